"""Steps of losses that couple tokens: drawn near the current policy, run by xloss and by the oracle."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from hypothesis import assume
from hypothesis import strategies as st
from torch import Tensor

from tests import budgets
from tests.oracle import head, sequence
from tests.property.steps import Step, head_fields, max_logit, run_step
from tests.strategies import StepCase, step_cases
from xloss import GRPOLossConfig, RLLossContextInputItem
from xloss.losses.policies import find_policy_loss

RATIO_LEVELS = ("token", "sequence", "sequence_token", "segment", "sequence_sum")


NAMES = ("gspo", "gspo_token", "segment_ratio", "rloo", "luspo", "gmpo", "vespo", "real", "a_star_po", "fipo",
         "ppo", "cispo", "sapo")  # fmt: skip


@st.composite
def sequence_policies(draw: st.DrawFn, name: str | None = None) -> dict[str, Any]:
    """A policy_loss_cfg that couples tokens, with clips tight enough that both sides act."""
    name = name or draw(st.sampled_from(NAMES))
    tight = {"cliprange_low": draw(st.sampled_from((3e-4, 0.1))), "cliprange_high": draw(st.sampled_from((4e-4, 0.2)))}
    several = draw(st.booleans())
    options: dict[str, dict[str, Any]] = {
        "gspo": {"log_ratio_max": 0.5} if several else {"dual_clip_c": 1.5},
        "rloo": {"delta": 1.5} if several else {},
        "gmpo": {"cliprange_low": 0.1, "cliprange_high": 0.3},
        "vespo": {"k_pos": 1.5, "lambda_pos": 2.3, "k_neg": 2.1, "lambda_neg": 0.7} if several else {},
        "real": {"tau": draw(st.sampled_from((0.5, 2.0)))},
        "a_star_po": {"beta": draw(st.sampled_from((1e-3, 0.4)))},
        "fipo": {
            "decay_rate": draw(st.sampled_from((1.0, 32.0))),
            "weight_cliprange": draw(st.sampled_from((None, 0.2))),
            "weight_clip_high_only": several,
            "safety_threshold": draw(st.sampled_from((None, 1.2))),
            "participation_threshold": draw(st.sampled_from((None, 1.1))),
        },
        "cispo": {"clip_low_threshold": 0.8, "clip_high_threshold": 1.2},
        "sapo": {"tau_pos": 1.5, "tau_neg": 0.7},
    }
    clips = {} if name in ("gmpo", "vespo", "real", "a_star_po", "cispo", "sapo") else tight
    level = {"ratio_level": draw(st.sampled_from(RATIO_LEVELS))} if name in ("ppo", "cispo", "sapo", "luspo") else {}
    return {"loss_type": name} | clips | level | options.get(name, {})


@dataclass
class SequenceCase:
    """A step whose log-probs lie near the current policy's; one item a micro-batch."""

    step: StepCase
    items: list[RLLossContextInputItem]
    bounds: list[list[int]]

    def __repr__(self) -> str:
        return f"SequenceCase({self.step!r}, bounds={self.bounds})"


@st.composite
def sequence_cases(draw: st.DrawFn, dtype: torch.dtype = torch.float64, max_batches: int = 2) -> SequenceCase:
    """Packed and padded; two answers a prompt, mostly; advantages per token or per sequence."""
    case = draw(step_cases(dtype=dtype, max_batches=max_batches))
    g = torch.Generator().manual_seed(case.seed + 7)
    drift, constant = draw(st.sampled_from((0.01, 0.5, 3.0))), draw(st.booleans())
    items, all_bounds, cus = [], [], []
    for b, (hidden, batch) in enumerate(zip(case.hidden, case.batches, strict=True)):
        shape = batch.labels.shape
        if case.cu_seq_lens is not None:
            bounds = case.cu_seq_lens[b].tolist()
        else:
            rows, length = shape if len(shape) == 2 else (1, shape[0])
            bounds = [length * i for i in range(rows + 1)]
        now = head.token_stats(hidden, case.weight, batch.labels, case.bias, case.head).logprobs.detach()
        near = [(now + drift * torch.randn(shape, generator=g, dtype=torch.float64)).to(dtype) for _ in range(3)]
        groups = torch.zeros(shape, dtype=torch.int64)
        advantages = batch.advantages.clone()
        for i, (start, stop) in enumerate(pairwise(bounds)):
            groups.view(-1)[start:stop] = 5 * b + i // 2
            if constant and stop > start:
                advantages.view(-1)[start:stop] = advantages.view(-1)[start]
        items.append(
            RLLossContextInputItem(
                shifted_labels=batch.labels,
                advantages=advantages,
                old_logprobs=near[0],
                ref_logprobs=near[1],
                rollout_logprobs=near[2],
                is_weights=batch.is_weights,
                group_ids=groups,
            )
        )
        all_bounds.append(bounds)
        cus.append(torch.tensor(bounds))
    one_row = {b.labels.dim() == 1 or b.labels.shape[0] == 1 for b in case.batches}
    assume(len(one_row) == 1)  # bounds are given for every micro-batch or for none
    if one_row == {True}:
        case.cu_seq_lens = cus
    return SequenceCase(case, items, all_bounds)


def run_case(case: SequenceCase, fields: dict[str, Any], run: dict[str, Any]) -> Step:
    cfg = GRPOLossConfig(**fields, **(head_fields(case.step) | run))
    return run_step(cfg, case.items, case.step)


def tokens_of(case: SequenceCase, b: int, lp: Tensor, folded: bool) -> sequence.Tokens:
    """Micro-batch b as the oracle takes it; rollout weights only where the loss folds them in."""
    item = case.items[b]

    def flat(x: Tensor | None) -> Tensor | None:
        return None if x is None else x.reshape(-1).double()

    return sequence.Tokens(
        lp.reshape(-1),
        flat(item.old_logprobs),
        flat(item.advantages),
        item.shifted_labels.reshape(-1) != -100,
        list(pairwise(case.bounds[b])),
        flat(item.ref_logprobs),
        flat(item.is_weights) if folded else None,
        item.group_ids.reshape(-1),
    )


def assert_oracle(case: SequenceCase, fields: dict[str, Any], got: Step) -> None:
    """Losses of the micro-batches and gradients of their sum are the oracle's, to the rounding of their dtype."""
    step = case.step
    leaves = head.leaves(*step.hidden, step.weight, step.bias)
    hidden, weight, bias = leaves[:-2], leaves[-2], leaves[-1]
    labels = [item.shifted_labels for item in case.items]
    stats = [head.token_stats(h, weight, y, bias, step.head) for h, y in zip(hidden, labels, strict=True)]
    folded = find_policy_loss(fields["policy_loss_cfg"]["loss_type"]).folds_is_weights
    terms = [_terms(case, b, s, fields, got.kwargs[b], folded) for b, s in enumerate(stats)]
    total = torch.stack([t.sum() for t in terms]).sum()
    adjoints = head.grads(total, [x for s in stats for x in (s.logprobs, s.entropy)], keep_graph=True)
    plain = [_on_policy(case, b, s.logprobs.detach(), got.kwargs[b]) for b, s in enumerate(stats)]
    adjoint = sum(budgets.norm(g) ** 2 for g in [*adjoints, *plain]) ** 0.5
    gold = head.grads(total, leaves)
    size, tokens = sum(float(t.detach().abs().sum()) for t in (*terms, *plain)), sum(t.numel() for t in terms)
    top, slope = max_logit(step), step.head.logit_scale / float(step.head.temperature)
    for ours, theirs in zip(got.losses, terms, strict=True):
        budgets.assert_rounding("loss", ours, theirs.sum(), top, size + adjoint * tokens**0.5)
    rows = sum(map(budgets.norm, step.hidden))
    scales = [budgets.norm(step.weight)] * len(hidden) + [rows, 1.0]
    ours_all = [*got.hidden, got.weight, got.bias]
    for name, (ours, theirs, scale) in enumerate(zip(ours_all, gold, scales, strict=True)):
        if ours is not None and theirs is not None:
            budgets.assert_rounding(f"gradient {name}", ours, theirs, top, adjoint * slope * scale)


def _on_policy(case: SequenceCase, b: int, lp: Tensor, kwargs: Any) -> Tensor:
    """Sizes of the summands at ratio 1: a weight that happens to be 1e-100 was still made of numbers of that size."""
    x = tokens_of(case, b, lp, folded=False)
    return (torch.where(x.valid, x.advantages * (1 + x.lp.abs()), 0) * kwargs.policy_loss_weight.reshape(-1)).abs()


def _terms(case: SequenceCase, b: int, stats: head.Stats, fields: dict[str, Any], kwargs: Any, folded: bool) -> Tensor:
    x = tokens_of(case, b, stats.logprobs, folded)
    policy = fields["policy_loss_cfg"]
    cfg = find_policy_loss(policy["loss_type"]).model_validate(policy).model_dump()
    keep = x.valid
    entropy = stats.entropy.reshape(-1)
    if fields.get("opsm_delta") is not None:
        sampled = case.items[b].rollout_logprobs.reshape(-1).double()
        keep = keep & sequence.opsm_keep(x, sampled, fields["opsm_delta"])
    high = x.valid
    if fields.get("top_entropy_quantile") is not None:
        high = sequence.top_entropy_keep(entropy, x.valid, fields["top_entropy_quantile"])
    loss = torch.where(keep & high, sequence.per_token(x, cfg), 0) * kwargs.policy_loss_weight.reshape(-1).double()
    if not fields.get("entropy_coef"):
        return loss
    return loss - torch.where(high, entropy, 0) * kwargs.entropy_loss_weight.reshape(-1).double()
