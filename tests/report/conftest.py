"""Runs as folders and as data, made of series that a test names."""

import json
from pathlib import Path

import pytest

from meshift.report.run_data import RunData
from meshift.report.series import Series


@pytest.fixture(scope="session")
def make_run():
    """`make_run({"loss": [3, 2, 1]}, config={...}, samples=[...])` -> RunData with steps from 1."""

    def make(metrics, config=None, samples=(), **fields):
        series = {key: Series(range(1, len(values) + 1), values) for key, values in metrics.items()}
        given = {
            "path": Path("runs/x"),
            "name": "x",
            "config": config or {},
            "environment": {},
            "metrics": series,
            "samples": list(samples),
            "num_steps": max((len(s) for s in series.values()), default=0),
            "has_model": True,
            "num_unreadable": 0,
        }
        return RunData(**(given | fields))

    return make


@pytest.fixture
def make_folder(tmp_path):
    """`make_folder(rows, samples=..., config=..., name="run")` -> the folder of a run."""

    def make(rows, samples=(), config="max_steps: 3\n", name="run"):
        folder = tmp_path / name
        folder.mkdir(parents=True)
        (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        (folder / "samples.jsonl").write_text("".join(json.dumps(row) + "\n" for row in samples))
        (folder / "config.yaml").write_text(config)
        return folder

    return make
