"""Running one optimizer step of a loss, by xloss and by the oracle, for the tests of this folder."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from tests import budgets
from tests.oracle import ce, grpo, head
from tests.property.helpers import leaf
from tests.strategies import StepCase
from xloss import BaseLossConfig, CELossContextInputItem, LossInfo, RLLossContextInputItem


@dataclass
class Step:
    """Losses of the micro-batches, and gradients of their sum with respect to hidden states, weight and bias."""

    losses: list[Tensor]
    hidden: list[Tensor]
    weight: Tensor
    bias: Tensor | None
    infos: list[LossInfo]
    kwargs: list[Any]

    @property
    def total(self) -> Tensor:
        return torch.stack([x.detach() for x in self.losses]).sum()


@dataclass
class GoldStep(Step):
    """The same from the oracle, with the sizes that rounding is measured against."""

    loss_scale: float = 0.0  # sum of |summand|
    max_logit: float = 0.0
    adjoint: float = 0.0  # norm of d loss / d statistics of the step
    stats: list[head.Stats] | None = None


def rl_items(case: StepCase) -> list[RLLossContextInputItem]:
    return [
        RLLossContextInputItem(
            shifted_labels=b.labels,
            advantages=b.advantages,
            old_logprobs=b.old,
            ref_logprobs=b.ref,
            is_weights=b.is_weights,
        )
        for b in case.batches
    ]


def ce_items(case: StepCase) -> list[CELossContextInputItem]:
    """Importance weights serve as free token weights; NaN stands at ignored tokens."""
    return [
        CELossContextInputItem(
            shifted_labels=b.labels,
            token_weight=None if b.is_weights is None else b.is_weights.masked_fill(b.labels == -100, torch.nan),
        )
        for b in case.batches
    ]


def head_fields(case: StepCase) -> dict[str, Any]:
    """The config fields that describe the head of a case."""
    temperature = case.head.temperature
    assert isinstance(temperature, float)
    return {
        "temperature": temperature,
        "softcap": case.head.softcap,
        "logit_scale": case.head.logit_scale,
        "chunk_size": case.chunk_size,
    }


def contexts(cfg: BaseLossConfig, items: Sequence[Any], cu_seq_lens: Sequence[Tensor] | None = None) -> list[Any]:
    ctx_cls = cfg.loss_ctx_cls
    built = ctx_cls.build_batches_loss_kwargs(items, cfg, cu_seq_lens_list=cu_seq_lens)
    return [ctx_cls(cfg, kwargs) for kwargs in built]


def run_step(cfg: BaseLossConfig, items: Sequence[Any], case: StepCase, upstream: float = 1.0) -> Step:
    """Forward every micro-batch, then differentiate `upstream` times the sum of the losses."""
    hidden = [leaf(h) for h in case.hidden]
    weight, bias = leaf(case.weight), leaf(case.bias)
    built = contexts(cfg, items, case.cu_seq_lens)
    outs = [c.forward(h, weight, bias) for c, h in zip(built, hidden, strict=True)]
    losses = [loss for loss, _ in outs]
    inputs = [*hidden, weight] + ([] if bias is None else [bias])
    grads = list(torch.autograd.grad(upstream * torch.stack(losses).sum(), inputs))
    last = None if bias is None else grads.pop()
    return Step(losses, grads[:-1], grads[-1], last, [info for _, info in outs], [c.loss_kwargs for c in built])


def gold_step(case: StepCase, got: Step, objective: grpo.Objective | None = None, **ce_options: Any) -> GoldStep:
    """The step by the oracle: GRPO when an objective is given, else cross-entropy with `reduction` and its options.

    The weights that calibration made are held against the oracle's in their own precision and then taken over, so that
    loss and gradients can be held to float64.
    """
    leaves = head.leaves(*case.hidden, case.weight, case.bias)
    hidden, weight, bias = leaves[:-2], leaves[-2], leaves[-1]
    stats = [head.token_stats(h, weight, b.labels, bias, case.head) for h, b in zip(hidden, case.batches, strict=True)]
    if objective is None:
        terms = _ce_terms(case, got, stats, **ce_options)
    else:
        terms = _policy_terms(case, got, stats, objective)
    losses = [t.sum() for t in terms]
    total = torch.stack(losses).sum()
    adjoints = head.grads(total, [getattr(s, n) for s in stats for n in head.STATISTICS], keep_graph=True)
    grads = head.grads(total, leaves)
    return GoldStep(
        losses,
        grads[:-2],
        grads[-2],
        grads[-1],
        infos=[],
        kwargs=[],
        loss_scale=sum(float(t.detach().abs().sum()) for t in terms),
        max_logit=max_logit(case),
        adjoint=sum(budgets.norm(g) ** 2 for g in adjoints) ** 0.5,
        stats=stats,
    )


def _ce_terms(case: StepCase, got: Step, stats: list[head.Stats], **options: Any) -> list[Tensor]:
    reduction = options.pop("reduction", "token")
    labels = [b.labels for b in case.batches]
    want = ce.step_weights(labels, case.cu_seq_lens, reduction, [b.is_weights for b in case.batches])
    ours = [calibrated("loss_weight", k.loss_weight, w) for k, w in zip(got.kwargs, want, strict=True)]
    return [w * ce.token_loss(s, **options) for s, w in zip(stats, ours, strict=True)]


def _policy_terms(case: StepCase, got: Step, stats: list[head.Stats], objective: grpo.Objective) -> list[Tensor]:
    terms = []
    wanted = grpo.step_weights(case.batches, objective)
    for s, batch, want, kwargs in zip(stats, case.batches, wanted, got.kwargs, strict=True):
        taken = {n: calibrated(n, getattr(kwargs, f"{n}_loss_weight"), w) for n, w in vars(want).items()}
        terms.append(grpo.token_loss(s, batch, objective, grpo.Weights(**taken)))
    return terms


def calibrated(name: str, ours: Tensor | None, want: Tensor) -> Tensor:
    """Our weights in float64, after they were found right to float32, their precision. None stands for 0."""
    ours = torch.zeros_like(want) if ours is None else ours
    budgets.assert_rounding(f"{name} weight", ours.float(), want, 0.0, 0.0)
    return ours.double()


def max_logit(case: StepCase) -> float:
    bias = 0 if case.bias is None else case.bias.double()
    raw = [(h.double() @ case.weight.double().t() + bias).abs() for h in case.hidden]
    slope = case.head.logit_scale / float(case.head.temperature)
    return max(float(r[r.isfinite()].max()) if r.numel() else 0.0 for r in raw) * slope


def assert_step(got: Step, gold: GoldStep, case: StepCase, upstream: float = 1.0) -> None:
    """Losses and all gradients are the oracle's, to the rounding of the dtype they come in.

    An adjoint is a function of log-probs that are rounded themselves: where its terms (advantage, KL slope) cancel, it
    carries the rounding of each, whose size is that of the loss terms.
    """
    adjoint = gold.adjoint + gold.loss_scale
    slope = case.head.logit_scale / float(case.head.temperature) * abs(upstream)
    tokens = sum(b.labels.numel() for b in case.batches)
    for b, (ours, theirs) in enumerate(zip(got.losses, gold.losses, strict=True)):
        scale = gold.loss_scale + gold.adjoint * tokens**0.5  # of the sum itself, and of the statistics in it
        budgets.assert_rounding(f"loss {b}", ours, theirs, gold.max_logit, scale)
    for b, (ours, theirs) in enumerate(zip(got.hidden, gold.hidden, strict=True)):
        scale = adjoint * slope * budgets.norm(case.weight)
        budgets.assert_rounding(f"d hidden {b}", ours, theirs * upstream, gold.max_logit, scale)
    rows = sum(budgets.norm(h[h.isfinite()]) for h in case.hidden)
    scale = adjoint * slope
    budgets.assert_rounding("d weight", got.weight, gold.weight * upstream, gold.max_logit, scale * rows)
    if got.bias is not None:
        budgets.assert_rounding("d bias", got.bias, gold.bias * upstream, gold.max_logit, scale)
