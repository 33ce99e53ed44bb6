"""``mode="fused"`` end to end under the interpreter: the public calls against the float64 oracle of plain autograd.

Contract: for every built-in loss, plan and head option the loss, statistics and gradients are those of ``mode="eager"``
in float64 to the rounding of the working dtype, in one pass (losses in registers) and in two (dlogits from adjoints),
with chunks of logits and without any; what stands at an ignored token does not matter, counted or not; a head without
gradients takes no gradient kernel.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from tests import budgets
from xloss import (
    CELossConfig,
    CELossContextInputItem,
    GRPOLossConfig,
    RLLossContextInputItem,
    linear_logprobs,
)
from xloss.errors import UnsupportedError
from xloss.head.options import LiveRows

T, H, V = 23, 8, 131
VANILLA = {"loss_type": "vanilla", "cliprange_low": 0.2, "cliprange_high": 0.28}
CONFIGS: dict[str, Any] = {
    "vanilla": {"policy_loss_cfg": VANILLA},
    "plain-ppo": {
        "policy_loss_cfg": VANILLA | {"clip_ratio_c": None, "log_prob_diff_min": None, "log_prob_diff_max": None}
    },
    "cispo": {"policy_loss_cfg": {"loss_type": "cispo", "clip_low_threshold": 0.5, "clip_high_threshold": 1.5}},
    "importance_sampling": {"policy_loss_cfg": {"loss_type": "importance_sampling"}},
    "dro": {"policy_loss_cfg": {"loss_type": "dro", "beta": 0.3}},
    "reinforce": {"policy_loss_cfg": {"loss_type": "reinforce"}},
    "k1": {"policy_loss_cfg": VANILLA, "use_kl_loss": True, "kl_loss_type": "k1", "kl_loss_coef": 0.3},
    "abs": {"policy_loss_cfg": VANILLA, "use_kl_loss": True, "kl_loss_type": "abs", "kl_loss_coef": 0.3},
    "mse": {"policy_loss_cfg": VANILLA, "use_kl_loss": True, "kl_loss_type": "mse", "kl_loss_coef": 0.3},
    "k3-entropy": {
        "policy_loss_cfg": VANILLA,
        "use_kl_loss": True,
        "kl_loss_type": "k3",
        "kl_loss_coef": 0.3,
        "entropy_coef": 0.1,
    },
    "delta-straight-through": {
        "policy_loss_cfg": {"loss_type": "ppo", "clip_high_threshold": 1.1, "delta": 1.3, "anchor": "rollout"},
        "use_kl_loss": True,
        "kl_loss_type": "k3",
        "kl_loss_grad": "straight_through",
        "kl_loss_coef": 0.3,
    },
    "offsets-unbiased": {
        "policy_loss_cfg": {"loss_type": "cispo", "cliprange_low": 0.3, "log_ratio_clamp": 0.5},
        "use_kl_loss": True,
        "kl_loss_type": "k3",
        "kl_loss_grad": "unbiased",
        "kl_clamp_in": None,
        "kl_clamp_out": None,
        "kl_loss_coef": 0.3,
    },
    "kimi-score-function": {
        "policy_loss_cfg": {"loss_type": "kimi"},
        "use_kl_loss": True,
        "kl_loss_type": "k2",
        "kl_loss_grad": "score_function",
        "kl_clamp_in": 0.3,
        "kl_loss_coef": 0.3,
    },
    "torch-formulas": {
        "policy_loss_cfg": {"loss_type": "sapo"},
        "use_kl_loss": True,
        "kl_loss_type": "k3",
        "kl_clamp_in": 0.2,
        "kl_clamp_straight_through": True,
        "kl_loss_coef": 0.3,
    },
    "ce": {},
    "ce-everything": {"label_smoothing": 0.1, "z_loss_coef": 0.01, "return_entropy": True},
}
HEADS: dict[str, Any] = {
    "plain": {},
    "head": {"temperature": 0.7, "softcap": 5.0, "logit_scale": 0.8},
    "chunks": {"chunk_size": 6},
    "no-logits": {"logits_budget": 0, "temperature": 0.7, "softcap": 5.0, "logit_scale": 0.8},
    "no-logits-chunks": {"kernels": "no_logits", "chunk_size": 6},
}
HOW = ("chunk_size", "logits_budget", "kernels")  # of no meaning to eager


def _step(fields: dict[str, Any], dtype: torch.dtype, bias: bool, work: torch.dtype) -> list[Tensor]:
    """Loss, log-probs and gradients of one micro-batch whose inputs are exact in ``work``."""
    g = torch.Generator().manual_seed(7)
    hidden = torch.randn(1, T, H, generator=g).to(work).to(dtype).requires_grad_()
    weight = torch.randn(V, H, generator=g).to(work).to(dtype).requires_grad_()
    head_bias = torch.randn(V, generator=g).to(work).to(dtype).requires_grad_() if bias else None
    labels = torch.randint(0, V, (1, T), generator=g)
    labels[0, 0], labels[0, 1], labels[0, 5:9] = 0, V - 1, -100
    advantages = torch.randn(1, T, generator=g)
    advantages[0, 10:13] = 0
    old = torch.randn(1, T, generator=g) * 0.5 - 5
    if "policy_loss_cfg" in fields:
        cfg: Any = GRPOLossConfig(**fields)
        item: Any = RLLossContextInputItem(
            shifted_labels=labels,
            advantages=advantages,
            old_logprobs=old,
            ref_logprobs=old + 0.4,
            rollout_logprobs=old - 0.2,
        )
    else:
        cfg, item = CELossConfig(**fields), CELossContextInputItem(shifted_labels=labels)
    cls = cfg.loss_ctx_cls
    loss, info = cls(cfg, cls.build_batches_loss_kwargs([item], cfg)[0]).forward(hidden, weight, head_bias)
    leaves = [x for x in (hidden, weight, head_bias) if x is not None]
    assert info.logprobs is not None
    assert info.token_loss is not None
    return [loss.detach(), info.token_loss, info.logprobs.detach(), *torch.autograd.grad(loss * 1.7, leaves)]


@pytest.mark.parametrize("dtype", budgets.FUSED_RELATIVE, ids=["fp32", "fp16"])
@pytest.mark.parametrize("plan", ["auto", "two_pass"])
@pytest.mark.parametrize("head", HEADS.values(), ids=HEADS)
@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
def test_losses(config: dict[str, Any], head: dict[str, Any], plan: str, dtype: torch.dtype) -> None:
    bias = "temperature" in head
    eager = {k: v for k, v in head.items() if k not in HOW}
    want = _step(config | eager | {"mode": "eager"}, torch.float64, bias, dtype)
    got = _step(config | head | {"mode": "fused", "plan": plan}, dtype, bias, dtype)
    terms = want[1].abs().sum()  # the loss is a sum whose terms may cancel
    for name, ours, gold in zip(("loss", "token", "logprobs", "hidden", "weight", "bias"), got, want, strict=False):
        scale = terms if name == "loss" else gold.abs().max()
        error = (ours.double() - gold).abs().max() / scale
        assert error <= budgets.FUSED_RELATIVE[dtype], f"{name}: {float(error):.2g}"


@pytest.mark.parametrize("counted", [True, False])
def test_statistics_of_several_labels(counted: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every statistic with an upstream gradient of its own; an ignored token may hold NaN."""
    if not counted:
        module = __import__("xloss.head.linear_logprobs", fromlist=["live_rows"])
        monkeypatch.setattr(module, "live_rows", lambda y, _: LiveRows.all(len(y), counted=False))
    g = torch.Generator().manual_seed(3)
    hidden, weight = torch.randn(T, H, generator=g), torch.randn(V, H, generator=g)
    labels = torch.randint(0, V, (T, 3), generator=g)
    labels[4], labels[6, 1] = -100, -100
    wants: dict[str, list[Tensor]] = {}
    for mode, dtype in (("eager", torch.float64), ("fused", torch.float32)):
        h = hidden.to(dtype)
        if mode == "fused":
            h[4] = torch.nan
        leaves = [h.requires_grad_(), weight.to(dtype).requires_grad_()]
        stats = linear_logprobs(
            leaves[0], leaves[1], labels, mode=mode, chunk_size=None if mode == "eager" else 9, softcap=9.0,
            return_entropy=True, return_mean_logit=True, return_sum_p2=True, return_top1=True,
        )  # fmt: skip
        up = torch.Generator().manual_seed(5)
        total = sum((torch.randn(x.shape, generator=up).to(dtype) * x).sum() for _, x in stats.differentiable())
        assert isinstance(total, Tensor) and stats.top1 is not None
        values = [x.detach() for _, x in stats.differentiable()] + [stats.top1]
        wants[mode] = [*values, *torch.autograd.grad(total, leaves)]
    for ours, gold in zip(wants["fused"], wants["eager"], strict=True):
        assert (ours.double() - gold.double()).abs().max() <= budgets.FUSED_RELATIVE[
            torch.float32
        ] * gold.double().abs().max()


def test_forward_only_takes_no_gradient_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    from xloss.head import fused

    def refuse(*args: Any, **kwargs: Any) -> None:
        raise AssertionError("a gradient kernel ran without a gradient")

    monkeypatch.setattr(fused, "dlogits", refuse)
    monkeypatch.setattr(fused, "policy_rows", refuse)
    hidden, weight = torch.randn(T, H), torch.randn(V, H)
    labels = torch.randint(0, V, (T,))
    ours = linear_logprobs(hidden, weight, labels, mode="fused", return_entropy=True)
    gold = linear_logprobs(hidden.double(), weight.double(), labels, mode="eager", return_entropy=True)
    assert (ours.logprobs.double() - gold.logprobs).abs().max() < budgets.FUSED_LOGPROB_NATS


@pytest.mark.parametrize("dtype", budgets.FUSED_RELATIVE, ids=["fp32", "fp16"])
def test_banned_tokens(dtype: torch.dtype) -> None:
    """A bias of -inf gives probability 0: entropy and gradients stay finite and right."""
    g = torch.Generator().manual_seed(11)
    hidden, weight = (torch.randn(n, H, generator=g).to(dtype) for n in (T, V))
    bias = torch.zeros(V, dtype=dtype)
    bias[3:40:5] = -torch.inf
    labels = torch.randint(50, V, (T,), generator=g)
    found = []
    for mode, work in (("eager", torch.float64), ("fused", dtype)):
        leaves = [x.to(work).requires_grad_() for x in (hidden, weight)]
        stats = linear_logprobs(*leaves, labels, bias.to(work), mode=mode, return_entropy=True)
        assert stats.entropy is not None
        total = (stats.logprobs * 0.3 + stats.entropy).sum()
        found.append([stats.entropy.detach(), *torch.autograd.grad(total, leaves)])
    for ours, gold in zip(found[1], found[0], strict=True):
        assert (ours.double() - gold).abs().max() <= budgets.FUSED_RELATIVE[dtype] * gold.abs().max()


def test_float64_is_refused() -> None:
    with pytest.raises(UnsupportedError, match="float64"):
        linear_logprobs(torch.randn(2, 3).double(), torch.randn(5, 3).double(), torch.tensor([0, 4]), mode="fused")
