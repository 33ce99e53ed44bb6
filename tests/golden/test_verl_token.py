"""Golden cases of verl's losses of each token's own ratio, its KL penalties, entropy and full actor loss.

Contract: losses and both gradients of verl's own code, in float64 (eager and chunked) and float32; per-token KL values.

verl divides by the counts of this rank's batch unless it is told the global ones, and multiplies by the number of
ranks: `scale_of` undoes both. Its `seq-mean-token-sum-norm` of this commit does not divide by the number of sequences.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from tests.golden import records
from tests.golden.policy_step import Step, every_run, padded, run_step
from tests.golden.records import Entry, case_id
from tests.oracle import grpo, head
from xloss.policy.kl import kl_penalty

NAMES = ("vanilla", "cispo", "sapo", "gpg", "kl_penalty", "ppo_full", "entropy")
CASES: list[Entry] = records.entries("verl", *(f"verl_{name}" for name in NAMES))
DIFFERENT: dict[str, str] = {}
REDUCTION = {
    "token-mean": "token",
    "seq-mean-token-sum": "sample_sum",
    "seq-mean-token-mean": "sample",
    "seq-mean-token-sum-norm": "sample_sum_norm",
}


def policy_of(mode: str, cfg: dict[str, Any]) -> dict[str, Any]:
    clip = {"cliprange_low": cfg.get("clip_ratio_low"), "cliprange_high": cfg.get("clip_ratio_high")}
    taus = {name: cfg[name] for name in ("tau_pos", "tau_neg") if name in cfg}
    return {
        "vanilla": {"loss_type": "ppo", **clip, "dual_clip_c": cfg.get("clip_ratio_c")},
        "cispo": {"loss_type": "cispo", **clip},
        "sapo": {"loss_type": "sapo", **taus},
        "gpg": {"loss_type": "reinforce"},
        "none": {"loss_type": "reinforce"},
    }[mode]


def scale_of(mode: str, cfg: dict[str, Any], labels: Tensor) -> float:
    """What verl's number is in units of the mean over this batch."""
    tokens = (labels != -100).sum(1)
    sequences = int((tokens > 0).sum())
    scope = cfg | cfg.get("global_batch_info", {})
    ranks = float(scope.get("dp_size", 1))
    if mode == "token-mean":
        return ranks * int(tokens.sum()) / scope["batch_num_tokens"] if "batch_num_tokens" in scope else ranks
    if mode == "seq-mean-token-sum-norm":
        return float(sequences)
    return ranks * sequences / scope["global_batch_size"] if "global_batch_size" in scope else ranks


def step_of(entry: Entry) -> Step:
    cfg, data = entry["config"], records.tensors(entry["inputs"])
    name = entry["loss_name"].removeprefix("verl_")
    mode = cfg.get("loss_mode") or cfg.get("policy_loss", {}).get("loss_mode") or "none"
    aggregation = "seq-mean-token-mean" if mode == "sapo" else cfg.get("loss_agg_mode", "token-mean")
    config: dict[str, Any] = {"policy_loss_cfg": policy_of(mode, cfg), "loss_reduction": REDUCTION[aggregation]}
    if aggregation == "seq-mean-token-sum-norm":
        info = cfg.get("global_batch_info", {})
        config["norm_length"] = info.get("loss_scale_factor", data["labels"].shape[1])
    if name == "entropy":
        config["entropy_coef"] = -1.0  # recorded as a value, not as a bonus
    elif "entropy_coeff" in cfg:
        config["entropy_coef"] = cfg["entropy_coeff"]
    if name == "kl_penalty":
        config |= {"use_kl_loss": True, "kl_loss_coef": 1.0, "kl_loss_type": cfg["kl_penalty"]}
    elif cfg.get("use_kl_loss"):
        config |= {n: cfg[n] for n in ("use_kl_loss", "kl_loss_coef", "kl_loss_type")}
    fields: dict[str, Tensor] = {}
    if mode == "none":
        fields["advantages"] = torch.zeros_like(data["adv_tok"])
    elif "adv" in cfg:
        fields["advantages"] = data[cfg["adv"]]
    if cfg.get("rollout_is_weights"):
        fields["is_weights"] = data["is_ratio_tok"]
    return padded(entry, config, scale_of(aggregation, cfg, data["labels"]), **fields)


@every_run
@pytest.mark.parametrize("entry", CASES, ids=case_id)
def test_verl(entry: Entry, run: str) -> None:
    precision, found, _ = run_step(step_of(entry), run)
    assert not records.mismatches(entry, found, precision)


ORACLES = records.entries("verl", "verl_vanilla", "verl_cispo", "verl_sapo", "verl_gpg")


@pytest.mark.parametrize("entry", ORACLES, ids=case_id)
def test_oracle(entry: Entry) -> None:
    """The oracle on trial: losses and gradients from its formulas and loops over sequences."""
    step = step_of(entry)
    (item,), policy = step.items, step.config["policy_loss_cfg"]
    *hidden, weight = leaves = head.leaves(*step.hidden, step.weight)
    stats = head.token_stats(hidden[0], weight, item["shifted_labels"])
    live = item["shifted_labels"] != -100
    names = ("old_logprobs", "advantages")
    losses = grpo.POLICY[policy["loss_type"]](stats.logprobs, *(item[n].double() for n in names), policy)
    losses = losses * item.get("is_weights", torch.ones(())).double()
    rows = [row[mask] for row, mask in zip(losses, live, strict=True) if mask.any()]
    sums = torch.stack([row.sum() for row in rows])
    totals = {
        "token": sums.sum() / int(live.sum()),
        "sample": torch.stack([row.mean() for row in rows]).mean(),
        "sample_sum": sums.mean(),
        "sample_sum_norm": sums.mean() / step.config.get("norm_length", 1),
    }
    total = totals[step.config["loss_reduction"]] * step.factor
    grads = head.grads(total, leaves)
    found = {"loss": [total.item()], "grad_hidden": grads[0], "grad_weight": grads[1]}
    assert not records.mismatches(entry, found)


@pytest.mark.parametrize("entry", records.entries("verl", "verl_kl_penalty"), ids=case_id)
def test_kl_of_each_token(entry: Entry) -> None:
    data = records.tensors(entry["inputs"])
    labels = data["targets"]
    logprobs = head.token_stats(data["hidden"].double(), data["weight"].double(), labels).logprobs
    value = kl_penalty(logprobs, data["ref_logps"].double(), entry["config"]["kl_penalty"])
    live = data["labels"] != -100
    recorded = records.reference(entry, "out_kl")
    assert recorded is not None
    allowed = records.tolerance(entry)["f64"]
    assert records.differ("kl", value[live].numpy(), recorded[live.numpy()], allowed) is None


def test_dual_clip_cases_reach_the_bound() -> None:
    """The cases would pass without a dual clip if no token reached it."""
    entry = next(e for e in CASES if e["id"] == "verl-vanilla_dual-P1-007")
    step = step_of(entry)
    assert run_step(step, "eager-f64")[2][0]["dual_clip_frac"] > 0
    step.config["policy_loss_cfg"]["dual_clip_c"] = None
    precision, found, _ = run_step(step, "eager-f64")
    assert records.mismatches(entry, found, precision)
