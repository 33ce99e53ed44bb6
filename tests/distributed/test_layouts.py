"""One global batch over four processes (gloo), cut at random: data x sequence x tensor parallel.

Contract: a loss under any reduction, its sequences dealt at random to ranks and micro-batches (some ranks with no
micro-batch, some with nothing but ignored tokens), packed or padded, split over sequence-parallel ranks or not, held
twice by tensor-parallel ranks or not, gives the loss, gradients and metrics of one process. Calibration is one sum over
the ranks, the same collectives on every rank whatever its data.
"""

from __future__ import annotations

import random
from dataclasses import dataclass
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from tests import budgets
from tests.distributed.cut import Batches, Cut, merged, run_rank
from tests.distributed.ranks import spawn
from tests.property import registry
from tests.property.registry import EVERYTHING, PLAIN, VANILLA, policy, preference, reduction_forms
from tests.property.world import WORLD as STEP
from tests.property.world import Case, ask
from xloss import CELossConfig, CELossContextInputItem, TokenRanks
from xloss.distributed import all_gather, all_gather_object, all_reduce_max, all_reduce_sum, groups

pytestmark = pytest.mark.distributed
WORLD = 4
GRIDS = {"dp4": (4, 1, 1), "dp2-sp2": (2, 2, 1), "dp2-tp2": (2, 1, 2), "sp4": (1, 4, 1), "sp2-tp2": (1, 2, 2)}
PAIRS = ((0, 1), (2, 3), (4, 5), (6, 7), (8, 9))
CASES = dict(list(PLAIN.items())[::2]) | {f"reduction-{n}": c for n, c in reduction_forms().items()}
"""Half of the losses (`test_sequence_parallel` has them all) and every reduction."""


@dataclass(frozen=True)
class Job:
    name: str
    grid: str
    cut: Cut


def dealt(rng: random.Random, ranks: int, apart: bool) -> tuple[Batches, ...]:
    """Pairs of sequences in any order, in micro-batches of any size, each on any rank; or in one micro-batch."""
    pairs = rng.sample(PAIRS, len(PAIRS))
    cuts = sorted(rng.sample(range(1, len(pairs)), rng.randrange(4))) if apart else []
    parts = [pairs[a:b] for a, b in zip([0, *cuts], [*cuts, len(pairs)], strict=True)]
    found: list[list[tuple[int, ...]]] = [[] for _ in range(ranks)]
    for part in parts:
        rng.choice(found).append(tuple(i for pair in part for i in pair))
    return tuple(map(tuple, found))


def random_jobs() -> list[Job]:
    jobs = []
    for seed, (name, case) in enumerate(CASES.items()):
        rng = random.Random(seed)
        grid = rng.choice(list(GRIDS))
        batches = dealt(rng, GRIDS[grid][0], not case.by_rank)
        if case.by_place:
            batches = ((tuple(range(10)),), *(() for _ in range(GRIDS[grid][0] - 1)))
        packed = case.by_place or rng.random() < 0.6
        jobs.append(Job(name, grid, Cut(batches, packed, rng.choice(["contiguous", "head_tail"]), rng.random() < 0.3)))
    return jobs


JOBS = random_jobs()
COUNTED: dict[str, tuple[Case, int]] = {
    "ce": (registry.Case(CELossConfig, CELossContextInputItem), 1),
    "grpo": (policy(VANILLA, **EVERYTHING, loss_reduction="sample", entropy_reduction="token"), 1),
    "oreal": (PLAIN["step-oreal-default"], 1),
    "kto": (preference("kto"), 1),
    "prompt": (policy(VANILLA, loss_reduction="prompt"), 3),  # their largest number first, announced
}
UNEVEN: tuple[Batches, ...] = (((0, 1), (2, 3, 6, 7)), (), ((8, 9),), ((4, 5),))


def collectives(case: Case, rank: int) -> list[str]:
    """Everything this rank exchanges where batches are built."""
    seen: list[str] = []
    real = dist.all_reduce

    def recorded(tensor: torch.Tensor, op: Any, group: Any = None) -> None:
        seen.append(f"{op} {tuple(tensor.shape)} {tensor.dtype}")
        real(tensor, op=op, group=group)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(dist, "all_reduce", recorded)
        cfg, live = case.make(), STEP.live
        items = [STEP.item(case, b, False, torch.float64, None, live) for b in UNEVEN[rank]]
        cfg.loss_ctx_cls.build_batches_loss_kwargs(items, cfg)
    return seen


def of_a_grid(mesh: DeviceMesh) -> dict[str, Any]:
    """Reductions over a mesh of two dimensions, one group after the other."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(groups, "groups_of", lambda ranks: mesh.get_all_groups())
        mine = torch.tensor([float(dist.get_rank())])
        return {
            "sum": all_reduce_sum(mine, mesh).tolist(),
            "max": all_reduce_max(dist.get_rank(), mesh),
            "gather": all_gather(mine, mesh).flatten().tolist(),
            "objects": all_gather_object(dist.get_rank(), mesh),
            "size": groups.world_size(mesh),
        }


def job(rank: int) -> dict[str, Any]:
    meshes = {name: init_device_mesh("cpu", size, mesh_dim_names=("dp", "sp", "tp")) for name, size in GRIDS.items()}
    seen = []
    for todo in JOBS:
        mesh = meshes[todo.grid]
        sp_mesh = mesh["sp"] if mesh["sp"].size() > 1 else None
        data_mesh = mesh["dp", "sp"] if mesh["tp"].size() > 1 else None
        dp = mesh.get_local_rank("dp")
        seen.append(run_rank(CASES[todo.name], todo.cut, dp, sp_mesh, data_mesh, mode="chunk", chunk_size=5))
    alone = TokenRanks(meshes["dp2-tp2"]["tp"])
    return {
        "jobs": seen,
        "collectives": {name: collectives(case, rank) for name, (case, _) in COUNTED.items()},
        "grid": of_a_grid(init_device_mesh("cpu", (2, 2))),
        "tp": [float(alone.sum([torch.ones(3)]).value()), alone.gradient_factor("mean"), alone.gradient_factor("sum")],
    }


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    return spawn(WORLD, job, tmp_path_factory.mktemp("ranks"))


@pytest.mark.parametrize("number", range(len(JOBS)), ids=[f"{j.name}-{j.grid}" for j in JOBS])
def test_any_cut_is_one_process(ranks: list[dict[str, Any]], number: int) -> None:
    todo = JOBS[number]
    case, (dp, sp, tp) = CASES[todo.name], GRIDS[todo.grid]
    want = ask(case)
    for copy in range(tp):
        seen = [[ranks[(d * sp + s) * tp + copy]["jobs"][number] for s in range(sp)] for d in range(dp)]
        got = merged(seen, todo.cut)
        factor = 1 if todo.name == "logprob" else dp * sp
        for field, value in {"loss": want.loss, **want.grads}.items():
            close(field, got[field] / factor, value)
        for metrics in got["metrics"]:
            assert metrics.keys() == want.metrics.keys()
            for figure, value in want.metrics.items():
                close(figure, torch.tensor(metrics[figure], dtype=torch.float64), value)


def close(name: str, got: torch.Tensor, want: torch.Tensor) -> None:
    """To float32, the precision of calibrated weights."""
    found, allowed = budgets.error(got, want), budgets.F32_GRADIENT * (1.0 + budgets.norm(want))
    assert found <= allowed, f"{name}: error {found:.3g} > {allowed:.3g}"


@pytest.mark.parametrize("name", COUNTED)
def test_one_exchange_a_step(ranks: list[dict[str, Any]], name: str) -> None:
    """On ranks with two micro-batches, none, an ignored one, and one."""
    first, *others = [seen["collectives"][name] for seen in ranks]
    assert len(first) == COUNTED[name][1]
    assert all(other == first for other in others)


def test_mesh_of_several_dimensions(ranks: list[dict[str, Any]]) -> None:
    assert all(
        seen["grid"] == {"sum": [6.0], "max": 3, "gather": [0.0, 1, 2, 3], "objects": [0, 1, 2, 3], "size": 4}
        for seen in ranks
    )


def test_sums_are_over_the_ranks_given(ranks: list[dict[str, Any]]) -> None:
    assert all(seen["tp"] == [6.0, 2.0, 1.0] for seen in ranks)
