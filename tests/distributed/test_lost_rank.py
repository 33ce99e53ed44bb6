"""One of three processes (gloo) that is gone.

Contract: when a process is killed, or stuck, the others end with an error that names them within the group's timeout.
"""

from __future__ import annotations

import datetime
import functools
import os
import signal
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from tests.distributed.ranks import alone, context
from tests.distributed.test_failures import WORLD, build, ce
from xloss import CELossConfig, finalize_metrics

pytestmark = pytest.mark.distributed
TIMEOUT = 5  # seconds, of the process group where a rank dies


def join(rank: int, folder: str, seconds: int) -> None:
    limit = datetime.timedelta(seconds=seconds)
    dist.init_process_group(
        "gloo", init_method=f"file://{folder}/rendezvous-{seconds}", rank=rank, world_size=WORLD, timeout=limit
    )


def train(rank: int, folder: str, how: str) -> None:
    """Steps without end, until rank 1 leaves in the middle of one."""
    alone()
    join(rank, folder, 150)  # processes may start far apart
    dist.barrier()
    dist.destroy_process_group()
    join(rank, folder, TIMEOUT)
    cfg = CELossConfig()
    try:
        for step in range(1000):
            ctx = build(ce(), cfg)
            _, info = ctx.forward(torch.ones(1, 5, 3), torch.ones(7, 3))
            if rank == 1 and step == 2:
                if how == "killed":
                    os.kill(os.getpid(), signal.SIGKILL)
                time.sleep(600)
            if step % 2:
                finalize_metrics([info.metrics])
    except Exception as error:
        Path(folder, f"{rank}.txt").write_text("\n".join([repr(error), *getattr(error, "__notes__", [])]))
        os._exit(1)  # as a trainer that raises ends; a broken group is not left in order


@pytest.fixture(scope="module")
def jobs_that_lose_one(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, tuple[Path, list[Any]]]]:
    """Three running processes and their folder, for each way to lose one."""
    started: dict[str, tuple[Path, list[Any]]] = {}
    for how in ("killed", "stuck"):
        folder = tmp_path_factory.mktemp(how)
        workers = [functools.partial(train, rank, str(folder), how) for rank in range(WORLD)]
        started[how] = folder, [context().Process(target=worker) for worker in workers]
    every = [process for _, processes in started.values() for process in processes]
    for process in every:
        process.start()
    yield started
    for process in every:
        process.kill()
        process.join()


@pytest.mark.parametrize("how", ["killed", "stuck"])
def test_lost_rank_ends_the_others(jobs_that_lose_one: dict[str, tuple[Path, list[Any]]], how: str) -> None:
    folder, processes = jobs_that_lose_one[how]
    for rank in (0, 2):
        processes[rank].join(timeout=TIMEOUT + 90)  # the rest is for starting on a busy machine
        assert processes[rank].exitcode == 1, f"exit status {processes[rank].exitcode}"
        text = (folder / f"{rank}.txt").read_text()
        assert f"rank {rank} of 3 waited for the others while building batches" in text
