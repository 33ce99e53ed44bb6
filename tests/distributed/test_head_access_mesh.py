"""A vocabulary-parallel head inside FSDP2 units, on a 2 x 2 mesh of four processes (gloo).

Contract: ``head_weight`` hands out the gathered weight as the DTensor of the tensor-parallel mesh, in every layout, and
gradients of every parameter are those of one process with the whole batch, by the float64 oracle; the tokens of a
tensor-parallel pair are counted once.
"""

from __future__ import annotations

import warnings
from typing import Any

import pytest
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import Shard
from torch.distributed.tensor.parallel import ColwiseParallel, parallelize_module

from tests.distributed import head_layouts as layouts
from tests.distributed.head_layouts import LOSSES, WORLD, Layout
from tests.distributed.ranks import spawn
from tests.distributed.test_head_access import assert_same, oracle_gradients

pytestmark = pytest.mark.distributed
UNITS: dict[str, tuple[str, ...]] = {"root": (), "own": ("lm_head",), "norm": ("norm", "lm_head")}


def train(unit: tuple[str, ...], loss: str) -> dict[str, Any]:
    """Gradients of one step of two accumulated micro-batches."""
    mesh = init_device_mesh("cpu", (WORLD, 2), mesh_dim_names=("dp", "tp"))
    model = Layout().model()
    columns = ColwiseParallel(output_layouts=Shard(-1), use_local_output=False)
    parallelize_module(model.lm_head, mesh["tp"], columns)
    for block in model.blocks:
        fully_shard(block, mesh=mesh["dp"])
    if unit:
        modules = [model.get_submodule(name) for name in unit]
        fully_shard(modules if len(modules) > 1 else modules[0], mesh=mesh["dp"])
    fully_shard(model, mesh=mesh["dp"])
    data = layouts.batches(mesh["dp"].get_local_rank(), 0)
    for d, ctx in zip(data, layouts.contexts(loss, data), strict=True):
        model(d.ids, ctx).backward()
    return {name: layouts.whole(p.grad) for name, p in model.named_parameters()}


def job(rank: int) -> dict[Any, Any]:
    warnings.simplefilter("ignore")
    return {(name, loss): train(unit, loss) for name, unit in UNITS.items() for loss in LOSSES}


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> list[dict[Any, Any]]:
    """What all ranks saw."""
    return spawn(2 * WORLD, job, tmp_path_factory.mktemp("ranks"))


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("unit", UNITS)
def test_mesh_is_one_process(ranks: list[dict[Any, Any]], unit: str, loss: str) -> None:
    want = oracle_gradients(Layout(), loss)[0]
    for seen in ranks:
        assert_same(seen[unit, loss], want, unit)
