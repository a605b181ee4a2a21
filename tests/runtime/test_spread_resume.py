"""Runs of other methods than PPO that are broken off go on, by any plan, and end as those that were not."""

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
from broken_runs import KillerObserver, Notes, changed
from spread_cases import CASES, check_weights, placed, run

from meshift.config.loading import dump_config

ROOT = Path(__file__).parents[2]
OTHER = {"actor": placed(generate="d2@0-1", train="d1@1"), "reference": placed(infer="t2@1,0")}
MOVES = {
    "grpo": (CASES["grpo"].plan, OTHER),
    "dapo": (None, CASES["dapo"].plan),
    "grpo-ahead": (CASES["grpo-ahead"].plan, None),
    "dpo": (CASES["dpo"].plan, None),
    "dpo-read-once": (CASES["dpo-read-once"].plan, {"actor": placed(train="t2@1,0")}),
}


@pytest.mark.parametrize("name", MOVES)
def test_another_plan_would_not_go_on_from_a_checkpoint(make_case, tmp_path, read_lines, name):
    first, then = ({} if plan is None else {"plan": plan} for plan in MOVES[name])
    kept = {"max_steps": 5, "save_steps": 1, "save_total_limit": None}
    whole = run(make_case(CASES[name], tmp_path / "whole", **kept)).output_dir
    with pytest.raises(KeyboardInterrupt):
        run(make_case(CASES[name], tmp_path / "run", **kept, **first), Notes(3))
    listener = Notes()
    run(make_case(CASES[name], tmp_path / "run", **kept, **then, resume=True), listener)
    assert any("`plan` is another" in text for text in listener.notes)
    assert any("going on after step" in text for text in listener.notes)
    assert listener.steps[0] in (2, 3)
    check_weights(tmp_path / "run", whole)
    ours, theirs = (read_lines(folder / "metrics.jsonl") for folder in (tmp_path / "run", whole))
    assert [row["training/global_step"] for row in ours] == [1, 2, 3, 4, 5]
    for key in ("loss", "actor/pg_loss", "eval/loss", "sampling/num_rounds"):
        assert [row.get(key) for row in ours] == pytest.approx([row.get(key) for row in theirs], abs=1e-5)


@pytest.mark.parametrize(("name", "at"), [("dapo-apart", "reward_functions"), ("grpo-ahead", "train_actor")])
def test_a_process_that_is_killed_within_a_step_would_change_the_final_weights(make_case, tmp_path, name, at):
    """DAPO within its loop, and GRPO where one process draws and the others train."""
    case, kept = CASES[name], {"max_steps": 4, "save_steps": 1, "save_total_limit": None}
    for folder, observer in (("whole", Notes()), ("run", killer := KillerObserver(2, at))):
        run(make_case(case, tmp_path / folder, plan=case.plan, **kept), observer)
    assert killer.done
    assert any("starting again" in text for text in killer.messages)
    one, other = ((tmp_path / name / "final" / "model.safetensors").read_bytes() for name in ("whole", "run"))
    assert one == other


@pytest.mark.slow
@pytest.mark.parametrize("name", ["sft", "dapo"])
def test_sigterm_would_lose_a_run_of_another_method(make_case, tmp_path, name):
    case, length = CASES[name], 40
    whole = run(make_case(case, tmp_path / "whole", plan=case.plan, max_steps=length)).output_dir
    config, file = make_case(case, tmp_path / "run", plan=case.plan, max_steps=length), tmp_path / "config.yaml"
    file.write_text(dump_config(config), encoding="utf-8")
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    words = [sys.executable, "-m", "meshift.cli.main", name, "--config", str(file)]
    with subprocess.Popen(words, env=environment, stderr=subprocess.PIPE, text=True) as process:
        deadline = time.monotonic() + 120
        metrics = tmp_path / "run" / "metrics.jsonl"
        while not metrics.is_file() or not metrics.read_bytes():
            assert time.monotonic() < deadline
            assert process.poll() is None, process.stderr.read()
            time.sleep(0.02)
        process.terminate()
        said = process.stderr.read()
        assert process.wait(60) == 143, said
    assert "--resume goes on from" in said
    run(changed(config, resume=True))
    one, other = ((folder / "final" / "model.safetensors").read_bytes() for folder in (tmp_path / "run", whole))
    assert one == other
