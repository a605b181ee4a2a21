"""Several gloo processes on this CPU that run one function of a test: `run_gang(4, check, tmp_path, ...)`."""

import multiprocessing
import os
import traceback
from datetime import timedelta
from pathlib import Path

TIMEOUT_S = 300


def run_gang(num_processes, function, folder, *arguments):
    """`function(rank, *arguments)` in each process of one world; fails with the tracebacks of those that failed.

    The function must be importable (of a module, not of another function), its arguments picklable.
    """
    context = multiprocessing.get_context("forkserver")  # one process imports torch, the others are its copies
    context.set_forkserver_preload(["torch", "torch.distributed"])
    processes = [
        context.Process(target=_member, args=(rank, num_processes, function, Path(folder), arguments))
        for rank in range(num_processes)
    ]
    for process in processes:
        process.start()
    for process in processes:
        process.join(TIMEOUT_S)
    stuck = [rank for rank, process in enumerate(processes) if process.is_alive()]
    for process in processes:
        process.kill()
        process.join()
    said = "\n".join(path.read_text() for path in sorted(Path(folder).glob("rank*.txt")))
    codes = [process.exitcode for process in processes]
    assert not any(codes), f"exit codes {codes}, stuck {stuck}\n{said}"


def _member(rank, num_processes, function, folder, arguments):
    os.environ["OMP_NUM_THREADS"] = "1"
    import torch
    import torch.distributed as dist

    torch.set_num_threads(1)
    try:
        store = dist.FileStore(str(folder / "store"), num_processes)
        dist.init_process_group(
            "gloo", store=store, rank=rank, world_size=num_processes, timeout=timedelta(seconds=TIMEOUT_S / 3)
        )
        function(rank, *arguments)
        dist.barrier()
        dist.destroy_process_group()
    except BaseException:  # noqa: BLE001 - whatever it was, the parent shows it
        (folder / f"rank{rank}.txt").write_text(f"rank {rank}:\n{traceback.format_exc()}")
        os._exit(1)
