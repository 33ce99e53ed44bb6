"""Soft cross-entropy and MTP against the oracle and against cross-entropy.

Contract: in every mode and plan, whatever the chunk size and the cut into micro-batches, losses and gradients are the
oracle's to rounding; what stands at a masked token or target, NaN included, changes nothing; labels are rolled inside
sequences, once.
"""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from tests.oracle import ce, grpo
from tests.property.helpers import leaf
from tests.property.steps import contexts
from tests.property.supervised import BOUNDS, RUNS, H, T, V, assert_same, both_dtypes, every_run, gold, step, tensors
from xloss import (
    CELossConfig,
    CELossContextInputItem,
    MTPLossConfig,
    MTPLossContextInputItem,
    SoftCELossConfig,
    SoftCELossContextInputItem,
)

# -- K targets


def _targets(seed: int = 1, several: int = 3) -> tuple[Tensor, Tensor]:
    g = torch.Generator().manual_seed(seed)
    targets = torch.randint(0, V, (1, T, several), generator=g)
    weights = torch.randn(1, T, several, generator=g, dtype=torch.float64)
    if several > 2:
        targets[0, 2, 1] = targets[0, 2, 0]  # one token twice
        targets[0, 4, 2], targets[0, 8, :2] = -100, -100
        weights[0, 9, 1], weights[0, 10] = 0.0, 0.0
    return targets, weights


def _soft(reduction: str, labels: Tensor, targets: Tensor, weights: Tensor) -> Any:
    live = (labels[0] != -100).double()
    return lambda z: (ce.soft(z, targets[0], weights[0]) * live).sum() / (live.sum() if reduction == "token" else 1.0)


@every_run
@both_dtypes
@pytest.mark.parametrize("reduction", ["sum", "token"])
@pytest.mark.parametrize("chunk_size", [None, 1, 5])
def test_soft_cross_entropy(run: dict[str, Any], dtype: torch.dtype, reduction: str, chunk_size: int | None) -> None:
    hidden, weight, labels = tensors(dtype)
    targets, weights = _targets()
    want = gold(_soft(reduction, labels, targets, weights), hidden, weight)
    hidden[0, 7] = torch.nan
    weights[0, 7], weights[0, 8, 0] = torch.inf, torch.nan  # at an ignored token, at an ignored target
    targets[0, 7] = V + 99  # no token of the vocabulary, but nobody asks for it
    item = SoftCELossContextInputItem(shifted_labels=labels, target_tokens=targets, target_weights=weights.to(dtype))
    cfg = SoftCELossConfig(loss_reduction=reduction, chunk_size=chunk_size, **run)
    assert_same(step(cfg, item, hidden, weight), want, dtype)


def test_one_target_is_weighted_cross_entropy() -> None:
    hidden, weight, labels = tensors()
    _, weights = _targets(several=1)
    soft = SoftCELossContextInputItem(shifted_labels=labels, target_tokens=labels[..., None], target_weights=weights)
    hard = CELossContextInputItem(shifted_labels=labels, token_weight=weights[..., 0])
    assert_same(
        step(SoftCELossConfig(), soft, hidden, weight), step(CELossConfig(loss_reduction="sum"), hard, hidden, weight)
    )


def test_all_targets_are_a_distribution() -> None:
    """K = V with q as weights: torch's cross-entropy with probabilities, which is Megatron's for its q."""
    hidden, weight, labels = tensors()
    live = labels[0] != -100
    q = torch.full((1, T, V), 0.2 / (V - 1), dtype=torch.float64)
    q.scatter_(2, labels.masked_fill(~live, 0)[..., None], 0.8)
    targets = torch.arange(V).expand(1, T, V).contiguous()
    item = SoftCELossContextInputItem(shifted_labels=labels, target_tokens=targets, target_weights=q)
    soft = step(SoftCELossConfig(loss_reduction="token"), item, hidden, weight)
    assert_same(soft, gold(lambda z: F.cross_entropy(z[live], q[0][live]), hidden, weight))
    smooth = CELossConfig(label_smoothing=0.2, label_smoothing_kind="megatron")
    assert_same(soft, step(smooth, CELossContextInputItem(shifted_labels=labels), hidden, weight))


@pytest.mark.parametrize("skip", [False, True])
def test_targets_of_no_weight_have_statistics_only(skip: bool) -> None:
    hidden, weight, labels = tensors()
    targets, weights = _targets()
    item = SoftCELossContextInputItem(shifted_labels=labels, target_tokens=targets, target_weights=weights)
    (ctx,) = contexts(SoftCELossConfig(mode="chunk", skip_zero_grad_rows=skip), [item])
    _, info = ctx.forward(leaf(hidden), leaf(weight))
    assert info.logprobs is not None and info.logprobs.shape == targets.shape
    want = torch.log_softmax((hidden @ weight.T)[0], 1).gather(1, targets[0].clamp(min=0))
    left_out = (targets[0] == -100) | (labels[0] == -100).unsqueeze(1)
    left_out = left_out | ((weights[0].masked_fill(left_out, 0) == 0).all(1, keepdim=True) & skip)
    torch.testing.assert_close(info.logprobs[0], want.masked_fill(left_out, 0))
    assert info.plan.num_grad == int(((weights[0] != 0) & ~left_out).any(1).sum())


def test_a_banned_target_of_no_weight() -> None:
    """A head bias of -inf at a target with weight 0: no NaN."""
    hidden, weight, labels = tensors()
    targets, weights = _targets()
    weights[..., 2] = 0
    targets[..., 2], targets[..., :2] = 6, targets[..., :2].where(targets[..., :2] != 6, 5)
    bias = torch.zeros(V, dtype=torch.float64)
    bias[6] = -torch.inf
    item = SoftCELossContextInputItem(shifted_labels=labels, target_tokens=targets, target_weights=weights)
    for run in RUNS.values():
        (ctx,) = contexts(SoftCELossConfig(**run), [item])
        leaves = [leaf(hidden), leaf(weight)]
        loss, _ = ctx.forward(*leaves, bias)
        assert all(bool(torch.isfinite(x).all()) for x in (loss, *torch.autograd.grad(loss, leaves)))


def test_soft_kwargs_in_pieces() -> None:
    """chunk, cat: K rides along; the pieces' losses and gradients are the whole's."""
    hidden, weight, labels = tensors()
    targets, weights = _targets()
    cfg = SoftCELossConfig(loss_reduction="sample")
    item = SoftCELossContextInputItem(shifted_labels=labels, target_tokens=targets, target_weights=weights)
    (ctx,) = contexts(cfg, [item], [BOUNDS])
    pieces = ctx.loss_kwargs.chunk(5)
    assert [p.target_tokens.shape for p in pieces] == [(1, 5, 3), (1, 5, 3), (1, 2, 3)]
    joined = type(ctx).cat([type(ctx)(cfg, p) for p in pieces])
    assert torch.equal(joined.loss_kwargs.target_tokens, targets)
    whole, again = [leaf(hidden), leaf(weight)], [leaf(hidden.clone()), leaf(weight.clone())]
    loss = ctx.forward(*whole)[0]
    total = torch.stack(
        [type(ctx)(cfg, p).forward(h, again[1])[0] for p, h in zip(pieces, again[0].split(5, 1), strict=True)]
    ).sum()
    assert_same(
        [total.detach(), *torch.autograd.grad(total, again)], [loss.detach(), *torch.autograd.grad(loss, whole)]
    )


# -- multi-token prediction


def _mtp_gold(labels: Tensor, depth: int, rollout: Tensor | None = None) -> Any:
    bounds = BOUNDS.tolist()
    rolled = torch.tensor(ce.rolled(labels[0].tolist(), bounds, depth, -100))
    if rollout is None:
        return lambda z: F.cross_entropy(z, rolled, reduction="sum") / max(int((rolled != -100).sum()), 1)
    live = rolled != -100
    rolled_rollout = torch.tensor(ce.rolled(rollout[0].tolist(), bounds, depth, 0.0), dtype=torch.float64)[live]

    def want(z: Tensor) -> Tensor:
        logprobs = torch.log_softmax(z[live], 1).gather(1, rolled[live, None])[:, 0]
        return grpo.kl(logprobs, rolled_rollout, "k3").sum() / max(int(live.sum()), 1)

    return want


@every_run
@both_dtypes
@pytest.mark.parametrize("depth", [1, 2, 6])
@pytest.mark.parametrize("kl", [False, True], ids=["ce", "kl"])
def test_mtp(run: dict[str, Any], dtype: torch.dtype, depth: int, kl: bool) -> None:
    """Depth 6 leaves nothing: the longest sequence has six tokens."""
    hidden, weight, labels = tensors(dtype)
    rollout = -torch.rand(1, T, dtype=dtype) * 3
    want = gold(_mtp_gold(labels, depth, rollout if kl else None), hidden, weight)
    hidden[0, -1], rollout[0, 3] = torch.nan, torch.nan  # the last position predicts nothing; label 3 is ignored
    cfg = MTPLossConfig(mtp_depth=depth, kl_loss_type="k3" if kl else None, chunk_size=5, **run)
    item = MTPLossContextInputItem(shifted_labels=labels, rollout_logprobs=rollout if kl else None)
    assert_same(step(cfg, item, hidden, weight), want, dtype)


def test_mtp_is_cross_entropy_on_rolled_labels() -> None:
    """Options, weights and reductions are those of cross-entropy; calibrating twice rolls once."""
    hidden, weight, labels = tensors()
    token_weight, classes = torch.rand(1, T), torch.rand(V)
    options: dict[str, Any] = {"loss_reduction": "sample", "focal_gamma": 2.0, "z_loss_coef": 0.1}
    rolled = torch.tensor([ce.rolled(labels[0].tolist(), BOUNDS.tolist(), 2, -100)])
    rolled_weight = torch.tensor([ce.rolled(token_weight[0].tolist(), BOUNDS.tolist(), 2, 0.0)])
    want = step(
        CELossConfig(**options),
        CELossContextInputItem(shifted_labels=rolled, token_weight=rolled_weight, class_weight=classes),
        hidden,
        weight,
    )
    cfg = MTPLossConfig(mtp_depth=2, **options)
    item = MTPLossContextInputItem(shifted_labels=labels, token_weight=token_weight, class_weight=classes)
    assert_same(step(cfg, item, hidden, weight), want)
    ctx = cfg.build({"shifted_labels": labels, "token_weight": token_weight, "class_weight": classes})
    assert ctx is not None
    for _ in range(2):
        (built,) = type(ctx).build_batches([ctx], [BOUNDS])
    leaves = [leaf(hidden), leaf(weight)]
    loss, _ = built.forward(*leaves)
    assert_same([loss.detach(), *torch.autograd.grad(1.7 * loss, leaves)], want)


def test_mtp_detached_head() -> None:
    hidden, weight, labels = tensors()
    bias = torch.zeros(V, dtype=torch.float64, requires_grad=True)
    leaves = [leaf(hidden), leaf(weight)]
    item = MTPLossContextInputItem(shifted_labels=labels)
    (ctx,) = contexts(MTPLossConfig(detach_mtp_lm_head_weight=True), [item], [BOUNDS])
    loss, _ = ctx.forward(*leaves, bias)
    loss.backward()
    (free,) = contexts(MTPLossConfig(), [item], [BOUNDS])
    (want,) = torch.autograd.grad(free.forward(*leaves, bias)[0], leaves[:1])
    assert leaves[1].grad is None and bias.grad is None
    torch.testing.assert_close(leaves[0].grad, want)
    assert ctx.explain(*leaves, bias).grad_bytes < free.explain(*leaves, bias).grad_bytes


@pytest.mark.parametrize("build", [CELossConfig, SoftCELossConfig, MTPLossConfig])
@every_run
def test_nothing_to_learn(build: Any, run: dict[str, Any]) -> None:
    """All labels ignored, and no tokens at all: 0 with zero gradients."""
    for count in (0, 4):
        labels = torch.full((1, count), -100)
        fields: dict[str, Any] = {"shifted_labels": labels}
        if build is SoftCELossConfig:
            fields |= {"target_tokens": labels[..., None], "target_weights": torch.full((1, count, 1), torch.nan)}
        item = {
            CELossConfig: CELossContextInputItem,
            SoftCELossConfig: SoftCELossContextInputItem,
            MTPLossConfig: MTPLossContextInputItem,
        }[build](**fields)
        hidden = torch.full((1, count, H), torch.nan, dtype=torch.float64)
        bounds = torch.tensor([0, count])
        for x in step(build(**run), item, hidden, tensors()[1], bounds):
            assert torch.equal(x, torch.zeros_like(x))


@pytest.mark.parametrize("name", ["soft", "mtp"])
@pytest.mark.parametrize("order", [(0, 1, 2, 3), (3, 2, 0, 1)])
def test_a_sequence_a_micro_batch(name: str, order: tuple[int, ...]) -> None:
    """The pack cut into its sequences, in any order: the same loss and gradients."""
    hidden, weight, labels = tensors()
    targets, weights = _targets()
    cfg: Any = SoftCELossConfig(loss_reduction="token") if name == "soft" else MTPLossConfig(loss_reduction="sample")

    def item(span: slice) -> Any:
        if name == "soft":
            return SoftCELossContextInputItem(
                shifted_labels=labels[:, span], target_tokens=targets[:, span], target_weights=weights[:, span]
            )
        return MTPLossContextInputItem(shifted_labels=labels[:, span])

    spans = [slice(*pair) for pair in pairwise(BOUNDS.tolist())]
    spans = [spans[i] for i in order]
    leaves = [leaf(hidden), leaf(weight)]
    parts = contexts(cfg, [item(s) for s in spans], [torch.tensor([0, s.stop - s.start]) for s in spans])
    loss = torch.stack([c.forward(leaves[0][:, s], leaves[1])[0] for c, s in zip(parts, spans, strict=True)]).sum()
    ours = [loss.detach(), *torch.autograd.grad(1.7 * loss, leaves)]
    assert_same(ours, step(cfg, item(slice(0, T)), hidden, weight))
