"""Several gloo processes, and what each of them saw.

They are forked from one server, which has imported what all of them need: a fresh process takes seconds for it.
"""

from __future__ import annotations

import datetime
import gc
import multiprocessing
import os
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from multiprocessing import forkserver
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

PRELOAD = "tests.distributed.preload"


def spawn(
    world: int, job: Callable[..., Any], folder: Path, *args: Any, seconds: float = 60, within: float = 240
) -> list[Any]:
    """``job(rank, *args)`` on every rank of a world, and what they return.

    ``seconds``: the group's timeout, by which ranks that disagree on their collectives fail instead of hanging.
    ``within``: by then all have ended, or are killed and the test fails.
    """
    run_processes(_worker, world, job, str(folder), args, seconds, nprocs=world, within=within)
    return [torch.load(folder / f"{rank}.pt", weights_only=False) for rank in range(world)]


def run_processes(worker: Callable[..., None], *args: Any, nprocs: int, within: float = 240) -> None:
    """``worker(rank, *args)`` in as many processes; raises what the first to fail raised."""
    method = context().get_start_method()
    processes = mp.start_processes(worker, args, nprocs, join=False, start_method=method)
    ends = time.monotonic() + within
    try:
        while not processes.join(timeout=1):
            assert time.monotonic() < ends, f"the ranks hang: no end within {within:g} s"
    finally:
        for process in processes.processes:
            process.kill()


def context() -> Any:
    """How ranks are started: forked from the server, which is started where there is none yet."""
    if "forkserver" not in multiprocessing.get_all_start_methods():
        return multiprocessing.get_context("spawn")
    found = multiprocessing.get_context("forkserver")
    found.set_forkserver_preload([PRELOAD])
    with pytest.MonkeyPatch.context() as patch:  # the server finds modules where this process does
        patch.setenv("PYTHONPATH", os.pathsep.join(filter(None, sys.path)))
        forkserver.ensure_running()
    return found


@contextmanager
def group(folder: str, rank: int, world: int, seconds: float = 60) -> Iterator[None]:
    """This process as a rank of a world."""
    limit = datetime.timedelta(seconds=seconds)
    store = f"file://{folder}/rendezvous"
    dist.init_process_group("gloo", init_method=store, rank=rank, world_size=world, timeout=limit)
    try:
        yield
    finally:
        dist.destroy_process_group()


def alone() -> None:
    """One thread; and what was imported is out of reach of searches for a live module (`gc.get_referrers`)."""
    torch.set_num_threads(1)
    gc.freeze()


def _worker(rank: int, world: int, job: Callable[..., Any], folder: str, args: tuple[Any, ...], seconds: float) -> None:
    alone()
    with group(folder, rank, world, seconds):
        torch.save(job(rank, *args), f"{folder}/{rank}.pt")
