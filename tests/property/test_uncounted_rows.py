"""Rows that nobody counted, as on CUDA where counting would wait for the device.

Contract: when ignored tokens go through ``linear_logprobs`` because their number is not known on the host, statistics
and gradients are those of a run that left them out, NaN hidden states there included. (Contexts always count theirs.)
"""

from __future__ import annotations

import pytest
import torch
from hypothesis import HealthCheck, given, settings

from tests.property.helpers import ALL_STATISTICS, assert_grads, assert_stats, call, gold_for, leaf, upstream_for, weigh
from tests.strategies import HeadCase, head_cases
from xloss.head import engine, linear_logprobs
from xloss.head.options import LiveRows

once_patched = settings(suppress_health_check=[HealthCheck.function_scoped_fixture])  # the same patch for all examples


@pytest.fixture
def uncounted(monkeypatch: pytest.MonkeyPatch) -> None:
    """What the engine does on CUDA: all rows live, none left out of a backward by its adjoints."""
    monkeypatch.setattr(linear_logprobs, "live_rows", lambda labels, _: LiveRows.all(labels.shape[0], counted=False))
    monkeypatch.setattr(engine, "_nonzero_rows", lambda *_: None)


@pytest.mark.usefixtures("uncounted")
@once_patched
@given(case=head_cases())
def test_linear_logprobs(case: HeadCase) -> None:
    upstream = upstream_for(case)
    gold = gold_for(case, upstream)
    ignored = case.labels == case.head.ignore_index
    dead = ignored if ignored.ndim == case.hidden.ndim - 1 else ignored.all(-1)
    inputs = [leaf(case.hidden.masked_fill(dead.unsqueeze(-1), torch.nan)), leaf(case.weight), leaf(case.bias)]
    stats = call(case, *inputs, mode="chunk", **ALL_STATISTICS)
    got = torch.autograd.grad(weigh(stats, upstream), [x for x in inputs if x is not None])
    assert_stats(stats, gold)
    assert_grads([*got, None][:3] if case.bias is None else list(got), gold)
    assert bool((stats.logprobs[case.labels == case.head.ignore_index] == 0).all())
