"""Figures that every preference loss reports."""

from __future__ import annotations

import torch
from torch import Tensor

from xloss.losses.preferences.base import PreferenceBatch
from xloss.metrics import Metric


def preference_metrics(batch: PreferenceBatch, beta: float, paired: bool) -> dict[str, Metric]:
    """Means over sequences and pairs; a reward is ``beta (logprobs - ref_logprobs)``, before any f-divergence."""
    sides: dict[str, tuple[Tensor, Tensor]] = {
        name: (side.logprobs.detach(), beta * side.log_ratios.detach())
        for name, side in (("chosen", batch.chosen), ("rejected", batch.rejected))
    }
    metrics = {}
    for name, (logprobs, rewards) in sides.items():
        metrics[f"num_{name}"] = Metric.count_of(rewards)
        metrics[f"logps_{name}"] = Metric.mean(logprobs)
        metrics[f"reward_{name}"] = Metric.mean(rewards)
    if paired:
        margin = sides["chosen"][1] - sides["rejected"][1]
        metrics["reward_margin"] = Metric.mean(margin)
        metrics["reward_accuracy"] = Metric.mean(torch.gt(margin, 0).to(margin.dtype))
    return metrics
