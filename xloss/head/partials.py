"""Statistics of a part of the vocabulary, exchanged in one gather and merged into those of the whole.

A part's own statistics are all the others need to know. With ``s = exp(lse_part - lse)``, its share of the probability:

    lse = logsumexp(lse_part)                  logprobs = max(logprobs_part + log s), -inf where the label is not
    entropy = sum s (entropy_part - log s)     mean_logit = sum mean_part V_part / V
    sum_p2 = sum s^2 sum_p2_part               top1 = the lowest id among those of the largest logit

``lse_part`` is maximum and sum in one number. Every term of the entropy is positive, so nothing cancels. All ranks
merge the same numbers in rank order: they get the same bits.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Generic, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from xloss.distributed.groups import all_gather
from xloss.distributed.vocab import VocabPart
from xloss.stats import StatSpec, TokenStats

T = TypeVar("T")
U = TypeVar("U")
Adjoints = dict[str, Tensor]


def empty_stats(labels: Tensor, spec: StatSpec, dtype: torch.dtype) -> tuple[TokenStats, Tensor | None]:
    """Statistics of no row of the head, and the largest logit."""
    lse = torch.full(labels.shape[:1], -torch.inf, dtype=dtype, device=labels.device)
    zero = torch.zeros_like(lse)
    wanted = {n: zero for n in ("entropy", "mean_logit", "sum_p2") if getattr(spec, n)}
    top1 = torch.zeros_like(lse, dtype=torch.int64) if spec.top1 else None
    stats = TokenStats(torch.full_like(labels, -torch.inf, dtype=dtype), lse, **wanted, top1=top1)
    return stats, lse if spec.top1 else None


def pack(stats: TokenStats, peak: Tensor | None, labels: Tensor, part: VocabPart) -> Tensor:
    """``[P, C]`` to send: statistics of this part at its local ``labels``; ``peak``: the logit of ``top1``."""
    here = (labels >= 0) & (labels < part.num_rows)
    empty = stats.lse == -torch.inf  # every row banned: its own log-probs are 0 / 0
    logprobs = torch.where(here & ~(empty if labels.ndim == 1 else empty.unsqueeze(1)), stats.logprobs, -torch.inf)
    rows = [stats.lse]
    if stats.entropy is not None:
        rows.append(stats.entropy)
    if stats.mean_logit is not None:
        rows.append(stats.mean_logit * (part.num_rows / part.vocab_size))
    if stats.sum_p2 is not None:
        rows.append(stats.sum_p2)
    if stats.top1 is not None:
        assert peak is not None
        rows += [peak, stats.top1.to(peak.dtype)]
    return torch.cat([torch.stack(rows), logprobs.reshape(logprobs.shape[0], -1).t()])


def merge(parts: Tensor, spec: StatSpec, labels: Tensor, bounds: tuple[tuple[int, int], ...]) -> TokenStats:
    """Statistics of the whole vocabulary from ``[ranks, P, C]``, in the shape of ``labels``; -inf logprobs stay."""
    num_labels = 1 if labels.ndim == 1 else labels.shape[1]
    rows = iter(parts[:, :-num_labels].unbind(1))
    part_lse = next(rows)
    lse = torch.logsumexp(part_lse, 0)
    log_share = part_lse - lse
    share = log_share.exp()
    found: dict[str, Tensor] = {}
    if spec.entropy:
        found["entropy"] = torch.where(share > 0, share * (next(rows) - log_share), 0).sum(0)
    if spec.mean_logit:
        found["mean_logit"] = next(rows).sum(0)
    if spec.sum_p2:
        found["sum_p2"] = (share.square() * next(rows)).sum(0)
    if spec.top1:
        peak, best = next(rows), next(rows).to(torch.int64)
        ids = torch.stack([own + start for own, (start, _) in zip(best, bounds, strict=True)])
        found["top1"] = torch.where(peak == peak.amax(0), ids, torch.iinfo(torch.int64).max).amin(0)
    logprobs = (parts[:, -num_labels:] + log_share.unsqueeze(1)).amax(0)
    return TokenStats(logprobs.t().reshape(labels.shape), lse, **found)


def part_adjoints(adjoints: Adjoints, part: VocabPart | None) -> Adjoints:
    """Adjoints for row work that divides by the rows it sees: the mean is over the whole vocabulary."""
    if part is None or "mean_logit" not in adjoints:
        return adjoints
    return adjoints | {"mean_logit": adjoints["mean_logit"] * (part.num_rows / part.vocab_size)}


class Begun(Generic[T]):
    """A value, or one that ranks are exchanging while this rank goes on; ``finish`` waits for it."""

    def __init__(self, finish: Callable[[], T], under_way: bool = True) -> None:
        self.finish, self.under_way = finish, under_way

    @classmethod
    def done(cls, value: T) -> Begun[T]:
        return cls(lambda: value, under_way=False)

    def then(self, step: Callable[[T], U]) -> Begun[U]:
        """``step`` of the value: at once where nothing is under way."""
        if not self.under_way:
            return Begun.done(step(self.finish()))
        return Begun(lambda: step(self.finish()))


def one_behind(begun: Iterable[Begun[T]]) -> Iterator[T]:
    """Finish each after the next has begun, so that its exchange runs beside that one's product."""
    last: Begun[T] | None = None
    for this in begun:
        if last is not None:
            yield last.finish()
            last = None
        if this.under_way:
            last = this
        else:
            yield this.finish()
    if last is not None:
        yield last.finish()


def begin_whole(
    stats: TokenStats, peak: Tensor | None, labels: Tensor, part: VocabPart, spec: StatSpec
) -> Begun[TokenStats]:
    """Statistics of the whole vocabulary from those of this part (``pack``), by one gather."""
    sent = pack(stats, peak, labels, part)
    found = sent.new_empty((len(part.bounds), *sent.shape))
    work = dist.all_gather(list(found.unbind()), sent, group=part.group, async_op=True)
    return Begun(lambda: merge(_waited(work, found, sent), spec, labels, part.bounds))


def gathered(values: Tensor, part: VocabPart) -> Tensor:
    """``values`` of every rank, ``[ranks, ...]``; waits."""
    return all_gather(values, part.group)


def begin_sum(values: Tensor, part: VocabPart) -> Begun[Tensor]:
    """``values`` summed over the ranks, in place."""
    work = dist.all_reduce(values, group=part.group, async_op=True)
    return Begun(lambda: _waited(work, values, values))


def _waited(work: dist.Work | None, result: Tensor, sent: Tensor) -> Tensor:
    """``result`` of a collective that read ``sent``, which is kept until then."""
    assert work is not None
    work.wait()
    return result
