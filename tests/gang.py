"""Several gloo processes on this CPU that run one function of a test: `run_gang(4, check, tmp_path, ...)`."""

import faulthandler
import multiprocessing
import os
import time
import traceback
from datetime import timedelta
from multiprocessing.connection import wait
from pathlib import Path

TIMEOUT_S = 300
GRACE_S = 10
PRELOAD = ["torch", "torch.distributed", "meshift.runtime.role", "transformers.models.llama.configuration_llama"]


class Cases:
    """Checks that one gang made one after another, so that their processes were started once."""

    def __init__(self, num_processes, folder, cases):
        """`cases`: name -> a function of a module, and what it is called with behind the rank."""
        folder, self._said = Path(folder), ""
        try:
            run_gang(num_processes, _each, folder, folder, cases, timeout_s=TIMEOUT_S + 20 * len(cases))
        except AssertionError as error:
            self._said = str(error)
        self._ended = [name for name in cases if len([*folder.glob(f"{_file(name)}.*.ended")]) == num_processes]

    def check(self, name):
        """Fail if the case failed, or was not reached because one before it had."""
        assert name in self._ended, f"{name} did not come to its end\n{self._said}"


def _file(name):
    return "".join(letter if letter.isalnum() else "-" for letter in name)


def _each(rank, folder, cases):
    for name, (function, *arguments) in cases.items():
        function(rank, *arguments)
        (folder / f"{_file(name)}.{rank}.ended").touch()


def run_gang(num_processes, function, folder, *arguments, timeout_s=TIMEOUT_S):
    """`function(rank, *arguments)` in each process of one world; fails with the tracebacks of those that failed.

    The function must be importable (of a module, not of another function), its arguments picklable.
    """
    context = multiprocessing.get_context("forkserver")  # one process imports torch, the others are its copies
    context.set_forkserver_preload(PRELOAD)
    processes = [
        context.Process(target=_member, args=(rank, num_processes, function, Path(folder), arguments, timeout_s))
        for rank in range(num_processes)
    ]
    for process in processes:
        process.start()
    _wait(processes, timeout_s)
    stuck = [rank for rank, process in enumerate(processes) if process.is_alive()]
    for process in processes:
        process.kill()
        process.join()
    said = "\n".join(path.read_text() for path in sorted(Path(folder).glob("rank*.txt")))
    codes = [process.exitcode for process in processes]
    assert not any(codes), f"exit codes {codes}, stuck {stuck}\n{said}"


def _wait(processes, timeout_s):
    """Until all have ended, or some seconds after the first that failed: the others may wait for it for ever."""
    deadline = time.monotonic() + timeout_s
    while (left := [p for p in processes if p.is_alive()]) and time.monotonic() < deadline:
        wait([process.sentinel for process in left], timeout=1.0)
        if any(process.exitcode for process in processes):
            deadline = min(deadline, time.monotonic() + GRACE_S)


def _member(rank, num_processes, function, folder, arguments, timeout_s):
    os.environ["OMP_NUM_THREADS"] = "1"
    import torch
    import torch.distributed as dist

    torch.set_num_threads(1)
    said = (folder / f"rank{rank}.txt").open("w")
    faulthandler.dump_traceback_later(timeout_s - 5, file=said)
    try:
        store = dist.FileStore(str(folder / "store"), num_processes)
        dist.init_process_group(
            "gloo", store=store, rank=rank, world_size=num_processes, timeout=timedelta(seconds=TIMEOUT_S / 3)
        )
        function(rank, *arguments)
        dist.barrier()
        dist.destroy_process_group()
    except BaseException:  # noqa: BLE001 - whatever it was, the parent shows it
        said.write(f"rank {rank}:\n{traceback.format_exc()}")
        said.close()
        os._exit(1)
