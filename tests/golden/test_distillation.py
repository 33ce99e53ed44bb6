"""Golden cases: distillation of Liger and NeMo RL.

Contract: in float64 and float32, eager and chunked, one-pass and two-pass, xloss gives the losses and gradients that
the peers' own code gave. Teacher logits are `teacher_hidden @ teacher_weight.T`; both are given as hidden states and
head, and once more as logits.

Different, and reproduced in another way (`DIFFERENT`): Liger's cosine loss counts ignored tokens too, so it is run
beside the cross-entropy, with every token counted, and scaled to its denominator.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from tests.golden.records import Entry, case_id, entries, mismatches, tensors
from tests.property.helpers import leaf
from xloss import CELossConfig, CELossContextInputItem, DistillLossConfig, DistillLossContextInputItem

LIGER_JSD = entries("liger", "distill_jsd")
LIGER_COSINE = entries("liger", "distill_cosine")
NEMO_TOPK = entries("nemo", "distill_topk")
NEMO_SOFT_CE = entries("nemo", "soft_cross_entropy")
CASES: list[Entry] = [*LIGER_JSD, *LIGER_COSINE, *NEMO_TOPK, *NEMO_SOFT_CE]
DIFFERENT: dict[str, str] = {
    str(e["id"]): "Liger sums the cosine term over ignored tokens too and divides by the number of valid ones"
    for e in LIGER_COSINE
}
RUNS: dict[str, tuple[torch.dtype, dict[str, Any]]] = {
    "eager-f64": (torch.float64, {"mode": "eager"}),
    "one_pass-f64": (torch.float64, {"mode": "chunk", "chunk_size": 7}),
    "two_pass-f64": (torch.float64, {"mode": "chunk", "plan": "two_pass", "chunk_size": 7}),
    "one_pass-f32": (torch.float32, {"mode": "chunk", "chunk_size": 7}),
    "two_pass-f32": (torch.float32, {"mode": "chunk", "plan": "two_pass", "chunk_size": 7}),
}
every_run = pytest.mark.parametrize(("dtype", "run"), RUNS.values(), ids=RUNS)


def of(found: list[Entry]) -> Any:
    return pytest.mark.parametrize("entry", found, ids=case_id)


class Student:
    """Inputs of a case in a dtype, with gradients."""

    def __init__(self, entry: Entry, dtype: torch.dtype) -> None:
        self.entry, self.dtype = entry, dtype
        given = tensors(entry["inputs"])
        self.labels = given["labels"]
        self.hidden, self.weight = leaf(given["hidden"].to(dtype)), leaf(given["weight"].to(dtype))
        self.teacher_hidden, self.teacher_weight = given["teacher_hidden"].to(dtype), given["teacher_weight"].to(dtype)
        self.topk_ids, self.topk_logits = given["teacher_topk_indices"], given["teacher_topk_logits"].to(dtype)

    def loss(self, cfg: Any, item: Any, **forward: Any) -> Tensor:
        ctx_cls = cfg.loss_ctx_cls
        (kwargs,) = ctx_cls.build_batches_loss_kwargs([item], cfg)
        loss: Tensor = ctx_cls(cfg, kwargs).forward(self.hidden, self.weight, **forward)[0]
        return loss

    def from_head(self, cfg: Any, labels: Tensor | None = None) -> Tensor:
        labels = self.labels if labels is None else labels
        item = DistillLossContextInputItem(shifted_labels=labels, teacher_hidden_states=self.teacher_hidden)
        return self.loss(cfg, item, teacher_head_weight=self.teacher_weight)

    def from_logits(self, cfg: Any) -> Tensor:
        logits = self.teacher_hidden @ self.teacher_weight.t()
        return self.loss(cfg, DistillLossContextInputItem(shifted_labels=self.labels, teacher_logits=logits))

    def check(self, loss: Tensor) -> None:
        hidden, weight = torch.autograd.grad(loss, [self.hidden, self.weight])
        found = {"loss": [loss.item()], "grad_hidden": hidden, "grad_weight": weight}
        assert not mismatches(self.entry, found, "f64" if self.dtype == torch.float64 else "f32")


def liger_fields(config: dict[str, Any]) -> dict[str, Any]:
    """Liger weighs both terms 1/2 by default and has no T^2 factor."""
    return {
        "temperature": config.get("temperature", 1.0),
        "hard_weight": config.get("weight_hard_loss", 0.5),
        "soft_weight": config.get("weight_soft_loss", 0.5),
    }


@of(LIGER_JSD)
@every_run
def test_liger_jsd(entry: Entry, dtype: torch.dtype, run: dict[str, Any]) -> None:
    cfg = DistillLossConfig(divergence="jsd", beta=entry["config"]["beta"], **liger_fields(entry["config"]), **run)
    student = Student(entry, dtype)
    student.check(student.from_head(cfg))
    student.check(student.from_logits(cfg))


@of(LIGER_COSINE)
@every_run
def test_liger_cosine(entry: Entry, dtype: torch.dtype, run: dict[str, Any]) -> None:
    """`beta` scales Liger's cosine term."""
    student, fields = Student(entry, dtype), liger_fields(entry["config"])
    hard = CELossConfig(loss_reduction="sum", **run)
    soft = DistillLossConfig(divergence="cosine", loss_reduction="sum", temperature=fields["temperature"], **run)
    everywhere = student.labels.masked_fill(student.labels == -100, 0)
    valid = (student.labels != -100).sum()
    hard_loss = student.loss(hard, CELossContextInputItem(shifted_labels=student.labels))
    soft_loss = entry["config"]["beta"] * student.from_head(soft, everywhere)
    student.check((fields["hard_weight"] * hard_loss + fields["soft_weight"] * soft_loss) / valid)


@of(NEMO_TOPK)
@every_run
def test_nemo_topk(entry: Entry, dtype: torch.dtype, run: dict[str, Any]) -> None:
    given = entry["config"]["loss"]
    kind = {"forward": "forward_kl", "reverse": "reverse_kl", "mixed": "mixed"}[given["kl_type"]]
    share = {"mixed_kl_weight": given["mixed_kl_weight"]} if kind == "mixed" else {}
    mode = "full" if given.get("zero_outside_topk") else "renormalized"
    student = Student(entry, dtype)
    item = DistillLossContextInputItem(
        shifted_labels=student.labels,
        teacher_topk_ids=student.topk_ids,
        teacher_topk_logprobs=student.topk_logits.log_softmax(-1) if mode == "full" else student.topk_logits,
    )
    student.check(student.loss(DistillLossConfig(divergence=kind, topk_mode=mode, **share, **run), item))


@of(NEMO_SOFT_CE)
@every_run
def test_nemo_soft_cross_entropy(entry: Entry, dtype: torch.dtype, run: dict[str, Any]) -> None:
    student = Student(entry, dtype)
    student.check(student.from_head(DistillLossConfig(divergence="cross_entropy", **run)))
