"""Runs whose completions are drawn ahead: broken off they end as they would have; what cannot be is refused."""

import json

import pytest
from broken_runs import Notes
from spread_cases import CASES, POLICY, Case, run

from meshift.errors import ConfigError

KEPT = {"max_steps": 5, "save_steps": 1, "save_total_limit": None}
LORA = {"actor": {"lora": {"rank": 3, "alpha": 6, "save_merged": True}}}


def of_training(row):
    return {key: value for key, value in row.items() if not key.startswith(("timing_s/", "perf/"))}


@pytest.mark.parametrize(
    "name", ["grpo-ahead", *(pytest.param(name, marks=pytest.mark.slow) for name in ("dapo-ahead", "ppo-ahead"))]
)
def test_a_run_that_goes_on_would_draw_again_or_lose_what_waited(make_case, tmp_path, read_lines, name):
    case = CASES[name]
    whole = run(make_case(case, tmp_path / "whole", **KEPT)).output_dir
    with pytest.raises(KeyboardInterrupt):
        run(make_case(case, tmp_path / "run", **KEPT), Notes(3))
    ahead = case.sections["max_staleness"]
    kept = sorted(path.name for path in (tmp_path / "run" / "checkpoint-2" / "ahead").iterdir())
    assert kept == [*(f"completions-{step}.safetensors" for step in range(2, 2 + ahead)), "state.json"]
    run(make_case(case, tmp_path / "run", **KEPT, resume=True))
    ours, theirs = (read_lines(folder / "metrics.jsonl") for folder in (tmp_path / "run", whole))
    assert [of_training(row) for row in ours] == [of_training(row) for row in theirs]
    assert [row["off_policy/staleness_max"] for row in ours] == [min(step, ahead) for step in range(5)]
    one, other = ((folder / "samples.jsonl").read_bytes() for folder in (tmp_path / "run", whole))
    assert one == other
    one, other = ((f / "final" / "model.safetensors").read_bytes() for f in (tmp_path / "run", whole))
    assert one == other


def test_a_checkpoint_whose_completions_were_changed_would_be_gone_on_from(make_case, tmp_path):
    case = CASES["grpo-ahead"]
    with pytest.raises(KeyboardInterrupt):
        run(make_case(case, tmp_path / "run", **KEPT), Notes(3))
    (path,) = (tmp_path / "run" / "checkpoint-2" / "ahead").glob("*.safetensors")
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    listener = Notes()
    run(make_case(case, tmp_path / "run", **KEPT, resume=True), listener)
    assert any("is not as it was written" in note for note in listener.notes)
    with pytest.raises(ConfigError, match="`max_staleness` was 1"):
        run(make_case(case, tmp_path / "run", **KEPT, resume=True, max_staleness=0))


def test_a_longer_run_would_lack_completions_that_were_not_drawn(make_case, tmp_path):
    case, short = CASES["dapo-ahead"], {**KEPT, "max_steps": 4}
    with pytest.raises(KeyboardInterrupt):
        run(make_case(case, tmp_path / "run", **short), Notes(4))
    with pytest.raises(ConfigError, match=r"was to have 4 steps, and .*checkpoint-3 lacks completions"):
        run(make_case(case, tmp_path / "run", **{**KEPT, "max_steps": 6}, resume=True))


@pytest.mark.parametrize("method", ["raft", "online_dpo", "lora"])
def test_methods_without_a_ratio_and_adapters_are_drawn_ahead_too(make_case, tmp_path, read_lines, method):
    case = CASES["raft"] if method == "raft" else CASES["online_dpo"] if method == "online_dpo" else None
    if case is None:
        case = Case(POLICY["grpo"], {}, LORA)
    still = {"reference": {}} if method == "raft" else {}
    rows = read_lines(
        run(make_case(case, tmp_path / "run", max_staleness=1, max_steps=3, **still)).output_dir / "metrics.jsonl"
    )
    assert [row["off_policy/staleness_mean"] for row in rows] == [0.0, 1.0, 1.0]


def test_a_run_that_corrects_nothing_would_say_nothing(make_case, tmp_path):
    listener = Notes()
    case = Case(POLICY["gspo"], {}, {"gspo": {"num_mini_batches": 2}})
    run(make_case(case, tmp_path / "run", max_steps=1, max_staleness=1), listener)
    assert any("is not corrected" in note for note in listener.notes)
    assert json.loads((tmp_path / "run" / "metrics.jsonl").read_text())["off_policy/staleness_max"] == 0.0
