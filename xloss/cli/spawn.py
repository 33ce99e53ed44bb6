"""One piece of work on several processes: those that torchrun started, or a few spawned here, which always end.

A worker is called with its `Rank` when the process group stands. What it returns comes back, in the order of ranks.
Under torchrun (``RANK`` and ``WORLD_SIZE`` in the environment) every process runs the worker itself.
"""

from __future__ import annotations

import datetime
import multiprocessing
import os
import pickle
import signal
import socket
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from multiprocessing.connection import Connection, wait
from multiprocessing.context import ForkServerContext, SpawnContext
from pathlib import Path
from typing import Any, Literal

import torch
import torch.distributed as dist

from xloss.distributed import all_gather_object

Backend = Literal["gloo", "nccl"]
MOMENT = 0.5  # seconds in which others may name a better cause of a failure
Hear = Callable[[Any], None]


class RankFailed(Exception):
    """A rank raised or died. The message names it and says what it said; ``rank`` is -1 where none can be named."""

    def __init__(self, rank: int, what: str, details: str = "") -> None:
        super().__init__(f"rank {rank} {what}" if rank >= 0 else what)
        self.rank = rank
        self.details = details


@dataclass(frozen=True)
class Rank:
    """One process of the world. ``tell`` sends something small to the parent's ``hear`` while the work goes on."""

    rank: int
    world: int
    device: torch.device
    tell: Hear = field(default=lambda event: None, compare=False)


@dataclass(frozen=True)
class World:
    """Which processes. ``collective_timeout``: a collective that some rank never joins ends with an error by then."""

    nproc: int
    device: Literal["cpu", "cuda"] = "cpu"
    timeout: float = 600.0
    collective_timeout: float = 60.0

    @property
    def backend(self) -> Backend:
        """NCCL where every rank has a device of its own."""
        return "nccl" if self.device == "cuda" else "gloo"


def launched() -> bool:
    """Whether torchrun (or anything that sets its variables) started this process as one of several."""
    return "RANK" in os.environ and "WORLD_SIZE" in os.environ


def launched_rank() -> int:
    """This process's rank in the world that torchrun started; 0 where none did."""
    return int(os.environ["RANK"]) if launched() else 0


def launched_world() -> int | None:
    """Processes that torchrun started; ``None`` where none did."""
    return int(os.environ["WORLD_SIZE"]) if launched() else None


def run_ranks(
    work: Callable[..., Any], *args: Any, world: World, hear: Hear = lambda event: None, join: bool = True
) -> list[Any]:
    """``work(rank, *args)`` on every process of ``world``; what they return, by rank.

    Args:
        work: a function of a module (it is found by name in the new processes).
        args: anything that pickles.
        world: its ``nproc`` is torchrun's where that started this process.
        hear: gets what ranks ``tell``; under torchrun, on the rank that told.
        join: whether to be a rank of the world that torchrun started, where it did.

    Raises:
        RankFailed: a rank raised, died, or did not end in time. The other processes are ended first.
    """
    if join and launched():
        return _join(work, args, world, hear)
    return _spawn(work, args, world, hear)


# -- under torchrun ----------------------------------------------------------------------------------------------------


def _join(work: Callable[..., Any], args: tuple[Any, ...], world: World, hear: Hear) -> list[Any]:
    rank, size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    device = _device(world, int(os.environ.get("LOCAL_RANK", rank)))
    with _process_group(world, "env://", rank, size, device):
        try:
            return all_gather_object(work(Rank(rank, size, device, hear), *args))
        except Exception as error:
            raise RankFailed(rank, f"raised {type(error).__name__}: {error}", traceback.format_exc()) from error


# -- spawned here ------------------------------------------------------------------------------------------------------


def _spawn(work: Callable[..., Any], args: tuple[Any, ...], world: World, hear: Hear) -> list[Any]:
    context = process_context(work.__module__)
    with tempfile.TemporaryDirectory(prefix="xloss-ranks-") as folder:
        processes, pipes = [], []
        try:
            for rank in range(world.nproc):
                receiver, sender = context.Pipe(duplex=False)
                process = context.Process(target=_child, args=(work, args, world, rank, folder, sender), daemon=True)
                process.start()
                sender.close()
                processes.append(process)
                pipes.append(receiver)
            return _collect(processes, pipes, world.timeout, hear)
        finally:  # an error, Ctrl-C, or all well: nobody stays behind
            for process in processes:
                process.terminate()
            for process in processes:
                process.join(5)
                process.kill()
                process.join()


def process_context(module: str) -> SpawnContext | ForkServerContext:
    """Fresh processes: forked from a server that imported ``module`` and did nothing more; spawned without fork."""
    if "forkserver" not in multiprocessing.get_all_start_methods():
        return multiprocessing.get_context("spawn")
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([module])
    return context


def _collect(processes: list[Any], pipes: list[Connection], timeout: float, hear: Hear) -> list[Any]:
    """Results of all ranks, heard through their pipes until each has sent its own.

    A rank that fails takes others with it, so that for a moment after the first word of failure all are heard; the
    cause is a process that died, or else the first to raise.
    """
    ends = time.monotonic() + timeout
    results: dict[int, Any] = {}
    failures: list[tuple[float, RankFailed]] = []
    waiting = {pipe: rank for rank, pipe in enumerate(pipes)}
    while waiting:
        ready = wait(list(waiting), max(0.0, ends - time.monotonic()))
        if not ready and failures:
            break
        if not ready:
            slow = ", ".join(str(rank) for rank in waiting.values())
            raise RankFailed(-1, f"no result within {timeout:g} s from rank{'s' * (len(waiting) > 1)} {slow}")
        for pipe in ready:
            assert isinstance(pipe, Connection)
            rank = waiting[pipe]
            try:
                kind, content = pickle.loads(pipe.recv_bytes())
            except EOFError:
                processes[rank].join(5)
                kind, content = "failed", (0.0, _how_it_died(processes[rank].exitcode), "")
            if kind == "told":
                hear(content)
                continue
            del waiting[pipe]
            if kind == "result":
                results[rank] = content
            else:
                failures.append((content[0], RankFailed(rank, *content[1:])))
                ends = min(ends, time.monotonic() + MOMENT)
    if failures:
        raise min(failures, key=lambda failure: failure[0])[1]
    return [results[rank] for rank in range(len(pipes))]


def _how_it_died(exitcode: int | None) -> str:
    if exitcode is not None and exitcode < 0:
        name = signal.Signals(-exitcode).name
        return f"was killed by {name}" + (" (out of memory?)" if name == "SIGKILL" else "")
    return f"ended with status {exitcode} and without a result"


def _child(
    work: Callable[..., Any], args: tuple[Any, ...], world: World, rank: int, folder: str, sender: Connection
) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the parent, which ends this process

    def send(kind: str, content: Any) -> None:
        sender.send_bytes(pickle.dumps((kind, content)))  # not send: that would share tensors, which die with us

    def fail(error: Exception) -> None:
        send("failed", (time.time(), f"raised {type(error).__name__}: {error}", traceback.format_exc()))

    torch.set_num_threads(max(1, (os.cpu_count() or 1) // world.nproc))
    if world.backend == "gloo" and "lo" in {name for _, name in socket.if_nameindex()}:
        os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")  # all ranks are here; a host's name may not resolve
    try:
        device = _device(world, rank)
        store = (Path(folder) / "rendezvous").as_uri()
        with _process_group(world, store, rank, world.nproc, device):
            try:
                send("result", work(Rank(rank, world.nproc, device, lambda event: send("told", event)), *args))
            except Exception as error:  # told before the others notice that this rank is gone
                fail(error)
    except Exception as error:
        fail(error)


# -- both --------------------------------------------------------------------------------------------------------------


def _device(world: World, local_rank: int) -> torch.device:
    if world.device == "cpu":
        return torch.device("cpu")
    torch.cuda.set_device(local_rank)
    return torch.device("cuda", local_rank)


@contextmanager
def _process_group(world: World, init: str, rank: int, size: int, device: torch.device) -> Iterator[None]:
    dist.init_process_group(
        world.backend,
        init_method=init,
        rank=rank,
        world_size=size,
        timeout=datetime.timedelta(seconds=world.collective_timeout),
        device_id=device if world.backend == "nccl" else None,
    )
    try:
        yield
    finally:
        dist.destroy_process_group()
