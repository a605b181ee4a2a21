"""Hostile programs: none gets out, none hangs the run, none passes."""

import contextlib
import os
import random
import signal
import socket
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import attack_table
import pytest
from hostile_bombs import BOMBS
from hostile_escapes import ESCAPES
from hostile_forgeries import FUNCTIONS, OUTPUTS

from meshift.rewards.code.judging import Judge
from meshift.rewards.code.problems import Problem
from meshift.rewards.sandbox.launching import best_wall
from meshift.rewards.sandbox.layers import LAYERS, LIMITS

MEMORY = 128 * 2**20
INTERPRETER = 64 * 2**20
OUTPUT = 2**18
TIMEOUT_S = 0.2
LONGEST_S = 2 * TIMEOUT_S + 1 + 5  # of one test, and what the machine's other work may add
HARMLESS = ("a hidden thread",)  # it ends with the program, often before it has written a thing


@pytest.fixture(scope="module")
def judge(protection):
    return Judge(
        layers=protection.layers, timeout_s=TIMEOUT_S, total_timeout_s=20, memory_bytes=MEMORY, output_bytes=OUTPUT
    )


def judge_all(sandbox, judge, work):
    """(problem, program) pairs -> verdicts and seconds."""

    def one(slot, item):
        started = time.monotonic()
        return judge.judge(slot, *item), time.monotonic() - started

    return sandbox.map(one, work)


def drawn():
    return random.SystemRandom().randrange(10**12, 10**13)


@pytest.fixture(scope="module")
def surroundings(tmp_path_factory):
    """What escapes are told of: a file, a port and a process of the run."""
    canary = tmp_path_factory.mktemp("canary") / "canary"
    canary.write_text("secret")
    with socket.create_server(("127.0.0.1", 0)) as listener:
        os.environ["MESHIFT_SECRET"] = "1"
        names = {"CANARY": str(canary), "PORT": listener.getsockname()[1], "RUN": os.getpid(), "PROJECT": __file__}
        yield "".join(f"{name} = {value!r}\n" for name, value in names.items()), canary, listener
        del os.environ["MESHIFT_SECRET"]


@pytest.fixture(scope="module")
def escapes(sandbox, judge, surroundings):
    told, canary, listener = surroundings
    problem = Problem(inputs=[("", "ESCAPED")])
    verdicts = judge_all(sandbox, judge, [(problem, told + escape.program) for escape in ESCAPES])
    listener.settimeout(0.01)
    with pytest.raises(TimeoutError):
        listener.accept()
    assert sorted(p.name for p in canary.parent.iterdir()) == ["canary"], "something was written beside the run"
    assert not Path("/dev/shm/meshift-escape").exists()
    return dict(zip([e.what for e in ESCAPES], verdicts, strict=True))


@pytest.mark.parametrize("what", [escape.what for escape in ESCAPES])
def test_no_program_gets_out(escapes, what):
    verdict, seconds = escapes[what]
    assert not verdict.passed
    assert verdict.num_run == 1
    assert seconds < LONGEST_S


@pytest.mark.parametrize("escape", [e for e in ESCAPES if e.works_outside], ids=lambda escape: escape.what)
def test_that_escape_works_outside_so_it_is_the_sandbox_that_stops_it(escape, surroundings, tmp_path):
    if escape.needs_root and os.geteuid() != 0:
        pytest.skip("only root can do this outside")
    script = tmp_path / "escape.py"
    script.write_text(surroundings[0] + escape.program)
    process = subprocess.Popen(
        [sys.executable, "-I", "-S", script], stdout=subprocess.PIPE, start_new_session=True
    )
    try:
        output, _ = process.communicate(timeout=20)
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
    assert b"ESCAPED" in output
    for left in (surroundings[1].parent / "canary.left", Path("/dev/shm/meshift-escape")):
        left.unlink(missing_ok=True)
    for left in Path("/tmp").glob(f"*-{process.pid}*"):
        left.unlink()


class Watched:
    """A slot that remembers what its programs took."""

    def __init__(self, slot):
        self._slot = slot
        self.cpu_s = self.peak_bytes = self.written_bytes = 0

    def run(self, processes, links=()):
        ended = self._slot.run(processes, links)
        self.cpu_s = max(one.cpu_s for one in ended)
        self.peak_bytes = max(one.peak_bytes for one in ended)
        self.written_bytes = max(
            os.fstat(p.files[name]).st_size for p in processes for name in ("stdout", "stderr")
        )
        return ended


def watched(sandbox, judge, program):
    """The verdict on a program that first prints what is expected, its seconds, and what it took."""

    def one(slot, code):
        seen, started = Watched(slot), time.monotonic()
        verdict = judge.judge(seen, Problem(inputs=[("", "ok")]), "print('ok', flush=True)\n" + code)
        return verdict, time.monotonic() - started, seen

    return sandbox.map(one, program)


@pytest.fixture(scope="module")
def bombs(sandbox, judge):
    return dict(zip(BOMBS, watched(sandbox, judge, list(BOMBS.values())), strict=True))


@pytest.mark.parametrize("what", BOMBS)
def test_no_program_takes_too_much_or_too_long(bombs, what):
    verdict, seconds, took = bombs[what]
    assert verdict.num_run == 1
    assert verdict.passed <= (what in HARMLESS)
    assert seconds < LONGEST_S
    assert took.cpu_s < TIMEOUT_S + 0.5
    assert 0 < took.peak_bytes < MEMORY + INTERPRETER
    assert took.written_bytes <= OUTPUT


def test_without_limits_a_program_is_seen_to_take_more(sandbox, judge):
    """Else the test above could not fail."""
    free = replace(judge, layers=[layer for layer in LAYERS if layer != LIMITS], timeout_s=5.0)
    code = f"x = b'x' * {MEMORY + 2 * INTERPRETER}\nfor i in range(4): print('x' * 99_999)\nsum(range(10**7))"
    [(_, _, took)] = watched(sandbox, free, [code])
    assert took.peak_bytes > MEMORY + INTERPRETER
    assert took.written_bytes > OUTPUT
    [(_, _, took)] = watched(sandbox, replace(judge, timeout_s=3.0), [BOMBS["a loop"]])
    assert took.cpu_s > TIMEOUT_S + 0.5


def with_secret(tests):
    secret = drawn()
    return [test.replace("SECRET", str(secret)) for test in tests]


@pytest.fixture(scope="module")
def forgeries(sandbox, judge):
    work = [
        (Problem(tests=[{"code": t} for t in with_secret(forgery.tests)]), forgery.code) for forgery in FUNCTIONS
    ]
    return dict(zip([f.what for f in FUNCTIONS], judge_all(sandbox, judge, work), strict=True))


@pytest.mark.parametrize("what", [forgery.what for forgery in FUNCTIONS])
def test_no_function_forges_a_verdict(forgeries, what):
    verdict, seconds = forgeries[what]
    assert verdict.num_passed == 0
    assert verdict.num_run == 1
    assert seconds < LONGEST_S


@pytest.mark.parametrize("forgery", [f for f in FUNCTIONS if f.fools_exit_codes], ids=lambda forgery: forgery.what)
def test_that_forgery_fools_a_scorer_by_exit_code(forgery, tmp_path):
    script = tmp_path / "forgery.py"
    script.write_text("\n".join([forgery.code, *with_secret(forgery.tests)]))
    assert (
        subprocess.run(
            [sys.executable, "-I", "-S", script], timeout=20, stderr=subprocess.DEVNULL, check=False
        ).returncode
        == 0
    )


@pytest.fixture(scope="module")
def outputs(sandbox, judge):
    problem = Problem(inputs=[("1\n", f"{drawn()}.5")])
    return dict(
        zip(OUTPUTS, judge_all(sandbox, judge, [(problem, code) for code in OUTPUTS.values()]), strict=True)
    )


@pytest.mark.parametrize("what", OUTPUTS)
def test_no_output_is_taken_for_the_right_one(outputs, what):
    verdict, seconds = outputs[what]
    assert not verdict.passed
    assert seconds < LONGEST_S


def test_after_all_of_them_a_right_program_passes_and_nothing_is_left(
    sandbox, judge, escapes, bombs, forgeries, outputs
):
    [(verdict, _), (function, _)] = judge_all(
        sandbox,
        judge,
        [
            (Problem(inputs=[("4\n", "5")]), "print(int(input()) + 1)"),
            (Problem(tests=[{"code": "assert f(1) == 2"}]), "def f(x): return x + 1"),
        ],
    )
    assert verdict.passed
    assert function.passed
    assert num_hostile() >= 60


def num_hostile():
    return len(ESCAPES) + len(BOMBS) + len(FUNCTIONS) + len(OUTPUTS)


def test_the_page_of_attacks_names_every_program():
    """docs/sandbox_attacks.md is written by attack_table.py."""
    page = (Path(__file__).parents[3] / "docs" / "sandbox_attacks.md").read_text(encoding="utf-8")
    rows = [line.split(" | ")[0].removeprefix("| ") for line in page.splitlines() if line.startswith("| ")]
    items = [line.removeprefix("* ") for line in page.splitlines() if line.startswith("* ")]
    assert [row for row in rows if row not in ("attack", "forgery")] == [
        one.what for one in (*ESCAPES, *FUNCTIONS)
    ]
    assert items == [*BOMBS, *OUTPUTS]


@pytest.mark.slow
@pytest.mark.skipif(best_wall() != "bubblewrap" or os.geteuid() != 0, reason="the page is of root's bubblewrap")
def test_the_page_of_attacks_marks_the_layers_that_stop_them():
    page = (Path(__file__).parents[3] / "docs" / "sandbox_attacks.md").read_text(encoding="utf-8")
    measured = list(attack_table.escapes())
    assert [row for row in measured if row not in page.splitlines()] == []
    assert attack_table.counted(measured) in page
    told = (Path(__file__).parents[3] / "docs" / "sandbox.md").read_text(encoding="utf-8")
    assert attack_table.counted(measured).rpartition(", 0 only")[0] in " ".join(told.split())
