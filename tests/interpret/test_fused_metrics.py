"""Metrics of a policy loss in ``mode="fused"`` under the interpreter, against eager float64.

Contract: with the loss in registers and with it in torch, in one chunk and in several, with logits and without, every
metric is eager's: terms of the loss, figures of the ratio, the entropy, and token accuracy where it is asked for.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch

from tests import budgets
from xloss import GRPOLossConfig, LossInfo, RLLossContextInputItem

T, H, V = 23, 8, 131
HOW: dict[str, dict[str, Any]] = {
    "chunks": {"chunk_size": 6},
    "no-logits": {"logits_budget": 0},
    "two-pass": {"plan": "two_pass"},
}


def forward(policy: str, dtype: torch.dtype, run: dict[str, Any]) -> LossInfo:
    g = torch.Generator().manual_seed(7)
    hidden = torch.randn(1, T, H, generator=g).to(dtype).requires_grad_()
    weight = torch.randn(V, H, generator=g).to(dtype)
    labels = (hidden @ weight.T).argmax(-1)
    labels[0, ::2] = torch.randint(0, V, (T,), generator=g)[::2]
    labels[0, 5:9] = -100
    old = torch.randn(1, T, generator=g) * 0.5 - 5
    item = RLLossContextInputItem(
        shifted_labels=labels, advantages=torch.randn(1, T, generator=g), old_logprobs=old, ref_logprobs=old + 0.4
    )
    cfg = GRPOLossConfig(
        policy_loss_cfg={"loss_type": policy},
        use_kl_loss=True,
        kl_loss_type="k3",
        kl_loss_coef=0.3,
        entropy_coef=0.1,
        return_token_accuracy=True,
        **run,
    )
    (kwargs,) = cfg.loss_ctx_cls.build_batches_loss_kwargs([item], cfg)
    return cfg.loss_ctx_cls(cfg, kwargs).forward(hidden, weight)[1]


@pytest.mark.parametrize("how", HOW.values(), ids=HOW)
@pytest.mark.parametrize("policy", ["ppo", "sapo"])
def test_metrics(policy: str, how: dict[str, Any]) -> None:
    want = forward(policy, torch.float64, {"mode": "eager"}).metrics
    got = forward(policy, torch.float32, {"mode": "fused", **how}).metrics
    assert got.keys() == want.keys()
    assert {"pg_loss", "kl_loss", "entropy_loss", "token_accuracy", "ratio_ess", "approx_kl_k2"} <= got.keys()
    assert 0.3 < float(want["token_accuracy"].result()) < 0.9
    for name, metric in want.items():
        gold = metric.result().double()
        error = (got[name].result().double() - gold).abs() / gold.abs().clamp(min=1)
        assert error <= budgets.FUSED_RELATIVE[torch.float32], f"{name}: {float(error):.2g}"
