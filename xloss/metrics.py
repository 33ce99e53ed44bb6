"""Metrics that add up: each is a device-side value with a declared reducer, so any grouping gives one answer.

Nothing here reads a value back to the host but ``finalize_metrics`` over several ranks; ``result()`` is a 0-d tensor,
and ``float(...)`` of it the caller's choice.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from math import prod
from typing import Literal

import torch
from torch import Tensor

from xloss.distributed import Ranks, all_gather, all_gather_object, default_device, world_size
from xloss.distributed.agree import by_rank, digest, ranks_text
from xloss.errors import OptionError

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
    def means(cls, of: dict[str, Tensor], valid: Tensor | None = None) -> dict[str, Metric]:
        """``mean`` of several vectors of one shape and dtype over the same tokens, summed as one."""
        x = torch.stack(list(of.values())).flatten(1)
        sums = _kept(x, None if valid is None else valid.flatten(), 0).sum(1)
        count = _count(x[0], valid)
        return {name: cls(total, count, "mean") for name, total in zip(of, sums.unbind(), strict=True)}

    @classmethod
    def totals(cls, of: dict[str, Tensor], scale: float | Tensor = 1.0) -> dict[str, Metric]:
        """``total`` of several vectors of one shape and dtype, times ``scale``, summed as one."""
        sums = torch.stack([x.detach() for x in of.values()]).flatten(1).sum(1) * scale
        return {name: cls(total) for name, total in zip(of, sums.unbind(), strict=True)}

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

    def empty(self) -> Metric:
        """What adds nothing to this metric."""
        value = torch.full_like(self.value, _EMPTY.get(self.reducer, 0))
        return Metric(value, None if self.count is None else torch.zeros_like(self.count), self.reducer)

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


def finalize_metrics(parts: Iterable[dict[str, Metric]], group: Ranks = None) -> dict[str, Tensor]:
    """Results over all ``parts`` and, when ``torch.distributed`` is initialised, all ranks of ``group``.

    ``group``: the ``data_mesh`` that the batches were built with, or a process group; default all ranks. Over ranks:
    one all-gather, merged in the order of ranks, in float64. It waits for the device, to see that all ranks have the
    same metrics; ``OptionError`` on every rank names those that some lack. A rank without any (it had no micro-batch)
    gets those of the others.
    """
    merged = merge_metrics(parts)
    if world_size(group) > 1:
        merged = _over_ranks(merged, group)
    return {name: metric.result() for name, metric in merged.items()}


_BLOCK = 1024  # numbers in the first gather of every rank, whatever its metrics are
_Layout = dict[str, tuple[Reducer, tuple[int, ...], bool]]


def _over_ranks(merged: dict[str, Metric], group: Ranks) -> dict[str, Metric]:
    """``merged`` of all ranks of ``group`` as one."""
    layout: _Layout = {n: (m.reducer, tuple(m.value.shape), m.count is not None) for n, m in sorted(merged.items())}
    own = digest(layout) if layout else 0
    numbers = [t for n in layout for t in (merged[n].value, merged[n].count) if t is not None]
    device = numbers[0].device if numbers else default_device(group)
    head = torch.full((1,), own, dtype=torch.float64, device=device)
    row = torch.cat([head, *(t.to(torch.float64).reshape(-1) for t in numbers)])
    row = torch.nn.functional.pad(row, (0, -row.numel() % _BLOCK))
    rows = all_gather(row[:_BLOCK], group)
    has_metrics = rows[:, 0] != 0
    if bool((rows[:, 0] != own).any()):  # which every rank sees
        layout = _common(all_gather_object(layout, group), group)
        size = 1 + sum(prod(shape) + counted for _, shape, counted in layout.values())
        row = torch.nn.functional.pad(row, (0, size + -size % _BLOCK - row.numel()))
    if row.numel() > _BLOCK:
        rows = torch.cat([rows, all_gather(row[_BLOCK:], group)], 1)
    rows = rows[has_metrics]
    sums, extremes = rows.sum(0), {"max": rows.amax(0), "min": rows.amin(0)} if layout else {}
    out, at = {}, 1
    for name, (reducer, shape, counted) in layout.items():
        size = prod(shape)
        value = extremes.get(reducer, sums)[at : at + size].reshape(shape)
        out[name] = Metric(value, sums[at + size] if counted else None, reducer)
        at += size + counted
    return {name: out[name] for name in merged or layout}


def _common(layouts: list[_Layout], group: Ranks) -> _Layout:
    """The one layout of all ranks that have metrics."""
    present = {rank: layout for rank, layout in enumerate(layouts) if layout}
    names = sorted({name for each in present.values() for name in each})
    holders: dict[tuple[str, ...], list[int]] = {}
    for rank, each in present.items():
        holders.setdefault(tuple(n for n in names if n not in each), []).append(rank)
    told = [f"{ranks_text(r, group)} {'lack' if r[1:] else 'lacks'} {list(n)}" for n, r in holders.items() if n]
    for name in names:
        kinds = {rank: f"{each[name][0]}[{prod(each[name][1])}]" for rank, each in present.items() if name in each}
        if len(set(kinds.values())) > 1:
            told.append(f"{name} is {by_rank(kinds, group)}")
    if told:
        raise OptionError(
            f"finalize_metrics needs the same metrics on every rank, with the same reducers: {'; '.join(told)}"
        )
    return next(iter(present.values()))
