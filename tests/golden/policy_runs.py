"""Running one recorded policy step through xloss: what the golden modules of policy losses share."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from tests.golden import records
from xloss import GRPOLossConfig, LossInfo, RLLossContextInputItem

RUNS = {
    "f64-eager": (torch.float64, {"mode": "eager"}),
    "f64-chunk": (torch.float64, {"mode": "chunk", "chunk_size": 7}),
    "f32-chunk": (torch.float32, {"mode": "chunk", "chunk_size": 7}),
}
every_run = pytest.mark.parametrize(("dtype", "run"), RUNS.values(), ids=RUNS)
Arrays = dict[str, Tensor]


def precision(dtype: torch.dtype) -> str:
    return "f64" if dtype == torch.float64 else "f32"


def batches(entry: records.Entry) -> list[Arrays]:
    """The micro-batches of the entry's inputs, one for a padded set, suffixes of packed sets taken off."""
    data = records.tensors(entry["inputs"])
    if "n_batches" not in data:
        return [data]
    count = int(data["n_batches"])
    return [{k.removesuffix(f"_{b}"): v for k, v in data.items() if k.endswith(f"_{b}")} for b in range(count)]


def item(batch: Arrays, **changed: Any) -> RLLossContextInputItem:
    """Labels, advantages of the sequence, and old and rollout log-probs; `changed` replaces or adds."""
    fields = {
        "shifted_labels": batch["labels"],
        "advantages": batch["adv_seq_tok"],
        "old_logprobs": batch["old_logps"],
    }
    return RLLossContextInputItem(**(fields | changed))


@dataclass
class Step:
    """A step that was run and differentiated."""

    losses: list[float]
    infos: list[LossInfo]
    kwargs: list[Any]
    hidden: list[Tensor]
    weight: Tensor

    def found(self, undo: float = 1.0) -> dict[str, Any]:
        """What `records.mismatches` compares; `undo`: a factor to take the peer's own."""
        out: dict[str, Any] = {"loss": [x * undo for x in self.losses]}
        grads = [h.grad * undo for h in self.hidden]
        names = ["grad_hidden"] if len(grads) == 1 else [f"grad_hidden_{b}" for b in range(len(grads))]
        return out | dict(zip(names, grads, strict=True)) | {"grad_weight": self.weight.grad * undo}


def run_step(entry: records.Entry, cfg: GRPOLossConfig, items: list[Any], dtype: torch.dtype) -> Step:
    """Forward every micro-batch, then differentiate the sum of the losses."""
    data, parts = records.tensors(entry["inputs"]), batches(entry)
    cu = [p["cu_seq_lens"] for p in parts] if "cu_seq_lens" in parts[0] else None
    ctx_cls = cfg.loss_ctx_cls
    kwargs = ctx_cls.build_batches_loss_kwargs(items, cfg, cu_seq_lens_list=cu)
    hidden = [p["hidden"].to(dtype).requires_grad_() for p in parts]
    weight = data["weight"].to(dtype).requires_grad_()
    outs = [ctx_cls(cfg, k).forward(h, weight) for k, h in zip(kwargs, hidden, strict=True)]
    torch.stack([loss for loss, _ in outs]).sum().backward()
    return Step([float(loss.detach()) for loss, _ in outs], [info for _, info in outs], kwargs, hidden, weight)


def assert_recorded(entry: records.Entry, step: Step, dtype: torch.dtype, undo: float = 1.0) -> None:
    """Loss and gradients are what the peer gave."""
    found = step.found(undo)
    if "grad_hidden" in found and "grad_hidden_0" in records.arrays(entry["file"]):
        found["grad_hidden_0"] = found.pop("grad_hidden")
    assert records.mismatches(entry, found, precision(dtype)) == []


def close(entry: records.Entry, name: str, got: float | np.ndarray, want: Any, dtype: torch.dtype) -> str | None:
    """None, or how far one figure is from the recorded one."""
    tolerance = records.tolerance(entry)[precision(dtype)]
    return records.differ(name, np.asarray(got, np.float64), np.asarray(want, np.float64), tolerance)
