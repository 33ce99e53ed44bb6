"""Pick a tile by timing, when asked: never on the hot path, never on live buffers.

Several kernels write over their own input, so a timed launch must own its tensors:

    scratch = logits.clone()
    best = fastest(tiles.row_candidates(V, scratch.dtype), lambda tile: policy_rows(scratch, ..., tile=tile))
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TypeVar

import triton
from triton.runtime.errors import OutOfResources

Tile = TypeVar("Tile")


def milliseconds(run: Callable[[], object]) -> float:
    """Median time of `run` on the current device."""
    return float(triton.testing.do_bench(run, quantiles=[0.5]))


def fastest(
    candidates: Sequence[Tile],
    launch: Callable[[Tile], object],
    *,
    timer: Callable[[Callable[[], object]], float] = milliseconds,
) -> Tile:
    """The candidate whose `launch` is quickest; earlier ones win ties. One that does not fit the device is passed over.

    `launch` is run many times: it must work on copies.
    """
    times: list[tuple[float, int]] = []
    for index, tile in enumerate(candidates):
        try:
            times.append((timer(lambda tile=tile: launch(tile)), index))  # type: ignore[misc]
        except OutOfResources:
            continue
    assert times, "no candidate fits this device"
    return candidates[min(times)[1]]
