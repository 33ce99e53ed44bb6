"""Running a recorded policy step through xloss: padded sets `[B, T]` and packed ones, in three ways.

A peer's own last factor (a gradient accumulation count, a denominator of another batch) is no part of a loss on this
batch: `Step.factor` takes it back.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.golden import records
from tests.golden.records import Entry
from tests.property.helpers import leaf
from xloss import GRPOLossConfig, GRPOLossContext, RLLossContextInputItem

RUNS = {
    "eager-f64": (torch.float64, {"mode": "eager"}),
    "chunk-f64": (torch.float64, {"mode": "chunk", "chunk_size": 7}),
    "chunk-f32": (torch.float32, {"mode": "chunk", "chunk_size": 7}),
}
every_run = pytest.mark.parametrize("run", RUNS)


@dataclass
class Step:
    """One optimizer step in xloss's terms: config fields, one item and one `hidden` a micro-batch."""

    config: dict[str, Any]
    items: list[dict[str, Tensor]]
    hidden: list[Tensor]
    weight: Tensor
    cu_seq_lens: list[Tensor] | None = None
    factor: float = 1.0
    names: list[str] = field(default_factory=lambda: ["grad_hidden"])


def padded(entry: Entry, config: dict[str, Any], factor: float = 1.0, **fields: Tensor | None) -> Step:
    """A step on a padded set: labels are -100 where the mask is 0. A field that is None is left out."""
    data = records.tensors(entry["inputs"])
    item = {
        "shifted_labels": data["labels"],
        "advantages": data["adv_seq_tok"],
        "old_logprobs": data["old_logps"],
        "ref_logprobs": data["ref_logps"],
    } | fields
    present = {name: value for name, value in item.items() if value is not None}
    return Step(config, [present], [data["hidden"]], data["weight"], factor=factor)


def packed(entry: Entry, config: dict[str, Any], factor: float = 1.0) -> Step:
    """A step on a packed set, one item a micro-batch."""
    data = records.tensors(entry["inputs"])
    count = int(data["n_batches"])
    fields = {
        "shifted_labels": "labels",
        "advantages": "adv_seq_tok",
        "old_logprobs": "old_logps",
        "ref_logprobs": "ref_logps",
    }
    return Step(
        config,
        [{name: data[f"{key}_{b}"] for name, key in fields.items()} for b in range(count)],
        [data[f"hidden_{b}"] for b in range(count)],
        data["weight"],
        [data[f"cu_seq_lens_{b}"] for b in range(count)],
        factor,
        [f"grad_hidden_{b}" for b in range(count)],
    )


def run_step(step: Step, run: str) -> tuple[str, dict[str, Any], list[dict[str, float]]]:
    """The precision to compare in, what to compare (losses and gradients), and the metrics of each micro-batch."""
    dtype, options = RUNS[run]
    config = GRPOLossConfig(**step.config, **options)
    items = [RLLossContextInputItem(**item) for item in step.items]
    built = GRPOLossContext.build_batches_loss_kwargs(items, config, cu_seq_lens_list=step.cu_seq_lens)
    hidden, weight = [leaf(h.to(dtype)) for h in step.hidden], leaf(step.weight.to(dtype))
    outs = [GRPOLossContext(config, kw).forward(h, weight) for kw, h in zip(built, hidden, strict=True)]
    (torch.stack([loss for loss, _ in outs]).sum() * step.factor).backward()
    found: dict[str, Any] = {"loss": [float(loss.detach()) * step.factor for loss, _ in outs]}
    found |= {name: h.grad for name, h in zip(step.names, hidden, strict=True)} | {"grad_weight": weight.grad}
    metrics = [{name: float(m.result()) for name, m in info.metrics.items()} for _, info in outs]
    return dtype_key(dtype), found, metrics


def dtype_key(dtype: torch.dtype) -> str:
    return "f64" if dtype == torch.float64 else "f32"
