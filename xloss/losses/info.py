"""What a forward saw on the way to the loss."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from xloss.head.plan import Plan
from xloss.metrics import Metric


@dataclass
class LossInfo:
    """Statistics, metrics and the plan of one forward. Unpacks as ``(logits, extra_info)``, XTuner's pair.

    Tensors have the shape of ``shifted_labels``, hold 0 at tokens left out, and carry no gradient except under
    ``mode="eager"`` and ``plan="two_pass"``.

    - ``loss``: the loss, detached, 0-d
    - ``logprobs``, ``lse``: nats; a loss of K labels a token has ``logprobs [.., K]``
    - ``entropy``: nats, or ``None`` where nobody asked for it
    - ``token_loss``: weighted loss of each token, detached, or ``None`` where the loss is not a sum over tokens
    - ``metrics``: sums and counts, to be merged over micro-batches with ``merge_metrics``
    - ``logits``: ``[.., V]``, ``mode="eager"`` only
    - ``plan``: what ran
    """

    loss: Tensor
    plan: Plan
    logprobs: Tensor | None = None
    lse: Tensor | None = None
    entropy: Tensor | None = None
    token_loss: Tensor | None = None
    logits: Tensor | None = None
    metrics: dict[str, Metric] = field(default_factory=dict)
    user_info: dict[str, Any] = field(default_factory=dict)

    def add(self, loss: Tensor, token_losses: Tensor, metrics: dict[str, Metric]) -> None:
        """Take in a term computed beside the head: the new total, the term's loss of each token, its metrics."""
        self.loss = loss.detach()
        if self.token_loss is not None:
            self.token_loss = self.token_loss + token_losses.detach().to(self.token_loss.dtype)
        self.metrics = self.metrics | metrics

    @property
    def extra_info(self) -> dict[str, Any]:
        """Metrics as 0-d tensors, ``local_base_loss``, and what a custom ``loss_fn`` returned."""
        results = {name: metric.result() for name, metric in self.metrics.items()}
        return {"local_base_loss": self.loss, **results, **self.user_info}

    def __iter__(self) -> Iterator[Any]:
        yield self.logits
        yield self.extra_info
