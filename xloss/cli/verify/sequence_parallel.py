"""Layouts that split sequences over ranks."""

from __future__ import annotations

from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from xloss.cli.verify.cases import LossCase
from xloss.cli.verify.data_parallel import MICRO_BATCHES, ddp_of, last_only, shard
from xloss.cli.verify.layouts import Site, Variants, cut_pairs, dealt, layout
from xloss.cli.verify.step import Setup
from xloss.distributed import Order

PAIRS = (("ranks that share sequences", 2),)


def _token_local(case: LossCase) -> bool:
    return not case.coupled()


def _over_all(site: Site, order: Order, packed: bool = True) -> Setup:
    """Every sequence over all ranks, which an engine averages over as over any others."""
    mesh = init_device_mesh(site.rank.device.type, (site.rank.world,), mesh_dim_names=("sp",))
    module = ddp_of(site, site.model())
    cut = cut_pairs(list(range(site.batch.num_pairs)), 2)
    return Setup(module, cut, packed, before=last_only(module), sp_mesh=mesh, sp_order=order)


@layout("sp", "packs cut into equal parts, one a rank", ranks=2, takes=_token_local)
def sp(site: Site) -> Variants:
    """Each rank holds distinct tokens, and padding."""
    yield "packed", _over_all(site, "contiguous")
    yield "padded rows", _over_all(site, "contiguous", packed=False)


@layout("sp-head-tail", "parts in the order of torch's context_parallel", ranks=2, takes=_token_local)
def sp_head_tail(site: Site) -> Variants:
    """Each rank holds a part from the front and one from the back."""
    yield "packed", _over_all(site, "head_tail")


@layout("sp-coupled", "losses that couple the tokens of a sequence, over ranks", ranks=2, takes=LossCase.coupled)
def sp_coupled(site: Site) -> Variants:
    """Sums over a sequence cross ranks before anything is done with them."""
    yield "packed", _over_all(site, "contiguous")
    yield "padded rows", _over_all(site, "contiguous", packed=False)
    yield "head_tail", _over_all(site, "head_tail")


@layout("dp-sp", "FSDP2 over all ranks, sequences over pairs of them", ranks=4, multiple=2, counts=PAIRS)
def dp_sp(site: Site) -> Variants:
    """Distinct tokens on every rank: all of them count."""
    mesh = init_device_mesh(site.rank.device.type, (site.rank.world // 2, 2), mesh_dim_names=("dp", "sp"))
    data: DeviceMesh = mesh["dp"]
    module = shard(site.model(), [])
    cut = dealt(site, data.size(), data.get_local_rank(), MICRO_BATCHES)
    yield "", Setup(module, cut, before=last_only(module), sp_mesh=mesh["sp"])
