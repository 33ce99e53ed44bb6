"""Losses that couple the tokens of a sequence, against the oracle.

Contract: for any packs and padded batches, masks, fully ignored sequences, head options and chunk sizes, in every mode,
with and without masks on the policy term, the losses and gradients are the oracle's to rounding. NaN and infinities at
ignored tokens change nothing, nor does a sequence without a token, nor the order of a pack.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tests.property.sequence_steps import SequenceCase, assert_oracle, run_case, sequence_cases, sequence_policies

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
