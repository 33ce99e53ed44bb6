"""Several gloo processes, and what each of them saw."""

from __future__ import annotations

import datetime
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp


def spawn(world: int, job: Callable[..., Any], folder: Path, *args: Any, seconds: float = 60) -> list[Any]:
    """``job(rank, *args)`` on every rank of a world, and what they return."""
    mp.spawn(_worker, args=(world, job, str(folder), args, seconds), nprocs=world)
    return [torch.load(folder / f"{rank}.pt", weights_only=False) for rank in range(world)]


def _worker(rank: int, world: int, job: Callable[..., Any], folder: str, args: tuple[Any, ...], seconds: float) -> None:
    torch.set_num_threads(1)
    limit = datetime.timedelta(seconds=seconds)  # ranks that disagree on their collectives fail instead of hanging
    dist.init_process_group(
        "gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=world, timeout=limit
    )
    try:
        torch.save(job(rank, *args), f"{folder}/{rank}.pt")
    finally:
        dist.destroy_process_group()
