"""What a policy loss sees: per-token vectors of one micro-batch, and the sequences they form."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from xloss.packing import Segments
from xloss.policy.level import RatioLevel, log_ratio_at


@dataclass(frozen=True)
class PolicyBatch:
    """Per-token vectors ``[T]``; only ``logprobs`` and ``entropy`` carry gradients.

    A loss of each token alone sees live tokens only, and no ``sequences``. One that couples tokens sees all ``T`` in
    order; positions left out hold 0 (``sequences.valid`` is False there), and what it returns for them is not used.

    Args:
        logprobs: of the current policy.
        old_logprobs: of the policy that the ratio is taken against; the current ones, detached, when on-policy.
        advantages: per token.
        rollout_logprobs: as the sampler reported them.
        ref_logprobs: of the frozen reference.
        is_weights: constant weights on the policy term; there for a loss that folds them in itself.
        entropy: of the full distribution, nats; there when ``PolicyLossConfig.needs_entropy``.
        sequences: which tokens form a sequence; there when ``PolicyLossConfig.coupling`` is not ``token``.
        groups: number of the prompt group of each token, int; there when the batch has them.
    """

    logprobs: Tensor
    old_logprobs: Tensor
    advantages: Tensor
    rollout_logprobs: Tensor | None = None
    ref_logprobs: Tensor | None = None
    is_weights: Tensor | None = None
    entropy: Tensor | None = None
    sequences: Segments | None = None
    groups: Tensor | None = None

    @property
    def log_ratio(self) -> Tensor:
        """``logprobs - old_logprobs``."""
        return self.logprobs - self.old_logprobs

    def at(self, level: RatioLevel) -> PolicyBatch:
        """The same batch with its ``log_ratio`` at ``level``, so that any formula on a ratio serves every level.

        ``old_logprobs`` is then what the current ones differ from by that ratio, and carries the gradient of the rest
        of the sequence; above the token it needs ``sequences``.
        """
        if level == "token":
            return self
        assert self.sequences is not None, "a context hands out sequences with every coupled loss"
        log_ratio = log_ratio_at(level, self.logprobs, self.old_logprobs, self.sequences)
        return replace(self, old_logprobs=self.logprobs - log_ratio)

    def at_ratio_one(self, tokens: Tensor) -> PolicyBatch:
        """A copy whose old and sampler's log-probs are the current ones at these tokens ``[T]`` bool.

        Tokens of weight 0 (a rejected sample, say) then keep a finite loss and slope, however far their ratio is.
        """
        now = self.logprobs.detach()
        rollout = self.rollout_logprobs
        return replace(
            self,
            old_logprobs=torch.where(tokens, now, self.old_logprobs),
            rollout_logprobs=None if rollout is None else torch.where(tokens, now, rollout),
        )
