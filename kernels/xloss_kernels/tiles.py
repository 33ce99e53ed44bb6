"""Block shapes: fixed rows chosen by dtype, vocabulary and architecture, never by the number of tokens.

A shape that depended on the token count would make a token's log-prob depend on the batch it sits in. Nothing here
times a kernel; `tune.py` does, on copies, when asked.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

FP_FUSION = True
"""Contraction of a*b+c into one fma. Set on every launch: triton's own default differs between versions."""

TWO_PASS_WARPS = 16
"""Warps per row where rows are read twice: fewer rows in flight leave more of each in L2. Not measured yet."""


@dataclass(frozen=True)
class RowTile:
    """One program walks one row in blocks of `fold * lanes` columns; each lane keeps its own running softmax.

    With `lanes` = threads x the elements of one 16-byte load, the fold axis lies inside a thread: no shuffle and no
    barrier until the row is read.
    """

    fold: int
    lanes: int
    num_warps: int

    @property
    def block(self) -> int:
        """Columns per step."""
        return self.fold * self.lanes

    def options(self) -> dict[str, object]:
        """Launch options."""
        return {"num_warps": self.num_warps, "enable_fp_fusion": FP_FUSION}


@dataclass(frozen=True)
class HeadTile:
    """Tile of the head product: `block_m` tokens x `block_n` vocabulary entries, `block_k` hidden units a step.

    One program keeps the statistics of `tiles_per_split` neighbouring vocabulary tiles in registers and writes them
    once. `group_m` token tiles share each vocabulary tile while it is in L2. `use_tma` reads through tensor
    descriptors. The epilogue works through a tile in `pieces` of its columns, to stay within the registers.
    """

    block_m: int
    block_n: int
    block_k: int
    tiles_per_split: int
    group_m: int
    num_warps: int
    num_stages: int
    use_tma: bool
    pieces: int = 8

    @property
    def split(self) -> int:
        """Vocabulary entries per partial."""
        return self.block_n * self.tiles_per_split

    def options(self) -> dict[str, object]:
        """Launch options."""
        return {"num_warps": self.num_warps, "num_stages": self.num_stages, "enable_fp_fusion": FP_FUSION}


def row_tile(num_vocab: int, *dtypes: torch.dtype, num_warps: int = 8) -> RowTile:
    """RowTile for rows of `num_vocab` logits read or written as `dtypes`; small vocabularies get fewer warps.

    The compiler gives a thread as many neighbouring columns as the smallest item packs into 16 bytes, in every pass
    of a kernel. Lanes must follow, or the fold crosses threads (measured in the PTX: 16 barriers a step).
    """
    per_load = 16 // min(dtype.itemsize for dtype in dtypes)
    while num_warps > 1 and num_warps * 32 * per_load >= 2 * num_vocab:
        num_warps //= 2
    return RowTile(fold=16 // per_load, lanes=num_warps * 32 * per_load, num_warps=num_warps)


def row_candidates(num_vocab: int, *dtypes: torch.dtype) -> list[RowTile]:
    """The pruned space a tuner may search: warps and fold around the default."""
    base = [row_tile(num_vocab, *dtypes, num_warps=warps) for warps in (8, 4, 16, 32)]
    wide = [RowTile(2 * tile.fold, tile.lanes, tile.num_warps) for tile in base]
    return list(dict.fromkeys(base + wide))


_HALF = {
    80: HeadTile(128, 128, 32, 8, 16, num_warps=8, num_stages=4, use_tma=False),
    90: HeadTile(128, 256, 64, 4, 16, num_warps=8, num_stages=3, use_tma=True),
    100: HeadTile(128, 256, 64, 4, 16, num_warps=8, num_stages=3, use_tma=True),
}
_FLOAT32 = HeadTile(64, 64, 32, 16, 16, num_warps=4, num_stages=2, use_tma=False, pieces=4)


def head_tile(dtype: torch.dtype, arch: int) -> HeadTile:
    """HeadTile for operands of `dtype` on compute capability `arch` (80, 90, 100); float32 uses no tensor cores."""
    if dtype == torch.float32:
        return _FLOAT32
    return _HALF[100 if arch >= 100 else 90 if arch >= 90 else 80]


def head_candidates(dtype: torch.dtype, arch: int) -> list[HeadTile]:
    """The pruned space a tuner may search on this architecture."""
    base = head_tile(dtype, arch)
    if dtype == torch.float32:
        return [base]
    others = [
        HeadTile(128, 128, 64, 8, 16, num_warps=4, num_stages=4, use_tma=base.use_tma),
        HeadTile(256, 128, 64, 8, 8, num_warps=8, num_stages=3, use_tma=base.use_tma),
    ]
    return [base, *others]


def arch_of(device: torch.device) -> int:
    """Compute capability of `device` as 80, 90, ...; 80 (no descriptors) for anything but CUDA."""
    if device.type != "cuda":
        return 80
    major, minor = torch.cuda.get_device_capability(device)
    return 10 * major + minor


def num_programs(device: torch.device, per_sm: int = 1) -> int:
    """Programs of a persistent grid: `per_sm` on each multiprocessor; 4 off CUDA."""
    if device.type != "cuda":
        return 4
    return per_sm * torch.cuda.get_device_properties(device).multi_processor_count
