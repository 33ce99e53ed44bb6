"""Modules that lose gradients are found where a program has set its objects aside from garbage collection."""

from __future__ import annotations

import gc

from torch.nn.parallel import DistributedDataParallel

from xloss.distributed import routes


class Wrapped(DistributedDataParallel):
    def __init__(self) -> None:  # no process group
        pass


def test_frozen_modules_are_found() -> None:
    before, after = Wrapped(), None
    gc.freeze()
    try:
        after = Wrapped()
        for _ in range(2):
            found = routes._modules_of(DistributedDataParallel)
            assert sum(x is before for x in found) == 1
            assert sum(x is after for x in found) == 1
        del found
    finally:
        gc.unfreeze()
    assert any(x is after for x in routes._modules_of(DistributedDataParallel))
