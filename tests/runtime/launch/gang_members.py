"""What the processes of the gangs in the tests do."""

import os
import signal
import time

import torch
import torch.distributed as dist

from meshift.counted import counted
from meshift.errors import DataError


def add_up(argument, rank, num_processes, observer):
    total = torch.tensor([float(argument) + rank])
    dist.all_reduce(total)
    observer.on_message(f"here is {rank}")
    observer.on_step(rank, {"loss": float("nan")})
    clock = iter([0.0, 5.0])
    assert list(counted("a", "letters", lambda: 1, lambda: next(clock))) == ["a"]
    return [num_processes, float(total)]


def refuse(argument, rank, num_processes, observer):
    if rank == 1:
        raise DataError("rows.jsonl:3 is no row")
    time.sleep(60)


def crash(argument, rank, num_processes, observer):
    if rank == 1:
        raise RuntimeError("an accident")
    dist.barrier()


def die(argument, rank, num_processes, observer):
    observer.on_message(str(os.getpid()))
    dist.barrier()
    if rank == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    time.sleep(60)


def stop_itself(argument, rank, num_processes, observer):
    observer.on_call(2, "rollout")
    dist.barrier()
    if rank == 1:
        os.kill(os.getpid(), signal.SIGSTOP)
    time.sleep(60)


def wait_for_ever(argument, rank, num_processes, observer):
    observer.on_call(4, "train_actor" if rank else "train_critic")
    if rank == 0:
        dist.barrier()
    time.sleep(60)


def work_slowly(argument, rank, num_processes, observer):
    for number in range(6):
        observer.on_call(number, "rollout")
        time.sleep(0.5)
    return "done"


def lose_a_peer(argument, rank, num_processes, observer):
    """The others learn of the death by a broken connection, and may end before it is seen who died."""
    dist.barrier()
    if rank == 2:
        os.kill(os.getpid(), signal.SIGKILL)
    dist.all_reduce(torch.ones(1))
    time.sleep(60)


def wait_for_term(argument, rank, num_processes, observer):
    heard = []
    if rank == 0:
        signal.signal(signal.SIGTERM, lambda number, frame: heard.append(number))
    dist.barrier()
    if rank == 0:
        observer.on_message("ready")
    deadline = time.monotonic() + 30
    while rank == 0 and not heard and time.monotonic() < deadline:
        time.sleep(0.05)
    dist.barrier()
    return heard


def refuse_late(argument, rank, num_processes, observer):
    """Process 1 says what is wrong; process 0, which is heard first, can only say that it has lost it."""
    observer.on_message("busy")
    dist.barrier()
    if rank == 1:
        raise DataError("rows.jsonl:3 is no row")
    dist.all_reduce(torch.ones(1))
    time.sleep(60)


def kill_the_server(argument, rank, num_processes, observer):
    dist.barrier()
    if rank == 1:
        os.kill(os.getppid(), signal.SIGKILL)
    time.sleep(60)
