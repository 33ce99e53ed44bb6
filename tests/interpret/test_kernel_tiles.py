"""Tiles: shapes follow dtype and vocabulary alone; the tuner times candidates and keeps the quickest."""

from __future__ import annotations

import pytest
import torch
from triton.runtime.errors import OutOfResources

from xloss_kernels import tiles, tune


@pytest.mark.parametrize("vocab", [1, 100, 5000, 50257, 262144])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_row_tiles_are_powers_of_two_and_one_load_wide(vocab, dtype):
    for tile in tiles.row_candidates(vocab, dtype):
        assert tile.lanes == tile.num_warps * 32 * 16 // dtype.itemsize
        assert tile.block & (tile.block - 1) == 0
    small = tiles.row_tile(vocab, dtype)
    assert small.num_warps == 1 or small.lanes < 2 * vocab


def test_the_smallest_item_sets_the_lanes():
    assert tiles.row_tile(128256, torch.float32, torch.bfloat16) == tiles.row_tile(128256, torch.bfloat16)


@pytest.mark.parametrize("arch", [80, 86, 90, 100, 103, 120])
def test_head_tiles(arch):
    half = tiles.head_tile(torch.bfloat16, arch)
    assert half.use_tma == (arch >= 90) and half in tiles.head_candidates(torch.bfloat16, arch)
    assert tiles.head_candidates(torch.float32, arch) == [tiles.head_tile(torch.float32, arch)]
    assert half.split == half.block_n * half.tiles_per_split


def test_the_quickest_candidate_that_fits():
    cost = {"a": 3.0, "b": 1.0, "c": 1.0}
    ran = []

    def timer(run):
        run()
        if ran[-1] == "d":
            raise OutOfResources(1, 0, "shared memory")
        return cost[ran[-1]]

    assert tune.fastest("abcd", ran.append, timer=timer) == "b"
    assert ran == list("abcd")
    with pytest.raises(AssertionError, match="fits"):
        tune.fastest("d", ran.append, timer=timer)
