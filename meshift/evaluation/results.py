"""What an evaluation found, as files: `results.json` and `scores.jsonl`.

It knows nothing of how anything was scored.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from meshift.errors import InputError
from meshift.evaluation.estimators import CONFIDENCE, Estimate
from meshift.evaluation.saved import write_lines, write_text

SCORES, RESULTS = "scores.jsonl", "results.json"


@dataclass(frozen=True, kw_only=True)
class Results:
    """Estimates by name, and of every completion what it got, in the order of the questions."""

    metrics: Mapping[str, Estimate]
    rows: Sequence[Mapping[str, Any]]
    num_questions: int
    num_samples: int
    seconds: float
    notes: Sequence[str] = ()


def make_folder(folder: Path) -> None:
    """Where results go. Raises `InputError` where that can be no folder."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"--output {folder} cannot be made ({error.strerror}); name another folder") from None


def write_results(folder: Path, asked: Mapping[str, Any], results: Results) -> dict[str, Any]:
    """Both files; gives what stands in `results.json`. `asked` stands there first. Raises `SaveError`."""
    write_lines(folder / SCORES, results.rows)
    content = {
        **asked,
        "num_questions": results.num_questions,
        "num_completions": results.num_samples,
        "metrics": {name: estimate.to_json() for name, estimate in results.metrics.items()},
        "confidence": CONFIDENCE,
        "seconds": round(results.seconds, 3),
        "notes": [*results.notes],
    }
    write_text(folder / RESULTS, json.dumps(content, indent=2, ensure_ascii=False) + "\n")
    return content
