"""Supervised losses in ``mode="fused"`` under the interpreter.

Contract: loss, log-probs and gradients are those of ``mode="eager"`` in float64 to float32's rounding, whether a kernel
knows the formula (cross-entropy, label smoothing, z-loss, DFT) or torch takes it between two kernels (focal, CHORD-phi,
K targets), in one pass and in two. Which ran is asserted.
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
    MTPLossConfig,
    MTPLossContextInputItem,
    SoftCELossConfig,
    SoftCELossContextInputItem,
)

T, H, V, K = 13, 8, 71, 3
# name: config class, its fields, whether the loss kernel knows it
CASES: dict[str, tuple[Any, dict[str, Any], bool]] = {
    "megatron": (CELossConfig, {"label_smoothing": 0.1, "label_smoothing_kind": "megatron"}, True),
    "smooth": (CELossConfig, {"label_smoothing": 0.2, "z_loss_coef": 0.01, "return_token_accuracy": True}, True),
    "dft": (CELossConfig, {"token_scaling": "dft"}, True),
    "dft-z": (CELossConfig, {"token_scaling": "dft", "z_loss_coef": 0.01, "softcap": 5.0}, True),
    "class-z": (CELossConfig, {"z_loss_coef": 0.01}, True),
    "accuracy": (CELossConfig, {"return_token_accuracy": True}, True),
    "focal": (CELossConfig, {"focal_gamma": 2.0}, False),
    "chord": (CELossConfig, {"token_scaling": "chord_phi", "cutoff_prob": 0.5, "z_loss_coef": 0.01}, False),
    "soft": (SoftCELossConfig, {}, False),
    "mtp": (MTPLossConfig, {"mtp_depth": 2}, True),
    "mtp-kl": (MTPLossConfig, {"kl_loss_type": "low_var_kl", "detach_mtp_lm_head_weight": True}, False),
}


def _step(name: str, run: dict[str, Any], dtype: torch.dtype) -> list[Tensor]:
    """Loss, log-probs and gradients; ignored tokens hold NaN."""
    cls, fields, _ = CASES[name]
    g = torch.Generator().manual_seed(7)
    hidden, weight = torch.randn(1, T, H, generator=g).to(dtype), torch.randn(V, H, generator=g).to(dtype)
    labels = torch.randint(0, V, (1, T), generator=g)
    labels[0, 0], labels[0, 1], labels[0, 5:8] = 0, V - 1, -100
    if cls is not MTPLossConfig:
        hidden[0, 6] = torch.nan
    cfg = cls(**fields, **run)
    if cls is SoftCELossConfig:
        targets = torch.randint(0, V, (1, T, K), generator=g)
        targets[0, 3, 1], targets[0, 4, 2] = targets[0, 3, 0], -100
        weights = torch.randn(1, T, K, generator=g)
        item: Any = SoftCELossContextInputItem(shifted_labels=labels, target_tokens=targets, target_weights=weights)
    elif cls is MTPLossConfig:
        item = MTPLossContextInputItem(shifted_labels=labels, rollout_logprobs=-torch.rand(1, T, generator=g) * 4 - 2)
    else:
        classes = torch.rand(V, generator=g) + 0.5
        item = CELossContextInputItem(shifted_labels=labels, class_weight=classes if name == "class-z" else None)
    ctx_cls = cfg.loss_ctx_cls
    (kwargs,) = ctx_cls.build_batches_loss_kwargs([item], cfg, [torch.tensor([0, 4, T])])
    leaves = [hidden.requires_grad_(), weight.requires_grad_()]
    loss, info = ctx_cls(cfg, kwargs).forward(*leaves)
    found = torch.autograd.grad(loss * 1.7, leaves, allow_unused=True)
    assert info.logprobs is not None
    return [loss.detach(), info.logprobs.detach(), *(x for x in found if x is not None)]


@pytest.mark.parametrize("plan", ["one_pass", "two_pass"])
@pytest.mark.parametrize("chunk_size", [None, 5])
@pytest.mark.parametrize("name", CASES)
def test_losses(name: str, chunk_size: int | None, plan: str, monkeypatch: pytest.MonkeyPatch) -> None:
    from xloss.head import fused

    seen: list[bool] = []
    kernel = fused.loss_rows
    monkeypatch.setattr(fused, "loss_rows", lambda *a, **k: seen.append((out := kernel(*a, **k)) is not None) or out)
    want = _step(name, {"mode": "eager"}, torch.float64)
    got = _step(name, {"mode": "fused", "plan": plan, "chunk_size": chunk_size}, torch.float32)
    assert (plan == "one_pass" and CASES[name][2]) == any(seen)
    assert len(got) == len(want)  # a detached head has no d weight
    for what, ours, gold in zip(("loss", "logprobs", "d hidden", "d weight"), got, want, strict=False):
        error = (ours.double() - gold).abs().max() / gold.abs().max()
        assert error <= budgets.FUSED_RELATIVE[torch.float32], f"{what}: {float(error):.2g}"


def test_dft_of_hopeless_labels() -> None:
    """Probabilities far below exp(-20), where policy losses clamp: nothing is clamped here."""
    g = torch.Generator().manual_seed(3)
    hidden, weight = torch.randn(1, T, H, generator=g), torch.randn(V, H, generator=g)
    logits = (hidden @ weight.T) * 6
    labels = logits.argmin(-1)
    found = []
    for mode, dtype in (("eager", torch.float64), ("fused", torch.float32)):
        cfg = CELossConfig(token_scaling="dft", logit_scale=6.0, mode=mode)
        item = CELossContextInputItem(shifted_labels=labels)
        (kwargs,) = cfg.loss_ctx_cls.build_batches_loss_kwargs([item], cfg)
        leaf = hidden.to(dtype).requires_grad_()
        loss, info = cfg.loss_ctx_cls(cfg, kwargs).forward(leaf, weight.to(dtype))
        found.append([info.token_loss, *torch.autograd.grad(loss, leaf)])
        assert info.logprobs is not None and float(info.logprobs.detach().max()) < -25
    max_logit = 2 * float(logits.abs().max())
    for ours, gold in zip(found[1], found[0], strict=True):
        budgets.assert_rounding("dft", ours, gold, max_logit, 0.0)
