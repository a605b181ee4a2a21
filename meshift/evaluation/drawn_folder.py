"""The completions of an evaluation's folder: every one is kept when it is finished, and the same command goes on.

It knows nothing of models: how completions are drawn is a dictionary, which has to stay the same.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from meshift.errors import InputError, SaveError
from meshift.evaluation.saved import Saved, as_lines, saved_lines, write_text
from meshift.evaluation.tasks import Question

COMPLETIONS, DRAWING = "completions.jsonl", "drawing.json"


class DrawnFolder:
    """A folder that is made, or gone on with. `settings` say how its completions are drawn, by key.

    Raises `InputError` where it holds completions that were drawn otherwise, or nobody knows how.
    """

    def __init__(self, folder: Path, settings: Mapping[str, Any]) -> None:
        self.path = folder / COMPLETIONS
        self._kept: dict[tuple[str, int], Saved] = {}
        drawing = folder / DRAWING
        try:
            folder.mkdir(parents=True, exist_ok=True)
            if self.path.exists():
                self._check(drawing, settings)
                self._take_up()
            else:
                write_text(drawing, json.dumps(dict(settings), indent=2, ensure_ascii=False) + "\n")
        except OSError as error:
            raise InputError(f"--output {folder} cannot be used ({error.strerror}); name another folder") from None

    def _check(self, drawing: Path, settings: Mapping[str, Any]) -> None:
        advice = f"score these with --completions {self.path}, or name another --output"
        try:
            before = dict(json.loads(drawing.read_text(encoding="utf-8")))
        except (OSError, ValueError, TypeError):
            raise InputError(
                f"{self.path.parent} holds completions, and no {DRAWING} that says how they were drawn; {advice}"
            ) from None
        now = json.loads(json.dumps(settings))
        key = next((key for key in [*now, *before] if before.get(key) != now.get(key)), None)
        if key is not None:
            was, is_now = (f"{values.get(key)!r:.60}" for values in (before, now))
            raise InputError(
                f"{self.path.parent} holds completions that were drawn with {key} {was}, and it is {is_now} now; "
                f"{advice}"
            )

    def _take_up(self) -> None:
        """Read the finished ones; what follows the last line break is half a line of a run that was killed."""
        data = self.path.read_bytes()
        whole = data[: data.rfind(b"\n") + 1]
        if len(whole) < len(data):
            self.path.write_bytes(whole)
        self._kept = {(one.id, one.sample): one for one, _ in saved_lines(self.path)}

    def missing(
        self, questions: Sequence[Question], prompts: Sequence[Sequence[int]], num_samples: int
    ) -> list[tuple[int, int]]:
        """(question, sample) of those that are still to be drawn.

        Raises `InputError` where a finished one is of another prompt: the data or the tokenizer has changed.
        """
        left = []
        for i, (question, prompt) in enumerate(zip(questions, prompts, strict=True)):
            for j in range(num_samples):
                one = self._kept.get((question.id, j))
                if one is None:
                    left.append((i, j))
                elif list(one.prompt_ids) != list(prompt):
                    raise InputError(
                        f"{self.path} has a completion of {question.id!r}, whose prompt is another one now "
                        f"({question.where}); name another --output"
                    )
        return left

    def add(self, saved: Sequence[Saved]) -> None:
        """Keep these; they are in the file when this returns. Raises `SaveError`."""
        try:
            with self.path.open("ab") as file:
                file.write(as_lines(saved).encode("utf-8", errors="replace"))
        except OSError as error:
            raise SaveError(f"{self.path} cannot be written ({error.strerror}); make room, and repeat") from error
        self._kept.update(((one.id, one.sample), one) for one in saved)

    def finish(self, questions: Sequence[Question], num_samples: int) -> list[list[Saved]]:
        """The completions of all questions, which now stand in the file in this order, before any others."""
        found = [[self._kept[question.id, j] for j in range(num_samples)] for question in questions]
        first = {(one.id, one.sample): one for of_one in found for one in of_one}
        write_text(self.path, as_lines(list((first | self._kept).values())))
        return found

    @property
    def num_kept(self) -> int:
        """Completions in the file."""
        return len(self._kept)


def drawing_beside(completions: Path) -> dict[str, Any] | None:
    """How these completions were drawn, as the `drawing.json` of the evaluation that did says; None of other
    files, of which nothing is known. Raises `InputError` where it cannot be read."""
    drawing = completions.parent / DRAWING
    if completions.name != COMPLETIONS or not drawing.exists():
        return None
    try:
        return dict(json.loads(drawing.read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError) as error:
        raise InputError(
            f"{drawing} cannot be read ({error}); remove it, if you know who drew {completions}"
        ) from None


def check_drawn(path: Path, model: str, weights: Mapping[str, Sequence[int]]) -> None:
    """Raise `InputError` where another model than this, or the same before its `weights` changed, drew a file."""
    before = drawing_beside(path)
    if before is None or before.get("weights") == weights:
        return
    was = f"by {before.get('model')!r}"
    now = "whose weights have changed since" if before.get("model") == model else f"and --model is {model!r}"
    raise InputError(f"{path} was drawn {was}, {now}; give the model that drew, or draw anew")
