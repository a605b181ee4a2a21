"""What the processes of the gangs in the tests do."""

import os
import signal
import time

import torch
import torch.distributed as dist

from meshift.errors import DataError


def add_up(argument, rank, num_processes, observer):
    total = torch.tensor([float(argument) + rank])
    dist.all_reduce(total)
    observer.on_message(f"here is {rank}")
    observer.on_step(rank, {"loss": float("nan")})
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
