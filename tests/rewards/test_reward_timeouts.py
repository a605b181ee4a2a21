"""Reward functions with a time limit: in a process of their own, killed when they hang, leaving nothing behind."""

import os
import signal
import subprocess
import sys
import time

import pytest
import torch
from reward_batches import host_call, rollout, score_spec

from meshift.config.sections import RewardFunctionConfig
from meshift.errors import RewardError
from meshift.rewards.configured import load_functions

FILE = """import asyncio
import os
import random
import subprocess
import sys
import time

import numpy


def compute_score(data_source, solution_str, ground_truth, extra_info=None):
    if "f" in solution_str:
        time.sleep(600)
    return {"score": float(len(solution_str)), "acc": True}


def judge(completions, **columns):
    if any("f" in text for text in completions):
        time.sleep(600)
    return [float(len(completions))] * len(completions)


async def later(completions, **columns):
    if any("f" in text for text in completions):
        await asyncio.sleep(600)
    return [float(len(completions))] * len(completions)


async def blocking(data_source, solution_str, ground_truth, extra_info=None):
    if "f" in solution_str:
        time.sleep(600)  # where asyncio.sleep was meant: no other coroutine runs, nor a timeout
    return 1.0


async def waiting(data_source, solution_str, ground_truth, extra_info=None):
    if "f" in solution_str:
        await asyncio.sleep(600)
    return 1.0


def reward_func(queries, prompts, labels):
    print("no JSON at all", end="")
    os.write(1, b"nor this")
    sys.stdout.flush()
    os.system("echo nor what others print")
    assert sys.stdin.read() == ""
    return {"rewards": [float(len(label)) for label in labels], "extra_logs": {"process": os.getpid()}}


def logged(completions, trainer_state, log_metric, scale=1.0):
    log_metric("step", trainer_state.global_step)
    log_metric("max", trainer_state.max_steps)
    return [scale if c == "de" else None for c in completions]


def dying(completions, **columns):
    if any("f" in text for text in completions):
        os._exit(7)
    return [1.0] * len(completions)


def failing(completions, **columns):
    return [{"de": 1.0}[text] for text in completions]


def catching(completions, **columns):
    while True:
        try:
            time.sleep(600)
        except BaseException:
            pass


def drawing(completions):
    return [random.random() + float(numpy.random.rand()) for _ in completions]


def drawing_one(data_source, solution_str, ground_truth, extra_info=None):
    return random.random()


def leaving(completions):
    child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
    with open(os.environ["CHILD_FILE"], "w") as file:
        file.write(str(child.pid))
    time.sleep(600)


def slow_together(completions, **columns):
    time.sleep(0.0 if len(completions) == 1 else 600)
    return [1.0]
"""
QUICK = 120.0  # for what is expected to answer: the machine may be busy
HANG = 1.0
BATCH = {"prompts": ["a"] * 3, "completions": ["de", "fga", "dc"], "answer": ["x", "", "yz"]}


@pytest.fixture(scope="module")
def functions_file(tmp_path_factory):
    path = tmp_path_factory.mktemp("rewards") / "timed_rewards.py"
    path.write_text(FILE, encoding="utf-8")
    return path


@pytest.mark.parametrize(
    ("name", "scores"),
    [
        ("compute_score", [2.0, 0.0, 2.0]),
        ("judge", [2.0, 0.0, 2.0]),
        ("later", [2.0, 0.0, 2.0]),
        ("blocking", [1.0, 0.0, 1.0]),
        ("waiting", [1.0, 0.0, 1.0]),
    ],
)
def test_a_function_that_hangs_on_a_sample_is_passed_over_or_stops_the_run(functions_file, name, scores):
    keys = {"timeout_s": HANG, "batch": rollout(**BATCH)}
    skipped, metrics = score_spec(f"{functions_file}:{name}", on_error="skip", **keys)
    assert skipped == scores
    assert metrics[f"reward/{name}/num_timeouts"] == 1
    assert metrics[f"reward/{name}/num_errors"] == 0
    sentence = (
        rf"{name} gave no answer within timeout_s = 1 on sample 1 \(data\.jsonl:2\), completion 'fga'; raise"
    )
    with pytest.raises(RewardError, match=sentence):
        score_spec(f"{functions_file}:{name}", **keys)


def test_a_function_that_catches_everything_is_killed_and_its_process_is_gone(functions_file):
    with pytest.raises(RewardError, match="catching gave no answer within timeout_s = 1 on sample 0"):
        score_spec(f"{functions_file}:catching", timeout_s=HANG)


def test_after_several_timeouts_in_a_step_the_rest_is_not_waited_for(functions_file):
    batch = rollout(prompts=["a"] * 30, completions=["f"] * 29 + ["d"], answer=[""] * 30)
    scores, metrics = score_spec(f"{functions_file}:compute_score", batch, on_error="skip", timeout_s=0.2)
    assert scores == [0.0] * 30
    assert metrics["reward/compute_score/num_timeouts"] == 5
    assert metrics["reward/compute_score/num_errors"] == 25


def test_a_batch_that_is_slow_only_as_a_whole_is_named_as_one(functions_file):
    with pytest.raises(
        RewardError, match="no answer within timeout_s = 1 on a batch of 3 samples; raise its timeout"
    ):
        score_spec(f"{functions_file}:slow_together", rollout(**BATCH), timeout_s=HANG)


def test_what_a_function_prints_does_not_disturb_and_its_process_lives_on(functions_file, capfd):
    batch = rollout(**BATCH)
    config = RewardFunctionConfig(function=f"{functions_file}:reward_func", timeout_s=QUICK)
    call = host_call(load_functions([config]), batch)
    first, second = call(batch), call(batch)
    assert first.batch["function_scores"].values.tolist() == [1.0, 0.0, 2.0]
    assert (
        first.metrics["reward/reward_func/process"] == second.metrics["reward/reward_func/process"] != os.getpid()
    )
    printed = capfd.readouterr()
    assert printed.out == ""
    assert "no JSON at all" in printed.err


def test_a_process_of_its_own_gets_and_gives_the_same_as_this_one(functions_file):
    batch = rollout(first=4)
    keys = {"batch": batch, "kwargs": {"scale": 2.5}}
    own = score_spec(f"{functions_file}:logged", timeout_s=QUICK, **keys)
    here = score_spec(f"{functions_file}:logged", **keys)
    assert own == here == ([2.5, 0.0], {"reward/logged": 2.5, "reward/logged/step": 2.0, "reward/logged/max": 0.0})


@pytest.mark.parametrize(
    ("name", "what"),
    [
        ("dying", "ended its process with exit code 7"),
        ("failing", r"raised KeyError: 'fga' \(.*timed_rewards\.py, line \d+\)"),
    ],
)
def test_what_goes_wrong_there_is_named_as_here(functions_file, name, what):
    with pytest.raises(RewardError, match=rf"{name} {what} on sample 1 \(data"):
        score_spec(f"{functions_file}:{name}", timeout_s=QUICK)
    assert score_spec(f"{functions_file}:{name}", timeout_s=QUICK, on_error="skip")[0] == [1.0, 0.0]


def test_a_column_that_is_no_json_is_named(functions_file):
    with pytest.raises(RewardError, match=r"judge has a timeout_s, .* cannot reach .*complex is not JSON"):
        score_spec(f"{functions_file}:judge", rollout(answer=[1j, 2j]), timeout_s=QUICK)


@pytest.mark.parametrize("end", ["return", "kill"])
def test_no_process_is_left_when_the_run_ends(functions_file, tmp_path, end):
    """A run that ends, and one that is killed, while the function is at work."""
    code = f"""
import sys, threading, time
sys.path.insert(0, {os.path.dirname(__file__)!r})
from meshift.rewards.worker import WorkerProcess
worker = WorkerProcess({f"{functions_file}:catching"!r}, 600.0)
ask = {{"calls": [{{"completions": []}}], "num_samples": 0}}
threading.Thread(target=worker.ask, args=(ask, 600.0), daemon=True).start()
while worker._process is None:
    time.sleep(0.01)
print(worker._process.pid, flush=True)
if {end == "kill"}:
    time.sleep(600)
"""
    program = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    child = int(program.stdout.readline())
    if end == "kill":
        program.send_signal(signal.SIGKILL)
    program.wait(timeout=QUICK)
    program.stdout.close()
    deadline = time.monotonic() + QUICK
    while _runs(child) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not _runs(child)


def _runs(pid):
    try:
        with open(f"/proc/{pid}/stat", encoding="utf-8") as stat:
            return stat.read().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


@pytest.mark.parametrize("name", ["drawing", "drawing_one"])
def test_numbers_that_a_process_draws_would_differ_when_the_run_is_repeated(functions_file, name):
    """The run seeds torch's generator at every step; a process that began later draws the same."""
    drawn = {}
    for seed in (1, 2, 1):
        torch.manual_seed(seed)
        scores, _ = score_spec(f"{functions_file}:{name}", rollout(**BATCH), timeout_s=QUICK)
        assert drawn.setdefault(seed, scores) == scores
        assert len(set(scores)) == 3
    assert drawn[1] != drawn[2]


def test_what_a_hung_function_has_started_would_live_on(functions_file, tmp_path, monkeypatch):
    monkeypatch.setenv("CHILD_FILE", str(tmp_path / "child"))
    with pytest.raises(RewardError, match="leaving"):
        score_spec(f"{functions_file}:leaving", timeout_s=3 * HANG)
    child = int((tmp_path / "child").read_text())
    deadline = time.monotonic() + QUICK
    while is_running(child):
        assert time.monotonic() < deadline, "the child of a killed function runs on"
        time.sleep(0.05)


def is_running(pid):
    """A zombie, which waits for whoever reaps orphans, is not."""
    try:
        with open(f"/proc/{pid}/stat", encoding="ascii") as file:
            return file.read().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False
