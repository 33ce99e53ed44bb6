"""A record of the matrix products and allocations that a piece of code really ran."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

# operand positions of the two factors
PRODUCTS = {"mm": (0, 1), "addmm": (1, 2), "bmm": (0, 1), "baddbmm": (1, 2), "addmm_": (1, 2), "baddbmm_": (1, 2)}


class Recorder(TorchDispatchMode):
    """`with Recorder() as ran: ...`, backward included; sizes are elements, not bytes."""

    def __init__(self) -> None:
        super().__init__()
        self.products: list[tuple[int, int, int]] = []  # m, k, n of every product
        self.storages: dict[int, tuple[tuple[int, ...], str]] = {}  # what ops gave back: storage, largest shape in it

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        name = func.overloadpacket.__name__
        if name in PRODUCTS:
            a, b = (args[i] for i in PRODUCTS[name])
            self.products.append((a.shape[-2], a.shape[-1], b.shape[-1]))
        for x in tree_leaves(out):
            if isinstance(x, Tensor):
                key = x.untyped_storage().data_ptr()
                if x.numel() >= torch.Size(self.storages.get(key, ((0,), ""))[0]).numel():
                    self.storages[key] = (tuple(x.shape), name)
        return out

    @property
    def multiplied(self) -> int:
        """Sum of m k n: multiply-adds of all products."""
        return sum(m * k * n for m, k, n in self.products)

    def largest(self, known: Iterable[Tensor] = ()) -> int:
        """Elements of the largest output that is not a view of a known tensor."""
        mine = {x.untyped_storage().data_ptr() for x in known}
        return max((torch.Size(s).numel() for key, (s, _) in self.storages.items() if key not in mine), default=0)

    def shapes(self, known: Iterable[Tensor] = ()) -> set[tuple[int, ...]]:
        """Shapes of outputs that are not views of a known tensor."""
        mine = {x.untyped_storage().data_ptr() for x in known}
        return {s for key, (s, _) in self.storages.items() if key not in mine}
