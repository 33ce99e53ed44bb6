"""``mode="fused"`` over a vocabulary that three processes share, under the interpreter; one of them holds no row.

Contract: every statistic and gradient of every plan, with chunks of logits and without logits, in several strips, is
the float64 oracle's, or eager mode's in float64; the kernel that knows loss formulas, which would need the whole row,
stays out of it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from tests import budgets
from tests.distributed import vocab_ranks
from tests.interpret.test_no_logits import ALL, HEADS, NO_LOGITS, STRIPS, WIDE, gold, tensors, upstream
from tests.oracle import head as oracle
from tests.property.registry import PLAIN
from tests.property.world import WORLD
from xloss import VocabShard, linear_logprobs

pytestmark = pytest.mark.distributed
BOUNDS = ((0, 1300), (1300, 1300), (1300, WIDE))  # the first has two strips of 1024 columns
WAYS: dict[str, dict[str, Any]] = {
    "chunks": {"mode": "fused", "chunk_size": 7},
    "no logits": NO_LOGITS | {"chunk_size": 11},
    "strips": STRIPS,
}
KINDS = {"softcap": (1, HEADS["softcap"]), "several labels": (3, HEADS["all"])}
CASES = ("policy-vanilla", "ce", "soft", "step-everything")
SMALL = vocab_ranks.SPLITS["empty-middle"]


def several(kind: str) -> int:
    labels, _ = KINDS[kind]
    return labels if labels > 1 else 0


def job(rank: int) -> Callable[[], dict[Any, Any]]:
    built = {
        (name, way): WORLD.build(PLAIN[name], grad_reduce="sum", **{"chunk_size": 5} | how)
        for name in CASES
        for way, how in WAYS.items()
        if way != "strips"
    }

    def run() -> dict[Any, Any]:
        found = {key: vocab_ranks.step(PLAIN[key[0]], ctx, SMALL, rank, torch.float32) for key, ctx in built.items()}
        return found | {(kind, way): statistics(kind, how, rank) for kind in KINDS for way, how in WAYS.items()}

    return run


def statistics(kind: str, how: dict[str, Any], rank: int) -> list[Tensor]:
    """Statistics of every kind, then gradients of hidden states, and of this rank's weight and bias."""
    hidden, weight, bias, labels = tensors(torch.float32, WIDE, several=several(kind))
    rows = slice(*BOUNDS[rank])
    leaves = [x.clone().requires_grad_() for x in (hidden, weight[rows], bias[rows])]
    head = VocabShard(leaves[1], offset=rows.start, vocab_size=WIDE, group=dist.group.WORLD, bias=leaves[2])
    stats = linear_logprobs(leaves[0], head, labels, **KINDS[kind][1], **ALL, **how)
    values = [getattr(stats, name) for name in oracle.STATISTICS]
    if kind == "softcap":
        with torch.no_grad():
            quiet = linear_logprobs(leaves[0], head, labels, **KINDS[kind][1], **ALL, **how)
        assert all(torch.equal(v, getattr(quiet, n)) for n, v in zip(oracle.STATISTICS, values, strict=True))
    assert stats.top1 is not None
    return [*(v.detach() for v in values), stats.top1, *torch.autograd.grad(upstream(values), leaves)]


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> list[dict[Any, Any]]:
    found = vocab_ranks.spawn(tmp_path_factory.mktemp("fused"), len(BOUNDS), {"fused": job})
    return [f["fused"] for f in found]


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("kind", KINDS)
def test_statistics_and_gradients(ranks: list[dict[Any, Any]], kind: str, way: str) -> None:
    hidden, weight, bias, labels = tensors(torch.float32, WIDE, several=several(kind))
    want = gold([hidden, weight, bias], labels, KINDS[kind][1])
    seen = [r[kind, way] for r in ranks]
    got = [*seen[0][:7], torch.cat([s[7] for s in seen]), torch.cat([s[8] for s in seen])]
    names = (*oracle.STATISTICS, "top1", "d hidden", "d weight", "d bias")
    for name, ours, theirs in zip(names, got, want, strict=True):
        if name == "top1":
            assert torch.equal(ours, theirs)
            continue
        error = float((ours - theirs).abs().max()) / max(float(theirs.abs().max()), 1e-3)
        assert error <= budgets.FUSED_RELATIVE[torch.float32], f"{name}: {error:.2g}"
    for other in seen[1:]:
        assert all(torch.equal(a, b) for a, b in zip(other[:7], seen[0][:7], strict=True))


@pytest.mark.parametrize("way", ["chunks", "no logits"])
@pytest.mark.parametrize("name", CASES)
def test_losses(ranks: list[dict[Any, Any]], name: str, way: str) -> None:
    seen = [r[name, way] for r in ranks]
    got, want = vocab_ranks.as_result(seen, SMALL), WORLD.run(PLAIN[name], mode="eager")
    assert f"mode fused: {got.infos[0].plan.num_rows} tokens" in str(got.infos[0].plan)
    allowed = budgets.FUSED_RELATIVE[torch.float32]
    assert float((got.loss - want.loss).abs()) <= allowed * (1 + float(want.loss.abs()))
    for leaf, grad in want.grads.items():
        error = float((got.grads[leaf] - grad).abs().max()) / max(float(grad.abs().max()), 1e-3)
        assert error <= 2 * allowed, f"d {leaf}: {error:.2g}"
