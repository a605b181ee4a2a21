"""The quickstart's sentiment task, as JSON Lines files made of labelled film reviews; it knows no tokenizer.

Prompts are openings of IMDB reviews. Preference pairs are Rotten Tomatoes sentences: each was picked because it
sums its review up, so its label can be read off it, which of a window of an IMDB review it often cannot.

Every choice (which file a review goes to, how long an opening is) is read off a sha256 of the review's own cleaned
text, so the files are the same bytes on every machine, and a review keeps its place when others come or go. A
review serves one file only, so nothing leaks from the held-out files into training:

    share of reviews    IMDB                Rotten Tomatoes
    [.00, .04)          prompts-heldout     preferences-heldout
    [.04, .10)          prompts             preferences-heldout
    [.10, 1.0)          prompts             preferences
"""

import csv
import hashlib
import html
import json
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from meshift.errors import DataError

RECIPE_VERSION = 3
FILES = ("preferences", "preferences-heldout", "prompts", "prompts-heldout")
IMDB, ROTTEN_TOMATOES = "imdb", "rotten_tomatoes"

NUM_ROWS = {"preferences": 3400, "preferences-heldout": 300, "prompts": 8000, "prompts-heldout": 256}
PROMPT_WORDS = (6, 10)
SENTENCE_WORDS = (8, 32)

BETWEEN_SENTENCES = re.compile(r"(?<=[.!?])[\"')]*\s+")
# Curly quotes and dashes, in Unicode and in what Windows-1252 becomes when it is read as Latin-1.
TYPOGRAPHY = str.maketrans(
    {c: plain for cs, plain in (("‘’`´\x91\x92", "'"), ("“”\x93\x94", '"'), ("–—\x96\x97", "-")) for c in cs}
    | dict.fromkeys("…\x85", "...")
)
CONTROL = re.compile(r"[\x00-\x1f\x7f-\xa0]")


@dataclass(frozen=True, kw_only=True)
class Review:
    """One labelled review. Example: `Review(text="A joy.", positive=True, source="rotten_tomatoes")`."""

    text: str
    positive: bool
    source: str

    def draw(self, what: str, num_choices: int) -> int:
        """A number in [0, num_choices), uniform over reviews, always the same; `what` names the decision."""
        digest = hashlib.sha256(f"{what}\n{self.text}".encode()).digest()
        return int.from_bytes(digest[:8], "big") % num_choices


def write_sentiment_files(source: Path, folder: Path) -> None:
    """Write `<name>.jsonl` for each of FILES into `folder`, from the CSV `source` (text, label, source).

    Rows: `{"prompt", "source"}`, or `{"chosen", "rejected", "source"}` with a positive and a negative text of
    equally many words. Raises DataError naming the line of a row that cannot be read.
    """
    by_file = split_reviews(read_reviews(source))
    taken: set[str] = set()
    # Held-out rows come first, and no text appears twice anywhere, not even where two reviews open alike.
    for name in sorted(FILES, key=lambda name: not name.endswith("heldout")):
        make = prompt_rows if name.startswith("prompts") else preference_rows
        _write(folder / f"{name}.jsonl", make(by_file[name], NUM_ROWS[name], taken))


def read_reviews(path: Path) -> list[Review]:
    """The cleaned reviews of the CSV, sorted by text, without repeats and texts that carry both labels."""
    labels: dict[tuple[str, str], set[str]] = {}
    with path.open(encoding="utf-8", newline="") as file:
        reader = csv.DictReader(file)
        for row in reader:
            text, label, source = row.get("text"), row.get("label"), row.get("source")
            if not text or label not in ("0", "1") or source not in (IMDB, ROTTEN_TOMATOES):
                raise DataError(f"{path}:{reader.line_num}: not a review with text, label 0 or 1, and source.")
            labels.setdefault((clean(text, source), source), set()).add(label)
    return [
        Review(text=text, positive=found == {"1"}, source=source)
        for (text, source), found in sorted(labels.items())
        if len(found) == 1
    ]


def clean(text: str, source: str) -> str:
    """Text on one line: no HTML, plain quotes, single spaces; punctuation that stands apart is rejoined."""
    text = html.unescape(re.sub(r"</?[a-zA-Z][^<>]{0,40}>", " ", text))
    text = " ".join(CONTROL.sub(" ", text.translate(TYPOGRAPHY)).split())
    if source == ROTTEN_TOMATOES:
        text = re.sub(r" (n't|'(?:s|re|ve|ll|d|m)\b|[.,;:!?%)\]])", r"\1", text.replace(". . .", "..."))
        text = re.sub(r"([(\[]) ", r"\1", text)
        text = text[:1].upper() + text[1:]
    return text


def split_reviews(reviews: Iterable[Review]) -> dict[str, list[Review]]:
    """The reviews of each file, by the table in this module's docstring.

    Some reviews are edited copies of one another: one that shares a sentence of 8 words or more with an
    earlier one follows it into its file, and is left out when it follows two into different files.
    """
    by_file: dict[str, list[Review]] = {name: [] for name in FILES}
    home: dict[str, str] = {}
    for review in reviews:
        sentences = [text for text in BETWEEN_SENTENCES.split(review.text.lower()) if text.count(" ") >= 7]
        followed = {home[text] for text in sentences if text in home} or {_file_of(review)}
        if len(followed) == 1:
            (name,) = followed
            by_file[name].append(review)
            home.update(dict.fromkeys(sentences, name))
    return by_file


def prompt_rows(reviews: Sequence[Review], num_rows: int, taken: set[str]) -> Iterator[dict[str, str]]:
    """Openings of 6 to 10 words, in random order; those in `taken` are passed over, those used join it."""
    num_left = num_rows
    for review in _shuffled(reviews, "prompt order"):
        words = review.text.split()
        opening = " ".join(words[: _between(review, "prompt words", PROMPT_WORDS)])
        if num_left and len(words) > PROMPT_WORDS[1] and _claim(taken, opening):
            num_left -= 1
            yield {"prompt": opening, "source": review.source}


def preference_rows(reviews: Sequence[Review], num_rows: int, taken: set[str]) -> list[dict[str, str]]:
    """Pairs of a positive and a negative sentence of one number of words, in random order."""
    rows = _pairs(_sentences(reviews), num_rows, taken)
    return sorted(rows, key=lambda row: hashlib.sha256(row["chosen"].encode()).digest())


def _file_of(review: Review) -> str:
    share = review.draw("file", 100)
    if review.source == ROTTEN_TOMATOES:
        return "preferences-heldout" if share < 10 else "preferences"
    return "prompts-heldout" if share < 4 else "prompts"


def _sentences(reviews: Sequence[Review]) -> list[tuple[Review, list[str]]]:
    """The sentences' words, whole up to the longest length: cut short, many would lose their point."""
    split = ((review, review.text.split()[: SENTENCE_WORDS[1]]) for review in reviews)
    return [(review, words) for review, words in split if len(words) >= SENTENCE_WORDS[0]]


def _pairs(texts: Sequence[tuple[Review, list[str]]], num_rows: int, taken: set[str]) -> Iterator[dict[str, str]]:
    """Pair positives with negatives of (nearly) the same length, both cut to the shorter one.

    A subset of each label is drawn first, then both are sorted by length, so partners hardly need cutting.
    """
    sides: dict[bool, list[tuple[Review, list[str]]]] = {True: [], False: []}
    for review, words in sorted(texts, key=lambda text: text[0].draw("pair order", 1 << 62)):
        if _claim(taken, " ".join(words)):
            sides[review.positive].append((review, words))
    num_pairs = min(num_rows, len(sides[True]), len(sides[False]))
    by_length = [sorted(sides[positive][:num_pairs], key=lambda text: len(text[1])) for positive in (True, False)]
    for (review, chosen), (_, rejected) in zip(*by_length, strict=True):
        num_words = min(len(chosen), len(rejected))
        yield {
            "chosen": " ".join(chosen[:num_words]),
            "rejected": " ".join(rejected[:num_words]),
            "source": review.source,
        }


def _between(review: Review, what: str, bounds: tuple[int, int]) -> int:
    return bounds[0] + review.draw(what, bounds[1] - bounds[0] + 1)


def _shuffled(reviews: Iterable[Review], what: str) -> list[Review]:
    return sorted(reviews, key=lambda review: review.draw(what, 1 << 62))


def _claim(taken: set[str], text: str) -> bool:
    """Whether `text` is new, whatever its case; it is not from now on."""
    key = text.lower()
    if key in taken:
        return False
    taken.add(key)
    return True


def _write(path: Path, rows: Iterable[dict[str, str]]) -> None:
    with path.open("w", encoding="utf-8", newline="\n") as file:
        file.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
