"""Golden cases of verl's and slime's sequence losses, xloss on trial.

Contract: GSPO of verl (GSPO-token, log-ratio clamped at 10) and of slime, and verl's GMPO (`geo_mean`), have their
numbers in xloss, loss and both gradients, in float64 (eager and chunked) and float32.
"""

from __future__ import annotations

from typing import Any

import pytest

from tests.golden import records
from tests.golden.policy_step import Step, every_run, packed, padded, run_step
from tests.golden.records import Entry, case_id

CASES: list[Entry] = [
    *records.entries("verl", "verl_gspo", "verl_geo_mean"),
    *records.entries("slime", "slime_gspo"),
]
DIFFERENT: dict[str, str] = {}


def step_of(entry: Entry) -> Step:
    """The peer's arguments as ours."""
    cfg = entry["config"]
    if entry["peer"] == "slime":
        return slime_step(entry, cfg["args"])
    clip = {"cliprange_low": cfg["clip_ratio_low"], "cliprange_high": cfg["clip_ratio_high"]}
    if entry["loss_name"] == "verl_gspo":
        policy = {"loss_type": "gspo_token", "log_ratio_max": 10.0}
        reduction: dict[str, Any] = {"loss_reduction": "sample"}
    else:
        policy = {"loss_type": "gmpo"}
        reduction = {"loss_reduction": "sample", "count_empty_sequences": True}
    is_weights = records.tensors(entry["inputs"])["is_ratio_tok"] if cfg.get("rollout_is_weights") else None
    return padded(entry, {"policy_loss_cfg": policy | clip} | reduction, is_weights=is_weights)


def slime_step(entry: Entry, args: dict[str, Any]) -> Step:
    """slime divides sums of sequence means by its global batch size (8 here), xloss by the sequences of this batch."""
    low = args["eps_clip"]
    policy = {"loss_type": "gspo", "cliprange_low": low, "cliprange_high": args.get("eps_clip_high", low)}
    config = {"policy_loss_cfg": policy, "loss_reduction": "sample", "count_empty_sequences": True}
    step = packed(entry, config)
    sequences = sum(bounds.numel() - 1 for bounds in step.cu_seq_lens or [])
    step.factor = sequences * len(step.items) / 8
    return step


@every_run
@pytest.mark.parametrize("entry", CASES, ids=case_id)
def test_sequence_ratio(entry: Entry, run: str) -> None:
    precision, found, _ = run_step(step_of(entry), run)
    assert records.mismatches(entry, found, precision) == []
