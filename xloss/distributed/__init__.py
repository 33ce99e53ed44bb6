"""Ranks and meshes: who holds which tokens, and what they exchange."""

from xloss.distributed.access import Head, head_weight
from xloss.distributed.agree import together
from xloss.distributed.groups import (
    Ranks,
    all_gather,
    all_gather_object,
    all_reduce_max,
    all_reduce_sum,
    alone,
    default_device,
    ranks_in,
    world_size,
)
from xloss.distributed.ranks import RankSum, TokenRanks
from xloss.distributed.routes import check_gradient_route
from xloss.distributed.sequence import (
    GatherParts,
    Order,
    inverse_places,
    join_parts,
    mesh_places,
    sp_gather,
    sp_places,
    sp_split,
    take_places,
)

__all__ = [
    "GatherParts",
    "Head",
    "Order",
    "RankSum",
    "Ranks",
    "TokenRanks",
    "all_gather",
    "all_gather_object",
    "all_reduce_max",
    "all_reduce_sum",
    "alone",
    "check_gradient_route",
    "default_device",
    "head_weight",
    "inverse_places",
    "join_parts",
    "mesh_places",
    "ranks_in",
    "sp_gather",
    "sp_places",
    "sp_split",
    "take_places",
    "together",
    "world_size",
]
