"""The protocol between the benchmark and its sides, with a real process that does nothing."""

import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks.contestant import ROOT, Contestant, ContestantError, variables

FAKE = Path(__file__).with_name("fake_side.py")


@pytest.fixture
def side(tmp_path):
    made = Contestant("fake", [sys.executable, str(FAKE), "7"], num_threads=1, log=tmp_path / "log")
    yield made
    made.close()


def test_what_a_library_prints_does_not_break_the_protocol(side, tmp_path):
    side.start(model="m")
    assert side.about["given"] == {"model": "m"}
    assert "greets" in (tmp_path / "log").read_text()


def test_a_side_says_which_versions_it_has(side):
    import rich  # noqa: F401

    assert side.start().about["versions"]["rich"].count(".") >= 1


def test_rounds_carry_the_sides_own_time_and_what_it_has_to_say(side):
    played = side.start().round(number=3)
    assert (played.seconds, played.num_tokens, played.extra) == (0.5, 7, {"number": 3})
    assert played.others >= 0
    assert side.peak_memory_gb() > 0


def test_a_side_that_cannot_start_says_why_and_where_its_output_is(side, tmp_path):
    with pytest.raises(ContestantError, match=r"ValueError: there is no such model; its output is in .*log"):
        side.start(fail=True)


def test_a_side_that_dies_is_an_error_and_no_endless_wait(side):
    side.start()
    with pytest.raises(ContestantError, match="ended with exit code 3"):
        side.round(number=99)


def test_thread_counts_are_explicit_for_every_library():
    made = variables(2, "cpu")
    assert {made[f"{name}_NUM_THREADS"] for name in ("OMP", "MKL", "OPENBLAS")} == {"2"}


def test_a_cpu_run_sees_no_gpu_and_a_gpu_run_does():
    assert variables(1, "cpu")["CUDA_VISIBLE_DEVICES"] == ""
    assert "CUDA_VISIBLE_DEVICES" not in variables(1, "cuda")


def test_on_a_gpu_the_memory_is_the_devices(side, monkeypatch):
    monkeypatch.setattr(side, "_device_memory_gb", 3.5)
    assert side.peak_memory_gb() == 3.5


def test_the_part_that_peers_import_needs_the_standard_library_alone():
    code = "import sys, benchmarks.serve, benchmarks.sizes, benchmarks.variety\n"
    code += "known = set(sys.stdlib_module_names) | {'benchmarks', '__main__', 'sitecustomize'}\n"
    code += "extra = {m.split('.')[0] for m in sys.modules} - known\n"
    code += "sys.exit(' '.join(sorted(m for m in extra if not m.startswith('_'))) or 0)"
    done = subprocess.run(
        [sys.executable, "-I", "-S", "-c", f"import sys; sys.path.insert(0, {str(ROOT)!r}); {code}"],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
