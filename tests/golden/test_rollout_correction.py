"""Golden cases: mismatch corrections of verl and XTuner, verl's bypass mode, XTuner's KL penalties.

Contract: in float64 and float32, eager and chunked, loss and gradients are those of the peers' own code, and so are the
weights, masks, labels and metrics they recorded.

verl and XTuner take rejected tokens out of their denominators: `renormalize_rejected=True`. verl's k1 thresholds are
bounds of exp(-x); ours are in nats. In bypass mode verl compares the current policy with the sampler: given as
`old_logprobs` where the denominators depend on it.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch

from tests.golden import records
from tests.golden.policy_runs import assert_recorded, batches, close, every_run, item, precision, run_step
from xloss import GRPOLossConfig, RolloutImportanceSampling, finalize_metrics, linear_logprobs, rename_metrics
from xloss.policy.kl import kl_penalty

CORRECTIONS = records.entries("verl", "verl_rollout_corr")
BYPASS = records.entries("verl", "verl_bypass")
XTUNER = records.entries("xtuner", "rollout_is")
XTUNER_KL = records.entries("xtuner", "kl_penalty")
CASES = CORRECTIONS + BYPASS + XTUNER + XTUNER_KL
DIFFERENT: dict[str, str] = {}

VANILLA = {"loss_type": "vanilla", "cliprange_low": 0.2, "cliprange_high": 0.28, "clip_ratio_c": 3.0}
REDUCTION = {
    "token-mean": "token",
    "seq-mean-token-sum": "sample_sum",
    "seq-mean-token-mean": "sample",
}


def from_verl(verl: dict[str, Any]) -> dict[str, Any]:
    """A `rollout_correction` from verl's options."""
    out: dict[str, Any] = {"renormalize_rejected": True, "level": verl.get("rollout_is")}
    if verl.get("rollout_is"):
        low, _, high = str(verl.get("rollout_is_threshold", 2.0)).rpartition("_")
        out |= {"low": float(low) if low else None, "high": float(high), "action": "mask" if low else "truncate"}
        if verl.get("rollout_is_batch_normalize"):
            out["batch_normalize"] = True
    if verl.get("rollout_rs"):
        names, bounds = verl["rollout_rs"].split(","), str(verl["rollout_rs_threshold"]).split(",")
        out["reject"] = [criterion(*pair) for pair in zip(names, bounds, strict=True)]
    return out


def criterion(name: str, bounds: str) -> dict[str, Any]:
    *level, estimator = name.split("_")
    low, _, high = bounds.rpartition("_")
    in_nats = math.log if estimator == "k1" else float
    return {
        "estimator": estimator,
        "over": "token" if level == ["token"] else level[1],
        "low": in_nats(float(low)) if low else None,
        "high": in_nats(float(high)),
    }


@every_run
@pytest.mark.parametrize("entry", CORRECTIONS, ids=records.case_id)
def test_verl_correction(entry: records.Entry, dtype: torch.dtype, run: dict[str, Any]) -> None:
    cfg = GRPOLossConfig(policy_loss_cfg=VANILLA, rollout_correction=from_verl(entry["config"]), **run)
    (batch,) = batches(entry)
    step = run_step(entry, cfg, [item(batch, rollout_logprobs=batch["rollout_logps"])], dtype)
    assert_recorded(entry, step, dtype)
    (kwargs,) = step.kwargs
    recorded = records.arrays(entry["file"])
    mask = kwargs.loss_mask.double()
    assert close(entry, "mask", mask.numpy(), recorded["out_modified_mask"], dtype) is None
    if "out_is_weights" in recorded:
        ours = kwargs.rollout_weights.double() * mask
        want = recorded["out_is_weights"] * recorded["out_modified_mask"]
        assert close(entry, "weights", ours.numpy(), want, torch.float32) is None


@every_run
@pytest.mark.parametrize("entry", BYPASS, ids=records.case_id)
def test_verl_bypass(entry: records.Entry, dtype: torch.dtype, run: dict[str, Any]) -> None:
    (batch,) = batches(entry)
    verl = entry["config"]["policy_loss"]["rollout_correction"]
    reduction, sampled = REDUCTION[entry["config"]["loss_agg_mode"]], batch["rollout_logps"]
    if verl["loss_type"] == "reinforce":
        cfg = GRPOLossConfig(policy_loss_cfg={"loss_type": "reinforce"}, rollout_correction=from_verl(verl),
                             loss_reduction=reduction, **run)  # fmt: skip
        ours = item(batch, old_logprobs=batch["cur_logps_f64"], rollout_logprobs=sampled)
        assert_recorded(entry, run_step(entry, cfg, [ours], dtype), dtype)
        return
    correction = {"level": None, "bypass": True, "reject": from_verl(verl)["reject"]}
    cfg = GRPOLossConfig(policy_loss_cfg=VANILLA, rollout_correction=correction, loss_reduction=reduction, **run)
    step = run_step(entry, cfg, [item(batch, old_logprobs=None, rollout_logprobs=sampled)], dtype)
    rejected = float(step.infos[0].metrics["rollout_is_mask_frac"].result())
    assert rejected > 0
    assert_recorded(entry, step, dtype, undo=1 / (1 - rejected))  # the pass keeps the denominator, verl does not


@every_run
@pytest.mark.parametrize("entry", XTUNER, ids=records.case_id)
def test_xtuner(entry: records.Entry, dtype: torch.dtype, run: dict[str, Any]) -> None:
    """Tuples are (upper, lower), truncation clamps both ends, rejected tokens leave the count."""
    correction = RolloutImportanceSampling(**entry["config"]["rollout_is"])
    cfg = GRPOLossConfig(policy_loss_cfg=entry["config"]["policy_loss_cfg"], rollout_correction=correction, **run)
    parts = batches(entry)
    step = run_step(entry, cfg, [item(p, rollout_logprobs=p["rollout_logps"]) for p in parts], dtype)
    assert_recorded(entry, step, dtype)
    for b, kwargs in enumerate(step.kwargs):
        got, want = kwargs.policy_loss_weight, records.arrays(entry["file"])[f"out_policy_loss_weight_{b}"]
        assert close(entry, "policy_loss_weight", got.double().numpy(), want, torch.float32) is None
    results = rename_metrics(finalize_metrics([info.metrics for info in step.infos]), "xtuner")
    for theirs, want in entry["metrics"]["finalized"].items():
        if theirs != "local_base_loss":
            assert close(entry, theirs, float(results[theirs]), want, dtype) is None


@pytest.mark.parametrize("entry", XTUNER, ids=records.case_id)
def test_xtuner_call(entry: records.Entry) -> None:
    """The call on packed rollouts gives XTuner's weights, mask and figures under its names.

    Its K3 figures are not clamped at |x| = 20; weights of whole sequences it also counts at sequences without a token.
    """
    correction = RolloutImportanceSampling(**entry["config"]["rollout_is"])
    recorded = records.arrays(entry["file"])
    for b, p in enumerate(batches(entry)):
        weights, mask, mismatch, metrics = correction.compute_rollout_importance_weights_and_metrics(
            p["old_logps"].double(), p["rollout_logps"].double(), p["num_tokens"], p["mask"]
        )
        if weights is None:
            assert correction.native() is None and metrics == {} and torch.equal(mask, p["mask"])
            continue
        labels = p["labels"].masked_fill(mask == 0, -100)
        assert np.array_equal(labels.numpy(), recorded[f"out_labels_after_is_{b}"])
        assert close(entry, "weights", weights.numpy(), recorded[f"out_is_weights_{b}"], torch.float32) is None
        want = entry["metrics"][f"mismatch_{b}"] | entry["metrics"][f"rollout_is_{b}"]
        apart = set()
        if "K3" in entry["id"]:
            apart |= {"mismatch/mismatch_k3_kl", "mismatch/mismatch_ppl_ratio"}
        if correction.rollout_is_level == "sequence":
            apart |= {f"mismatch/rollout_is_{n}" for n in ("ratio_fraction_low", "ratio_fraction_high", "min", "max")}
        for figures in (metrics, want):  # the variance: the root of one near 0 is rounding
            figures["mismatch/rollout_is_std"] = figures["mismatch/rollout_is_std"] ** 2
        found = {k: close(entry, k, v, want[k], torch.float32)
                 for k, v in (mismatch | metrics).items() if k not in apart}  # fmt: skip
        assert not any(found.values()), found


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=["f64", "f32"])
@pytest.mark.parametrize("entry", XTUNER_KL, ids=records.case_id)
def test_xtuner_kl_penalty(entry: records.Entry, dtype: torch.dtype) -> None:
    batch = batches(entry)[0]  # what was recorded
    hidden = batch["hidden"].to(dtype).requires_grad_()
    weight = records.tensors(entry["inputs"])["weight"].to(dtype).requires_grad_()
    lp = linear_logprobs(hidden, weight, batch["targets"]).logprobs
    loss = (
        kl_penalty(lp, batch["ref_logps"], entry["config"]["kl_penalty"]) * batch["is_weights"] * batch["mask"]
    ).sum()
    loss.backward()
    found = {"loss": loss, "grad_hidden_0": hidden.grad, "grad_weight": weight.grad}
    assert records.mismatches(entry, found, precision(dtype)) == []
