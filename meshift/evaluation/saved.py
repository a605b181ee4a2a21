"""Completions in a JSON Lines file, so that they can be scored again, elsewhere, or beside another model's.

It knows nothing of models or scores.
"""

from __future__ import annotations

import json
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


def write_completions(path: Path, saved: Sequence[Saved]) -> None:
    """A line each. Raises `SaveError`."""
    write_lines(path, [asdict(one) for one in saved])


def write_lines(path: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    """JSON Lines. Raises `SaveError`."""
    try:
        path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    except OSError as error:
        raise SaveError(
            f"{path} cannot be written ({error.strerror}); make room, or name another folder"
        ) from error


def read_completions(path: str | Path, questions: Sequence[Question]) -> list[list[Saved]]:
    """The completions of each question, in the order of the questions; samples in the order of the file.

    HumanEval's own files (`task_id`, `completion`) are read too. Raises `DataError` for a line that is none, for
    an id that no question has, and where a question has none.
    """
    found: dict[str, list[Saved]] = {question.id: [] for question in questions}
    for row in iter_rows(path):
        one = _saved(row)
        if one.id not in found:
            raise DataError(
                f"{row.where}: no question of the data has the id {one.id!r}; give the file that was completed."
            )
        found[one.id].append(one)
    missing = next((name for name, completions in found.items() if not completions), None)
    if missing is not None:
        raise DataError(f"{path} has no completion of {missing!r}; give --limit as it was generated with, or all.")
    return [found[question.id] for question in questions]


def _saved(row: Row) -> Saved:
    values = row.values
    name = values.get("id", values.get("task_id"))
    if not isinstance(name, str | int) or not isinstance(values.get("completion"), str):
        raise DataError(f"{row.where}: a line of completions has the texts 'id' and 'completion': write both.")
    ids = [values.get(key) or [] for key in ("prompt_ids", "completion_ids")]
    if not all(isinstance(one, list) and all(isinstance(i, int) for i in one) for one in ids):
        raise DataError(f"{row.where}: 'prompt_ids' and 'completion_ids' are lists of token ids: correct them.")
    return Saved(
        id=str(name),
        sample=int(values.get("sample") or 0),
        completion=values["completion"],
        truncated=values.get("truncated") is True,
        prompt_ids=ids[0],
        completion_ids=ids[1],
    )
