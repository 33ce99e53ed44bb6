"""Golden cases of slime's policy losses (its sequence ratio is with the sequence losses, SFT with the supervised ones).

Contract: losses and both gradients of slime's own code, in float64 (eager and chunked) and float32.

slime takes the mean of each sample and divides the sum by its global batch size of 8, times the number of micro-
batches; with `calculate_per_token_loss` it gives the plain sum. `reduction_of` undoes the former. Samples of a group
(`group_of`, counted in each micro-batch) share a mean. Neither log-ratios nor k3 are clamped, `low_var_kl` in its value
only. What a case does not say is recorded with eps_clip 0.2 and eps_clip_high 0.28.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from tests.golden import records
from tests.golden.policy_step import Step, every_run, packed, run_step
from tests.golden.records import Entry, case_id

GLOBAL_BATCH = 8
CASES: list[Entry] = records.entries("slime", "slime_grpo", "slime_cispo")
DIFFERENT: dict[str, str] = {}


def reduction_of(cfg: dict[str, Any], data: dict[str, Tensor]) -> tuple[str, float, list[Tensor]]:
    """loss_reduction, the factor from our mean to slime's number, and the group of each token."""
    batches = range(int(data["n_batches"]))
    groups: list[Tensor] = []
    for b in batches:
        lengths = data[f"cu_seq_lens_{b}"].diff()
        number = torch.arange(len(lengths)) // cfg.get("group_of", 1) + 100 * b
        groups.append(torch.repeat_interleave(number, lengths).unsqueeze(0))
    if cfg["args"].get("calculate_per_token_loss"):
        return "sum", 1.0, groups
    ids = [g[data[f"labels_{b}"] != -100] for b, g in enumerate(groups)]
    units = len(torch.cat(ids).unique())
    return "prompt" if "group_of" in cfg else "sample", units * len(batches) / GLOBAL_BATCH, groups


def step_of(entry: Entry) -> Step:
    cfg, data = entry["config"], records.tensors(entry["inputs"])
    args = cfg["args"]
    reduction, scale, groups = reduction_of(cfg, data)
    low, high = args.get("eps_clip", 0.2), args.get("eps_clip_high", 0.28)
    clip = {"cliprange_low": low, "cliprange_high": high, "log_ratio_clamp": None}
    policy: dict[str, Any] = {"loss_type": "ppo", "dual_clip_c": args.get("eps_clip_c"), **clip}
    if args.get("advantage_estimator") == "cispo":
        policy = {"loss_type": "cispo", **clip}
    if args.get("use_rollout_logprobs"):
        policy["anchor"] = "rollout"
    config: dict[str, Any] = {
        "policy_loss_cfg": policy,
        "loss_reduction": reduction,
        "entropy_coef": args.get("entropy_coef", 0.0),
        "temperature": args.get("rollout_temperature", 1.0),
    }
    if args.get("use_kl_loss"):
        config |= {n: args[n] for n in ("use_kl_loss", "kl_loss_coef", "kl_loss_type")}
        config |= {"kl_clamp_in": None, "kl_clamp_out": 10.0 if args["kl_loss_type"] == "low_var_kl" else None}
        if args.get("use_unbiased_kl"):
            config |= {"kl_loss_grad": "unbiased", "kl_clamp_weighted": config["kl_clamp_out"] is not None}
    if args.get("use_opsm"):
        config["opsm_delta"] = args["opsm_delta"]
    step = packed(entry, config, scale)
    for b, item in enumerate(step.items):
        item["rollout_logprobs"] = data[f"rollout_logps_{b}"]
        item["group_ids"] = groups[b]
        if "adv" in cfg:
            item["advantages"] = data[f"{cfg['adv']}_{b}"]
        if args.get("use_tis"):
            item["is_weights"] = mismatch_weights(args, item["old_logprobs"] - item["rollout_logprobs"])
        if cfg.get("old_none"):
            del item["old_logprobs"], item["rollout_logprobs"]
    return step


def mismatch_weights(args: dict[str, Any], log_is: Tensor) -> Tensor:
    """TIS clamps the weight of trainer against sampler, IcePop drops what is out of bounds."""
    ratio, low, high = log_is.exp(), args["tis_clip_low"], args["tis_clip"]
    if "icepop" in args.get("custom_tis_function_path", ""):
        return ratio * ((ratio >= low) & (ratio <= high))
    return ratio.clamp(low, high)


@every_run
@pytest.mark.parametrize("entry", CASES, ids=case_id)
def test_slime(entry: Entry, run: str) -> None:
    precision, found, _ = run_step(step_of(entry), run)
    assert not records.mismatches(entry, found, precision)
