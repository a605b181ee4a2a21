"""Completions in a JSON Lines file, so that they can be scored again, elsewhere, or beside another model's.

It knows nothing of models or scores.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from meshift.data.rows import Row, iter_rows
from meshift.errors import DataError, SaveError
from meshift.evaluation.tasks import Question


@dataclass(frozen=True, kw_only=True)
class Saved:
    """One completion of one question. Example: `Saved(id="HumanEval/0", sample=0, completion="    return 1")`.

    `completion` is what is scored, cut at stop strings. `prompt_ids` and `completion_ids` are the model's own
    tokens, empty where another program wrote the file. `truncated`: the limit of tokens cut it off.
    """

    id: str
    sample: int
    completion: str
    truncated: bool = False
    prompt_ids: Sequence[int] = field(default=())
    completion_ids: Sequence[int] = field(default=())


def as_lines(saved: Sequence[Saved]) -> str:
    """JSON Lines. HumanEval's name for an id, `task_id`, stands beside ours: its scorer reads the file."""
    rows = [{"task_id": one.id, **asdict(one)} for one in saved]
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)


def write_lines(path: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    """JSON Lines. Raises `SaveError`."""
    write_text(path, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))


def write_text(path: Path, text: str) -> None:
    """The whole file or, where it cannot be written, what stood there before. Raises `SaveError`."""
    unfinished = path.with_name(f".{path.name}.new")
    try:
        unfinished.write_bytes(text.encode("utf-8", errors="replace"))  # half a surrogate pair is no text
        unfinished.replace(path)
    except OSError as error:
        raise SaveError(
            f"{path} cannot be written ({error.strerror}); make room, or name another folder"
        ) from error


def read_completions(
    path: str | Path, questions: Sequence[Question], *, all_questions: bool = True
) -> list[list[Saved]]:
    """The completions of each question, in the order of the questions; samples in the order of the file.

    HumanEval's own files (`task_id`, `completion`) are read too. Raises `DataError` for a line that is none, and
    where a question has none, or one sample twice; for an id that no question has too, if these are
    `all_questions` of the data.
    """
    found: dict[str, list[Saved]] = {question.id: [] for question in questions}
    seen: set[tuple[str, int]] = set()
    for one, where in saved_lines(path):
        if (one.id, one.sample) in seen:
            raise DataError(f"{where}: a line before this has sample {one.sample} of {one.id!r}; leave one out.")
        seen.add((one.id, one.sample))
        if one.id in found:
            found[one.id].append(one)
        elif all_questions:
            raise DataError(
                f"{where}: no question of the data has the id {one.id!r}; give the data that was completed."
            )
    missing = next((name for name, completions in found.items() if not completions), None)
    if missing is not None:
        raise DataError(
            f"{path} has no completion of {missing!r}; give --limit as these were drawn with, or complete all."
        )
    return [found[question.id] for question in questions]


def saved_lines(path: str | Path) -> list[tuple[Saved, str]]:
    """Every completion of a file, and the line it stands on. Raises `DataError` for a line that is none."""
    numbers: Counter[str] = Counter()
    found = []
    for row in iter_rows(path):
        one = _saved(row, numbers)
        numbers[one.id] += 1
        found.append((one, row.where))
    return found


def _saved(row: Row, numbers: Mapping[str, int]) -> Saved:
    """Samples without a number are counted, of each question from 0."""
    values = row.values
    name = values.get("id", values.get("task_id"))
    if not isinstance(name, str | int) or not isinstance(values.get("completion"), str):
        raise DataError(f"{row.where}: a line of completions has the texts 'id' and 'completion': write both.")
    ids = [values.get(key) or [] for key in ("prompt_ids", "completion_ids")]
    if not all(isinstance(one, list) and all(isinstance(i, int) for i in one) for one in ids):
        raise DataError(f"{row.where}: 'prompt_ids' and 'completion_ids' are lists of token ids: correct them.")
    sample = values.get("sample", numbers[str(name)])
    if not isinstance(sample, int) or isinstance(sample, bool) or sample < 0:
        raise DataError(f"{row.where}: 'sample' is {sample!r}: write the number of the sample, from 0 on.")
    return Saved(
        id=str(name),
        sample=sample,
        completion=values["completion"],
        truncated=values.get("truncated") is True,
        prompt_ids=ids[0],
        completion_ids=ids[1],
    )
