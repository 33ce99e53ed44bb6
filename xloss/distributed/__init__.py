"""Ranks and meshes: who holds which tokens, and what they exchange."""

from xloss.distributed.access import Head, head_weight
from xloss.distributed.agree import agree_plan, together
from xloss.distributed.groups import (
    all_gather,
    all_gather_object,
    all_reduce_max,
    all_reduce_sum,
    alone,
    default_device,
    world_size,
)
from xloss.distributed.routes import check_gradient_route
from xloss.distributed.sequence import sp_gather, sp_split

__all__ = [
    "Head",
    "agree_plan",
    "all_gather",
    "all_gather_object",
    "all_reduce_max",
    "all_reduce_sum",
    "alone",
    "check_gradient_route",
    "default_device",
    "head_weight",
    "sp_gather",
    "sp_split",
    "together",
    "world_size",
]
