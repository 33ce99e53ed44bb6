"""Which tokens of a policy step take part, and with which constant weights, as far as the data alone decides."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from xloss.distributed import TokenRanks
from xloss.errors import MissingFieldError, OptionError
from xloss.losses import calibration
from xloss.losses.correction import correct_batches, correction_metrics, mean_weight, mismatch_metrics
from xloss.losses.nonfinite import finite_tokens, nonfinite_metrics
from xloss.losses.reduction import Weights, reduction_weights

if TYPE_CHECKING:
    from xloss.losses.grpo import GRPOLossConfig


def weigh_tokens(kwargs_list: Sequence[Any], cfg: GRPOLossConfig, ranks: TokenRanks) -> None:
    """Set every weight of every micro-batch, in place: what takes part, corrected, over the global denominators."""
    counted, normalize = settle_tokens(kwargs_list, cfg, ranks)
    options, entropy_options = cfg.reduction_options(), cfg.entropy_reduction_options()
    of_tokens = of_entropy = reduction_weights(counted, cfg.ignore_idx, options, ranks)
    if cfg.entropy_coef and entropy_options != options:
        of_entropy = reduction_weights(counted, cfg.ignore_idx, entropy_options, ranks)
    num_tokens = ranks.sum([kwargs.shifted_labels != cfg.ignore_idx for kwargs in counted])
    of_policy = cfg.policy_weights(counted, of_tokens, ranks)
    of_nll = positive_nll_weights(counted, cfg, ranks) if cfg.nll_coef else None

    normalize()  # from here on, sums over ranks are known
    folded = cfg.policy_loss_cfg.folds_is_weights
    for kwargs, *wholes in zip(kwargs_list, of_tokens(), of_entropy(), of_policy(), strict=True):
        weight, entropy_weight, policy_weight = map(kwargs.taking_part, wholes)
        for factor in () if folded else (kwargs.is_weights, kwargs.rollout_weights):
            if factor is not None:
                policy_weight = policy_weight * factor.masked_fill(policy_weight == 0, 0)
        kwargs.policy_loss_weight = policy_weight
        kwargs.kl_loss_weight = weight * cfg.kl_loss_coef if cfg.use_kl_loss else None
        kwargs.entropy_loss_weight = entropy_weight * cfg.entropy_coef if cfg.entropy_coef else None
        kwargs.value_loss_weight = None if cfg.value_loss is None else weight * cfg.value_loss_coef
        kwargs.global_grad_tokens = num_tokens.divisor()
        kwargs.gradient_factor = torch.full_like(kwargs.global_grad_tokens, ranks.gradient_factor(cfg.grad_reduce))
    if of_nll is not None:
        for kwargs, share in zip(kwargs_list, of_nll(), strict=True):
            kwargs.nll_loss_weight = kwargs.taking_part(share)


def settle_tokens(
    kwargs_list: Sequence[Any], cfg: GRPOLossConfig, ranks: TokenRanks
) -> tuple[list[Any], Callable[[], None]]:
    """Set ``loss_mask`` and ``rollout_weights`` of every micro-batch, and keep the metrics of both.

    Returns copies of the kwargs with the labels that denominators count: tokens left out as not finite stay in them,
    rejected ones go where ``renormalize_rejected`` says so. And what is to be called once all sums over ranks have been
    asked for: it divides ``rollout_weights`` by their mean, where ``batch_normalize`` says so.
    """
    correction, ignore = cfg.rollout_correction, cfg.ignore_idx
    finite = finite_tokens(kwargs_list, ignore, cfg.nonfinite)
    labelled = [kwargs.shifted_labels != ignore for kwargs in kwargs_list]
    takes_part, counted = finite, labelled
    metrics = calibration.sequence_counts(kwargs_list, finite)
    if cfg.nonfinite == "drop":
        metrics = [m | nonfinite_metrics(f, v) for m, f, v in zip(metrics, finite, labelled, strict=True)]
    weights: list[Tensor | None] = [None for _ in kwargs_list]
    mean = None
    if correction is not None and not corrects_in_pass(kwargs_list, cfg):
        found = correct_batches(kwargs_list, finite, correction)
        weights = [c.weight for c in found]
        metrics = [m | correction_metrics(c, correction) for m, c in zip(metrics, found, strict=True)]
        if correction.batch_normalize:
            mean = mean_weight(found, correction, ranks)
        if correction.renormalize_rejected:
            takes_part = [c.kept for c in found]
            counted = [v & (c.kept | ~f) for v, c, f in zip(labelled, found, finite, strict=True)]
    if correction is None and all(k.old_logprobs is not None and k.rollout_logprobs is not None for k in kwargs_list):
        figures_of = mismatch_metrics(kwargs_list, finite)
        metrics = [m | figures for m, figures in zip(metrics, figures_of, strict=True)]
    narrows = cfg.nonfinite == "drop" or (correction is not None and correction.renormalize_rejected)
    out = []
    for kwargs, mask, weight, count, figures in zip(kwargs_list, takes_part, weights, counted, metrics, strict=True):
        kwargs.loss_mask = mask if narrows else None
        kwargs.rollout_weights = weight
        kwargs.keep_metrics(figures)
        out.append(kwargs.replaced({"shifted_labels": kwargs.shifted_labels.masked_fill(~count, ignore)}))

    def normalize() -> None:
        if mean is not None:
            for kwargs in kwargs_list:
                kwargs.rollout_weights = kwargs.rollout_weights / mean()

    return out, normalize


def corrects_in_pass(kwargs_list: Sequence[Any], cfg: GRPOLossConfig) -> bool:
    """Whether the correction waits for the current log-probs: there are no ``old_logprobs``. Raises where it cannot."""
    correction = cfg.rollout_correction
    if correction is None:
        return False
    if not kwargs_list:  # nothing to correct; what the others on other ranks need is asked for all the same
        return False
    missing = [kwargs.old_logprobs is None for kwargs in kwargs_list]
    if any(kwargs.rollout_logprobs is None for kwargs in kwargs_list):
        raise MissingFieldError("rollout_logprobs is None; rollout_correction compares them with the trainer's")
    if any(missing) != all(missing):
        raise MissingFieldError("old_logprobs is None in some micro-batches and a tensor in others")
    if correction.bypass and not all(missing):
        raise OptionError("rollout_correction.bypass takes rollout_logprobs as the old policy; leave old_logprobs out")
    for name in ("batch_normalize", "renormalize_rejected"):
        if all(missing) and getattr(correction, name):
            raise OptionError(
                f"rollout_correction.{name} needs the weights of the whole step where its batches are built, so it "
                "needs old_logprobs; on-policy weights are known in the pass only"
            )
    return all(missing)


def positive_tokens(kwargs: Any, ignore_idx: int) -> Tensor:
    """Tokens with a label and a positive reward, or a positive advantage where ``rewards`` is ``None``."""
    signal = kwargs.advantages if kwargs.rewards is None else kwargs.rewards
    found: Tensor = (kwargs.shifted_labels != ignore_idx) & (signal > 0)
    return found


def positive_nll_weights(counted: Sequence[Any], cfg: GRPOLossConfig, ranks: TokenRanks) -> Weights:
    """``nll_coef / N``, N tokens of positive reward over the whole step."""
    return token_shares([positive_tokens(k, cfg.ignore_idx) for k in counted], cfg.nll_coef, cfg.grad_reduce, ranks)


def token_shares(masks: Sequence[Tensor], factor: float, grad_reduce: str, ranks: TokenRanks) -> Weights:
    """``factor / N`` at the N tokens of the masks of all micro-batches and ranks, 0 elsewhere."""
    count, factor = ranks.sum(masks), factor * ranks.gradient_factor(grad_reduce)
    return lambda: [mask * (factor / count.divisor()) for mask in masks]
