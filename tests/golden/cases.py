"""Recorded XTuner and Tinker cases (CE, GRPO, log-probs) as neutral tensors; `records` loads the files.

Nothing here knows xloss, so the oracle can be put on trial with the same cases.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from tests.golden import records
from tests.golden.records import differ
from tests.oracle.grpo import Batch

_XTUNER = records.entries("xtuner", "ce", "grpo", "logprob")
_TINKER = [
    e for e in records.entries("tinker") if e["function"].startswith("documented ") and e["config"].get("loss_fn")
]
ENTRIES = _XTUNER + _TINKER


@dataclass
class Case:
    """One recorded step. `batches` carries labels, advantages, old, ref and is_weights of each micro-batch."""

    id: str
    peer: str
    kind: str  # "ce", "policy" or "logprob"
    config: dict[str, Any]
    weight: Tensor
    hidden: list[Tensor]
    batches: list[Batch]
    cu_seq_lens: list[Tensor]
    recorded: dict[str, np.ndarray]
    metrics: dict[str, Any]
    policy: dict[str, Any] = field(default_factory=dict)  # loss_type and its fields
    ignore_index: int = -100
    loss_weight: list[Tensor] | None = None  # CE only: the peer's own per-token weights
    is_sum: bool = False  # the peer sums over tokens; xloss and the oracle divide by the tokens (or weights) that count
    tolerance: dict[str, dict[str, float]] = field(default_factory=dict)

    def tolerance_for(self, dtype: torch.dtype) -> dict[str, float]:
        return self.tolerance["f64" if dtype == torch.float64 and self.config.get("dtype") is None else "f32"]


def cases(*kinds: str) -> list[Case]:
    return [c for c in map(_load, ENTRIES) if c.kind in kinds]


def count_by_peer() -> Counter[tuple[str, str]]:
    return Counter((c["peer"], c["loss_name"].removeprefix("tinker_")) for c in ENTRIES)


def _load(entry: dict[str, Any]) -> Case:
    data = records.arrays(entry["inputs"])
    count = int(data["n_batches"])

    def each(name: str) -> list[Tensor]:
        return [torch.from_numpy(data[f"{name}_{b}"]) for b in range(count)]

    case = Case(
        id=entry["id"],
        peer=entry["peer"],
        kind={"ce": "ce", "tinker_cross_entropy": "ce", "logprob": "logprob"}.get(entry["loss_name"], "policy"),
        config=entry["config"],
        weight=torch.from_numpy(data["weight"]),
        hidden=each("hidden"),
        batches=[
            Batch(labels, adv, old, ref)
            for labels, adv, old, ref in zip(
                each("labels"), each("adv_seq_tok"), each("old_logps"), each("ref_logps"), strict=True
            )
        ],
        cu_seq_lens=each("cu_seq_lens"),
        recorded=records.arrays(entry["file"]),
        metrics=entry["metrics"],
        tolerance=records.tolerance(entry),
    )
    (_as_xtuner if case.peer == "xtuner" else _as_tinker)(case, each)
    return case


def _as_xtuner(case: Case, each: Any) -> None:
    cfg = case.config
    if "ignore_idx" in cfg:
        case.ignore_index = cfg["ignore_idx"]
    for b, batch in enumerate(case.batches):
        if cfg.get("all_masked") or cfg.get("all_ignored_batch") == b:
            batch.labels = torch.full_like(batch.labels, -100)
        batch.labels = batch.labels.where(batch.labels != -100, case.ignore_index)
        if cfg.get("advantages"):
            batch.advantages = each(cfg["advantages"])[b]
        if "adv_zero_frac" in cfg:
            batch.advantages = batch.advantages.clone()
            batch.advantages[:, :: cfg["adv_zero_frac"]] = 0
        if cfg.get("use_is_weights"):
            batch.is_weights = each("is_weights")[b]
    case.policy = cfg.get("policy_loss_cfg", {})


def _as_tinker(case: Case, each: Any) -> None:
    """Sums, no dual clip, no log-ratio clamp; masked tokens have advantage 0, which leaves dro its quadratic term."""
    cfg, case.is_sum = case.config, True
    name = cfg["loss_fn"]
    if name == "cross_entropy":
        if cfg.get("float_weights"):
            case.loss_weight = [w * m for w, m in zip(each("is_weights"), each("mask"), strict=True)]
        return
    if cfg.get("adv"):
        for b, adv in enumerate(each(cfg["adv"])):
            case.batches[b].advantages = adv
    if name == "dro" and not cfg.get("mask_quadratic"):
        for batch, targets, mask in zip(case.batches, each("targets"), each("mask"), strict=True):
            batch.labels, batch.advantages = targets, batch.advantages * mask
    eps = cfg.get("eps", 0.0)
    low, high = cfg.get("clip_low_threshold", 1.0 - eps), cfg.get("clip_high_threshold", 1.0 + eps)
    case.policy = {
        "ppo": {
            "loss_type": "vanilla",
            "cliprange_low": 1.0 - low,
            "cliprange_high": high - 1.0,
            "clip_ratio_c": None,
            "log_prob_diff_min": -700.0,
            "log_prob_diff_max": 700.0,
        },
        "cispo": {"loss_type": "cispo", "clip_low_threshold": low, "clip_high_threshold": high},
        "importance_sampling": {"loss_type": "importance_sampling"},
        "dro": {"loss_type": "dro", "beta": cfg.get("beta")},
    }[name]


def mismatch(case: Case, name: str, ours: Tensor | np.ndarray | list[float], dtype: torch.dtype) -> str | None:
    """None, or what is wrong with `ours` against what the peer recorded under `name`."""
    got = np.asarray(ours.detach().double() if isinstance(ours, Tensor) else ours, dtype=np.float64)
    name, got = records.projected(name, got, case.recorded)
    if name not in case.recorded:  # no gradient at the peer (every token masked): ours must be exactly 0
        return f"{name}: the peer has none, ours is not 0" if np.abs(got).max(initial=0) else None
    return differ(name, got, case.recorded[name].astype(np.float64), case.tolerance_for(dtype))
