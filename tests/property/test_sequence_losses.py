"""Losses that couple the tokens of a sequence, against the oracle.

Contract: for any packs and padded batches, masks, fully ignored sequences, head options and chunk sizes, in every mode,
with and without masks on the policy term, the losses and gradients are the oracle's to rounding. NaN and infinities at
ignored tokens change nothing, nor does a sequence without a token, nor the order of a pack.
"""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise
from typing import Any

import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st

from tests import budgets
from tests.property.sequence_steps import SequenceCase, assert_oracle, run_case, sequence_cases, sequence_policies
from tests.property.steps import max_logit
from xloss import RLLossContextInputItem

RUNS = {
    "eager": {"mode": "eager"},
    "chunk": {"mode": "chunk"},
    "recompute": {"mode": "chunk", "logits_budget": 1, "chunk_size": 2},
    "auto": {},
}
every_run = pytest.mark.parametrize("run", RUNS.values(), ids=RUNS)
reductions = st.sampled_from(("token", "sample", "square", "sample_sum", "prompt", "sum"))


@every_run
@given(case=sequence_cases(), policy=sequence_policies(), reduction=reductions)
def test_oracle(run: dict[str, Any], case: SequenceCase, policy: dict[str, Any], reduction: str) -> None:
    fields = {"policy_loss_cfg": policy, "loss_reduction": reduction}
    assert_oracle(case, fields, run_case(case, fields, run))


@given(case=sequence_cases(dtype=torch.float32), policy=sequence_policies())
def test_oracle_in_float32(case: SequenceCase, policy: dict[str, Any]) -> None:
    fields = {"policy_loss_cfg": policy, "loss_reduction": "sample"}
    assert_oracle(case, fields, run_case(case, fields, {"mode": "chunk"}))


@every_run
@given(
    case=sequence_cases(),
    policy=sequence_policies() | st.just({"loss_type": "reinforce"}),
    opsm=st.sampled_from((None, -0.1, 0.0, 0.3)),
    quantile=st.sampled_from((None, 0.25, 0.5, 1.0)),
    entropy=st.booleans(),
)
def test_masks(
    run: dict[str, Any],
    case: SequenceCase,
    policy: dict[str, Any],
    opsm: float | None,
    quantile: float | None,
    entropy: bool,
) -> None:
    """Masks of the policy term; the entropy bonus, averaged in its own way, is masked by entropy only."""
    fields: dict[str, Any] = {"policy_loss_cfg": policy, "opsm_delta": opsm, "top_entropy_quantile": quantile}
    if entropy:
        fields |= {"entropy_coef": 0.1, "entropy_reduction": "sample"}
    assert_oracle(case, fields, run_case(case, fields, run))


@pytest.mark.parametrize("run", [RUNS["eager"], RUNS["chunk"]], ids=["eager", "chunk"])
@given(case=sequence_cases(), policy=sequence_policies(), masked=st.booleans())
def test_what_is_ignored_does_not_matter(
    run: dict[str, Any], case: SequenceCase, policy: dict[str, Any], masked: bool
) -> None:
    """NaN and infinities in every field and hidden state of ignored tokens: the same bits."""
    fields: dict[str, Any] = {"policy_loss_cfg": policy, "loss_reduction": "sample"}
    if masked:
        fields |= {"opsm_delta": 0.1, "top_entropy_quantile": 0.5, "entropy_coef": 0.1}
    clean = run_case(case, fields, run)
    for b, item in enumerate(case.items):
        dead = item.shifted_labels == -100
        case.step.hidden[b] = case.step.hidden[b].masked_fill(dead.unsqueeze(-1), torch.inf)
        names = ("advantages", "old_logprobs", "ref_logprobs", "rollout_logprobs", "is_weights")
        for name, bad in zip(names, (torch.nan, torch.inf, -torch.inf, torch.nan, -1.0), strict=True):
            value = getattr(item, name)
            if value is not None:
                setattr(item, name, value.masked_fill(dead, bad))
        item.group_ids = item.group_ids.masked_fill(dead, -7)
    dirty = run_case(case, fields, run)
    for ours, theirs in zip([*dirty.losses, *dirty.hidden, dirty.weight],
                            [*clean.losses, *clean.hidden, clean.weight], strict=True):  # fmt: skip
        assert torch.equal(ours, theirs)
    for ours, theirs in zip(dirty.infos, clean.infos, strict=True):
        for name, metric in ours.metrics.items():
            assert torch.equal(metric.result(), theirs.metrics[name].result()), name


def _one_sequence_each(case: SequenceCase, order: list[int]) -> SequenceCase:
    """Every sequence in a micro-batch of its own, in another order."""
    parts = []
    for hidden, item, bounds in zip(case.step.hidden, case.items, case.bounds, strict=True):
        fields = {name: value.reshape(-1) for name, (value, _) in item.per_token().items()}
        rows = hidden.reshape(-1, hidden.shape[-1])
        for a, b in pairwise(bounds):
            parts.append((rows[a:b], RLLossContextInputItem(**{n: x[a:b] for n, x in fields.items()}), [0, b - a]))
    hidden, items, spans = zip(*(parts[i] for i in order), strict=True)
    step = replace(case.step, hidden=list(hidden), cu_seq_lens=[torch.tensor(s) for s in spans])
    return SequenceCase(step, list(items), list(spans))


@given(case=sequence_cases(), policy=sequence_policies(), reduction=st.sampled_from(("token", "sample", "sample_sum")),
       data=st.data())  # fmt: skip
def test_cut_between_sequences(case: SequenceCase, policy: dict[str, Any], reduction: str, data: st.DataObject) -> None:
    """Sequences dealt to other micro-batches in any order: the same loss and gradients, to float32 weights."""
    assume(policy["loss_type"] != "real")  # its prompts would be cut
    order = data.draw(st.permutations(range(sum(len(b) - 1 for b in case.bounds))))
    fields = {"policy_loss_cfg": policy, "loss_reduction": reduction, "opsm_delta": 0.1}
    whole = run_case(case, fields, {"mode": "chunk"})
    other = _one_sequence_each(case, order)
    parts = run_case(other, fields, {"mode": "chunk"})
    back = [parts.hidden[order.index(i)] for i in range(len(order))]
    rows = torch.cat([h.reshape(-1, h.shape[-1]) for h in whole.hidden])
    terms = sum(float(info.token_loss.abs().sum()) for info in whole.infos)
    size = (1.0 + terms) * (1.0 + budgets.norm(case.step.weight) + sum(map(budgets.norm, case.step.hidden)))
    pairs = {
        "loss": (parts.total, whole.total),
        "weight": (parts.weight, whole.weight),
        "hidden": (torch.cat(back), rows),
    }
    for name, (ours, theirs) in pairs.items():
        budgets.assert_rounding(name, ours.float(), theirs.float(), max_logit(case.step), size)
