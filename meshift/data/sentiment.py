"""The quickstart's sentiment task, as JSON Lines files made of labelled film reviews; it knows no tokenizer.

Every choice (which file a review goes to, where a snippet begins, how long it is) is read off a sha256 of the
review's own cleaned text, so the files are the same bytes on every machine, and a review keeps its place when
others come or go. A review serves one file only, so nothing leaks from the held-out files into training:

    share of reviews    file
    [.00, .04)          prompts-heldout
    [.04, .10)          preferences-heldout
    [.10, .40)          prompts
    [.40, .50)          demonstrations
    [.50, 1.0)          preferences

Only the IMDB reviews are used: single sentences of critics, which the source also has, teach a reward model that
praise is vivid rather than that it praises.
"""

import csv
import hashlib
import html
import json
import math
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from meshift.errors import DataError

RECIPE_VERSION = 7
FILES = ("demonstrations", "preferences", "preferences-heldout", "prompts", "prompts-heldout")
SOURCES = ("imdb", "rotten_tomatoes")
IMDB = SOURCES[0]

NUM_ROWS = {
    "demonstrations": 2000,
    "preferences": 6000,
    "preferences-heldout": 300,
    "prompts": 7000,
    "prompts-heldout": 256,
}
PROMPT_WORDS = (6, 10)
SNIPPET_WORDS = (8, 32)
DEMONSTRATION_WORDS = 40

# A snippet with a grade in it ("3/10", "four stars") would teach a policy to write grades instead of reviews.
GRADE = re.compile(r"\d\s*/\s*\d|\bout of\b|\bstars?\b|\b(?:grade|rating|rated|score)\b", re.IGNORECASE)
# The end of a word of three letters or more, so that "Dr." and "B." end no sentence.
SENTENCE_END = re.compile(r"(?:\w{3}|[)\"'])[.!?]+[\"')]*$")
BETWEEN_SENTENCES = re.compile(r"(?<=[.!?])[\"')]*\s+")
# Curly quotes and dashes, in Unicode and in what Windows-1252 becomes when it is read as Latin-1.
TYPOGRAPHY = str.maketrans(
    {c: plain for cs, plain in (("‘’`´\x91\x92", "'"), ("“”\x93\x94", '"'), ("–—\x96\x97", "-")) for c in cs}
    | dict.fromkeys("…\x85", "...")
)
CONTROL = re.compile(r"[\x00-\x1f\x7f-\xa0]")


@dataclass(frozen=True, kw_only=True)
class Review:
    """One labelled review. Example: `Review(text="A joy.", positive=True)`."""

    text: str
    positive: bool

    def draw(self, what: str, num_choices: int) -> int:
        """A number in [0, num_choices), uniform over reviews, always the same; `what` names the decision."""
        digest = hashlib.sha256(f"{what}\n{self.text}".encode()).digest()
        return int.from_bytes(digest[:8], "big") % num_choices


def write_sentiment_files(source: Path, folder: Path) -> None:
    """Write `<name>.jsonl` for each of FILES into `folder`, from the CSV `source` (text, label, source).

    Rows: `{"prompt"}`; `{"text"}`; `{"chosen", "rejected"}`, a positive and a negative text of equally many words.
    Raises DataError naming the line of a row that cannot be read.
    """
    by_file = split_reviews(read_reviews(source))
    opinions = word_opinions(by_file["preferences"])
    taken: set[str] = set()
    # Held-out rows come first, and no text appears twice anywhere, not even where two reviews open alike.
    for name in sorted(FILES, key=lambda name: not name.endswith("heldout")):
        reviews, num_rows = by_file[name], NUM_ROWS[name]
        if name.startswith("prompts"):
            _write(folder / f"{name}.jsonl", prompt_rows(reviews, num_rows, taken))
        elif name.startswith("preferences"):
            _write(folder / f"{name}.jsonl", preference_rows(reviews, num_rows, taken, opinions))
        else:
            _write(folder / f"{name}.jsonl", demonstration_rows(reviews, num_rows))


def read_reviews(path: Path) -> list[Review]:
    """The CSV's IMDB reviews, cleaned, sorted by text, without repeats and texts that carry both labels."""
    labels: dict[str, set[str]] = {}
    with path.open(encoding="utf-8", newline="") as file:
        reader = csv.DictReader(file)
        for row in reader:
            text, label, source = row.get("text"), row.get("label"), row.get("source")
            if not text or label not in ("0", "1") or source not in SOURCES:
                raise DataError(f"{path}:{reader.line_num}: not a review with text, label 0 or 1, and source.")
            if source == IMDB:
                labels.setdefault(clean(text), set()).add(label)
    return [
        Review(text=text, positive=found == {"1"}) for text, found in sorted(labels.items()) if len(found) == 1
    ]


def clean(text: str) -> str:
    """Text on one line: no HTML, plain quotes, single spaces."""
    text = html.unescape(re.sub(r"</?[a-zA-Z][^<>]{0,40}>", " ", text))
    return " ".join(CONTROL.sub(" ", text.translate(TYPOGRAPHY)).split())


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
            yield {"prompt": opening}


def demonstration_rows(reviews: Sequence[Review], num_rows: int) -> Iterator[dict[str, str]]:
    """How reviews begin, whatever they say: their first 40 words, in random order."""
    long = (review for review in reviews if len(review.text.split()) >= DEMONSTRATION_WORDS)
    for review in list(_shuffled(long, "demonstration order"))[:num_rows]:
        yield {"text": " ".join(review.text.split()[:DEMONSTRATION_WORDS])}


def preference_rows(
    reviews: Sequence[Review], num_rows: int, taken: set[str], opinions: Mapping[str, float]
) -> list[dict[str, str]]:
    """Pairs of a positive and a negative text of one number of words, in random order."""
    rows = _pairs(_snippets(reviews, opinions), num_rows, taken)
    return sorted(rows, key=lambda row: hashlib.sha256(row["chosen"].encode()).digest())


def word_opinions(reviews: Iterable[Review]) -> dict[str, float]:
    """How surely each frequent word tells the label of its review: log-odds over their standard error (Wald's z).

    Positive where the word speaks for a positive label. By log-odds alone, rare words of a film's subject
    ("loneliness", "astaire") would weigh more than common words of judgement ("great": 18, "worst": -23). Words
    in fewer than 20 reviews have no opinion.
    """
    counts: dict[bool, Counter[str]] = {True: Counter(), False: Counter()}
    for review in reviews:
        counts[review.positive].update(set(_words(review.text)))
    frequent = (word for word, n in (counts[True] + counts[False]).items() if n >= 20)
    sides = ((word, counts[True][word] + 1, counts[False][word] + 1) for word in frequent)
    return {word: math.log(p / n) / math.sqrt(1 / p + 1 / n) for word, p, n in sides}


def snippet(review: Review, num_words: int, opinions: Mapping[str, float]) -> list[str] | None:
    """`num_words` words from the sentence start where words lean most to one side, whichever side that is.

    Most windows of a long review do not show its label; the review's own label has no part in the choice. None
    when no place fits.
    """
    words = review.text.split()
    ends = (i for i, word in enumerate(words) if word[-1] in "!.?\"')" and SENTENCE_END.search(word))
    choices = _fitting(words, [0, *(end + 1 for end in ends)], num_words)
    if not choices:
        return None
    leaning = [abs(sum(opinions.get(w, 0.0) for w in _words(" ".join(words[i : i + num_words])))) for i in choices]
    start = choices[leaning.index(max(leaning))]
    return words[start : start + num_words]


def _words(text: str) -> list[str]:
    return re.findall(r"[a-z']+", text.lower())


def _fitting(words: list[str], starts: list[int], num_words: int) -> list[int]:
    windows = ((start, words[start : start + num_words]) for start in starts)
    return [i for i, window in windows if len(window) == num_words and not GRADE.search(" ".join(window))]


def _file_of(review: Review) -> str:
    share = review.draw("file", 100)
    if share < 4:
        return "prompts-heldout"
    if share < 10:
        return "preferences-heldout"
    if share < 40:
        return "prompts"
    return "demonstrations" if share < 50 else "preferences"


def _snippets(reviews: Sequence[Review], opinions: Mapping[str, float]) -> list[tuple[Review, list[str]]]:
    """A window of each review; how many words it has is drawn."""
    lengths = ((review, _between(review, "snippet words", SNIPPET_WORDS)) for review in reviews)
    found = ((review, snippet(review, num_words, opinions)) for review, num_words in lengths)
    return [(review, words) for review, words in found if words is not None]


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
    for (_, chosen), (_, rejected) in zip(*by_length, strict=True):
        num_words = min(len(chosen), len(rejected))
        yield {
            "chosen": " ".join(chosen[:num_words]),
            "rejected": " ".join(rejected[:num_words]),
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
