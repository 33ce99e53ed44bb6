"""Several processes for one piece of work.

Contract: results come in the order of ranks; a rank that raises, dies or does not end is named, and nobody stays
behind; under torchrun's variables the process joins instead of spawning.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import socket
import time

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from xloss.cli.spawn import Rank, RankFailed, World, run_ranks

pytestmark = pytest.mark.distributed


def add(rank: Rank, start: float) -> Tensor:
    rank.tell(("begins", rank.rank))
    total = torch.full((3,), start + rank.rank)
    dist.all_reduce(total)
    return total + rank.rank


def fail(rank: Rank, how: str) -> None:
    if rank.rank == 1 and how == "raise":
        raise ValueError("no such thing")
    if rank.rank == 1 and how == "die":
        os.kill(os.getpid(), signal.SIGKILL)
    if rank.rank == 1 and how == "leave":
        os._exit(7)
    if rank.rank == 1 and how == "sleep":
        time.sleep(300)
    dist.barrier()


def test_results_by_rank_and_what_they_tell() -> None:
    heard: list[object] = []
    found = run_ranks(add, 10.0, world=World(2), hear=heard.append)
    assert [x.tolist() for x in found] == [[21.0] * 3, [22.0] * 3]
    assert sorted(heard) == [("begins", 0), ("begins", 1)]  # type: ignore[type-var]


@pytest.mark.parametrize(
    ("how", "says"),
    [
        ("raise", "rank 1 raised ValueError: no such thing"),
        ("die", "rank 1 was killed by SIGKILL"),
        ("leave", "rank 1 ended with status 7 and without a result"),
        ("sleep", "no result within 4 s from ranks 0, 1"),
    ],
)
def test_failures_name_the_rank(how: str, says: str) -> None:
    with pytest.raises(RankFailed, match=says) as failure:
        run_ranks(fail, how, world=World(2, timeout=4.0 if how == "sleep" else 60.0))
    assert failure.value.rank == (-1 if how == "sleep" else 1)
    assert ("no such thing" in failure.value.details) == (how == "raise")
    assert not [p for p in multiprocessing.active_children() if p.is_alive()]


def test_joins_the_world_it_was_started_in(monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    for name, value in {"RANK": 0, "WORLD_SIZE": 1, "MASTER_ADDR": "localhost", "MASTER_PORT": port}.items():
        monkeypatch.setenv(name, str(value))
    assert [x.tolist() for x in run_ranks(add, 5.0, world=World(4))] == [[5.0] * 3]
    assert not dist.is_initialized()
