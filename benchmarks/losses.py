"""The losses of the benchmark as plain formulas on ``[T]`` vectors, apart from xloss: the gate trusts them.

``lp`` is the log-prob of each label, ``r = exp(lp - old)``, ``w = mask / N``, ``N`` the tokens that count. Parameters
are chosen so that all peers that know a loss compute the same number.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

CLIP = 0.2
CISPO_HIGH = 1.28
DRO_BETA = 0.05
KL_COEF = 0.1
ENTROPY_COEF = 0.01
PPO_DELTA = 1.35
SAPO_TAU = {"tau_pos": 1.0, "tau_neg": 1.05}
DPPO_DELTA = 0.99  # so far off that rounding flips no token; what it costs does not depend on it
KIMI_TAU = 0.1
FOCAL_GAMMA = 2.0


@dataclass(frozen=True)
class Tokens:
    """What a loss reads beside log-probs: ``[T]`` vectors, ``weight`` being 0 at ignored labels."""

    labels: Tensor
    advantages: Tensor
    old: Tensor
    ref: Tensor
    weight: Tensor
    num_sequences: int

    def rows(self, start: int, stop: int) -> Tokens:
        """Tokens ``start:stop``, for losses that do not couple tokens."""
        cut = slice(start, stop)
        return Tokens(
            self.labels[cut], self.advantages[cut], self.old[cut], self.ref[cut], self.weight[cut], self.num_sequences
        )

    def pick(self, index: Tensor) -> Tokens:
        """Tokens at ``index [M]``, for losses that do not couple tokens."""
        parts = (self.labels, self.advantages, self.old, self.ref, self.weight)
        labels, advantages, old, ref, weight = (x[index] for x in parts)
        return Tokens(labels, advantages, old, ref, weight, self.num_sequences)

    def to(self, dtype: torch.dtype) -> Tokens:
        """Floats in ``dtype``."""
        advantages, old, ref, weight = (x.to(dtype) for x in (self.advantages, self.old, self.ref, self.weight))
        return Tokens(self.labels, advantages, old, ref, weight, self.num_sequences)


Formula = Callable[[Tensor, Tensor | None, Tokens], Tensor]


def _clipped(ratio: Tensor, advantages: Tensor) -> Tensor:
    return -torch.minimum(ratio * advantages, ratio.clamp(1 - CLIP, 1 + CLIP) * advantages)


def _ce(lp: Tensor, entropy: Tensor | None, t: Tokens) -> Tensor:
    return -(lp * t.weight).sum()


def _grpo(lp: Tensor, entropy: Tensor | None, t: Tokens) -> Tensor:
    return (_clipped((lp - t.old).exp(), t.advantages) * t.weight).sum()


def _cispo(lp: Tensor, entropy: Tensor | None, t: Tokens) -> Tensor:
    ratio = (lp.detach() - t.old).exp().clamp(max=CISPO_HIGH)
    return -(ratio * t.advantages * lp * t.weight).sum()


def _dro(lp: Tensor, entropy: Tensor | None, t: Tokens) -> Tensor:
    return -((t.advantages * lp - 0.5 * DRO_BETA * (lp - t.old).square()) * t.weight).sum()


def _grpo_kl_entropy(lp: Tensor, entropy: Tensor | None, t: Tokens) -> Tensor:
    assert entropy is not None
    gap = t.ref - lp
    penalty = KL_COEF * (gap.exp() - gap - 1) - ENTROPY_COEF * entropy
    return _grpo(lp, None, t) + (penalty * t.weight).sum()


def _gspo(lp: Tensor, entropy: Tensor | None, t: Tokens) -> Tensor:
    mask = (t.weight > 0).to(lp.dtype).view(t.num_sequences, -1)
    mean = ((lp - t.old).view_as(mask) * mask).sum(1) / mask.sum(1).clamp(min=1)
    ratio = mean.exp().unsqueeze(1).expand_as(mask).reshape(-1)
    return (_clipped(ratio, t.advantages) * t.weight).sum()


def _weighted(per_token: Callable[[Tensor, Tensor, Tensor], Tensor]) -> Formula:
    """The weighted sum of a loss of ``(lp, old, advantages)``."""

    def formula(lp: Tensor, entropy: Tensor | None, t: Tokens) -> Tensor:
        return (per_token(lp, t.old, t.advantages) * t.weight).sum()

    return formula


def _dft(lp: Tensor, old: Tensor, a: Tensor) -> Tensor:
    return -lp.detach().exp() * lp


def _focal(lp: Tensor, old: Tensor, a: Tensor) -> Tensor:
    return -((1 - lp.exp()) ** FOCAL_GAMMA) * lp


def _importance_sampling(lp: Tensor, old: Tensor, a: Tensor) -> Tensor:
    return -(lp - old).exp() * a


def _ppo_delta(lp: Tensor, old: Tensor, a: Tensor) -> Tensor:
    ratio = (lp - old).exp()
    return torch.maximum(-ratio.clamp(max=PPO_DELTA) * a, -ratio.clamp(1 - CLIP, 1 + CLIP) * a)


def _sapo(lp: Tensor, old: Tensor, a: Tensor) -> Tensor:
    tau = torch.where(a > 0, SAPO_TAU["tau_pos"], SAPO_TAU["tau_neg"])
    return -4 / tau * torch.sigmoid(tau * ((lp - old).exp() - 1)) * a


def _dppo_tv(lp: Tensor, old: Tensor, a: Tensor) -> Tensor:
    moved = lp.detach().exp() - old.exp()
    keep = torch.where(a > 0, moved <= DPPO_DELTA, moved >= -DPPO_DELTA)
    return -(lp.detach() - old).exp() * a * keep * lp


def _kimi(lp: Tensor, old: Tensor, a: Tensor) -> Tensor:
    return -a * lp + 0.5 * KIMI_TAU * (lp - old).square()


def _topr(lp: Tensor, old: Tensor, a: Tensor) -> Tensor:
    return -torch.where(a > 0, 1.0, (lp.detach() - old).exp().clamp(max=1)) * a * lp


def _softplus(lp: Tensor, old: Tensor, a: Tensor) -> Tensor:
    return -torch.nn.functional.softplus(lp - old) * a


def _tanh(lp: Tensor, old: Tensor, a: Tensor) -> Tensor:
    return -torch.tanh(lp - old) * a


def _no_loss(lp: Tensor, entropy: Tensor | None, t: Tokens) -> Tensor:
    raise AssertionError("a forward-only case has no loss")


@dataclass(frozen=True)
class Loss:
    """One loss. ``coupled``: tokens enter each other's loss. ``forward_only``: log-probs and entropy, no gradient.

    ``standard``: it is in a run that names no losses.
    """

    title: str
    formula: Formula
    entropy: bool = False
    coupled: bool = False
    forward_only: bool = False
    standard: bool = True

    def __call__(self, lp: Tensor, entropy: Tensor | None, tokens: Tokens) -> Tensor:
        """The loss, 0-d. Log-probs at ignored labels may be anything finite or not: they are not read."""
        return self.formula(torch.where(tokens.weight > 0, lp, tokens.old), entropy, tokens)


LOSSES: dict[str, Loss] = {
    "ce": Loss("cross-entropy", _ce),
    "grpo": Loss("GRPO", _grpo),
    "cispo": Loss("CISPO", _cispo),
    "dro": Loss("DRO", _dro),
    "grpo-kl-entropy": Loss("GRPO + KL + entropy", _grpo_kl_entropy, entropy=True),
    "gspo": Loss("GSPO-like (sequence ratio)", _gspo, coupled=True),
    "logprob": Loss("log-prob + entropy, forward only", _no_loss, entropy=True, forward_only=True),
    **{
        name: Loss(title, _weighted(per_token), standard=False)
        for name, title, per_token in (
            ("dft", "DFT", _dft),
            ("focal", "focal loss", _focal),
            ("importance_sampling", "importance sampling", _importance_sampling),
            ("ppo-delta", "PPO with a bound on the ratio", _ppo_delta),
            ("sapo", "SAPO", _sapo),
            ("dppo_tv", "DPPO (total variation)", _dppo_tv),
            ("kimi", "Kimi's policy loss", _kimi),
            ("topr", "TOPR", _topr),
            ("own-policy", "a policy loss registered by a user", _softplus),
            ("own-token-loss", "a user's token_loss", _tanh),
        )
    },
}
STANDARD = tuple(name for name, loss in LOSSES.items() if loss.standard)
