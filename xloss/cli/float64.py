"""The policy losses and their gradients in float64, written from the formulas: what both runs are measured against.

Nothing of the engine is used. Blocks of tokens keep it small; the losses depend on each token alone, so blocks add up:
``dz_t = g_t (onehot(y_t) - p_t)`` with ``g_t`` the derivative of the loss by token ``t``'s log-probability.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from xloss.cli.rollouts import Rollouts

CLIP_LOW, CLIP_HIGH, DUAL_CLIP = 0.2, 0.28, 3.0
CISPO_LOW, CISPO_HIGH = 0.8, 1.28
KL_COEF = 0.1


@dataclass(frozen=True)
class Reference:
    """Loss and gradients in float64: by the hidden states of all tokens, and by the head's rows for some words."""

    loss: float
    d_hidden: Tensor  # [T, H]
    d_words: Tensor  # [M, H]


def grpo(logprobs: Tensor, batch: Rollouts, rows: slice) -> Tensor:
    """Clipped surrogate with dual clip (arXiv 1707.06347 eq. 7, 2503.14476, 1912.09729). Per token."""
    ratio = (logprobs - batch.old_logprobs[rows]).exp()
    gain = batch.advantages[rows]
    loss = -torch.minimum(ratio * gain, ratio.clamp(1 - CLIP_LOW, 1 + CLIP_HIGH) * gain)
    return torch.where(gain < 0, torch.minimum(loss, -DUAL_CLIP * gain), loss)


def cispo(logprobs: Tensor, batch: Rollouts, rows: slice) -> Tensor:
    """``-sg(clip(ratio)) A logprob`` (arXiv 2506.13585). Per token."""
    ratio = (logprobs.detach() - batch.old_logprobs[rows]).exp()
    return -ratio.clamp(CISPO_LOW, CISPO_HIGH) * batch.advantages[rows] * logprobs


def grpo_kl(logprobs: Tensor, batch: Rollouts, rows: slice) -> Tensor:
    """GRPO plus ``KL_COEF`` times the k3 estimate of the divergence from the reference, at most 10. Per token."""
    gap = batch.ref_logprobs[rows] - logprobs
    return grpo(logprobs, batch, rows) + KL_COEF * (gap.exp() - gap - 1).clamp(max=10)


def references(
    batch: Rollouts,
    losses: Sequence[Callable[[Tensor, Rollouts, slice], Tensor]],
    words: Tensor,
    block: int = 256,
    tick: Callable[[], None] = lambda: None,
) -> list[Reference]:
    """Token-mean of each of ``losses`` and its gradients.

    Args:
        batch: ``T`` tokens.
        losses: ``f(logprobs [n], batch, rows) -> [n]``, called on blocks of tokens.
        words: Ids ``[M]`` of the words whose rows of the head's gradient are wanted; all words would take T*V*H more.
        block: Tokens at a time; ``block * V * 16`` bytes are held.
        tick: Called after each block.
    """
    weight = batch.head_weight.double()
    total = batch.num_tokens
    hidden_grads = [torch.zeros_like(batch.hidden_states, dtype=torch.float64) for _ in losses]
    word_grads = [weight.new_zeros(len(words), weight.shape[1]) for _ in losses]
    values = [0.0] * len(losses)
    for start in range(0, total, block):
        rows = slice(start, min(start + block, total))
        hidden, labels = batch.hidden_states[rows].double(), batch.shifted_labels[rows]
        probs = (hidden @ weight.T).log_softmax(-1)
        logprobs = probs.gather(1, labels[:, None])[:, 0]
        probs.exp_()
        expected = probs @ weight  # sum_v p_v W_v: what every token's gradient shares
        some = probs[:, words]
        hits = (labels[:, None] == words).double()
        for i, loss_fn in enumerate(losses):
            leaf = logprobs.clone().requires_grad_()
            loss = loss_fn(leaf, batch, rows).sum() / total
            (g,) = torch.autograd.grad(loss, leaf)
            values[i] += loss.item()
            hidden_grads[i][rows] = g[:, None] * (weight[labels] - expected)
            word_grads[i] += (g[:, None] * (hits - some)).T @ hidden
        tick()
    return [Reference(*parts) for parts in zip(values, hidden_grads, word_grads, strict=True)]


def relative(found: Tensor, expected: Tensor) -> float:
    """``||found - expected|| / ||expected||`` in float64; 0 if both are 0."""
    gap, size = (found.double() - expected).norm().item(), expected.norm().item()
    return gap / size if size else (0.0 if gap == 0 else float("inf"))
