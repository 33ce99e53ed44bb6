"""One global batch cut in three ways: the mean of per-part means drifts with the cut, a global denominator does not."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from xloss import CELossConfig, CELossContext, CELossContextInputItem
from xloss.cli.float64 import relative
from xloss.cli.tiny_lm import TinyLM

LENGTHS = (96, 64, 80, 12, 30, 7, 42, 5)  # words in each of the 8 sequences
Packed = tuple[Tensor, Tensor]  # hidden states [n, H] and labels [n]
LossOf = Callable[[list[Packed], Tensor], Tensor]
CUTS = {"1 x 8": 8, "2 x 4": 4, "8 x 1": 1}  # micro-batches x sequences in each


@dataclass(frozen=True)
class Cut:
    """One way to cut the batch. Drifts are ``|x - uncut| / |uncut|``; ``grad`` is the gradient of the head."""

    name: str
    num_micro_batches: int
    naive_loss: float
    xloss_loss: float
    naive_loss_drift: float
    xloss_loss_drift: float
    naive_grad_drift: float
    xloss_grad_drift: float


def calibrate(model: TinyLM, text: Tensor) -> list[Cut]:
    """Cross-entropy of 8 sequences of uneven length from ``text [N]``, as 1, 2 and 8 micro-batches."""
    sequences = _sequences(model, text)
    weight = model.lm_head.weight.detach()
    loss, grad = _loss_and_grad(_xloss_loss, _cut(sequences, len(LENGTHS)), weight)
    cuts: list[Cut] = []
    for name, size in CUTS.items():
        parts = _cut(sequences, size)
        naive_loss, naive_grad = _loss_and_grad(_mean_of_means, parts, weight)
        xloss_loss, xloss_grad = _loss_and_grad(_xloss_loss, parts, weight)
        cuts.append(
            Cut(
                name=name,
                num_micro_batches=len(parts),
                naive_loss=naive_loss,
                xloss_loss=xloss_loss,
                naive_loss_drift=abs(naive_loss / loss - 1),
                xloss_loss_drift=abs(xloss_loss / loss - 1),
                naive_grad_drift=relative(naive_grad, grad),
                xloss_grad_drift=relative(xloss_grad, grad),
            )
        )
    return cuts


def _sequences(model: TinyLM, text: Tensor) -> list[Packed]:
    """Hidden states and labels of consecutive stretches of the text."""
    ids = text.to(model.lm_head.weight.device).repeat(1 + sum(LENGTHS) // len(text))
    stretches = ids[: sum(LENGTHS) + 1]
    ends = [sum(LENGTHS[: i + 1]) for i in range(len(LENGTHS))]
    with torch.no_grad():
        return [
            (model(stretches[None, end - length : end])[0], stretches[end - length + 1 : end + 1])
            for length, end in zip(LENGTHS, ends, strict=True)
        ]


def _cut(sequences: Sequence[Packed], size: int) -> list[Packed]:
    """Micro-batches of ``size`` sequences each, packed."""
    parts = [sequences[i : i + size] for i in range(0, len(sequences), size)]
    return [(torch.cat([states for states, _ in part]), torch.cat([labels for _, labels in part])) for part in parts]


def _loss_and_grad(loss_of: LossOf, parts: list[Packed], weight: Tensor) -> tuple[float, Tensor]:
    head = weight.clone().requires_grad_()
    loss = loss_of(parts, head)
    (grad,) = torch.autograd.grad(loss, head)
    return loss.item(), grad.double()


def _mean_of_means(parts: list[Packed], head: Tensor) -> Tensor:
    """What ``loss.mean() / gradient_accumulation_steps`` amounts to."""
    return torch.stack([F.cross_entropy(states @ head.T, labels) for states, labels in parts]).mean()


def _xloss_loss(parts: list[Packed], head: Tensor) -> Tensor:
    """Every micro-batch is given to ``build_batches_loss_kwargs`` at once, and the losses are added."""
    loss_cfg = CELossConfig()
    items = [CELossContextInputItem(shifted_labels=labels) for _, labels in parts]
    batches_loss_kwargs = CELossContext.build_batches_loss_kwargs(items, loss_cfg)
    losses = [
        CELossContext(loss_cfg, loss_kwargs).forward(states, head)[0]
        for loss_kwargs, (states, _) in zip(batches_loss_kwargs, parts, strict=True)
    ]
    return torch.stack(losses).sum()
