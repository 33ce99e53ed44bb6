"""One small distillation micro-batch with everything in it, and its oracle: what the tests of distillation share."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from tests import budgets
from tests.oracle import distill, head
from tests.property.helpers import leaf
from xloss import DistillLossConfig, DistillLossContextInputItem

TOKENS, HIDDEN, TEACHER_HIDDEN, VOCAB, K = 13, 6, 9, 23, 5
STUDENT = head.Head(softcap=4.0, logit_scale=1.3)
TEACHER = head.Head(softcap=3.0, logit_scale=0.8)
RUNS: dict[str, dict[str, Any]] = {
    "eager": {"mode": "eager"},
    "one_pass": {"mode": "chunk", "chunk_size": 3},
    "two_pass": {"mode": "chunk", "plan": "two_pass", "chunk_size": 3},
    "two_pass-again": {"mode": "chunk", "plan": "two_pass", "chunk_size": 3, "logits_budget": 1},
    "auto": {},
}


@dataclass
class Problem:
    """Masked tokens hold NaN in everything that may be read there; token weights and temperatures differ."""

    dtype: torch.dtype = torch.float64
    shape: tuple[int, ...] = (1, TOKENS)
    seed: int = 0
    bias: bool = True
    tau: float | str = 1.0  # "per token": a vector
    teacher_tau: float | None = None
    options: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        g = torch.Generator().manual_seed(self.seed)

        def randn(*size: int) -> Tensor:
            return torch.randn(size, generator=g, dtype=torch.float64).to(self.dtype)

        self.hidden, self.weight = randn(*self.shape, HIDDEN), randn(VOCAB, HIDDEN)
        self.head_bias = randn(VOCAB) if self.bias else None
        self.teacher_hidden, self.teacher_weight = randn(*self.shape, TEACHER_HIDDEN), randn(VOCAB, TEACHER_HIDDEN)
        self.teacher_bias = randn(VOCAB) if self.bias else None
        self.labels = torch.randint(0, VOCAB, self.shape, generator=g)
        self.labels[..., ::4] = -100
        self.labels[..., 1::6] = VOCAB - 1
        self.token_weight = torch.rand(self.shape, generator=g)
        self.token_weight[..., 2::7] = 0
        self.temperature = torch.rand(self.shape, generator=g) + 0.5 if self.tau == "per token" else None
        for x in (self.hidden, self.teacher_hidden, self.token_weight):
            x[self.labels == -100] = torch.nan
        self.live = ((self.labels != -100) & (self.token_weight != 0)).reshape(-1)

    @property
    def tau_live(self) -> float | Tensor:
        """The student's temperature in the divergence, a column where it is a vector."""
        if self.temperature is None:
            return float(self.tau)
        return self.temperature.double().reshape(-1)[self.live].unsqueeze(1)

    def teacher_logits(self) -> Tensor:
        """Of all tokens [T, V], at temperature 1; NaN where hidden states are."""
        flat = self.teacher_hidden.reshape(-1, TEACHER_HIDDEN)
        return head.logits(flat, self.teacher_weight, self.teacher_bias, TEACHER)

    def config(self, **fields: Any) -> DistillLossConfig:
        given = {"softcap": STUDENT.softcap, "logit_scale": STUDENT.logit_scale} | self.options | fields
        if isinstance(self.tau, float):
            given["temperature"] = self.tau
        return DistillLossConfig(teacher_temperature=self.teacher_tau, **given)

    def context(self, cfg: DistillLossConfig, **teacher: Tensor) -> Any:
        item = DistillLossContextInputItem(
            shifted_labels=self.labels, token_weight=self.token_weight, temperature=self.temperature, **teacher
        )
        (kwargs,) = cfg.loss_ctx_cls.build_batches_loss_kwargs([item], cfg)
        return cfg.loss_ctx_cls(cfg, kwargs)

    def run(self, source: str, **fields: Any) -> tuple[list[Tensor], Any]:
        """`[loss, dH, dW(, db)]` and the info, with the teacher given as `source`."""
        inputs = [x for x in (leaf(self.hidden), leaf(self.weight), leaf(self.head_bias)) if x is not None]
        bias = inputs[2] if self.bias else None
        logits = self.teacher_logits().to(self.dtype)
        if source == "head":
            cfg = self.config(teacher_softcap=TEACHER.softcap, teacher_logit_scale=TEACHER.logit_scale, **fields)
            ctx = self.context(cfg, teacher_hidden_states=self.teacher_hidden)
            forward = {"teacher_head_weight": self.teacher_weight, "teacher_head_bias": self.teacher_bias}
        elif source == "logits":
            ctx, forward = self.context(self.config(**fields), teacher_logits=logits.reshape(*self.shape, VOCAB)), {}
        else:
            ctx, forward = self.context(self.config(**fields)), {"teacher_logits_fn": lambda places: logits[places]}
        loss, info = ctx.forward(inputs[0], inputs[1], bias, **forward)
        assert str(ctx.explain(inputs[0], inputs[1], bias, **forward)) == str(info.plan)
        return [loss.detach(), *torch.autograd.grad(loss, inputs)], info

    def gold(self, kind: str, x: float | None = None, hard: float = 0.0, soft: float = 1.0, t2: bool = False) -> Any:
        """The same from the oracle, and the divergence of each live token."""
        inputs = head.leaves(self.hidden, self.weight, self.head_bias)
        z = distill.student_logits(*inputs, STUDENT, self.live)
        tau = self.tau_live
        other = self.teacher_logits()[self.live] / (tau if self.teacher_tau is None else self.teacher_tau)
        found = distill.of_logits(z / tau, other, kind, x)
        nll = -torch.log_softmax(z, -1).gather(1, self.labels.reshape(-1)[self.live, None])[:, 0]
        factor = (tau**2).squeeze(1) if t2 and isinstance(tau, Tensor) else tau**2 if t2 else 1.0
        loss = (self.weights() * (hard * nll + soft * factor * found)).sum()
        return [loss.detach(), *(g for g in head.grads(loss, inputs) if g is not None)], found.detach()

    def weights(self) -> Tensor:
        """Of the live tokens, with the float32 precision of calibrated ones."""
        kept = self.token_weight.reshape(-1)[self.live]
        return (kept / kept.sum()).double()


def assert_same(got: list[Tensor], gold: list[Tensor]) -> None:
    """Norm-wise, to the rounding of calibrated float32 weights, or of the working dtype."""
    for i, (ours, want) in enumerate(zip(got, gold, strict=True)):
        budgets.assert_relative(("loss", "d hidden", "d weight", "d bias")[i], ours, want, budgets.DISTILL_RELATIVE)
