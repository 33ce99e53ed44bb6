"""Token statistics of a language-model head, from the definitions.

    x = logit_scale * (h W^T + b)          z = softcap(x) / temperature,  softcap(x) = c tanh(x / c)
    lse = log sum_v exp(z_v)               logprob = z_y - lse            p = exp(z - lse)
    entropy = -sum_v p_v log p_v           mean_logit = sum_v z_v / V     sum_p2 = sum_v p_v^2

A row is live when at least one of its labels is not ignored. Everything is 0 on a dead row (`top1` is -1), and a dead
row is never read: NaN in it may not show up anywhere.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields

import torch
from torch import Tensor

STATISTICS = ("logprobs", "lse", "entropy", "mean_logit", "sum_p2")  # the differentiable ones


@dataclass
class Head:
    """What sits between hidden states and logits, besides the tensors."""

    temperature: float | Tensor = 1.0  # a number, or one per token in the layout of the labels
    softcap: float | None = None
    logit_scale: float = 1.0
    ignore_index: int = -100


@dataclass
class Stats:
    logprobs: Tensor
    lse: Tensor
    entropy: Tensor
    mean_logit: Tensor
    sum_p2: Tensor
    top1: Tensor

    def reshape(self, shape: Sequence[int], label_shape: Sequence[int]) -> Stats:
        shaped = {f.name: getattr(self, f.name).reshape(tuple(shape)) for f in fields(self) if f.name != "logprobs"}
        return Stats(logprobs=self.logprobs.reshape(tuple(label_shape)), **shaped)


def logits(hidden: Tensor, weight: Tensor, bias: Tensor | None, head: Head) -> Tensor:
    """z [N, V] of hidden [N, H]; a tensor temperature has N entries."""
    x = hidden.double() @ weight.double().t()
    if bias is not None:
        x = x + bias.double()
    x = x * head.logit_scale
    if head.softcap is not None:
        x = head.softcap * torch.tanh(x / head.softcap)
    if isinstance(head.temperature, Tensor):
        return x / head.temperature.double().reshape(-1, 1)
    return x / head.temperature


def token_stats(
    hidden: Tensor, weight: Tensor, labels: Tensor, bias: Tensor | None = None, head: Head | None = None
) -> Stats:
    """All statistics of every token; labels [..] or [.., K] where hidden is [.., H]. Differentiable, float64."""
    head = head or Head()
    rows_shape = hidden.shape[:-1]
    several = 1 if labels.shape == rows_shape else labels.shape[-1]
    flat_labels = labels.reshape(rows_shape.numel(), several)  # [N, K]
    known = flat_labels != head.ignore_index
    live = known.any(dim=1).nonzero().flatten()
    temperature = head.temperature
    if isinstance(temperature, Tensor):
        temperature = temperature.reshape(-1)[live]
    live_head = Head(temperature, head.softcap, head.logit_scale, head.ignore_index)
    z = logits(hidden.reshape(rows_shape.numel(), hidden.shape[-1])[live], weight, bias, live_head)

    lse = torch.logsumexp(z, dim=1)
    logp = z - lse[:, None]
    p = logp.exp()
    picked = torch.gather(logp, 1, flat_labels[live].where(known[live], 0))
    per_row = {
        "lse": lse,
        "entropy": -(p * logp).sum(1),
        "mean_logit": z.mean(1),
        "sum_p2": (p * p).sum(1),
    }
    n = flat_labels.shape[0]
    spread = {k: torch.zeros(n, dtype=torch.float64).index_put((live,), v) for k, v in per_row.items()}
    logprobs = torch.zeros(flat_labels.shape, dtype=torch.float64)
    logprobs = logprobs.index_put((live,), picked * known[live])
    top1 = torch.full((n,), -1, dtype=torch.int64).index_put((live,), z.argmax(1))
    flat = Stats(logprobs=logprobs, top1=top1, **spread)
    return flat.reshape(rows_shape, labels.shape)


def leaves(*tensors: Tensor | None) -> list[Tensor | None]:
    """Fresh float64 leaves that require grad."""
    return [None if t is None else t.detach().double().clone().requires_grad_(True) for t in tensors]


def grads(output: Tensor, inputs: Sequence[Tensor | None], keep_graph: bool = False) -> list[Tensor | None]:
    """d output / d input; zeros where the output does not depend on the input."""
    present = [t for t in inputs if t is not None]
    if not output.requires_grad:
        return [None if t is None else torch.zeros_like(t) for t in inputs]
    found = iter(torch.autograd.grad(output, present, retain_graph=keep_graph, allow_unused=True))
    return [None if t is None else (torch.zeros_like(t) if (g := next(found)) is None else g) for t in inputs]
