"""``mode="fused"`` of corrected, ranked and mixed policy objectives, under the interpreter.

Contract: loss, token losses, log-probs and gradients are those of ``mode="eager"`` in float64, to float32, in the plan
that the docs promise.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from tests import budgets
from xloss import GRPOLossConfig, GRPOLossContext, OrealLossConfig, RLLossContextInputItem

T, H, V = 23, 8, 131
PPO = {"policy_loss_cfg": {"loss_type": "ppo"}}
SEQUENCE = {"level": "sequence", "high": 1.5, "veto_low": 0.2}
CASES: dict[str, tuple[type[GRPOLossConfig], dict[str, Any], bool, str]] = {  # config, fields, old given, plan
    "masked": (GRPOLossConfig, PPO | {"rollout_correction": {"action": "mask", "high": 1.2}}, True, "one-pass"),
    "token in the pass": (GRPOLossConfig, PPO | {"rollout_correction": {"high": 1.2}}, False, "one-pass"),
    "sequence in the pass": (GRPOLossConfig, PPO | {"rollout_correction": SEQUENCE}, False, "two-pass"),
    "kl_cov": (GRPOLossConfig, {"policy_loss_cfg": {"loss_type": "kl_cov", "kl_cov_ratio": 0.2}}, True, "two-pass"),
    "vapo": (GRPOLossConfig, PPO | {"positive_nll_coef": 0.1}, True, "one-pass"),
    "oreal": (OrealLossConfig, PPO | {"use_kl_loss": True, "kl_loss_type": "k3"}, True, "one-pass"),
}


def step(case: tuple[Any, dict[str, Any], bool, str], dtype: torch.dtype, **run: Any) -> list[Tensor]:
    """Loss, token losses, log-probs and gradients of one pack with ignored tokens."""
    config, fields, given, plan = case
    g = torch.Generator().manual_seed(5)
    hidden = torch.randn(1, T, H, generator=g).to(dtype).requires_grad_()
    weight = torch.randn(V, H, generator=g).to(dtype).requires_grad_()
    labels = torch.randint(0, V, (1, T), generator=g)
    labels[0, 3:5] = -100
    with torch.no_grad():
        now = torch.log_softmax(hidden.double() @ weight.double().t(), -1)
    near = now.gather(2, labels.clamp(min=0).unsqueeze(2)).squeeze(2).float()
    old, ref, rollout = (near + 0.3 * torch.randn(1, T, generator=g) for _ in range(3))
    item = RLLossContextInputItem(
        shifted_labels=labels,
        advantages=torch.randn(1, T, generator=g),
        old_logprobs=old if given else None,
        ref_logprobs=ref,
        rollout_logprobs=rollout,
    )
    cfg = config(**fields, **run)
    bounds = [torch.tensor([0, 9, 15, T])]
    (kwargs,) = cfg.loss_ctx_cls.build_batches_loss_kwargs([item], cfg, cu_seq_lens_list=bounds)
    loss, info = cfg.loss_ctx_cls(cfg, kwargs).forward(hidden, weight)
    assert info.plan.kind == ("eager" if cfg.mode == "eager" else plan)
    assert info.token_loss is not None
    assert info.logprobs is not None
    grads = torch.autograd.grad(loss * 1.7, [hidden, weight])
    return [loss.detach(), info.token_loss, info.logprobs.detach(), *grads]


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_fused(case: tuple[Any, dict[str, Any], bool, str]) -> None:
    want = step(case, torch.float64, mode="eager")
    got = step(case, torch.float32, mode="fused", chunk_size=8)
    terms = want[1].abs().sum()
    for name, ours, gold in zip(("loss", "token", "logprobs", "hidden", "weight"), got, want, strict=True):
        scale = terms if name == "loss" else gold.abs().max()
        error = (ours.double() - gold).abs().max() / scale
        assert error <= budgets.FUSED_RELATIVE[torch.float32], f"{name}: {float(error):.2g}"


def test_overflowing_ratio_of_a_rejected_token() -> None:
    """Weight 0 on the policy term, KL kept: the loss kernel gives what any other ratio there would."""
    g = torch.Generator().manual_seed(3)
    hidden, weight = torch.randn(1, 4, 16, generator=g), torch.randn(20, 16, generator=g)
    policy = {"loss_type": "importance_sampling", "log_ratio_clamp": None}
    cfg = GRPOLossConfig(policy_loss_cfg=policy, use_kl_loss=True, kl_loss_type="k3", mode="fused")

    def at(far: float) -> tuple[torch.Tensor, ...]:
        item = RLLossContextInputItem(
            shifted_labels=torch.tensor([[1, 5, 19, 0]]),
            advantages=torch.ones(1, 4),
            old_logprobs=torch.tensor([[-3.0, far, -3.0, -3.0]]),
            ref_logprobs=torch.full((1, 4), -3.0),
            is_weights=torch.tensor([[1.0, 0.0, 1.0, 1.0]]),
        )
        (kwargs,) = GRPOLossContext.build_batches_loss_kwargs([item], cfg)
        context = GRPOLossContext(cfg, kwargs)
        assert context.twin(kwargs) is not None
        leaves = [hidden.clone().requires_grad_(), weight.clone().requires_grad_()]
        loss, _ = context.forward(*leaves)
        return (loss.detach(), *torch.autograd.grad(loss, leaves))

    for got, want in zip(at(-200.0), at(-3.0), strict=True):
        assert torch.equal(got, want) and bool(want.isfinite().all())
