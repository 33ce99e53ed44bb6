"""Metrics that add up: each is a device-side value with a declared reducer, so any grouping gives one answer.

Nothing here reads a value back to the host; ``result()`` is a 0-d tensor, and ``float(...)`` of it the caller's choice.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

import torch
import torch.distributed as dist
from torch import Tensor

Reducer = Literal["sum", "mean", "std", "ess", "max", "min"]
_EMPTY = {"max": -torch.inf, "min": torch.inf}


@dataclass(frozen=True)
class Metric:
    """One metric of one part of a batch.

    ``sum``: ``value`` adds. ``mean``: ``value`` is a sum and ``count`` what to divide it by in the end. ``std`` and
    ``ess``: ``value`` is ``[sum x, sum x^2]``. ``max`` and ``min``: ``value`` is an extreme, and ``+-inf`` where the
    part was empty. Tensors are 0-d (but for those pairs) and on the loss's device.
    """

    value: Tensor
    count: Tensor | None = None
    reducer: Reducer = "sum"

    @classmethod
    def total(cls, x: Tensor, valid: Tensor | None = None) -> Metric:
        """Sum of ``x`` over its tokens, or over those of the mask ``valid``."""
        return cls(_kept(x, valid, 0).sum(), None, "sum")

    @classmethod
    def count_of(cls, x: Tensor, valid: Tensor | None = None) -> Metric:
        """Number of tokens in ``x``, or in the mask ``valid``."""
        return cls(_count(x, valid), None, "sum")

    @classmethod
    def mean(cls, x: Tensor, valid: Tensor | None = None) -> Metric:
        """Mean of ``x`` over all tokens (of the mask ``valid``) of all parts."""
        return cls(_kept(x, valid, 0).sum(), _count(x, valid), "mean")

    @classmethod
    def moments(cls, x: Tensor, reducer: Literal["std", "ess"], valid: Tensor | None = None) -> Metric:
        """Standard deviation of ``x`` over all tokens of all parts, or its effective sample size as a share of them.

        ``std``: ``sqrt(mean(x^2) - mean(x)^2)``. ``ess``: ``mean(x)^2 / mean(x^2)``, 1 for equal weights.
        """
        x = _kept(x, valid, 0)
        return cls(torch.stack([x.sum(), x.square().sum()]), _count(x, valid), reducer)

    @classmethod
    def extreme(cls, x: Tensor, reducer: Literal["max", "min"], valid: Tensor | None = None) -> Metric:
        """Largest or smallest of ``x``, defined for an empty ``x`` too."""
        x = _kept(x, valid, _EMPTY[reducer]).reshape(-1)
        x = torch.cat([x, x.new_full((1,), _EMPTY[reducer])])
        return cls(x.amax() if reducer == "max" else x.amin(), None, reducer)

    def merge(self, other: Metric) -> Metric:
        """This part and another as one."""
        if self.reducer != other.reducer:
            raise ValueError(f"cannot merge a {self.reducer!r} metric with a {other.reducer!r} one")
        if self.reducer in _EMPTY:
            pick = torch.maximum if self.reducer == "max" else torch.minimum
            return Metric(pick(self.value, other.value), None, self.reducer)
        count = None if self.count is None or other.count is None else self.count + other.count
        return Metric(self.value + other.value, count, self.reducer)

    def to(self, device: torch.device | str) -> Metric:
        """The same on ``device``."""
        return Metric(self.value.to(device), None if self.count is None else self.count.to(device), self.reducer)

    def result(self) -> Tensor:
        """The value, 0-d. Without any token: 0."""
        if self.count is not None and self.reducer in ("mean", "std", "ess"):
            mean = self.value / self.count.clamp(min=1)
            if self.reducer == "mean":
                return mean
            if self.reducer == "std":
                return (mean[1] - mean[0].square()).clamp(min=0).sqrt()
            return mean[0].square() / mean[1].masked_fill(mean[1] == 0, 1)
        if self.reducer in _EMPTY:
            return torch.where(torch.isinf(self.value), torch.zeros_like(self.value), self.value)
        return self.value


def _kept(x: Tensor, valid: Tensor | None, fill: float) -> Tensor:
    return x.detach() if valid is None else x.detach().masked_fill(~valid, fill)


def _count(x: Tensor, valid: Tensor | None) -> Tensor:
    if valid is None:
        return torch.full((), x.numel(), dtype=x.dtype, device=x.device)
    return valid.sum().to(x.dtype)


def merge_metrics(parts: Iterable[dict[str, Metric]]) -> dict[str, Metric]:
    """Metrics of several parts (chunks, micro-batches) as those of the whole."""
    merged: dict[str, Metric] = {}
    for part in parts:
        for name, metric in part.items():
            merged[name] = merged[name].merge(metric) if name in merged else metric
    return merged


def finalize_metrics(parts: Iterable[dict[str, Metric]], group: dist.ProcessGroup | None = None) -> dict[str, Tensor]:
    """Results over all ``parts`` and, when ``torch.distributed`` is initialised, all ranks of ``group``.

    One all-reduce per reducer kind; every rank must pass the same metric names.
    """
    merged = merge_metrics(parts)
    if not dist.is_initialized() or not merged:
        return {name: metric.result() for name, metric in merged.items()}
    sums = [m.value for m in merged.values() if m.reducer not in _EMPTY]
    sums += [m.count for m in merged.values() if m.count is not None]
    reduced: dict[int, Tensor] = {}
    for tensors, op in (
        (sums, dist.ReduceOp.SUM),
        ([m.value for m in merged.values() if m.reducer == "max"], dist.ReduceOp.MAX),
        ([m.value for m in merged.values() if m.reducer == "min"], dist.ReduceOp.MIN),
    ):
        if tensors:
            packed = torch.cat([t.to(torch.float64).reshape(-1) for t in tensors])
            dist.all_reduce(packed, op=op, group=group)
            parts_of = packed.split([t.numel() for t in tensors])
            reduced.update({id(t): part.reshape(t.shape) for t, part in zip(tensors, parts_of, strict=True)})
    return {
        name: Metric(reduced[id(m.value)], None if m.count is None else reduced[id(m.count)], m.reducer).result()
        for name, m in merged.items()
    }
