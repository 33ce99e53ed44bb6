"""Plain PyTorch with the logits of all tokens: as it is usually written, and the same under ``torch.compile``."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F

from benchmarks.cases import Batch, Case
from benchmarks.losses import Tokens
from benchmarks.providers.base import Prepared, Provider, Result, backward, leaves, widened


def _forward(case: Case) -> Callable[..., tuple[Tensor, ...]]:
    """``(hidden, weight, t) -> (loss,)``, or ``(logprobs, entropy)`` of a forward-only case."""
    loss_fn = case.loss

    def forward(hidden: Tensor, weight: Tensor, t: Tokens) -> tuple[Tensor, ...]:
        logits = widened(F.linear(hidden, weight))
        if case.loss_name == "ce":
            return (F.cross_entropy(logits, t.labels),)
        entropy = None
        if loss_fn.entropy:
            logp = logits.log_softmax(1)
            lp = logp.gather(1, t.labels.clamp(min=0).unsqueeze(1)).squeeze(1)
            entropy = -(logp.exp() * logp).sum(1)
        else:
            lp = -F.cross_entropy(logits, t.labels, reduction="none")
        if loss_fn.forward_only:
            assert entropy is not None
            return lp, entropy
        return (loss_fn(lp, entropy, t),)

    return forward


def _prepare(compiled: bool) -> Callable[[Case, Batch], Prepared]:
    def prepare(case: Case, batch: Batch) -> Prepared:
        forward = _forward(case)
        if compiled:
            torch.compiler.reset()
            forward = torch.compile(forward, dynamic=False)

        def run() -> Result:
            hidden, weight = leaves(case, batch)
            with torch.set_grad_enabled(not case.loss.forward_only):
                out = forward(hidden, weight, batch.tokens)
            if case.loss.forward_only:
                return Result(logprobs=out[0], entropy=out[1])
            return backward(out[0], hidden, weight)

        return Prepared(run, "all logits", case.shape.num_tokens)

    return prepare


EAGER = Provider("eager", _prepare(compiled=False))
COMPILE = Provider("torch.compile of eager", _prepare(compiled=True), default_on=("cuda",))
