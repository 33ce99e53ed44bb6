"""Golden cases: NeMo RL's clipped policy gradient.

Contract: in float64 and float32, eager and chunked, loss and gradients are those of NeMo's own code.

Its KL always carries the score function, and on-policy approximation weighs it by the ratio to the sampler: `unbiased`.
Its sequence mean counts every sample of the mask, without tokens too; a global count that is given replaces ours, and
`undo` puts it in.
"""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

from tests.golden import records
from tests.golden.policy_runs import assert_recorded, batches, every_run, item, run_step
from xloss import GRPOLossConfig

POLICY = records.entries("nemo", "nemo_clipped_pg")
CASES = POLICY
DIFFERENT: dict[str, str] = {}


def policy_of(nemo: dict[str, Any]) -> dict[str, Any]:
    if nemo.get("disable_ppo_ratio"):
        return {"loss_type": "reinforce"}
    low, high = nemo["ratio_clip_min"], nemo["ratio_clip_max"]
    if nemo.get("use_cispo"):
        return {"loss_type": "cispo", "clip_low_threshold": 1 - low, "clip_high_threshold": 1 + high}
    return {
        "loss_type": "ppo",
        "cliprange_low": low,
        "cliprange_high": high,
        "dual_clip_c": nemo.get("ratio_clip_c"),
        "log_ratio_clamp": None,
        "ratio_level": "sequence" if nemo.get("sequence_level_importance_ratios") else "token",
    }


def kl_of(nemo: dict[str, Any]) -> dict[str, Any]:
    coef = nemo["reference_policy_kl_penalty"]
    if not coef or nemo.get("use_kl_in_reward"):
        return {}
    sampled = nemo.get("use_on_policy_kl_approximation")
    return {
        "use_kl_loss": True,
        "kl_loss_coef": coef,
        "kl_loss_type": nemo.get("reference_policy_kl_type", "k3"),
        "kl_clamp_in": nemo.get("kl_input_clamp_value", 20.0),
        "kl_clamp_out": nemo.get("kl_output_clamp_value", 10.0),
        "kl_loss_grad": "unbiased" if sampled else "score_function",
        "kl_ratio_anchor": "rollout" if sampled else "old",
        "kl_clamp_weighted": True,
    }


def correction_of(nemo: dict[str, Any]) -> dict[str, Any] | None:
    if not nemo.get("use_importance_sampling_correction"):
        return None
    if nemo.get("sequence_level_importance_ratios"):
        return {"level": "sequence", "high": None}
    kind, high = nemo.get("truncated_importance_sampling_type"), nemo.get("truncated_importance_sampling_ratio")
    low = nemo.get("truncated_importance_sampling_ratio_min")
    if kind == "seq-mask-tis":
        bounds = {"low": -math.log(high), "high": -math.log(low)}  # of -mean x
        return {"high": None, "reject": [{"estimator": "k1", "over": "mean", **bounds}]}
    # "tis" of this version clamps at both ends
    return {"action": "mask" if kind == "icepop" else "truncate", "low": low, "high": high}


@every_run
@pytest.mark.parametrize("entry", POLICY, ids=records.case_id)
def test_clipped_pg(entry: records.Entry, dtype: torch.dtype, run: dict[str, Any]) -> None:
    theirs = entry["config"]
    nemo = theirs["loss"]
    by_token = nemo.get("token_level_loss", True)
    cfg = GRPOLossConfig(
        policy_loss_cfg=policy_of(nemo),
        rollout_correction=correction_of(nemo),
        positive_nll_coef=nemo.get("positive_example_nll_weight", 0.0),
        loss_reduction="token" if by_token else "sample",
        count_empty_sequences=not by_token,
        **kl_of(nemo),
        **run,
    )
    (batch,) = batches(entry)
    labels = batch["labels"].clone()
    for row in theirs.get("sample_mask_drop", []):
        labels[row] = -100
    given: dict[str, Any] = {
        "shifted_labels": labels,
        "advantages": batch[theirs.get("adv", "adv_seq_tok")],
        "ref_logprobs": batch["ref_logps"],
        "rewards": batch["rewards"][:, None].expand_as(labels).contiguous(),
    }
    if nemo.get("force_on_policy_ratio"):
        given["old_logprobs"] = None
    if correction_of(nemo) or nemo.get("use_on_policy_kl_approximation"):
        given["rollout_logprobs"] = batch["rollout_logps"]
    rows = labels.shape[0] - len(theirs.get("sample_mask_drop", []))
    ours = int((labels != -100).sum()) if by_token else labels.shape[0]
    undo = ours / theirs.get("global_valid_toks" if by_token else "global_valid_seqs", ours if by_token else rows)
    assert_recorded(entry, run_step(entry, cfg, [item(batch, **given)], dtype), dtype, undo)
