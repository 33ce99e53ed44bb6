"""What must not change when the way of asking changes. No oracle: xloss against itself, in float64.

Contract: losses and gradients do not depend on the chunk size, the logits budget, the plan, the cut into micro-
batches or the order of sequences in a pack; a concatenation's statistics are the parts', and its gradients add;
ignored tokens may be dropped; a constant added to all logits of a token changes nothing but lse and mean_logit;
limits of one loss are another one.
"""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from tests import budgets
from tests.oracle.grpo import Batch
from tests.property.helpers import ALL_STATISTICS, Gold, call, gold_for, leaf, upstream_for, weigh
from tests.property.steps import Step, ce_items, head_fields, max_logit, rl_items, run_step
from tests.strategies import HeadCase, StepCase, head_cases, policies, step_cases
from xloss import BaseLossConfig, CELossConfig, GRPOLossConfig, RLLossContextInputItem, TokenStats, linear_logprobs

MILD = (1.0, 30.0)


def _grads(case: HeadCase, upstream: dict[str, Tensor], **options: Any) -> tuple[TokenStats, list[Tensor]]:
    inputs = [leaf(case.hidden), leaf(case.weight), leaf(case.bias)]
    stats = call(case, *inputs, **{"mode": "chunk", **ALL_STATISTICS} | options)
    present = [x for x in inputs if x is not None]
    return stats, list(torch.autograd.grad(weigh(stats, upstream), present))


def _same_stats(ours: dict[str, Tensor], theirs: dict[str, Tensor], gold: Gold) -> None:
    for name, value in ours.items():
        budgets.assert_rounding(name, value, theirs[name], gold.max_logit, value.numel() ** 0.5)


def _same_grads(ours: list[Tensor], theirs: list[Tensor], gold: Gold) -> None:
    """Equal to the rounding of sums taken in another order. The oracle lends its sizes, not its values."""
    for a, b, scale in zip(ours, theirs, gold.scales, strict=False):
        budgets.assert_rounding("gradient", a, b, gold.max_logit, scale)


def _stats(stats: TokenStats) -> dict[str, Tensor]:
    return dict(stats.differentiable())


@given(case=head_cases(magnitudes=MILD), sizes=st.lists(st.integers(1, 30), min_size=2, max_size=2))
def test_chunk_size(case: HeadCase, sizes: list[int]) -> None:
    upstream = upstream_for(case)
    (first, a), (second, b) = (_grads(case, upstream, chunk_size=size) for size in sizes)
    gold = gold_for(case, upstream)
    _same_stats(_stats(first), _stats(second), gold)
    assert torch.equal(first.top1, second.top1)
    _same_grads(a, b, gold)


@given(case=head_cases(magnitudes=MILD), budget=st.integers(1, 5000))
def test_logits_budget(case: HeadCase, budget: int) -> None:
    """How many chunks of logits are kept for backward and how many are computed again makes no difference."""
    upstream, size = upstream_for(case), case.chunk_size or 3
    kept, again = (_grads(case, upstream, chunk_size=size, logits_budget=b) for b in (1 << 30, budget))
    _same_grads(kept[1], again[1], gold_for(case, upstream))


@given(case=head_cases(magnitudes=MILD, several_labels=False), data=st.data())
def test_concatenation(case: HeadCase, data: st.DataObject) -> None:
    """Tokens do not see each other: the parts' statistics are the whole's, their weight gradients add up to it."""
    count = case.leading.numel()
    flat = replace(case, hidden=case.hidden.reshape(count, case.hidden.shape[-1]), labels=case.labels.reshape(count))
    flat.head = replace(case.head, temperature=1.3)
    cut = data.draw(st.integers(0, count))
    upstream = {n: u.reshape(count) for n, u in upstream_for(case).items()}
    stats, whole = _grads(flat, upstream)
    parts = []
    for rows in (slice(0, cut), slice(cut, count)):
        part = replace(flat, hidden=flat.hidden[rows], labels=flat.labels[rows])
        parts.append(_grads(part, {n: u[rows] for n, u in upstream.items()}))
    (first, a), (second, b) = parts
    gold = gold_for(flat, upstream)
    _same_stats({n: torch.cat([getattr(first, n), getattr(second, n)]) for n in _stats(stats)}, _stats(stats), gold)
    _same_grads([torch.cat([a[0], b[0]]), *(x + y for x, y in zip(a[1:], b[1:], strict=True))], whole, gold)


@given(case=head_cases(magnitudes=MILD, several_labels=False))
def test_ignored_tokens_may_be_dropped(case: HeadCase) -> None:
    upstream = upstream_for(case)
    live = case.labels != case.head.ignore_index
    temperature = case.head.temperature
    small = replace(
        case,
        hidden=case.hidden[live],
        labels=case.labels[live],
        head=replace(case.head, temperature=temperature[live] if isinstance(temperature, Tensor) else temperature),
    )
    stats, grads = _grads(case, upstream)
    few, few_grads = _grads(small, {n: u[live] for n, u in upstream.items()})
    gold = gold_for(case, upstream)
    _same_stats({n: v[live] for n, v in _stats(stats).items()}, _stats(few), gold)
    _same_grads([grads[0][live], *grads[1:]], few_grads, gold)


@given(case=head_cases(magnitudes=(1.0,)), shift=st.sampled_from((-700.0, 0.5, 700.0)))
def test_a_constant_added_to_all_logits(case: HeadCase, shift: float) -> None:
    """Through the bias: log-probs, entropy, sum_p2 and their gradients stay; lse and mean_logit move by it."""
    case.head = replace(case.head, softcap=None, logit_scale=1.0, temperature=1.0)
    case.bias = torch.zeros_like(case.weight[:, 0]) if case.bias is None else case.bias
    moved = replace(case, bias=case.bias + shift)
    upstream = {n: u for n, u in upstream_for(case).items() if n in ("logprobs", "entropy", "sum_p2")}
    (before, a), (after, b) = _grads(case, upstream), _grads(moved, upstream)
    gold, live = gold_for(moved, upstream), before.top1 >= 0
    expected = {n: v + shift * live if n in ("lse", "mean_logit") else v for n, v in _stats(before).items()}
    _same_stats(_stats(after), expected, gold)
    _same_grads(b, a, gold)


@given(case=head_cases(magnitudes=(1.0,)), factor=st.sampled_from((0.5, 4.0)))
def test_temperature_is_a_scale(case: HeadCase, factor: float) -> None:
    """Without a cap, temperature t and logit_scale 1 / t are one thing."""
    upstream = upstream_for(case)
    a = replace(case, head=replace(case.head, softcap=None, logit_scale=1.0, temperature=factor))
    b = replace(case, head=replace(case.head, softcap=None, logit_scale=1.0 / factor, temperature=1.0))
    (x, dx), (y, dy) = _grads(a, upstream), _grads(b, upstream)
    gold = gold_for(a, upstream)
    _same_stats(_stats(x), _stats(y), gold)
    _same_grads(dx, dy, gold)


def _cuts(case: StepCase, data: st.DataObject) -> StepCase:
    """The tokens of a step joined and cut elsewhere into micro-batches; layout [1, T]."""
    joined = torch.cat([h.reshape(-1, h.shape[-1]) for h in case.hidden])
    tensors = {
        n: torch.cat([getattr(b, n).reshape(-1) for b in case.batches]) for n in ("labels", "advantages", "old", "ref")
    }
    count = joined.shape[0]
    bounds = [0, *sorted(data.draw(st.lists(st.integers(0, count), max_size=3))), count]
    spans = [slice(a, b) for a, b in pairwise(bounds)]
    batches = [Batch(**{n: x[s].unsqueeze(0) for n, x in tensors.items()}) for s in spans]
    return replace(case, hidden=[joined[s].unsqueeze(0) for s in spans], batches=batches, cu_seq_lens=None)


def _equal_steps(a: Step, b: Step, case: StepCase, *, losses: bool = True, dtype: torch.dtype = torch.float64) -> None:
    """Equal to rounding: a term of the loss is known to its own size, its gradient to that and 1 (|A| sum w)."""
    terms = 1.0 + sum(float(info.token_loss.abs().sum()) for info in [*a.infos, *b.infos])
    width = 1.0 + budgets.norm(case.weight) + sum(map(budgets.norm, case.hidden))
    pairs = {"d weight": (a.weight, b.weight), "d hidden": (_rows(a.hidden), _rows(b.hidden))}
    if losses:
        pairs["loss"] = (a.total, b.total)
    for name, (x, y) in pairs.items():
        budgets.assert_rounding(name, x.to(dtype), y.to(dtype), max_logit(case), terms * width)


def _rows(hidden: list[Tensor]) -> Tensor:
    return torch.cat([h.flatten(0, -2) for h in hidden])


@given(
    case=step_cases(weighted=False), policy=policies(), data=st.data(), run=st.sampled_from(({}, {"plan": "two_pass"}))
)
def test_micro_batch_cut(case: StepCase, policy: dict[str, Any], data: st.DataObject, run: dict[str, str]) -> None:
    """One global batch cut anywhere, empty micro-batches too: the same loss and gradients."""
    cut = _cuts(case, data)
    policy_cfg = GRPOLossConfig(
        policy_loss_cfg=policy,
        use_kl_loss=True,
        kl_loss_type="k2",
        entropy_coef=0.1,
        mode="chunk",
        **head_fields(case),
        **run,
    )
    for cfg, items in ((policy_cfg, rl_items), (CELossConfig(mode="chunk", **head_fields(case), **run), ce_items)):
        whole, parts = run_step(cfg, items(case), case), run_step(cfg, items(cut), cut)
        _equal_steps(whole, parts, case)


@given(
    case=step_cases(packed=True, weighted=False),
    reduction=st.sampled_from(("token", "sample", "square")),
    data=st.data(),
)
def test_order_of_a_pack(case: StepCase, reduction: str, data: st.DataObject) -> None:
    """Sequences in another order, and packs dealt to other micro-batches, one sequence each: the same numbers."""
    assert case.cu_seq_lens is not None
    sequences = []
    for hidden, batch, cu in zip(case.hidden, case.batches, case.cu_seq_lens, strict=True):
        rows, labels = hidden.reshape(-1, hidden.shape[-1]), batch.labels.reshape(-1)
        sequences += [(rows[a:b], labels[a:b]) for a, b in pairwise(cu.tolist())]
    order = data.draw(st.permutations(range(len(sequences))))
    shuffled = [sequences[i] for i in order]

    def pack(groups: list[list[tuple[Tensor, Tensor]]]) -> StepCase:
        lengths = [torch.tensor([0] + [s[1].numel() for s in g]).cumsum(0) for g in groups]
        batches = [Batch(torch.cat([s[1] for s in g]), torch.empty(0)) for g in groups]
        return replace(
            case, hidden=[torch.cat([s[0] for s in g]) for g in groups], batches=batches, cu_seq_lens=lengths
        )

    cfg = CELossConfig(loss_reduction=reduction, mode="chunk", **head_fields(case))
    base = run_step(cfg, ce_items(case), case)
    for groups in ([shuffled], [[s] for s in shuffled]):
        other = pack(groups)
        got = run_step(cfg, ce_items(other), other)
        parts = _rows(got.hidden).split([labels.numel() for _, labels in shuffled])
        got.hidden = [part for _, part in sorted(zip(order, parts, strict=True), key=lambda pair: pair[0])]
        _equal_steps(got, base, case, dtype=torch.float32)  # weights are float32, and summed in another order


def _vanilla(**fields: Any) -> dict[str, Any]:
    return {"loss_type": "vanilla", "cliprange_low": 0.2, "cliprange_high": 0.28} | fields


def _run(case: StepCase, policy: dict[str, Any]) -> Step:
    cfg: BaseLossConfig = GRPOLossConfig(policy_loss_cfg=policy, mode="chunk", **head_fields(case))
    return run_step(cfg, rl_items(case), case)


def _identical(a: Step, b: Step) -> None:
    for x, y in zip([*a.losses, *a.hidden, a.weight], [*b.losses, *b.hidden, b.weight], strict=True):
        assert torch.equal(x, y)


@given(case=step_cases())
def test_no_dual_clip_is_a_distant_one(case: StepCase) -> None:
    _identical(_run(case, _vanilla(clip_ratio_c=None)), _run(case, _vanilla(clip_ratio_c=1e30)))


@given(case=step_cases())
def test_wide_clip_is_importance_sampling(case: StepCase) -> None:
    """Without a clip or a clamp in reach, PPO is -r A."""
    wide = _vanilla(
        cliprange_low=0.999999999,
        cliprange_high=1e30,
        clip_ratio_c=None,
        log_prob_diff_min=-80.0,
        log_prob_diff_max=80.0,
    )
    for batch in case.batches:
        batch.old = batch.old.clamp(-18, -14)  # ratios above 1e-9
    _identical(_run(case, wide), _run(case, {"loss_type": "importance_sampling"}))


@given(case=step_cases())
def test_dro_without_pull_is_reinforce(case: StepCase) -> None:
    a, b = _run(case, {"loss_type": "dro", "beta": 0.0}), _run(case, {"loss_type": "reinforce"})
    _equal_steps(a, b, case)


@given(
    case=step_cases(),
    name=st.sampled_from(
        ("cispo", "importance_sampling", "vanilla", "ppo", "tis", "topr", "sapo", "dppo_tv", "dppo_kl")
    ),
)
def test_on_policy_gradients_are_reinforce(case: StepCase, name: str) -> None:
    """At ratio 1 all of them are the plain policy gradient (the losses themselves differ)."""
    for batch in case.batches:
        batch.old = None
    policy = _vanilla() if name == "vanilla" else {"loss_type": name}
    a, b = _run(case, policy), _run(case, {"loss_type": "reinforce"})
    _equal_steps(a, b, case, losses=False)


@given(case=step_cases())
def test_on_policy_without_old_is_with_current(case: StepCase) -> None:
    """old_logprobs=None equals old_logprobs = the log-probs of a no_grad pass, down to the gradient."""
    fields = head_fields(case)
    with torch.no_grad():
        for hidden, batch in zip(case.hidden, case.batches, strict=True):
            batch.old = linear_logprobs(hidden, case.weight, batch.labels, case.bias, mode="chunk", **fields).logprobs
    given_old = _run(case, _vanilla())
    for batch in case.batches:
        batch.old = None
    _equal_steps(given_old, _run(case, _vanilla()), case)


@given(case=step_cases(max_batches=1), policy=policies())
def test_scaling_advantages_scales_a_policy_gradient(case: StepCase, policy: dict[str, Any]) -> None:
    """All but dro and kimi are linear in the advantage's size."""
    policy = {"loss_type": "reinforce"} if policy["loss_type"] in ("dro", "kimi") else policy
    once = _run(case, policy)
    case.batches[0].advantages = case.batches[0].advantages * 2.0  # exact in binary
    twice = _run(case, policy)
    once.losses, once.hidden, once.weight = [2 * x for x in once.losses], [2 * x for x in once.hidden], 2 * once.weight
    _identical(once, twice)


@pytest.mark.parametrize("run", [{"mode": "eager"}, {"mode": "chunk"}], ids=["eager", "chunk"])
def test_same_input_same_bits(run: dict[str, Any]) -> None:
    torch.manual_seed(0)
    hidden, weight = torch.randn(1, 41, 8), torch.randn(67, 8)
    labels = torch.randint(0, 67, (1, 41))
    item = RLLossContextInputItem(shifted_labels=labels, advantages=torch.randn(1, 41))
    cfg = GRPOLossConfig(policy_loss_cfg=_vanilla(), entropy_coef=0.01, chunk_size=7, **run)
    seen = []
    for _ in range(3):
        case = StepCase(weight, None, [hidden], [], None, None, 7, 0)  # type: ignore[arg-type]
        step = run_step(cfg, [item], case)
        seen.append([*step.losses, *step.hidden, step.weight])
    assert all(torch.equal(a, b) for other in seen[1:] for a, b in zip(seen[0], other, strict=True))
