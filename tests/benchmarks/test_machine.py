"""What is read from /proc, with files written here."""

import pytest

from benchmarks.machine import cpu_seconds, cpu_times, peak_memory_gb, process_tree


def process(proc, pid, *, children=(), ticks=(0, 0, 0, 0), peak_kb=0):
    (proc / str(pid) / "task" / str(pid)).mkdir(parents=True)
    (proc / str(pid) / "task" / str(pid) / "children").write_text(" ".join(map(str, children)))
    fields = ["S", *["0"] * 10, *map(str, ticks), "20"]
    (proc / str(pid) / "stat").write_text(f"{pid} (a name) of sorts) {' '.join(fields)}")
    (proc / str(pid) / "status").write_text(f"Name:\tx\nVmHWM:\t{peak_kb} kB\n")


def test_waiting_is_not_work_and_what_the_hypervisor_withholds_is_told_apart(tmp_path):
    (tmp_path / "stat").write_text("cpu  100 20 30 4000 500 6 7 80 9 0\ncpu0 1 2 3\n")
    times = cpu_times(tmp_path)
    assert (times.busy, times.stolen) == (pytest.approx(1.63), pytest.approx(0.8))


def test_the_workers_of_an_engine_count_as_the_engine(tmp_path):
    process(tmp_path, 1, children=[2, 3], ticks=(100, 50, 0, 0), peak_kb=1_000_000)
    process(tmp_path, 2, children=[4], ticks=(10, 0, 0, 0), peak_kb=500_000)
    process(tmp_path, 3)
    process(tmp_path, 4, ticks=(0, 0, 30, 10))
    tree = process_tree(1, tmp_path)
    assert sorted(tree) == [1, 2, 3, 4]
    assert cpu_seconds(tree, tmp_path) == pytest.approx(2.0)
    assert peak_memory_gb(tree, tmp_path) == pytest.approx(1.536)


def test_a_process_that_has_ended_meanwhile_is_no_error(tmp_path):
    assert cpu_seconds([77], tmp_path) == peak_memory_gb([77], tmp_path) == 0
