"""Golden cases of prime-rl's losses.

Contract: losses and both gradients of prime-rl's own code, in float64 (eager and chunked) and float32; its entropy.

prime-rl adds three components, each over its own token weights and divided by its own count: the policy loss
(`dppo_tv`, or its symmetric form `ipo`), cross-entropy, and distillation (`ref_kl`). Here they are three contexts whose
losses add up. Its `inference_logprobs` are `rollout_logprobs`, and `adv_tau` is a factor on the advantages.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from tests.golden import records
from tests.golden.policy_step import RUNS, dtype_key, every_run
from tests.golden.records import Entry, case_id
from tests.oracle import grpo, head
from tests.property.helpers import leaf
from xloss import CELossConfig, CELossContextInputItem, GRPOLossConfig, RLLossContextInputItem, linear_logprobs

STEPS: list[Entry] = records.entries("prime", "prime_default", "prime_ipo")
ENTROPIES: list[Entry] = records.entries("prime", "entropy")
CASES: list[Entry] = STEPS + ENTROPIES
DIFFERENT: dict[str, str] = {}


def policy_of(cfg: dict[str, Any]) -> dict[str, Any]:
    """`rl_loss_fn` of the config; prime-rl neither caps the ratio nor clamps its log."""
    loss = cfg.get("loss", {})
    if cfg["type"] == "ipo":
        bound = loss.get("ipo_threshold", 0.1)
        mask = {"delta_low": bound, "delta_high": bound, "one_sided": False}
    else:
        mask = {"delta_low": loss.get("dppo_mask_low", 0.2), "delta_high": loss.get("dppo_mask_high", 0.2)}
    return {
        "loss_type": "dppo_tv",
        "anchor": "rollout",
        "ratio_cap": None,
        "log_ratio_clamp": None,
        "kl_tau": loss.get("kl_tau", 1e-3),
        **mask,
    }


def components(entry: Entry, run: dict[str, Any]) -> list[tuple[Any, list[Any], float]]:
    """Config, items and the count that prime-rl divides by, of each component."""
    cfg, data = entry["config"], records.tensors(entry["inputs"])
    batches = range(int(data["n_batches"]))
    common = {"temperature": cfg.get("temperature", 1.0), "loss_reduction": "sum", **run}

    def each(name: str) -> list[Tensor]:
        return [data[f"{name}_{b}"] for b in batches]

    labels, targets, mask, stream = each("labels"), each("targets"), each("mask"), each("is_weights")
    factor = cfg.get("loss", {}).get("adv_tau", 1.0)
    advantages = [a * factor for a in each(cfg.get("adv", "adv_seq_tok"))]

    def policy(fields: dict[str, Any], weights: list[Tensor] | None) -> tuple[Any, list[Any]]:
        items = [
            RLLossContextInputItem(
                shifted_labels=labels[b],
                advantages=advantages[b],
                rollout_logprobs=data[f"old_logps_{b}"],
                ref_logprobs=data[f"ref_logps_{b}"],
                is_weights=None if weights is None else weights[b],
            )
            for b in batches
        ]
        return GRPOLossConfig(policy_loss_cfg=fields, **common), items

    found = []
    if not cfg.get("only_ce"):
        weights = [w * (w > 0.6) for w in stream] if cfg.get("rl_weights") else None
        found.append((*policy(policy_of(cfg), weights), cfg["rl_scale"]))
    if cfg.get("ref_kl"):
        weights = [w * (w < cfg["ref_kl"]) for w in stream]
        found.append((*policy({"loss_type": "ref_kl", "anchor": "rollout"}, weights), cfg["ref_kl_scale"]))
    if cfg.get("only_ce"):
        items = [CELossContextInputItem(shifted_labels=y) for y in labels]
        found.append((CELossConfig(**common), items, cfg["ce_scale"]))
    if cfg.get("ce_weights"):  # on prompt and tool tokens
        weights = [w * (w > 1.2) * (m == 0) for w, m in zip(stream, mask, strict=True)]
        items = [
            CELossContextInputItem(shifted_labels=y, token_weight=w) for y, w in zip(targets, weights, strict=True)
        ]
        found.append((CELossConfig(**common), items, cfg["ce_scale"]))
    return found


@every_run
@pytest.mark.parametrize("entry", STEPS, ids=case_id)
def test_prime(entry: Entry, run: str) -> None:
    dtype, options = RUNS[run]
    data = records.tensors(entry["inputs"])
    count = int(data["n_batches"])
    hidden, weight = [leaf(data[f"hidden_{b}"].to(dtype)) for b in range(count)], leaf(data["weight"].to(dtype))
    losses = [torch.zeros((), dtype=dtype) for _ in range(count)]
    for cfg, items, scale in components(entry, options):
        built = cfg.loss_ctx_cls.build_batches_loss_kwargs(items, cfg)
        for b, kwargs in enumerate(built):
            losses[b] = losses[b] + cfg.loss_ctx_cls(cfg, kwargs).forward(hidden[b], weight)[0] / scale
    torch.stack(losses).sum().backward()
    found: dict[str, Any] = {"loss": [float(x.detach()) for x in losses], "grad_weight": weight.grad}
    found |= {f"grad_hidden_{b}": h.grad for b, h in enumerate(hidden)}
    assert not records.mismatches(entry, found, dtype_key(dtype))


PLAIN = [e for e in STEPS if not {"rl_weights", "ce_weights", "ref_kl", "only_ce"} & e["config"].keys()]


@pytest.mark.parametrize("entry", PLAIN, ids=case_id)
def test_oracle(entry: Entry) -> None:
    """The oracle on trial, for its policy losses."""
    cfg, data = entry["config"], records.tensors(entry["inputs"])
    policy, losses = policy_of(cfg), []
    for b in range(int(data["n_batches"])):
        labels = data[f"labels_{b}"]
        options = head.Head(temperature=cfg.get("temperature", 1.0))
        stats = head.token_stats(data[f"hidden_{b}"].double(), data["weight"].double(), labels, None, options)
        advantages = data[f"{cfg.get('adv', 'adv_seq_tok')}_{b}"].double() * cfg.get("loss", {}).get("adv_tau", 1.0)
        each = grpo.POLICY["dppo_tv"](stats.logprobs, data[f"old_logps_{b}"].double(), advantages, policy)
        losses.append(float(each[labels != -100].sum()) / cfg["rl_scale"])
    assert not records.mismatches(entry, {"loss": losses})


@pytest.mark.parametrize("mode", ["eager", "chunk"])
@pytest.mark.parametrize("entry", ENTROPIES, ids=case_id)
def test_entropy(entry: Entry, mode: str) -> None:
    data = records.tensors(entry["inputs"])
    for b in range(int(data["n_batches"])):
        hidden, weight = data[f"hidden_{b}"].double(), data["weight"].double()
        stats = linear_logprobs(hidden, weight, data[f"targets_{b}"], mode=mode, return_entropy=True)
        name = "out_entropy" if b == 0 else f"out_entropy_{b}"
        assert not records.mismatches(entry, {name: stats.entropy})
