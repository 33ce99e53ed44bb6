"""Layouts of a head whose rows are dealt to ranks: tensor parallelism, alone and with sequence or data parallelism."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Shard
from torch.distributed.tensor.parallel import ColwiseParallel, parallelize_module
from torch.nn.parallel import DistributedDataParallel

from xloss import LossInfo, VocabShard, head_weight
from xloss.cli.verify.data_parallel import MICRO_BATCHES, last_only
from xloss.cli.verify.layouts import Site, Variants, cut_pairs, dealt, layout
from xloss.cli.verify.problem import SmallLM
from xloss.cli.verify.step import Setup, full_gradients

PAIRS = (("ranks that share the vocabulary", 2),)
Gradients = Callable[[nn.Module], dict[str, Tensor | None]]


class RowsOfHead(SmallLM):
    """Its lm_head holds some rows of the vocabulary, as Megatron-LM's does."""

    rows: VocabShard

    def forward(self, ids: Tensor, loss_ctx: Any) -> tuple[Tensor, LossInfo]:
        """Loss of one micro-batch."""
        loss: tuple[Tensor, LossInfo] = loss_ctx(self.hidden_states(ids), self.rows)
        return loss

    def keep_rows(self, mesh: DeviceMesh, shares: list[int]) -> RowsOfHead:
        """Drop the rows of others; rank i of ``mesh`` keeps a part of the vocabulary as large as ``shares[i]``."""
        vocab_size, rank = self.lm_head.out_features, mesh.get_local_rank()
        ends = [vocab_size * sum(shares[: i + 1]) // sum(shares) for i in range(len(shares))]
        start, stop = [0, *ends][rank], ends[rank]
        self.lm_head.weight = nn.Parameter(self.lm_head.weight.detach()[start:stop].clone())
        if self.lm_head.bias is not None:
            self.lm_head.bias = nn.Parameter(self.lm_head.bias.detach()[start:stop].clone())
        self.rows = VocabShard(
            self.lm_head.weight, offset=start, vocab_size=vocab_size, group=mesh, bias=self.lm_head.bias
        )
        return self


class SequenceParallelLM(SmallLM):
    """Each rank runs a part of the sequence, and hands the hidden states on as one DTensor."""

    mesh: DeviceMesh

    def forward(self, ids: Tensor, loss_ctx: Any) -> tuple[Tensor, LossInfo]:
        """Loss of one micro-batch."""
        parts = ids.chunk(self.mesh.size(), 1)
        rank = self.mesh.get_local_rank()
        mine = parts[rank] if rank < len(parts) else ids[:, :0]
        hidden = self.hidden_states(mine)
        shape = torch.Size((*ids.shape, hidden.shape[-1]))
        stride = (shape[1] * shape[2], shape[2], 1)
        whole = DTensor.from_local(hidden, self.mesh, [Shard(1)], run_check=False, shape=shape, stride=stride)
        with head_weight(self.lm_head) as head:
            loss: tuple[Tensor, LossInfo] = loss_ctx(whole, *head)
        return loss


def _meshes(site: Site, tp: int) -> tuple[DeviceMesh, DeviceMesh]:
    """Ranks that hold distinct tokens, and ranks that share a vocabulary."""
    mesh = init_device_mesh(site.rank.device.type, (site.rank.world // tp, tp), mesh_dim_names=("dp", "tp"))
    return mesh["dp"], mesh["tp"]


def _all_pairs(site: Site) -> list[int]:
    return list(range(site.batch.num_pairs))


def _rows_joined(mesh: DeviceMesh) -> Gradients:
    """Gradients of the head's rows from all ranks of ``mesh``."""

    def gradients(module: nn.Module) -> dict[str, Tensor | None]:
        found = full_gradients(module)
        for name in ("lm_head.weight", "lm_head.bias"):
            if (mine := found.get(name)) is not None:
                parts: list[Tensor] = [mine] * mesh.size()
                dist.all_gather_object(parts, mine.cpu(), group=mesh.get_group())
                found[name] = torch.cat(parts)
        return found

    return gradients


def _colwise(model: SmallLM, mesh: DeviceMesh) -> SmallLM:
    parallelize_module(model, mesh, {"lm_head": ColwiseParallel()})
    return model


@layout("tp", "the head's rows a DTensor Shard(0) over all ranks", ranks=2)
def tp(site: Site) -> Variants:
    """What ``parallelize_module`` makes of it; every rank has all tokens."""
    data, mesh = _meshes(site, site.rank.world)
    for count in (1, 2):
        model = _colwise(site.model(), mesh)
        yield f"{count} micro-batches", Setup(model, cut_pairs(_all_pairs(site), count), data_mesh=data)


@layout("tp-uneven", "ranks hold 1, 2, 3... parts of the head's rows", ranks=2)
def tp_uneven(site: Site) -> Variants:
    """A local shard with its offset."""
    data, mesh = _meshes(site, site.rank.world)
    model = site.model(cls=RowsOfHead)
    assert isinstance(model, RowsOfHead)
    model.keep_rows(mesh, list(range(1, mesh.size() + 1)))
    cut = cut_pairs(_all_pairs(site), 2)
    yield "", Setup(model, cut, gradients=_rows_joined(mesh), data_mesh=data)


@layout("tp-sp", "rows of the head and parts of the sequence over the same ranks", ranks=2)
def tp_sp(site: Site) -> Variants:
    """Megatron's sequence parallelism: below the head gradients are those of the rank's tokens, and are added."""
    data, mesh = _meshes(site, site.rank.world)
    model = site.model(cls=SequenceParallelLM)
    assert isinstance(model, SequenceParallelLM)
    model.mesh = mesh

    def gradients(module: nn.Module) -> dict[str, Tensor | None]:
        found = full_gradients(module)
        for name, grad in found.items():
            if grad is not None and not name.startswith("lm_head."):
                dist.all_reduce(grad, group=mesh.get_group())
        return found

    yield "", Setup(_colwise(model, mesh), cut_pairs(_all_pairs(site), 2), gradients=gradients, data_mesh=data)


@layout("dp-tp", "DDP over pairs of ranks that share the vocabulary", ranks=4, multiple=2, counts=PAIRS)
def dp_tp(site: Site) -> Variants:
    """Ranks of a pair have the same tokens, which must not count twice."""
    data, mesh = _meshes(site, 2)
    model = site.model(cls=RowsOfHead)
    assert isinstance(model, RowsOfHead)
    module = DistributedDataParallel(model.keep_rows(mesh, [1, 1]), process_group=data.get_group())
    cut = dealt(site, data.size(), data.get_local_rank(), MICRO_BATCHES)
    yield "", Setup(module, cut, before=last_only(module), gradients=_rows_joined(mesh), data_mesh=data)


@layout("fsdp2-tp", "FSDP2 over pairs of ranks that share the vocabulary", ranks=4, multiple=2, counts=PAIRS)
def fsdp2_tp(site: Site) -> Variants:
    """The head is sharded over both meshes, and gathered over one."""
    data, mesh = _meshes(site, 2)
    for own in (False, True):
        model = _colwise(site.model(), mesh)
        for unit in [*model.blocks, *([model.lm_head] * own), model]:
            fully_shard(unit, mesh=data)
        cut = dealt(site, data.size(), data.get_local_rank(), MICRO_BATCHES)
        yield "the head a unit of its own" if own else "", Setup(model, cut, data_mesh=data)
