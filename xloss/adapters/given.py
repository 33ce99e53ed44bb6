"""What the adapters share: a config run where a framework has log-probs, denominators and a reduction of its own."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from xloss.distributed import alone
from xloss.errors import MissingFieldError, OptionError, UnsupportedError
from xloss.losses.base import BaseLossContext
from xloss.losses.config import BaseLossConfig
from xloss.losses.evaluation import StatsLoss, loss_from_stats
from xloss.losses.metric_names import Framework, rename_metrics
from xloss.losses.mtp import MTPLossConfig
from xloss.losses.oreal import OrealLossConfig
from xloss.losses.reduced import ReducedLossConfig
from xloss.metrics import Metric
from xloss.stats import TokenStats

_OF_THE_HEAD = (
    *("mode", "chunk_size", "plan", "logits_budget", "kernels", "accumulate_into_main_grad", "temperature", "softcap"),
    *("logit_scale", "return_entropy", "allow_retain_graph", "skip_zero_grad_rows"),
)
_OWN_DENOMINATOR = ("positive_nll_coef", "entropy_reduction", "value_loss")


def checked(
    config: BaseLossConfig, framework: str, refused: Mapping[str, str] | None = None, *, head: bool = True
) -> ReducedLossConfig:
    """``config``, if it can be run on log-probs and denominators that ``framework`` gives.

    Args:
        head: whether the framework runs the head too.
        refused: fields that the framework has an option for, and the option.

    Raises:
        OptionError: a field is set that only a head could honour, or one of ``refused``.
        UnsupportedError: it is not a sum over tokens, or a term of it has a denominator of its own.
    """
    if not isinstance(config, ReducedLossConfig):
        raise UnsupportedError(
            f"{framework} has denominators of its own: that takes a config with loss_reduction, such as GRPOLossConfig "
            f"or CELossConfig; got {type(config).__name__}"
        )

    if isinstance(config, (MTPLossConfig, OrealLossConfig)):
        raise UnsupportedError(
            f"{type(config).__name__} has counts of its own over the global batch, or heads of its own, of which "
            f"{framework} does not know"
        )

    def is_set(name: str) -> bool:
        field = type(config).model_fields.get(name)
        return field is not None and getattr(config, name) != field.default

    for name in filter(is_set, _OF_THE_HEAD if head else ()):
        raise OptionError(
            f"{name}={getattr(config, name)!r} is about the head, which is run by {framework} here; leave it out"
        )
    for name in filter(is_set, refused or {}):
        raise OptionError(
            f"{name}={getattr(config, name)!r} is no part of a loss of {framework}: {(refused or {})[name]}"
        )
    for name in filter(is_set, _OWN_DENOMINATOR):
        raise UnsupportedError(
            f"{name}={getattr(config, name)!r} has a denominator of its own over the global batch, which {framework} "
            "does not tell"
        )
    correction = getattr(config, "rollout_correction", None)
    for name in ("renormalize_rejected", "batch_normalize"):
        if getattr(correction, name, False):
            raise UnsupportedError(f"rollout_correction.{name} needs the whole step, of which {framework} shows a part")
    return config


def reduced_by(
    config: ReducedLossConfig, *agreed: str, run_as: str | None = None, norm_length: float | None = None
) -> ReducedLossConfig:
    """``config`` with the reduction that the framework asks for; gradients of ranks are the framework's to weigh.

    Args:
        agreed: what the framework's reduction is called here.
        run_as: what is left to do where the framework reduces token losses itself: ``sum``.

    Raises:
        OptionError: the config asks for another one.
    """
    own = config.loss_reduction
    if "loss_reduction" in config.model_fields_set and own not in agreed:
        raise OptionError(
            f"the config has loss_reduction={own!r}, the framework reduces by {' or '.join(map(repr, agreed))}; make "
            "them agree, or leave loss_reduction out of the config"
        )
    if config.count_empty_sequences:
        raise OptionError(
            "count_empty_sequences=True, but the framework counts the sequences; set count_empty_sequences=False"
        )
    fields = {"loss_reduction": run_as or agreed[0], "norm_length": norm_length, "grad_reduce": "sum"}
    return type(config)(**{**{n: getattr(config, n) for n in config.model_fields_set}, **fields})


def local_loss(
    config: BaseLossConfig,
    fields: Mapping[str, Any],
    logprobs: Tensor,
    entropy: Tensor | None = None,
    cu_seq_lens: Tensor | None = None,
) -> StatsLoss:
    """The loss of one micro-batch on given log-probs, as if it were the whole batch; ranks exchange nothing.

    Args:
        fields: of the config's kwargs, ``shifted_labels`` among them.
        logprobs: in the shape of ``shifted_labels``, with gradient. entropy: likewise.
        cu_seq_lens: bounds of the sequences where ``shifted_labels`` is a pack; without, each row is one.

    Raises:
        MissingFieldError: the loss needs a field or a statistic that is not there.
    """
    if cu_seq_lens is None and logprobs.shape[:-1] in ((), (1,)):
        cu_seq_lens = torch.tensor([0, logprobs.numel()], device=logprobs.device)
    if getattr(config, "z_loss_coef", 0.0):
        raise MissingFieldError("z_loss_coef needs lse of each token; log-probs are all there is")
    lse = torch.full_like(logprobs, torch.nan)  # unknown
    with alone():
        ctx = local_context(config, fields, cu_seq_lens)
        return loss_from_stats(ctx, TokenStats(logprobs, lse, entropy))


def local_context(
    config: BaseLossConfig, fields: Mapping[str, Any], cu_seq_lens: Tensor | None = None
) -> BaseLossContext[Any]:
    """A context of one micro-batch, built as if that were the whole batch. Call it under ``alone``.

    Raises ``MissingFieldError`` where a field that the config needs is not there.
    """
    present = {name: value for name, value in fields.items() if value is not None}
    needed = [n for n, f in config.loss_kwargs_cls.model_fields.items() if f.is_required() and n not in present]
    if needed:
        raise MissingFieldError(f"{type(config).__name__} needs {', '.join(needed)}")
    ctx = config.build(present)
    assert ctx is not None
    return ctx.build_batches([ctx], None if cu_seq_lens is None else [cu_seq_lens])[0]


def masked_labels(mask: Tensor) -> Tensor:
    """Labels that say which tokens count, where the log-probs are known: 0, and -100 outside ``mask``."""
    return torch.zeros_like(mask, dtype=torch.int64).masked_fill(mask == 0, -100)


def figures(metrics: Mapping[str, Metric], framework: Framework) -> dict[str, Tensor]:
    """Means and extremes, which do not depend on a denominator, under the framework's names."""
    return rename_metrics({name: m.result() for name, m in metrics.items() if m.reducer != "sum"}, framework)
