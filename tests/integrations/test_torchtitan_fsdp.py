"""Contract: under FSDP2 ``XlossLoss`` gives every gradient that torchtitan's own ``ChunkedLossWrapper`` gives, in each
layout of the head that torchtitan makes: a unit of its own, grouped with the norm, owned by the root; for two steps,
the second of two micro-batches. Two processes over gloo, each with its half of the batch. And with tensor parallelism,
both with the same batch and half of the head.
"""

from __future__ import annotations

import datetime
import tempfile
from functools import cache, partial
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor

from tests import budgets
from tests.integrations.comparisons import Comparison, worst
from tests.integrations.packages import need

need("torchtitan")
pytestmark = pytest.mark.distributed

WORLD, B, L, D, V = 2, 2, 8, 12, 31
LAYOUTS = ("FSDP2: head alone", "FSDP2: norm and head", "FSDP2: root")
TENSOR_PARALLEL = "lm_head split over the vocabulary"
WAYS = ("torchtitan", "xloss")


class Decoder(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(5)
        self.body = nn.Linear(D, D)
        self.norm = nn.LayerNorm(D)
        self.lm_head = nn.Linear(D, V, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        found: Tensor = self.norm(torch.tanh(self.body(x)))  # the lm_head is skipped
        return found


def micro_batches(rank: int, count: int = 2) -> list[tuple[Tensor, Tensor]]:
    gen = torch.Generator().manual_seed(rank)
    found = []
    for _ in range(count):
        labels = torch.randint(V, (B, L), generator=gen).masked_fill(torch.rand(B, L, generator=gen) < 0.2, -100)
        found.append((torch.randn(B, L, D, generator=gen), labels))
    return found


def loss_of(way: str) -> Any:
    from torchtitan.components.loss import ChunkedLossWrapper

    from xloss import CELossConfig
    from xloss.adapters.torchtitan import XlossLoss

    return (
        ChunkedLossWrapper.Config(num_chunks=2).build()
        if way == "torchtitan"
        else XlossLoss.Config(loss_cfg=CELossConfig(mode="chunk", chunk_size=5)).build()
    )


def sharded(layout: str) -> Any:
    from torch.distributed.fsdp import fully_shard

    model = Decoder()
    fully_shard(model.body)
    if layout == LAYOUTS[0]:
        fully_shard(model.lm_head)
    elif layout == LAYOUTS[1]:
        fully_shard([model.norm, model.lm_head], reshard_after_forward=False)
    fully_shard(model)
    return model


def steps(layout: str, way: str, rank: int) -> dict[str, Tensor]:
    """Whole gradients of two steps, summed over ranks: of one micro-batch, then of two."""
    model, loss_fn = sharded(layout), loss_of(way)
    loss_fn.set_lm_head(model.lm_head)
    found = {}
    for step, batch in enumerate((micro_batches(rank)[:1], micro_batches(rank))):
        total = torch.stack([(labels != -100).sum() for _, labels in batch]).sum()
        dist.all_reduce(total)
        model.zero_grad()
        for x, labels in batch:
            loss_fn(model(x), labels, total)[0].backward()
        for name, p in model.named_parameters():
            # torchtitan turns FSDP's division by the ranks off, for which gloo has no reduction
            found[f"{step} {name}"] = p.grad.full_tensor() * WORLD
    return found


def tensor_parallel(way: str) -> dict[str, Tensor]:
    """Whole gradients where both ranks have the same tokens and half of the vocabulary each."""
    from torchtitan.distributed.utils import set_spmd_backend

    set_spmd_backend("partial_dtensor")  # of torchtitan's two ways, that with DTensors
    mesh = init_device_mesh("cpu", (WORLD,), mesh_dim_names=("tp",))
    model, loss_fn = Decoder(), loss_of(way)
    model.lm_head.weight = nn.Parameter(distribute_tensor(model.lm_head.weight.detach(), mesh, [Shard(0)]))
    loss_fn.set_lm_head(model.lm_head)
    ((x, labels),) = micro_batches(0, 1)
    hidden_states = DTensor.from_local(model(x), mesh, [Replicate()])
    loss_fn(hidden_states, labels, (labels != -100).sum())[0].backward()
    grads = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    return {name: g.full_tensor() if isinstance(g, DTensor) else g for name, g in grads.items()}


def run_rank(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", f"file://{folder}/store", datetime.timedelta(seconds=60), rank=rank, world_size=WORLD
    )
    try:
        found = {f"{layout}/{way}": steps(layout, way, rank) for layout in LAYOUTS for way in WAYS}
        found |= {f"{TENSOR_PARALLEL}/{way}": tensor_parallel(way) for way in WAYS}
        if rank == 0:
            torch.save(found, Path(folder) / "found.pt")
    finally:
        dist.destroy_process_group()


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Tensor]]:
    return spawned(tmp_path_factory.mktemp("fsdp"))


def spawned(folder: Path) -> dict[str, dict[str, Tensor]]:
    mp.spawn(run_rank, (str(folder),), nprocs=WORLD)
    out: dict[str, dict[str, Tensor]] = torch.load(folder / "found.pt")
    return out


def alone() -> dict[str, Tensor]:
    """The same steps by plain autograd, in one process."""
    gradients = {}
    for step in (0, 1):
        model = Decoder()
        batch = [pair for rank in range(WORLD) for pair in micro_batches(rank)[: step + 1]]
        x, labels = (torch.cat(part) for part in zip(*batch, strict=True))
        nn.functional.cross_entropy(model.lm_head(model(x)).flatten(0, 1), labels.flatten()).backward()
        gradients |= {f"{step} {name}": p.grad for name, p in model.named_parameters() if p.grad is not None}
    return gradients


@pytest.mark.parametrize("layout", [*LAYOUTS, TENSOR_PARALLEL])
def test_gradients_are_torchtitans(found: dict[str, dict[str, Tensor]], layout: str) -> None:
    assert worst(found[f"{layout}/xloss"], found[f"{layout}/torchtitan"]) <= budgets.FLOAT32_FLOOR


@pytest.mark.parametrize("layout", LAYOUTS)
def test_gradients_are_those_of_one_process(found: dict[str, dict[str, Tensor]], layout: str) -> None:
    assert worst(found[f"{layout}/xloss"], alone()) <= budgets.FLOAT32_FLOOR


@cache
def everything() -> dict[str, dict[str, Tensor]]:
    with tempfile.TemporaryDirectory() as folder:
        return spawned(Path(folder))


def difference(layout: str) -> float:
    return worst(everything()[f"{layout}/xloss"], everything()[f"{layout}/torchtitan"])


ADAPTER = "xloss.adapters.torchtitan"
COMPARISONS = [
    Comparison(ADAPTER, "torchtitan", f"2 ranks, {x}", partial(difference, x)) for x in [*LAYOUTS, TENSOR_PARALLEL]
]
