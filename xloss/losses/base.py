"""The trio every loss is made of: ``BaseLossConfig`` (in ``config``), ``BaseLossKwargs`` (in ``model``), and here
``BaseLossContext``.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from inspect import getattr_static
from typing import Any, ClassVar, Generic, Self, TypeVar

import torch
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh

from xloss.distributed import Ranks, TokenRanks
from xloss.distributed.vocab import HeadWeight
from xloss.errors import OptionError
from xloss.head.backend import LossTwin
from xloss.head.options import LiveRows
from xloss.head.outside_compile import outside_compile
from xloss.head.plan import Plan
from xloss.losses import build, run
from xloss.losses.agreed import calibrating
from xloss.losses.config import BaseLossConfig
from xloss.losses.info import LossInfo
from xloss.losses.model import BaseLossContextInputItem, BaseLossKwargs
from xloss.metrics import Metric
from xloss.stats import StatSpec, TokenStats

InputItem = TypeVar("InputItem", bound=BaseLossContextInputItem)
TokenLoss = Tensor | tuple[Tensor, dict[str, Metric]]


class BaseLossContext(Generic[InputItem]):
    """Config and calibrated kwargs of one micro-batch: call it with hidden states and the head.

    A loss of your own is a subclass that defines one of

    - ``token_loss(stats, loss_kwargs)``: on per-token vectors, with the kernels and plans of the built-in losses;
    - ``loss_fn(hidden_states, head_weight, head_bias, loss_kwargs)``: anything, run chunk by chunk through autograd.
    """

    loss_cfg: BaseLossConfig
    loss_kwargs: BaseLossKwargs
    token_local: ClassVar[bool] = False
    """Promise: ``token_loss`` returns ``[T]`` losses, each of which depends on its own token alone (one-pass plan)."""
    label_field: ClassVar[str] = "shifted_labels"
    """The field that ``head_labels`` come from, for error messages."""

    def is_token_local(self) -> bool:
        """``token_local``, for losses whose config decides."""
        return self.token_local

    def why_coupled(self) -> str:
        """What makes the loss couple tokens, for ``explain()``; asked only where ``is_token_local()`` is False."""
        return "token_local is False"

    def needs_whole(self) -> bool:
        """Whether the loss of a part of a batch is not to be had from that part: it couples tokens.

        Sequence-parallel ranks then exchange statistics, and each evaluates ``token_loss`` on the whole.
        """
        return not self.has_own_loss_fn and not self.is_token_local()

    def whole(self) -> Self:
        """The context of all tokens of a batch split over sequence-parallel ranks; without a split, this one."""
        return self if self.loss_kwargs.split is None else type(self)(self.loss_cfg, self.loss_kwargs.whole)

    def __init__(self, loss_cfg: BaseLossConfig, loss_kwargs: BaseLossKwargs) -> None:
        if not isinstance(loss_cfg, BaseLossConfig):
            raise OptionError(f"loss_cfg must be a BaseLossConfig; got {type(loss_cfg).__name__}")
        if not isinstance(loss_kwargs, BaseLossKwargs):
            raise OptionError(f"loss_kwargs must be a BaseLossKwargs; got {type(loss_kwargs).__name__}")
        self.loss_cfg = loss_cfg
        self.loss_kwargs = loss_kwargs
        self.last_plan: Plan | None = None
        self.vocab_size = 0  # of the head that a forward runs with, for token_loss

    # -- building batches ------------------------------------------------------------------------------------------

    @classmethod
    def build_batches_loss_kwargs(
        cls,
        data_batches: Sequence[InputItem],
        loss_cfg: Any,
        cu_seq_lens_list: Sequence[Tensor] | None = None,
        sp_mesh: DeviceMesh | None = None,
        data_mesh: Ranks = None,
    ) -> list[Any]:
        """Kwargs of every micro-batch of one optimizer step, calibrated over all of them and all ranks.

        Every rank of ``data_mesh`` calls it once a step, one without a micro-batch too (``data_batches=[]``).

        Args:
            data_batches: one item per micro-batch; with ``sp_mesh``, already split by ``item.sp_split(sp_mesh)``.
            loss_cfg: config of this loss.
            cu_seq_lens_list: bounds of the packed sequences of each micro-batch (whole packs, also under ``sp_mesh``).
            sp_mesh: ranks that hold parts of one sequence.
            data_mesh: ranks that hold distinct tokens, those of ``sp_mesh`` included: a mesh of any dimensions or a
                process group; default all ranks. ``docs/calibration.md`` has a table of engines.

        Raises:
            OptionError: an item is not split where others are, or is over other ranks than ``sp_mesh``; ``data_mesh``
                lacks ranks of ``sp_mesh``.
        """
        with cls._calibrating(loss_cfg, data_batches, sp_mesh, data_mesh):
            kwargs_list = [build.kwargs_of(item, loss_cfg.loss_kwargs_cls) for item in data_batches]
            build.calibrate_all(cls, kwargs_list, loss_cfg, cu_seq_lens_list, sp_mesh, data_mesh)
        return kwargs_list

    @classmethod
    def build_batches(
        cls,
        loss_ctx_list: Sequence[Self],
        cu_seq_lens_list: Sequence[Tensor] | None = None,
        sp_mesh: DeviceMesh | None = None,
        data_mesh: Ranks = None,
    ) -> list[Self]:
        """Calibrate contexts made by ``config.build`` together, in place, and return them.

        Arguments and errors as in ``build_batches_loss_kwargs``.
        """
        if not loss_ctx_list:
            raise OptionError(
                "loss_ctx_list must not be empty; a rank without a micro-batch takes part in the step by "
                "build_batches_loss_kwargs([], loss_cfg)"
            )
        first, kwargs_list = loss_ctx_list[0].loss_cfg, [ctx.loss_kwargs for ctx in loss_ctx_list]
        with cls._calibrating(first, kwargs_list, sp_mesh, data_mesh):
            if any(ctx.loss_cfg != first for ctx in loss_ctx_list):
                raise OptionError("loss_ctx_list holds contexts of different configs; calibrate each config's apart")
            build.calibrate_all(cls, kwargs_list, first, cu_seq_lens_list, sp_mesh, data_mesh)
        return list(loss_ctx_list)

    @classmethod
    def _calibrating(
        cls, loss_cfg: Any, batches: Sequence[Any], sp_mesh: DeviceMesh | None, data_mesh: Ranks
    ) -> AbstractContextManager[None]:
        """Errors of one rank on all, where there is something to calibrate together."""
        alone = getattr_static(cls, "calibrate") is getattr_static(BaseLossContext, "calibrate")
        own = not cls.__module__.startswith("xloss.")  # a class of the user's may raise where the built-in ones do not
        return nullcontext() if alone else calibrating(loss_cfg, batches, sp_mesh, data_mesh, may_fail_late=own)

    @classmethod
    def calibrate(
        cls,
        kwargs_list: list[Any],
        loss_cfg: Any,
        cu_seq_lens_list: Sequence[Tensor] | None,
        ranks: TokenRanks,
    ) -> None:
        """Fill in, in place, what only the whole global batch knows: denominators and weights. Default: nothing.

        A class that overrides it builds its batches on all ranks together: what one rank raises, all do.

        Args:
            kwargs_list: of whole micro-batches, under sequence parallelism too; empty on a rank that has none.
            loss_cfg, cu_seq_lens_list: as in ``build_batches_loss_kwargs``.
            ranks: sums over the global batch. Every rank must ask for the same ones, in the same order, whatever its
                data; ask for all before the value of one, and a single all-reduce does.
        """

    @classmethod
    def cat(cls, chunks: Sequence[Self]) -> Self:
        """Contexts of one config as one, tokens joined. Weights stay as calibrated, so losses and gradients add."""
        if not chunks:
            raise OptionError("chunks must not be empty")
        if any(c.loss_cfg != chunks[0].loss_cfg for c in chunks):
            raise OptionError("chunks hold contexts of different configs")
        kwargs_cls = type(chunks[0].loss_kwargs)
        return cls(chunks[0].loss_cfg, kwargs_cls.cat([c.loss_kwargs for c in chunks]))

    # -- the loss --------------------------------------------------------------------------------------------------

    def stats_needed(self) -> StatSpec:
        """Statistics that ``token_loss`` reads beside ``logprobs`` and ``lse``."""
        return StatSpec(entropy=self.loss_cfg.return_entropy)

    def head_labels(self, loss_kwargs: Any) -> Tensor:
        """Labels whose log-probs the loss reads, in the shape of ``shifted_labels``, or that and an axis K."""
        labels: Tensor = loss_kwargs.shifted_labels
        return labels

    def head_temperature(self, loss_kwargs: Any) -> float | Tensor:
        """What divides the logits of every statistic: the batch's number per token, or else the config's."""
        if loss_kwargs.temperature is None:
            return self.loss_cfg.temperature
        if self.loss_cfg.temperature != 1.0:
            raise OptionError(
                f"temperature is given per token and as temperature={self.loss_cfg.temperature} in the config; give one"
            )
        per_token: Tensor = loss_kwargs.temperature
        return per_token

    def token_loss(self, stats: TokenStats, loss_kwargs: Any) -> TokenLoss:
        """The loss from per-token vectors: ``[T]`` losses or a scalar, alone or with a dict of metrics.

        Token-local losses see live tokens only; others see all ``T`` in order, with 0 in every field of those left out.
        Weights (``loss_kwargs.loss_weight`` and the like) are for this function to apply.
        """
        raise NotImplementedError(f"{type(self).__name__} must define token_loss or loss_fn")

    def value_losses(self, values: Tensor | None) -> tuple[Tensor, dict[str, Metric]] | None:
        """Weighted value loss of each token, in the shape of the labels, to add to the loss; and its metrics."""
        return None

    def twin(self, loss_kwargs: Any) -> LossTwin | None:
        """``token_loss`` as a kernel knows it, for ``loss_kwargs`` of live tokens; ``None`` where no kernel does."""
        return None

    def loss_fn(self, hidden_states: Tensor, head_weight: Tensor, head_bias: Tensor | None, loss_kwargs: Any) -> Any:
        """The loss of these hidden states by plain autograd, with the logits materialised.

        Override it to compute anything; it is then called on chunks, whose losses are added, and may return ``loss``,
        ``(loss, logits)`` or ``(loss, (logits, extra_info))``.
        """
        return run.run_token_loss(self, hidden_states, head_weight, head_bias, loss_kwargs, mode="eager")

    @property
    def has_own_loss_fn(self) -> bool:
        """Whether this class replaced ``loss_fn``, and so is run through autograd."""
        return type(self).loss_fn is not BaseLossContext.loss_fn

    def known_zero_grad(self) -> Tensor | None:
        """Mask of tokens whose gradient is 0 whatever the model says, in the shape of the labels, or ``None``."""
        return None

    def check_ready(self) -> None:
        """Raise ``MissingFieldError`` unless every field the loss needs is there."""

    @outside_compile
    def forward(
        self, hidden_states: Tensor, head_weight: HeadWeight, head_bias: Tensor | None = None
    ) -> tuple[Tensor, LossInfo]:
        """Loss of this micro-batch (its share of the global one) and what was seen on the way.

        Args:
            hidden_states: ``[T, H]``, ``[1, T, H]`` or ``[B, S, H]``, leading shape of ``shifted_labels``.
            head_weight: ``[V, H]``; on ranks that share the vocabulary a DTensor ``Shard(0)`` or a ``VocabShard``; with
                adapters a ``LoraWeight``.
            head_bias: ``[V]`` or ``None``.

        Returns:
            The loss, 0-d float32 (float64 for float64), to minimise; and a ``LossInfo``, which unpacks as
            ``(logits, extra_info)``.

        Raises:
            ShapeError, DtypeError, DeviceError, LabelError, MissingFieldError, UnsupportedError: before any work.
        """
        return run.forward(self, hidden_states, head_weight, head_bias)

    __call__ = forward

    def explain(
        self,
        hidden_states: Tensor | None = None,
        head_weight: HeadWeight | None = None,
        head_bias: Tensor | None = None,
    ) -> Plan:
        """What ``forward`` would do with these inputs, and why; ``print`` it. Does none of the work.

        Without inputs: what the last ``forward`` of this context did.
        """
        return run.explain(self, hidden_states, head_weight, head_bias)

    # -- live rows -------------------------------------------------------------------------------------------------

    def find_rows(self) -> LiveRows:
        """Count live tokens now (waits for a CUDA device) and remember them in the kwargs for the forwards to come."""
        asked = self.whole() if self.needs_whole() else self
        live, zero = asked.live_mask(), asked.known_zero_grad()
        if asked is not self:
            assert self.loss_kwargs.split is not None
            live = self.loss_kwargs.split.part_of(live)
            zero = None if zero is None else self.loss_kwargs.split.part_of(zero)
        if zero is not None:
            zero = zero.reshape(-1)
            if self.loss_cfg.skip_zero_grad_rows:
                live, zero = live & ~zero, None
        rows = LiveRows.find(live, zero)
        self.loss_kwargs.remember_rows(rows, self.loss_cfg)
        return rows

    def live_rows(self) -> LiveRows:
        """Live tokens: those remembered if no tensor changed since, else counted anew (waits for a CUDA device)."""
        known = self.loss_kwargs.known_rows(self.loss_cfg)
        return self.find_rows() if known is None else known

    def live_mask(self) -> Tensor:
        """``[T]`` bool: some label not ignored, and some weight not 0 (when the kwargs mark weights)."""
        kwargs = self.loss_kwargs
        live = self.head_labels(kwargs).flatten(0, kwargs.token_axis) != self.loss_cfg.ignore_idx
        live = live if live.ndim == 1 else live.any(1)
        weights = [value.reshape(-1) for value, mark in kwargs.per_token().values() if mark.weight]
        if weights:
            live = live & torch.stack([w != 0 for w in weights]).any(0)
        return live
