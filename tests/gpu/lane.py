"""Where the tests of this folder run: on CUDA, or the same bodies on a CPU under Triton's interpreter.

On a CPU the shapes are smaller, bfloat16 is left out (the interpreter computes it wrongly without saying so), and what
only CUDA has (syncs, its allocator) is stood in for.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DEVICE = torch.device("cpu" if INTERPRETED else "cuda")
DTYPES = (torch.float32, torch.float16) if INTERPRETED else (torch.float32, torch.bfloat16, torch.float16)
MODES = ("fused", "chunk")


@dataclass(frozen=True)
class Shape:
    """Tokens, hidden size, vocabulary; `sequences` divides the tokens. None is a multiple of any block."""

    tokens: int
    hidden: int
    vocab: int
    sequences: int = 1


SMALL = Shape(27, 24, 131, 3) if INTERPRETED else Shape(301, 100, 5003, 7)


def name_of(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


each_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=name_of)
each_mode = pytest.mark.parametrize("mode", MODES)


def on_device(x: Tensor) -> Tensor:
    """A copy of its own on the lane's device."""
    return x.to(DEVICE, copy=True)


@contextmanager
def no_sync() -> Iterator[None]:
    """Whatever makes the host wait for the device raises. Nothing to see on a CPU."""
    if DEVICE.type != "cuda":
        yield
        return
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


class PeakBytes:
    """`with PeakBytes() as peak: ...` leaves the most bytes held at once above those held before in `peak.bytes`.

    CUDA: by torch's allocator, kernels' own workspaces included. CPU: outputs of torch operations while they live.
    """

    def __init__(self) -> None:
        self.bytes = 0
        self._tracker = _LiveStorages()

    def __enter__(self) -> PeakBytes:
        if DEVICE.type == "cuda":
            torch.cuda.synchronize()
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
            self._before = torch.cuda.memory_allocated()
        else:
            self._tracker.__enter__()
        return self

    def __exit__(self, *raised: Any) -> None:
        if DEVICE.type == "cuda":
            torch.cuda.synchronize()
            self.bytes = torch.cuda.max_memory_allocated() - self._before
        else:
            self._tracker.__exit__(*raised)
            self.bytes = self._tracker.peak


class _LiveStorages(TorchDispatchMode):
    """Bytes of the storages that operations gave back and that still live."""

    def __init__(self) -> None:
        super().__init__()
        self.live: dict[int, tuple[torch.multiprocessing.reductions.StorageWeakRef, int]] = {}
        self.peak = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        known = {x.untyped_storage()._cdata for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)}
        out = func(*args, **(kwargs or {}))
        for x in tree_leaves(out):
            if isinstance(x, Tensor) and x.untyped_storage()._cdata not in known:
                storage = x.untyped_storage()
                weak = torch.multiprocessing.reductions.StorageWeakRef(storage)
                self.live[storage._cdata] = (weak, storage.nbytes())
        self.live = {key: (weak, size) for key, (weak, size) in self.live.items() if not weak.expired()}
        self.peak = max(self.peak, sum(size for _, size in self.live.values()))
        return out


def need_free_bytes(count: int) -> None:
    """Skip where the device has less memory than that free."""
    if DEVICE.type == "cuda":
        free, _ = torch.cuda.mem_get_info()
        if free < count:
            pytest.skip(f"needs {count / 2**30:.0f} GiB of free device memory; {free / 2**30:.0f} GiB are free")
