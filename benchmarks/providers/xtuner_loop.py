"""A loop as in XTuner, written here: autograd on each chunk of 1024 tokens, gradients added in the weight's dtype."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from benchmarks.cases import Batch, Case
from benchmarks.providers.base import Prepared, Provider, Result, leaves, widened

CHUNK = 1024


def _absent(case: Case) -> str | None:
    return "couples tokens of different chunks" if case.loss.coupled else None


def _applies(case: Case) -> bool:
    return not case.loss.forward_only


def _prepare(case: Case, batch: Batch) -> Prepared:
    size, tokens = case.chunk_size or CHUNK, batch.tokens
    total = case.shape.num_tokens

    def chunk_loss(hidden: Tensor, weight: Tensor, start: int, stop: int) -> Tensor:
        logits = widened(F.linear(hidden, weight))
        part = tokens.rows(start, stop)
        if not case.loss.entropy:
            return case.loss(-F.cross_entropy(logits, part.labels, reduction="none"), None, part)
        logp = logits.log_softmax(1)
        lp = logp.gather(1, part.labels.clamp(min=0).unsqueeze(1)).squeeze(1)
        return case.loss(lp, -(logp.exp() * logp).sum(1), part)

    def run() -> Result:
        hidden, weight = leaves(case, batch)
        d_weight = torch.zeros_like(weight)
        loss, d_hidden = torch.zeros((), device=hidden.device), []
        for start in range(0, total, size):
            part = hidden[start : start + size].detach().requires_grad_()
            value = chunk_loss(part, weight, start, min(start + size, total))
            grads = torch.autograd.grad(value, [part, weight] if weight.requires_grad else [part])
            d_hidden.append(grads[0])
            if weight.requires_grad:
                d_weight += grads[1]
            loss = loss + value.detach()
        return Result(loss, torch.cat(d_hidden), d_weight if weight.requires_grad else None)

    return Prepared(run, f"autograd on chunks of {size}", size)


XTUNER_LOOP = Provider("XTuner-style loop", _prepare, _absent, _applies)
