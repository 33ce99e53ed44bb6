"""What a policy loss sees: per-token vectors of one micro-batch, and the sequences they form."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from xloss.packing import Segments


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
        entropy: of the full distribution, nats; there when ``PolicyLossConfig.needs_entropy``.
        sequences: which tokens form a sequence; there when ``PolicyLossConfig.coupling`` is not ``token``.
        groups: number of the prompt group of each token, int; there when the batch has them.
    """

    logprobs: Tensor
    old_logprobs: Tensor
    advantages: Tensor
    rollout_logprobs: Tensor | None = None
    ref_logprobs: Tensor | None = None
    entropy: Tensor | None = None
    sequences: Segments | None = None
    groups: Tensor | None = None

    @property
    def log_ratio(self) -> Tensor:
        """``logprobs - old_logprobs``."""
        return self.logprobs - self.old_logprobs
