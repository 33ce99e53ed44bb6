"""Golden cases of TRL's GRPO and RLOO trainers, xloss on trial.

Contract: every loss type, ratio level, clip, mask, rollout weight, KL and entropy option of TRL has its numbers in
xloss, loss and both gradients, in float64 (eager and chunked) and float32. `DIFFERENT` lists what differs on purpose.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from tests.golden import records
from tests.golden.policy_step import Step, every_run, padded, run_step
from tests.golden.records import Entry, case_id

NAMES = ("grpo", "bnpo", "dr_grpo", "dapo", "cispo", "sapo", "luspo", "vespo", "rloo")
CASES: list[Entry] = records.entries("trl", *(f"trl_{name}" for name in NAMES))
DIFFERENT: dict[str, str] = {
    "trl-grpo_luspo_seq_kl-P5-044": "TRL's luspo averages the KL over padding too",
    "trl-grpo_luspo_tok-P2-045": "TRL's luspo at token level averages over padding too",
    "trl-grpo_vespo_params_is-P2-049": "TRL's vespo multiplies rollout weights at padding into the sequence's",
    "trl-rloo-P1-078": "TRL's rloo adds -A / N to the value for a sequence without a token; it has no gradient",
}


def step_of(entry: Entry) -> Step:
    """TRL's arguments as ours."""
    cfg, data = entry["config"], records.tensors(entry["inputs"])
    loss_type = cfg.get("loss_type", "rloo")
    length = cfg.get("max_completion_length", 20)
    sequences = {"loss_reduction": "sample", "count_empty_sequences": True}
    reduction: dict[str, Any] = {
        "grpo": sequences,
        "sapo": sequences,
        "rloo": sequences,
        "luspo": sequences,
        "dr_grpo": {"loss_reduction": "sample_sum_norm", "norm_length": length, "count_empty_sequences": True},
    }.get(loss_type, {})
    factor = 1.0
    if loss_type in ("grpo", "sapo", "bnpo", "dr_grpo", "luspo"):
        factor /= cfg.get("grad_accum", 1)
    if "num_items_in_batch" in cfg:  # of a batch of which this one is a part
        factor *= float((data["labels"] != -100).sum()) / cfg["num_items_in_batch"]
    level = cfg.get("importance_sampling_level", "token")
    config = {
        "policy_loss_cfg": policy_of(loss_type, level, cfg),
        "temperature": cfg.get("temperature", 1.0),
    } | reduction
    if cfg.get("beta") and cfg.get("use_ref_model", True):  # else Liger's reference is the current policy: KL 0
        config |= {"use_kl_loss": True, "kl_loss_coef": cfg["beta"], "kl_loss_type": "k3"}
        config |= {"kl_clamp_in": None, "kl_clamp_out": None}
        if cfg.get("use_bias_correction_kl"):
            config |= {"kl_loss_grad": "unbiased", "kl_ratio_level": level}
    if cfg.get("entropy_coef"):
        config |= {"entropy_coef": cfg["entropy_coef"], "entropy_reduction": "token"}
    if "top_entropy_quantile" in cfg:
        config["top_entropy_quantile"] = cfg["top_entropy_quantile"]
    if "off_policy_mask_threshold" in cfg:
        config["opsm_delta"] = cfg["off_policy_mask_threshold"]
    fields: dict[str, Any] = {}
    if cfg.get("old_none"):
        fields["old_logprobs"] = None
    if cfg.get("adv") == "token":
        fields["advantages"] = data["adv_tok"]
    if "is_ratio" in cfg:
        fields["is_weights"] = data[f"is_ratio_{cfg['is_ratio']}"].expand(data["labels"].shape).contiguous()
    if cfg.get("opsm_sampling"):
        fields["rollout_logprobs"] = data["rollout_logps"]
    return padded(entry, config, factor, **fields)


def policy_of(loss_type: str, level: str, cfg: dict[str, Any]) -> dict[str, Any]:
    """The policy loss of TRL's `loss_type` at its `importance_sampling_level`; TRL clamps no log-ratio."""
    low = cfg.get("epsilon_low", 0.2)
    clip = {"cliprange_low": low, "cliprange_high": cfg.get("epsilon_high", low), "delta": cfg.get("delta")}
    if loss_type == "vespo":
        names = ("k_pos", "lambda_pos", "k_neg", "lambda_neg")
        return {"loss_type": "vespo"} | {n: cfg[f"vespo_{n}"] for n in names if f"vespo_{n}" in cfg}
    if loss_type == "rloo":
        return {"loss_type": "rloo"} | clip
    at_level = {"ratio_level": level, "log_ratio_clamp": None}
    if loss_type == "cispo":
        return {"loss_type": "cispo", "clip_high_threshold": cfg["epsilon_high"]} | at_level
    if loss_type == "sapo":
        taus = {f"tau_{n}": cfg[f"sapo_temperature_{n}"] for n in ("pos", "neg") if f"sapo_temperature_{n}" in cfg}
        return {"loss_type": "sapo"} | at_level | taus
    return {"loss_type": "luspo" if loss_type == "luspo" else "ppo"} | clip | at_level


def luspo_with_padding(entry: Entry) -> list[Step]:
    """Steps of ours that add up to the peers' luspo, whose means run over padding wherever they are over tokens.

    The policy term at token level takes padding for tokens and holds the length in the advantages; the KL term of each
    sequence is its own step, over all its positions, times its length.
    """
    cfg, data, policy = entry["config"], records.tensors(entry["inputs"]), step_of(entry)
    lengths = data["mask"].sum(1)
    over_all = {"loss_reduction": "token", "count_empty_sequences": False}
    if cfg.get("importance_sampling_level", "token") == "token":
        advantages = data["adv_seq"] * lengths
        policy.items[0] |= {"shifted_labels": data["targets"], "advantages": _each(advantages, data["targets"])}
        policy.config |= over_all
        policy.config["policy_loss_cfg"] |= {"loss_type": "ppo"}
    steps = [policy]
    for i, length in enumerate(lengths.tolist() if cfg.get("beta") else []):
        kl = step_of(entry)
        labels = torch.full_like(data["targets"], -100)
        labels[i] = data["targets"][i]
        kl.items[0] |= {"shifted_labels": labels, "advantages": torch.zeros_like(data["adv_seq_tok"])}
        kl.config |= over_all | {"policy_loss_cfg": {"loss_type": "ppo"}}
        kl.config["kl_loss_coef"] *= length / len(lengths)
        steps.append(kl)
    policy.config = {name: value for name, value in policy.config.items() if not name.startswith(("kl_", "use_kl"))}
    return steps


def _each(per_sequence: Tensor, like: Tensor) -> Tensor:
    return per_sequence[:, None].expand(like.shape).contiguous()


def vespo_with_padding(entry: Entry) -> list[Step]:
    """The peers multiply the rollout weights at padding into those of the sequence: here its first token takes them."""
    data, step = records.tensors(entry["inputs"]), step_of(entry)
    mask, weights = data["mask"].bool(), data["is_ratio_tok"].double()
    weights[torch.arange(mask.shape[0]), mask.int().argmax(1)] *= weights.masked_fill(mask, 1).prod(1)
    step.items[0]["is_weights"] = weights
    return [step]


def run_steps(steps: list[Step], run: str) -> tuple[str, dict[str, Any]]:
    """The loss and gradients of steps on the same batch, added up."""
    parts = [run_step(step, run) for step in steps]
    founds = [found for _, found, _ in parts]
    added = {name: sum(found[name] for found in founds) for name in ("grad_hidden", "grad_weight")}
    return parts[0][0], {"loss": [sum(found["loss"][0] for found in founds)]} | added


@every_run
@pytest.mark.parametrize("entry", [e for e in CASES if e["id"] not in DIFFERENT], ids=case_id)
def test_trl(entry: Entry, run: str) -> None:
    precision, found, _ = run_step(step_of(entry), run)
    assert records.mismatches(entry, found, precision) == []


@every_run
@pytest.mark.parametrize("entry", [e for e in CASES if e["id"] in DIFFERENT], ids=case_id)
def test_different(entry: Entry, run: str) -> None:
    """Where the difference is made up for, our numbers are TRL's."""
    explained = {"trl_luspo": luspo_with_padding, "trl_vespo": vespo_with_padding}
    if entry["loss_name"] != "trl_rloo":
        precision, found = run_steps(explained[entry["loss_name"]](entry), run)
    else:
        precision, found, _ = run_step(step_of(entry), run)
        data = records.tensors(entry["inputs"])
        empty = data["mask"].sum(1) == 0
        found["loss"][0] -= float(data["adv_seq"][empty].double().sum()) / len(empty)
    assert records.mismatches(entry, found, precision) == []


@pytest.mark.parametrize("entry", [e for e in CASES if e["id"] in DIFFERENT], ids=case_id)
def test_different_they_are(entry: Entry) -> None:
    precision, found, _ = run_step(step_of(entry), "eager-f64")
    assert records.mismatches(entry, found, precision) != []
