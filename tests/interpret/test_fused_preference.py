"""Preference losses in ``mode="fused"`` under the interpreter.

Contract: loss and gradients are those of ``mode="eager"`` in float64 to the rounding of float32, for losses on
log-probs and for WPO, which reads another statistic; in one chunk and in several.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from tests import budgets
from xloss import PreferenceLossConfig, PreferenceLossContext, PreferenceLossContextInputItem

CONFIGS: dict[str, dict[str, Any]] = {
    "sigmoid": {"loss_type": "sigmoid"},
    "wpo-ld": {"loss_type": "ipo", "use_weighting": True, "ld_alpha": 0.5},
    "orpo": {"loss_type": "orpo", "chunk_size": 5},
}


def _step(fields: dict[str, Any], dtype: torch.dtype) -> list[Tensor]:
    g = torch.Generator().manual_seed(3)
    hidden, weight = (torch.randn(*shape, generator=g).to(dtype).requires_grad_() for shape in ((1, 17, 8), (131, 8)))
    labels = torch.randint(0, 131, (1, 17), generator=g)
    labels[0, [0, 5, 6, 11]] = -100
    ref = torch.randn(1, 17, generator=g).to(dtype) - 4
    cfg = PreferenceLossConfig(**fields)
    item = PreferenceLossContextInputItem(shifted_labels=labels, ref_logprobs=ref if cfg.needs_reference else None)
    bounds = torch.tensor([0, 5, 8, 13, 17])
    (kwargs,) = PreferenceLossContext.build_batches_loss_kwargs([item], cfg, cu_seq_lens_list=[bounds])
    loss, _ = PreferenceLossContext(cfg, kwargs).forward(hidden, weight)
    return [loss.detach(), *torch.autograd.grad(1.7 * loss, [hidden, weight])]


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
def test_losses(config: dict[str, Any]) -> None:
    eager = {name: value for name, value in config.items() if name != "chunk_size"}
    want = _step(eager | {"mode": "eager"}, torch.float64)
    for got, gold in zip(_step(config | {"mode": "fused"}, torch.float32), want, strict=True):
        budgets.assert_relative("fused", got, gold, budgets.FUSED_RELATIVE[torch.float32])
