"""Distillation losses under their names."""

from __future__ import annotations

from typing import Any

from xloss.losses.distill import DistillLossConfig
from xloss.losses.presets.base import Preset


def distillation(name: str, summary: str, source: str, **fields: Any) -> Preset:
    """A preset of ``DistillLossConfig``."""
    return Preset(name, DistillLossConfig, fields, summary, source)


PRESETS = [
    distillation("forward_kl", "covers all that the teacher does", "arXiv 1503.02531"),
    distillation("reverse_kl", "sticks to what the teacher prefers", "arXiv 2306.08543", divergence="reverse_kl"),
    distillation(
        "mixed_kl", "half forward, half reverse", "NeMo RL; weight 0.5", divergence="mixed", mixed_kl_weight=0.5
    ),
    distillation("jsd", "between forward and reverse", "arXiv 2306.13649; beta 0.5", divergence="jsd", beta=0.5),
    distillation(
        "gkd",
        "JSD at the temperature of TRL",
        "arXiv 2306.13649; beta 0.5, temperature 0.9",
        divergence="jsd",
        beta=0.5,
        temperature=0.9,
    ),
    distillation(
        "distillm",
        "forward KL against a mixture",
        "arXiv 2402.03898; lambda 0.1",
        divergence="skewed_forward_kl",
        skew_lambda=0.1,
    ),
    distillation(
        "distillm_reverse",
        "reverse KL against a mixture",
        "arXiv 2402.03898; lambda 0.1",
        divergence="skewed_reverse_kl",
        skew_lambda=0.1,
    ),
    distillation("tvd", "total variation", "Liger", divergence="tvd"),
    distillation("nla", "-log of the acceptance rate", "arXiv 2602.23881", divergence="nla"),
    distillation("lk_hybrid", "KL while far, TVD when close", "arXiv 2602.23881", divergence="lk_hybrid"),
    distillation("topk_kd", "the teacher's top k of the whole", "verl, NeMo RL", topk_mode="full"),
    distillation(
        "topk_kd_renormalized", "top k, both renormalised", "NeMo RL, ms-swift, TRL", topk_mode="renormalized"
    ),
    distillation("topk_kd_tail", "top k and all the rest as one", "TRL add_tail", topk_mode="tail"),
]
