"""``mode="fused"`` of losses that couple tokens, under the interpreter.

Contract: loss, log-probs and gradients of the fused two-pass plan are those of ``mode="eager"`` in float64, to float32.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from tests import budgets
from xloss import GRPOLossConfig, GRPOLossContext, RLLossContextInputItem

T, H, V = 23, 8, 131
CLIP = {"cliprange_low": 0.1, "cliprange_high": 0.2}
CONFIGS: dict[str, dict[str, Any]] = {
    "gspo": {"policy_loss_cfg": {"loss_type": "gspo"} | CLIP, "loss_reduction": "sample"},
    "cispo-at-turns": {"policy_loss_cfg": {"loss_type": "cispo", "ratio_level": "segment"}, "opsm_delta": 0.05},
    "gmpo": {"policy_loss_cfg": {"loss_type": "gmpo"}, "use_kl_loss": True, "kl_loss_type": "k3"},
    "fipo": {"policy_loss_cfg": {"loss_type": "fipo"}, "top_entropy_quantile": 0.5, "entropy_coef": 0.1},
    "real": {"policy_loss_cfg": {"loss_type": "real"}, "loss_reduction": "prompt"},
}


def step(fields: dict[str, Any], dtype: torch.dtype) -> list[Tensor]:
    """Loss, token losses, log-probs and gradients of one pack with an ignored stretch and an ignored sequence."""
    g = torch.Generator().manual_seed(11)
    hidden = torch.randn(1, T, H, generator=g).to(dtype).requires_grad_()
    weight = torch.randn(V, H, generator=g).to(dtype).requires_grad_()
    labels = torch.randint(0, V, (1, T), generator=g)
    labels[0, 3:5], labels[0, 15:18] = -100, -100
    bounds = torch.tensor([0, 9, 15, 18, T])
    with torch.no_grad():
        now = torch.log_softmax(hidden.double() @ weight.double().t(), -1)
    near = now.gather(2, labels.clamp(min=0).unsqueeze(2)).squeeze(2).float()
    old, ref = (near + 0.3 * torch.randn(1, T, generator=g) for _ in range(2))
    advantages = torch.randn(4, generator=g)[torch.repeat_interleave(torch.arange(4), bounds.diff())]
    item = RLLossContextInputItem(
        shifted_labels=labels,
        advantages=advantages.unsqueeze(0),
        old_logprobs=old,
        ref_logprobs=ref,
        group_ids=torch.zeros(1, T, dtype=torch.int64),
    )
    cfg = GRPOLossConfig(**fields)
    (kwargs,) = GRPOLossContext.build_batches_loss_kwargs([item], cfg, cu_seq_lens_list=[bounds])
    loss, info = GRPOLossContext(cfg, kwargs).forward(hidden, weight)
    assert info.plan.kind == ("eager" if cfg.mode == "eager" else "two-pass")
    assert info.token_loss is not None
    assert info.logprobs is not None
    grads = torch.autograd.grad(loss * 1.7, [hidden, weight])
    return [loss.detach(), info.token_loss, info.logprobs.detach(), *grads]


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
def test_coupled_losses(config: dict[str, Any]) -> None:
    want = step(config | {"mode": "eager"}, torch.float64)
    got = step(config | {"mode": "fused", "chunk_size": 6}, torch.float32)
    terms = want[1].abs().sum()
    for name, ours, gold in zip(("loss", "token", "logprobs", "hidden", "weight"), got, want, strict=True):
        scale = terms if name == "loss" else gold.abs().max()
        error = (ours.double() - gold).abs().max() / scale
        assert error <= budgets.FUSED_RELATIVE[torch.float32], f"{name}: {float(error):.2g}"
