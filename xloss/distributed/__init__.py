"""Ranks and meshes: who holds which tokens, and what they exchange."""

from xloss.distributed.groups import (
    all_gather,
    all_gather_object,
    all_reduce_max,
    all_reduce_sum,
    alone,
    default_device,
    world_size,
)
from xloss.distributed.sequence import sp_gather, sp_split

__all__ = [
    "all_gather",
    "all_gather_object",
    "all_reduce_max",
    "all_reduce_sum",
    "alone",
    "default_device",
    "sp_gather",
    "sp_split",
    "world_size",
]
