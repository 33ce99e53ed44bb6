"""Golden cases: XTuner's OREAL, verl's Clip-Cov and KL-Cov.

Contract: in float64 and float32, eager and chunked, loss and gradients are those of the peers' own code. verl draws the
tokens that Clip-Cov drops from torch's global generator; a case is comparable where it drops every candidate.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch

from tests.golden import records
from tests.golden.policy_runs import assert_recorded, batches, close, every_run, item, run_step
from xloss import GRPOLossConfig, OrealLossConfig

OREAL = records.entries("xtuner", "oreal")
COV = records.entries("verl", "verl_clip_cov", "verl_kl_cov")
CASES = OREAL + COV
DIFFERENT: dict[str, str] = {}


@every_run
@pytest.mark.parametrize("entry", OREAL, ids=records.case_id)
def test_oreal(entry: records.Entry, dtype: torch.dtype, run: dict[str, Any]) -> None:
    theirs = entry["config"]
    own = set(OrealLossConfig.model_fields) - {"mode", "chunk_size"}
    cfg = OrealLossConfig(**{k: v for k, v in theirs.items() if k in own}, **run)
    items = []
    for batch in batches(entry):
        advantages = batch[theirs.get("advantages", "adv_seq_tok")].clone()
        if "adv_zero_frac" in theirs:
            advantages[:, :: theirs["adv_zero_frac"]] = 0
        more = {"is_weights": batch["is_weights"]} if theirs.get("use_is_weights") else {}
        items.append(item(batch, advantages=advantages, ref_logprobs=batch["ref_logps"], **more))
    step = run_step(entry, cfg, items, dtype)
    assert_recorded(entry, step, dtype)
    for b, kwargs in enumerate(step.kwargs):
        got, want = kwargs.policy_loss_weight, records.arrays(entry["file"])[f"out_policy_loss_weight_{b}"]
        assert close(entry, "policy_loss_weight", got.double().numpy(), want, torch.float32) is None


@every_run
@pytest.mark.parametrize("entry", COV, ids=records.case_id)
def test_covariance(entry: records.Entry, dtype: torch.dtype, run: dict[str, Any]) -> None:
    theirs = entry["config"]
    options, name = dict(theirs["policy_loss"]), theirs["loss_mode"]
    options.pop("loss_mode")
    if name == "clip_cov":
        options |= {"cliprange_low": theirs["clip_ratio_low"], "cliprange_high": theirs["clip_ratio_high"]}
    cfg = GRPOLossConfig(policy_loss_cfg={"loss_type": name, **options}, **run)
    (batch,) = batches(entry)
    assert_recorded(entry, run_step(entry, cfg, [item(batch)], dtype), dtype)
