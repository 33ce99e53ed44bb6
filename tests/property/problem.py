"""One small GRPO micro-batch with everything in it, and its oracle: what the tests of training steps share."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from tests import budgets
from tests.oracle import grpo, head
from tests.property.steps import contexts
from xloss import GRPOLossConfig, RLLossContextInputItem

TOKENS, HIDDEN, VOCAB = 19, 6, 23
POLICY = {"loss_type": "vanilla", "cliprange_low": 0.2, "cliprange_high": 0.28}
RUNS = {
    "eager": {"mode": "eager"},
    "one_pass": {"mode": "chunk", "plan": "one_pass", "chunk_size": 4},
    "two_pass": {"mode": "chunk", "plan": "two_pass", "chunk_size": 4},
}
every_run = pytest.mark.parametrize("run", RUNS.values(), ids=RUNS)


class Problem:
    """A small GRPO micro-batch with KL and entropy terms, masked tokens and zero advantages; and its oracle."""

    objective = grpo.Objective(POLICY, 0.1, "k3", 0.01)

    def __init__(self, dtype: torch.dtype = torch.float64, shape: tuple[int, ...] = (1, TOKENS), seed: int = 0) -> None:
        g = torch.Generator().manual_seed(seed)
        wide = torch.float64 if dtype == torch.float64 else torch.float32

        def randn(*size: int) -> Tensor:
            return torch.randn(size, generator=g, dtype=torch.float64)

        self.hidden = randn(*shape, HIDDEN).to(dtype)
        self.weight = randn(VOCAB, HIDDEN).to(dtype)
        labels = torch.randint(0, VOCAB, shape, generator=g)
        labels[..., ::4] = -100
        labels[..., 1::6] = VOCAB - 1
        advantages = randn(*shape).to(wide)
        advantages[..., 2::5] = 0
        now = head.token_stats(self.hidden, self.weight, labels).logprobs
        old = (now + 0.5 * randn(*shape)).to(wide)
        self.batch = grpo.Batch(labels, advantages, old, ref=(now + 0.5 * randn(*shape)).to(wide))

    def context(self, **run: Any) -> Any:
        cfg = GRPOLossConfig(
            policy_loss_cfg=POLICY,
            use_kl_loss=True,
            kl_loss_coef=0.1,
            kl_loss_type="k3",
            entropy_coef=0.01,
            **run,
        )
        b = self.batch
        item = RLLossContextInputItem(
            shifted_labels=b.labels, advantages=b.advantages, old_logprobs=b.old, ref_logprobs=b.ref
        )
        return contexts(cfg, [item])[0]

    def loss(self, hidden: Tensor, weight: Tensor) -> Tensor:
        """The oracle's, with float32 weights as calibration hands them out."""
        (weights,) = grpo.step_weights([self.batch], self.objective)
        rounded = {n: w.float().double() for n, w in vars(weights).items()}
        return grpo.loss(hidden, weight, self.batch, grpo.Weights(**rounded), self.objective)

    def gold(self, factor: float = 1.0) -> list[Tensor]:
        leaves = head.leaves(self.hidden, self.weight)
        return head.grads(factor * self.loss(*leaves), leaves)


def assert_grads(inputs: list[Tensor], gold: list[Tensor], relative: float = 1e-6) -> None:
    """Relative to float32 rounding of the calibrated weights: the formulas are held to float64 in test_losses."""
    for name, x, want in zip(("hidden", "weight"), inputs, gold, strict=True):
        assert x.grad is not None
        budgets.assert_relative(f"d {name}", x.grad, want, relative)
