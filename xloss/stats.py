"""The few numbers per token that every loss is a function of."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, fields, replace

from torch import Tensor


@dataclass(frozen=True)
class StatSpec:
    """Which statistics to compute beside ``logprobs`` and ``lse``, which come with every pass."""

    entropy: bool = False
    mean_logit: bool = False
    sum_p2: bool = False
    top1: bool = False
    divergence: bool = False

    def __or__(self, other: StatSpec) -> StatSpec:
        return StatSpec(**{f.name: getattr(self, f.name) or getattr(other, f.name) for f in fields(self)})


@dataclass(frozen=True)
class TokenStats:
    """Statistics of the logits ``z`` of each token; all floats are float32 (float64 for float64 inputs).

    Shapes are those of the labels, written ``[T]`` here. At ignored labels every statistic is 0 (``top1``: -1) and
    carries no gradient. ``p = softmax(z)``; nats.

    - ``logprobs [T]`` (or ``[T, K]``): ``z[y] - lse``
    - ``lse [T]``: ``logsumexp(z)``
    - ``entropy [T]``: ``lse - sum(p z)``
    - ``mean_logit [T]``: ``sum(z) / V``
    - ``sum_p2 [T]``: ``sum(p^2)``
    - ``divergence [T]``: from a second distribution, as the loss that brought it defines it
    - ``top1 [T]``: ``argmax(z)``, int64, not differentiable
    """

    logprobs: Tensor
    lse: Tensor
    entropy: Tensor | None = None
    mean_logit: Tensor | None = None
    sum_p2: Tensor | None = None
    top1: Tensor | None = None
    divergence: Tensor | None = None

    def differentiable(self) -> Iterator[tuple[str, Tensor]]:
        """The statistics present that carry gradients, as ``(name, tensor)``."""
        for name in DIFFERENTIABLE:
            value = getattr(self, name)
            if value is not None:
                yield name, value

    def map(self, fn: Callable[[Tensor], Tensor]) -> TokenStats:
        """Apply ``fn`` to every tensor present."""
        present = {f.name: getattr(self, f.name) for f in fields(self)}
        return replace(self, **{k: fn(v) for k, v in present.items() if v is not None})

    def shaped(self, lead: Sequence[int]) -> TokenStats:
        """Each ``[T, ..]`` as ``[*lead, ..]``; with a gradient it is no view, which FSDP2 warns of in what a model
        returns: writing into one in place would undo its hooks.
        """

        def shape(x: Tensor) -> Tensor:
            shaped = x.reshape(*lead, *x.shape[1:])
            return shaped.clone() if shaped.requires_grad and shaped._is_view() else shaped

        return self.map(shape)


DIFFERENTIABLE: tuple[str, ...] = ("logprobs", "lse", "entropy", "mean_logit", "sum_p2", "divergence")


def mask_ignored(stats: TokenStats, labels: Tensor, ignore_index: int) -> TokenStats:
    """``stats`` with 0 (``top1``: -1) at ignored labels; a row of ``[T, K]`` labels is ignored when all K are."""
    ignored = labels == ignore_index
    row = ignored if labels.ndim == stats.lse.ndim else ignored.all(-1)
    masked = stats.map(lambda x: x.masked_fill(row if x.ndim == row.ndim else row.unsqueeze(-1), 0))
    top1 = None if stats.top1 is None else stats.top1.masked_fill(row, -1)
    return replace(masked, logprobs=stats.logprobs.masked_fill(ignored, 0), top1=top1)
