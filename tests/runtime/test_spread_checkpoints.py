"""A run over several processes that is broken off goes on, by any plan, and ends as one that was not."""

import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from broken_runs import KillerObserver, members
from safetensors.torch import load_file

from meshift.config.loading import dump_config
from meshift.errors import LostWorkerError
from meshift.runtime import planned_run
from meshift.runtime.launch.launcher import launch
from meshift.runtime.observer import SilentObserver
from meshift.runtime.ppo_run import run_ppo
from meshift.training.checkpoint import read_state

ROOT = Path(__file__).parents[2]
SMOOTH = {"learning_rate": 0.01, "adam_epsilon": 1e-3}  # Adam magnifies the rounding of a tiny gradient
PLAN = {
    "actor": {"generate": {"mesh": "0-2", "layout": "d3"}, "train": {"mesh": "0-2", "layout": "t3"}},
    "critic": {"train": {"mesh": "1-2", "layout": "d1t2p1"}},
    "reference": {"infer": {"mesh": "2,0", "layout": "d2t1p1"}},
}
OTHER = {
    "actor": {"generate": {"mesh": "1", "layout": "d1"}, "train": {"mesh": "0-1", "layout": "p2"}},
    "critic": {"train": {"mesh": "0-1", "layout": "d2"}},
}
SHARDED = {
    "actor": {"generate": {"mesh": "0-1", "layout": "d2"}, "train": {"mesh": "0-2", "layout": "d3t1p1s"}},
    "critic": {"train": {"mesh": "2,0", "layout": "d2t1p1s"}},
    "reference": {"infer": {"mesh": "1-2", "layout": "d2t1p1s"}},
}
MEMORY = {
    "reference": {"sync_ref_model": True, "ref_model_mixup_alpha": 0.3, "ref_model_sync_steps": 2},
    "ppo": {"num_mini_batches": 2, "value_norm": "ema", "adaptive_kl": True, "kl_target": 0.1, "kl_horizon": 20},
}


@pytest.fixture(scope="module")
def make_config(ppo_config_on_disk, actor_folder):
    def make(output_dir, **sections):
        actor = {"model_name_or_path": str(actor_folder), "logits_chunk": 5, **SMOOTH}
        defaults = {"actor": actor, "critic": SMOOTH, "max_steps": 4, "save_steps": 1, "save_total_limit": None}
        return ppo_config_on_disk(output_dir, **defaults | MEMORY | sections)

    return make


def final_weights(run):
    return {folder: load_file(run / folder / "model.safetensors") for folder in ("final", "final_critic")}


def same_bits(one, other):
    for folder, weights in final_weights(one).items():
        for name, weight in final_weights(other)[folder].items():
            assert weights[name].equal(weight), f"{folder}: {name}"


def close(one, other):
    for folder, weights in final_weights(one).items():
        for name, weight in final_weights(other)[folder].items():
            torch.testing.assert_close(weights[name], weight, atol=5e-5, rtol=1e-3)


@pytest.fixture(scope="module")
def unbroken(make_config, tmp_path_factory):
    """`unbroken(dtype="bfloat16")` -> the run by `PLAN`, from its first step to its last; each made once."""
    runs = {}

    def run(dtype="bfloat16"):
        if dtype not in runs:
            runs[dtype] = tmp_path_factory.mktemp("unbroken") / "run"
            run_ppo(make_config(runs[dtype], plan=PLAN, dtype=dtype), SilentObserver())
        return runs[dtype]

    return run


@pytest.fixture(scope="module")
def alone(make_config, tmp_path_factory):
    folder = tmp_path_factory.mktemp("alone") / "run"
    run_ppo(make_config(folder), SilentObserver())
    return folder


def test_what_a_run_carries_from_step_to_step_would_be_other_than_in_one_process(unbroken, alone):
    spread = unbroken("float32")
    close(spread, alone)
    for role in ("actor", "critic", "reference"):
        one, other = (read_state(run / "checkpoint-3" / role) for run in (spread, alone))
        assert one.values == other.values
        assert set(one.tensors) == set(other.tensors)
        assert one.tensors
        for name, expected in other.tensors.items():
            torch.testing.assert_close(one.tensors[name], expected, atol=5e-5, rtol=1e-3)


@pytest.mark.parametrize(
    ("call", "dtype"),
    [
        ("train_actor", "bfloat16"),
        pytest.param("train_actor", "float32", marks=pytest.mark.slow),
        pytest.param("rollout", "bfloat16", marks=pytest.mark.slow),
        pytest.param("rollout", "float32", marks=pytest.mark.slow),
    ],
)
def test_a_killed_process_would_change_the_final_weights(make_config, unbroken, tmp_path, call, dtype):
    killer = KillerObserver(2, call)
    run_ppo(make_config(tmp_path / "run", plan=PLAN, dtype=dtype), killer)
    assert killer.done
    assert any("was killed by SIGKILL" in text and "starting again" in text for text in killer.messages)
    assert any("going on after step 2" in text for text in killer.messages)
    same_bits(tmp_path / "run", unbroken(dtype))
    assert not members()


def test_a_stopped_process_would_stop_the_run(make_config, unbroken, tmp_path):
    killer = KillerObserver(1, "rollout", signal.SIGSTOP)
    sections = {"dtype": "bfloat16", "launch": {"heartbeat_timeout_s": 3}}
    run_ppo(make_config(tmp_path / "run", plan=PLAN, **sections), killer)
    assert any("not been heard for" in text and "stopped" in text for text in killer.messages)
    same_bits(tmp_path / "run", unbroken())
    assert "process 2" in (tmp_path / "run" / "hang_report.txt").read_text()


@pytest.mark.parametrize(
    ("first", "then"),
    [
        (PLAN, None),
        (None, PLAN),
        (PLAN, OTHER),
        (OTHER, PLAN),
        pytest.param(SHARDED, OTHER, marks=pytest.mark.slow),
        pytest.param(None, SHARDED, marks=pytest.mark.slow),
    ],
    ids=["one", "many", "to stages", "from stages", "sharded", "one-sharded"],
)
def test_another_plan_would_not_go_on_from_a_checkpoint(
    make_config, alone, unbroken, tmp_path, read_lines, first, then
):
    run = tmp_path / "run"
    if first in (None, PLAN):  # as it stood after two steps
        shutil.copytree(alone if first is None else unbroken("float32"), run)
        for folder in ("final", "final_critic", "checkpoint-3"):
            shutil.rmtree(run / folder)
        (run / "LATEST").write_text("checkpoint-2\n")
    else:
        with pytest.raises(LostWorkerError):
            run_ppo(make_config(run, plan=first, launch={"max_restarts": 0}), KillerObserver(2, "advantages"))
    before = read_state(run / "checkpoint-2" / "actor").tensors
    listener = KillerObserver(-1, "none")
    config = make_config(run, resume=True, **({} if then is None else {"plan": then}))
    run_ppo(config, listener)
    assert any("`plan` is another" in text for text in listener.messages)
    close(run, alone)
    steps = [row["training/global_step"] for row in read_lines(run / "metrics.jsonl")]
    assert steps == [1, 2, 3, 4]
    assert before


def test_a_reference_that_moves_without_process_0_would_not_go_on(make_config, alone, tmp_path):
    plan = {
        "actor": {"train": {"mesh": "1", "layout": "d1"}},
        "critic": {"train": {"mesh": "0", "layout": "d1"}},
        "reference": {"infer": {"mesh": "2", "layout": "d1"}},
    }
    killer = KillerObserver(3, "values")
    run_ppo(make_config(tmp_path / "run", plan=plan), killer)
    assert killer.done
    assert any("going on after step 3" in text for text in killer.messages)
    close(tmp_path / "run", alone)


def test_the_report_of_a_hang_would_be_gone_with_the_run_that_hung(make_config, tmp_path):
    killer = KillerObserver(0, "rollout", signal.SIGSTOP)
    sections = {"save_steps": None, "max_steps": 1, "launch": {"heartbeat_timeout_s": 3}}
    run_ppo(make_config(tmp_path / "run", plan=PLAN, **sections), killer)
    assert killer.done
    assert "process 2" in (tmp_path / "run" / "hang_report.txt").read_text()


def test_a_process_that_is_lost_when_all_is_done_would_fail_the_run(make_config, tmp_path, monkeypatch):
    gone = []

    def lost_at_the_end(*arguments):
        found = launch(*arguments)
        if not gone:
            gone.append(found)
            raise LostWorkerError("process 1 of the run was killed by SIGKILL")
        return found

    monkeypatch.setattr(planned_run, "launch", lost_at_the_end)
    killer = KillerObserver(-1, "none")
    sections = {"max_steps": 1, "launch": {"hang_timeout_s": 20, "max_restarts": 1}}
    result = run_ppo(make_config(tmp_path / "run", plan=PLAN, **sections), killer)
    assert result.final_dir.is_dir()
    assert any("is finished" in text for text in killer.messages)


@pytest.mark.parametrize("to", [pytest.param("one", marks=pytest.mark.slow), "the group"])
def test_sigterm_would_lose_a_run_over_several_processes(make_config, unbroken, tmp_path, to):
    run, file = tmp_path / "run", tmp_path / "config.yaml"
    config = make_config(run, plan=PLAN, save_steps=None, dtype="bfloat16")
    file.write_text(dump_config(config), encoding="utf-8")
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    words = [sys.executable, "-m", "meshift.cli.main", "ppo", "--config", str(file)]
    with subprocess.Popen(
        words, env=environment, stderr=subprocess.PIPE, text=True, start_new_session=True
    ) as process:
        deadline = time.monotonic() + 120
        while not (run / "metrics.jsonl").is_file() or not (run / "metrics.jsonl").read_bytes():
            assert time.monotonic() < deadline
            assert process.poll() is None, process.stderr.read()
            time.sleep(0.02)
        if to == "one":
            process.terminate()
        else:  # as GNU timeout, systemd and Slurm do
            os.killpg(process.pid, signal.SIGTERM)
        said = process.stderr.read()
        code = process.wait(60)
    if code == 0:
        pytest.skip("the run was over before SIGTERM came")
    assert code == 143, said
    assert "--resume goes on from" in said
    run_ppo(config.model_copy(update={"resume": True}), SilentObserver())
    same_bits(run, unbroken())
