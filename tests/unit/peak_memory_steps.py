"""Runs steps given as JSON on the command line and prints, for each, its measured peak and its plan's, as JSON.

A process of its own, so that the kernel's high-water mark is this work's, with every large block mapped and unmapped
(``MALLOC_MMAP_THRESHOLD_``), so that what is freed is seen to be gone.
"""

from __future__ import annotations

import json
import sys
from typing import Any

import torch

from xloss import (
    CELossConfig,
    CELossContextInputItem,
    DistillLossConfig,
    DistillLossContextInputItem,
    GRPOLossConfig,
    LogProbConfig,
    Lora,
    LoraWeight,
    RLLossContextInputItem,
)
from xloss.cli.memory import start_peak

PPO = {"loss_type": "vanilla", "cliprange_low": 0.2, "cliprange_high": 0.2}


def measure(
    tokens: int, hidden: int, vocab: int, dtype: str, loss: str, live: int, rank: int = 0, **run: Any
) -> dict[str, Any]:
    """One step, and the backward where there is one. ``rank``: of an adapter on a frozen head."""
    g = torch.Generator().manual_seed(0)
    labels = torch.randint(0, vocab, (1, tokens), generator=g)
    labels[0, live:] = -100
    advantages = torch.ones(1, tokens)
    advantages[0, : tokens // 4] = 0
    kind = getattr(torch, dtype)
    leaves = [torch.randn(*size, generator=g).to(kind) for size in ((1, tokens, hidden), (vocab, hidden))]
    config: Any
    given: dict[str, Any] = {}
    if loss == "ce":
        config, item = CELossConfig(**run), CELossContextInputItem(shifted_labels=labels)
    elif loss == "logprob":
        config, item = LogProbConfig(**run), CELossContextInputItem(shifted_labels=labels)
    elif loss == "distill":
        config, given = DistillLossConfig(**run), {"teacher_head_weight": torch.randn(vocab, 32, generator=g)}
        teacher_hidden = torch.randn(1, tokens, 32, generator=g)
        item = DistillLossContextInputItem(shifted_labels=labels, teacher_hidden_states=teacher_hidden)
    else:
        config = GRPOLossConfig(policy_loss_cfg=PPO, **run)
        item = RLLossContextInputItem(shifted_labels=labels, advantages=advantages)
    (kwargs,) = config.loss_ctx_cls.build_batches_loss_kwargs([item], config)
    context = config.loss_ctx_cls(config, kwargs)
    trained = loss != "logprob"
    inputs: list[Any] = [x.requires_grad_(trained) for x in leaves]
    if rank:
        a, b = (torch.randn(*size, generator=g).to(kind).requires_grad_() for size in ((rank, hidden), (vocab, rank)))
        inputs[1] = LoraWeight(inputs[1].requires_grad_(False), (Lora(a, b, 2.0),))
    plan = context.explain(*inputs, **given)
    peak = start_peak("cpu")
    value, _ = context.forward(*inputs, **given)
    if trained:
        (1.7 * value).backward()
    return {"measured": peak(), "promised": plan.peak_bytes, "plan": str(plan)}


if __name__ == "__main__":
    torch.set_num_threads(1)
    steps = json.loads(sys.argv[1])
    measure(**steps[0])  # what a first step loads stays
    print(json.dumps([measure(**step) for step in steps]))
