"""Inputs shared by the interpreter lane: rows of every temper, labels at both ends, ignored rows, strides."""

from __future__ import annotations

import torch

from xloss_kernels.tiles import HeadTile, RowTile
from xloss_kernels.transform import Transform

ROW = RowTile(fold=2, lanes=16, num_warps=1)  # blocks of 32 columns
HEAD = HeadTile(16, 16, 16, tiles_per_split=2, group_m=2, num_warps=4, num_stages=2, use_tma=False, pieces=2)
VOCABS = (1, 31, 32, 33, 64, 100)  # below, at and above a block; tails
IGNORE = -100

TEMPERS = {
    "plain": lambda shape, g: torch.randn(shape, generator=g) * 3,
    "negative": lambda shape, g: torch.randn(shape, generator=g) - 200,
    "huge": lambda shape, g: torch.randn(shape, generator=g) * 1e3,
    "equal": lambda shape, g: torch.full(shape, 0.25),
    "peaked": lambda shape, g: torch.randn(shape, generator=g) + 40 * (torch.arange(shape[1]) == shape[1] // 2),
}


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def logits(temper: str, rows: int, vocab: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> torch.Tensor:
    return TEMPERS[temper]((rows, vocab), generator(seed)).to(dtype)


def labels(rows: int, vocab: int, num_labels: int = 0, seed: int = 0) -> torch.Tensor:
    """Random ids with 0 and V-1 first, and an ignored row (all its labels) third."""
    shape = (rows, num_labels) if num_labels else (rows,)
    ids = torch.randint(0, vocab, shape, generator=generator(seed))
    if rows > 2:
        ids[0], ids[1], ids[2] = 0, vocab - 1, IGNORE
    return ids


def strided(tensor: torch.Tensor, extra: int = 5) -> torch.Tensor:
    """The same values with rows `extra` elements apart, NaN between them."""
    rows, columns = tensor.shape
    wide = torch.full((rows, columns + extra), float("nan"), dtype=tensor.dtype)
    wide[:, :columns] = tensor
    return wide[:, :columns]


def vector(rows: int, seed: int, positive: bool = False) -> torch.Tensor:
    x = torch.randn(rows, generator=generator(seed))
    return x.abs() + 0.1 if positive else x


def transforms(rows: int, vocab: int) -> dict[str, Transform]:
    bias = torch.randn(vocab, generator=generator(7))
    return {
        "identity": Transform(),
        "scale": Transform(logit_scale=0.37),
        "softcap": Transform(softcap=5.0),
        "temperature": Transform(temperature=0.6),
        "row temperature": Transform(temperature=vector(rows, 8, positive=True)),
        "bias": Transform(bias=bias),
        "all": Transform(0.7, 8.0, vector(rows, 9, positive=True), bias),
    }


TRANSFORMS = ("identity", "scale", "softcap", "temperature", "row temperature", "bias", "all")
