"""A ``token_loss`` on statistics: those that a head's pass gives, or ones that the caller has already."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from xloss.errors import MissingFieldError, OptionError, UnsupportedError
from xloss.head.linear_logprobs import spread_stats
from xloss.head.options import LiveRows
from xloss.losses.model import BaseLossKwargs
from xloss.losses.whole import all_tokens, loss_of_split
from xloss.metrics import Metric, merge_metrics
from xloss.shapes import check_per_token
from xloss.stats import StatSpec, TokenStats

if TYPE_CHECKING:
    from xloss.losses.base import BaseLossContext

    Ctx = BaseLossContext[Any]


class Evaluation:
    """Kwargs of one micro-batch as vectors, its live rows, and its ``token_loss`` evaluated on statistics of them.

    Args:
        lead: shape of the labels.
        dtype: of the statistics.
    """

    def __init__(self, ctx: Ctx, kwargs: BaseLossKwargs, rows: LiveRows, lead: torch.Size, dtype: torch.dtype) -> None:
        if kwargs.torn and ctx.needs_whole():
            raise UnsupportedError(
                f"the loss couples tokens ({ctx.why_coupled()}), and chunk() cut these kwargs from one rank's "
                "part of a split batch, so the whole is lost; chunk nothing, or set chunk_size in the config"
            )
        self.ctx = ctx
        self.local = ctx.is_token_local()
        self.split = kwargs.split if ctx.needs_whole() else None
        self.rows = rows
        self.lead = lead
        self.kwargs = kwargs.flat(dtype)
        self.metrics: list[dict[str, Metric]] = [kwargs.built_metrics]

    def live_kwargs(self) -> BaseLossKwargs:
        """Kwargs of live rows, in live order, for token-local losses."""
        live = self.kwargs.map_tokens(lambda x, _: self.rows.take(x, 0, self.rows.num_live))
        return live.replaced({"cu_seq_lens": None})

    def evaluate(self, stats: TokenStats, kwargs: BaseLossKwargs) -> Tensor:
        """``token_loss`` with its metrics put aside."""
        out = self.ctx.token_loss(stats, kwargs)
        loss, metrics = out if isinstance(out, tuple) else (out, {})
        if not isinstance(loss, Tensor) or loss.ndim > 1:
            shape = tuple(loss.shape) if isinstance(loss, Tensor) else type(loss).__name__
            raise OptionError(f"token_loss must return a scalar or one loss per token; got {shape}")
        if self.local and loss.shape != stats.lse.shape:
            raise OptionError(
                f"token_loss of {type(self.ctx).__name__} must return one loss per token, {tuple(stats.lse.shape)}, "
                f"as token_local is True; got {tuple(loss.shape)}"
            )
        if self.split is not None and not self.split.first:  # all ranks of a split evaluate the whole, one reports it
            metrics = {name: metric.empty() for name, metric in metrics.items()}
        self.metrics.append(metrics)
        return loss

    def losses(self, live_stats: TokenStats) -> tuple[Tensor, Tensor | None]:
        """The loss, and losses of all rows where it is a sum over tokens, with their gradients."""
        if self.local:
            losses = self.evaluate(live_stats, self.live_kwargs())
            return losses.sum(), self.rows.spread(losses)
        stats = spread_stats(live_stats, self.rows)
        if self.split is not None:
            return loss_of_split(self.ctx, self.split, stats, self.evaluate)
        kwargs = all_tokens(self.kwargs, self.lead, self.rows, self.ctx.loss_cfg.ignore_idx)
        loss = self.evaluate(stats, kwargs)
        return (loss, None) if loss.ndim == 0 else (loss.sum(), loss)


@dataclass(frozen=True)
class StatsLoss:
    """A loss on given statistics.

    - ``loss``: 0-d, differentiable in the statistics
    - ``token_loss``: loss of each token in the shape of the labels, differentiable; ``None`` where the loss is no sum
      over tokens
    - ``metrics``: as in ``LossInfo``
    """

    loss: Tensor
    token_loss: Tensor | None
    metrics: dict[str, Metric]


def loss_from_stats(ctx: Ctx, stats: TokenStats, vocab_size: int | None = None) -> StatsLoss:
    """The loss of a built context on statistics that somebody else's head gave, by plain autograd.

    The formula, weights, masks and metrics are those of ``ctx.forward``; only the pass through the head is not done.
    What the statistics hold at tokens left out does not matter.

    Args:
        ctx: built, with a ``token_loss``.
        stats: each in the shape of ``shifted_labels`` (``logprobs`` of K labels with one axis more), floating point.
        vocab_size: of the head that they are of; goes with ``mean_logit``.

    Raises:
        UnsupportedError: the loss is a ``loss_fn`` on logits. MissingFieldError: something that it needs is ``None``.
        ShapeError, DtypeError, DeviceError: a statistic does not go with the labels.
    """
    if ctx.has_own_loss_fn:
        raise UnsupportedError(f"{type(ctx).__name__} defines loss_fn, which needs hidden states and a head, not stats")
    kwargs = ctx.loss_kwargs
    kwargs.check()
    (ctx.whole() if ctx.needs_whole() else ctx).check_ready()
    needed = ctx.stats_needed() | StatSpec(entropy=ctx.loss_cfg.return_entropy)
    for spec in fields(StatSpec):
        if getattr(needed, spec.name) and getattr(stats, spec.name) is None:
            raise MissingFieldError(f"{type(ctx).__name__} needs stats.{spec.name} of each token; it is None")
    if stats.mean_logit is not None and vocab_size is None:
        raise MissingFieldError("stats.mean_logit is a mean over the vocabulary: give its vocab_size")
    ctx.vocab_size = vocab_size or 0
    labels = ctx.head_labels(kwargs)
    check_per_token("stats.logprobs", stats.logprobs, labels, floating=True)
    for name, value in stats.differentiable():
        if name != "logprobs":
            check_per_token(f"stats.{name}", value, kwargs.shifted_labels, floating=True)
    dtype = torch.promote_types(stats.logprobs.dtype, torch.float32)
    rows, axis = ctx.live_rows(), kwargs.token_axis

    def live(x: Tensor) -> Tensor:
        x = x.flatten(0, axis)
        return rows.take(x.to(dtype) if x.dtype.is_floating_point else x, 0, rows.num_live)

    on = Evaluation(ctx, kwargs, rows, kwargs.shifted_labels.shape, dtype)
    loss, token_loss = on.losses(stats.map(live))
    return StatsLoss(loss, None if token_loss is None else token_loss.reshape(on.lead), merge_metrics(on.metrics))
