"""The exact KL to a reference, over the whole vocabulary, as GRPO's penalty.

Contract: `sum_t w_t (policy_t + c KL(p_t, p_ref,t))` and its gradients are the oracle's in every plan, for losses of
tokens and of sequences, with the cap, scale and temperature of the policy on both sides. The reference gets no
gradient, a policy equal to its reference has no penalty, and what the exact KL has no use for is refused.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from pydantic import ValidationError
from torch import Tensor

from tests import budgets
from tests.oracle import distill, head
from tests.property.distilled import RUNS, assert_same
from tests.property.helpers import leaf
from xloss import GRPOLossConfig, RLLossContextInputItem
from xloss.errors import MissingFieldError, NonFiniteError, OptionError, UnsupportedError

B, S, H, H2, V, COEF = 3, 5, 6, 4, 17, 0.3
REINFORCE = {"loss_type": "reinforce"}
every_run = pytest.mark.parametrize("run", RUNS.values(), ids=RUNS)


class Problem:
    def __init__(self, dtype: torch.dtype = torch.float64, per_token: bool = False) -> None:
        g = torch.Generator().manual_seed(0)

        def randn(*size: int) -> Tensor:
            return torch.randn(size, generator=g, dtype=torch.float64).to(dtype)

        self.hidden, self.weight, self.bias = randn(B, S, H), randn(V, H), randn(V)
        self.ref_hidden, self.ref_weight, self.ref_bias = randn(B, S, H2), randn(V, H2), randn(V)
        self.labels = torch.randint(0, V, (B, S), generator=g)
        self.labels[:, ::3] = -100
        self.advantages = randn(B, S)
        self.advantages[1] = 0  # no policy gradient, but the penalty's
        self.temperature = torch.rand(B, S, generator=g).to(dtype) + 0.5 if per_token else None
        for x in (self.hidden, self.ref_hidden):
            x[self.labels == -100] = torch.nan
        self.live = (self.labels != -100).reshape(-1)

    def context(self, policy: dict[str, Any] = REINFORCE, **run: Any) -> Any:
        tau = {} if self.temperature is not None else {"temperature": 0.8}
        cfg = GRPOLossConfig(
            policy_loss_cfg=policy, use_kl_loss=True, kl_loss_type="full", kl_loss_coef=COEF, softcap=4.0,
            logit_scale=1.2, **tau, **run
        )  # fmt: skip
        item = RLLossContextInputItem(
            shifted_labels=self.labels, advantages=self.advantages, ref_hidden_states=self.ref_hidden,
            temperature=self.temperature,
        )  # fmt: skip
        (kwargs,) = cfg.loss_ctx_cls.build_batches_loss_kwargs([item], cfg)
        return cfg.loss_ctx_cls(cfg, kwargs)

    def logits(self, hidden: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        """Of the live tokens, at the temperature of the policy."""
        tau = 0.8 if self.temperature is None else self.temperature.reshape(-1)[self.live]
        options = head.Head(temperature=tau, softcap=4.0, logit_scale=1.2)
        return head.logits(hidden.reshape(-1, hidden.shape[-1])[self.live], weight, bias, options)

    def gold(self) -> tuple[list[Tensor], Tensor]:
        inputs = head.leaves(self.hidden, self.weight, self.bias)
        z = self.logits(*inputs)
        kl = distill.of_logits(z, self.logits(self.ref_hidden, self.ref_weight, self.ref_bias), "reverse_kl")
        logprobs = torch.log_softmax(z, -1).gather(1, self.labels.reshape(-1)[self.live, None])[:, 0]
        loss = (-self.advantages.reshape(-1)[self.live].double() * logprobs + COEF * kl).mean()
        return [loss.detach(), *head.grads(loss, inputs)], kl.detach()


@every_run
@pytest.mark.parametrize("per_token", [False, True])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_loss_and_gradients(dtype: torch.dtype, per_token: bool, run: dict[str, Any]) -> None:
    problem = Problem(dtype, per_token)
    ctx, inputs = problem.context(**run), [leaf(problem.hidden), leaf(problem.weight), leaf(problem.bias)]
    ref_weight = problem.ref_weight.clone().requires_grad_()
    loss, info = ctx.forward(*inputs, ref_head_weight=ref_weight, ref_head_bias=problem.ref_bias)
    gold, kl = problem.gold()
    assert_same([loss.detach(), *torch.autograd.grad(loss, inputs, retain_graph=False)], gold)
    budgets.assert_relative("ref_kl", info.metrics["ref_kl"].result(), kl.mean(), budgets.DISTILL_RELATIVE)
    assert ref_weight.grad is None
    explained = ctx.explain(*(x.detach() for x in inputs), ref_head_weight=ref_weight, ref_head_bias=problem.ref_bias)
    assert explained.teacher_size == info.plan.teacher_size == H2


@pytest.mark.parametrize("mode", ["eager", "chunk"])
def test_beside_a_loss_of_sequences(mode: str) -> None:
    """GSPO on-policy has the gradient of the sequence mean of REINFORCE; the penalty is the same in two passes."""
    problem = Problem()
    grads = []
    for policy, reduction in (({"loss_type": "gspo"}, "sample"), (REINFORCE, "sample")):
        problem.advantages[:] = problem.advantages[:, :1]  # one per answer
        ctx = problem.context(policy, mode=mode, loss_reduction=reduction, chunk_size=None if mode == "eager" else 4)
        inputs = [leaf(problem.hidden), leaf(problem.weight), leaf(problem.bias)]
        loss, info = ctx.forward(*inputs, ref_head_weight=problem.ref_weight, ref_head_bias=problem.ref_bias)
        grads.append(torch.autograd.grad(loss, inputs))
        assert mode == "eager" or info.plan.kind == ("two-pass" if policy["loss_type"] == "gspo" else "one-pass")
    for ours, want in zip(*grads, strict=True):
        budgets.assert_relative("gradient", ours, want, budgets.DISTILL_RELATIVE)


def test_policy_equal_to_its_reference() -> None:
    problem = Problem()
    problem.advantages.zero_()
    ctx = problem.context(mode="chunk", chunk_size=4)
    ctx.loss_kwargs.ref_hidden_states = problem.hidden
    hidden = leaf(problem.hidden)
    loss, _ = ctx.forward(
        hidden, problem.weight, problem.bias, ref_head_weight=problem.weight, ref_head_bias=problem.bias
    )
    (grad,) = torch.autograd.grad(loss, hidden)
    budgets.assert_rounding("loss", loss, torch.zeros(()), 10.0, 1.0)
    budgets.assert_rounding("gradient", grad, torch.zeros_like(grad), 10.0, budgets.norm(problem.weight))


def test_refused() -> None:
    problem = Problem(torch.float32)
    hidden, weight = problem.hidden, problem.weight
    with pytest.raises(MissingFieldError, match="ref_head_weight"):
        problem.context().forward(hidden, weight)
    ctx = problem.context()
    ctx.loss_kwargs.ref_hidden_states = None
    with pytest.raises(MissingFieldError, match="ref_hidden_states"):
        ctx.forward(hidden, weight, ref_head_weight=problem.ref_weight)
    with pytest.raises(UnsupportedError, match="mode='chunk'"):
        problem.context(mode="fused").forward(hidden, weight, ref_head_weight=problem.ref_weight)
    cfg = GRPOLossConfig(policy_loss_cfg=REINFORCE)
    item = RLLossContextInputItem(shifted_labels=problem.labels, advantages=problem.advantages)
    (kwargs,) = cfg.loss_ctx_cls.build_batches_loss_kwargs([item], cfg)
    with pytest.raises(OptionError, match="ref_head_weight"):
        cfg.loss_ctx_cls(cfg, kwargs).forward(hidden, weight, ref_head_weight=problem.ref_weight)
    for field in ({"kl_loss_grad": "unbiased"}, {"kl_clamp_in": 5.0}, {"kl_clamp_straight_through": True}):
        with pytest.raises(ValidationError, match=next(iter(field))):
            GRPOLossConfig(policy_loss_cfg=REINFORCE, use_kl_loss=True, kl_loss_type="full", **field)


def test_reference_that_is_not_finite() -> None:
    """Refused where the batch is built, or its tokens left out and counted; masked tokens may hold anything."""
    problem = Problem()
    problem.ref_hidden[1, 1, 2] = torch.nan
    problem.ref_hidden[2, 4, 0] = torch.inf
    with pytest.raises(NonFiniteError, match=r"ref_hidden_states .* 2 of its 9 tokens of the loss \(1 NaN, 1 inf\)"):
        problem.context()
    ctx = problem.context(nonfinite="drop", mode="chunk", chunk_size=4)
    loss, info = ctx.forward(problem.hidden, problem.weight, problem.bias, ref_head_weight=problem.ref_weight)
    assert bool(torch.isfinite(loss)) and int(info.metrics["num_nonfinite"].result()) == 2
    assert info.plan.num_live == 7
