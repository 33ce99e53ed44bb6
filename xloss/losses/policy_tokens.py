"""Which tokens of a policy step take part, and with which constant weights, as far as the data alone decides."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh

from xloss.errors import MissingFieldError, OptionError
from xloss.losses import calibration
from xloss.losses.correction import correct_batches, correction_metrics, mismatch_metrics
from xloss.losses.nonfinite import finite_tokens, nonfinite_metrics
from xloss.losses.reduction import reduction_weights

if TYPE_CHECKING:
    from xloss.losses.grpo import GRPOLossConfig


def weigh_tokens(
    kwargs_list: Sequence[Any],
    cfg: GRPOLossConfig,
    cu_seq_lens_list: Sequence[Tensor] | None,
    sp_mesh: DeviceMesh | None,
) -> None:
    """Set every weight of every micro-batch, in place: what takes part, corrected, over the global denominators."""
    counted = settle_tokens(kwargs_list, cfg, cu_seq_lens_list, sp_mesh)
    options, entropy_options = cfg.reduction_options(), cfg.entropy_reduction_options()
    weights = reduction_weights(counted, cfg.ignore_idx, options, cu_seq_lens_list, sp_mesh)
    entropy_weights = weights
    if cfg.entropy_coef and entropy_options != options:
        entropy_weights = reduction_weights(counted, cfg.ignore_idx, entropy_options, cu_seq_lens_list, sp_mesh)
    num_tokens = calibration.global_sum([kwargs.shifted_labels != cfg.ignore_idx for kwargs in counted])
    folded = cfg.policy_loss_cfg.folds_is_weights
    of_policy = cfg.policy_weights(counted, weights)
    for kwargs, *wholes in zip(kwargs_list, weights, entropy_weights, of_policy, strict=True):
        weight, entropy_weight, policy_weight = map(kwargs.taking_part, wholes)
        for factor in () if folded else (kwargs.is_weights, kwargs.rollout_weights):
            if factor is not None:
                policy_weight = policy_weight * factor.masked_fill(policy_weight == 0, 0)
        kwargs.policy_loss_weight = policy_weight
        kwargs.kl_loss_weight = weight * cfg.kl_loss_coef if cfg.use_kl_loss else None
        kwargs.entropy_loss_weight = entropy_weight * cfg.entropy_coef if cfg.entropy_coef else None
        kwargs.value_loss_weight = None if cfg.value_loss is None else weight * cfg.value_loss_coef
        kwargs.global_grad_tokens = num_tokens
    if cfg.nll_coef:
        weigh_positive_nll(kwargs_list, counted, cfg)


def settle_tokens(
    kwargs_list: Sequence[Any],
    cfg: GRPOLossConfig,
    cu_seq_lens_list: Sequence[Tensor] | None,
    sp_mesh: DeviceMesh | None,
) -> list[Any]:
    """Set ``loss_mask`` and ``rollout_weights`` of every micro-batch, and keep the metrics of both.

    Returns copies of the kwargs with the labels that denominators count: tokens left out as not finite stay in them,
    rejected ones go where ``renormalize_rejected`` says so.
    """
    correction, ignore = cfg.rollout_correction, cfg.ignore_idx
    finite = finite_tokens(kwargs_list, ignore, cfg.nonfinite)
    labelled = [kwargs.shifted_labels != ignore for kwargs in kwargs_list]
    takes_part, counted = finite, labelled
    metrics = calibration.sequence_counts(kwargs_list, finite, cu_seq_lens_list, sp_mesh)
    if cfg.nonfinite == "drop":
        metrics = [m | nonfinite_metrics(f, v) for m, f, v in zip(metrics, finite, labelled, strict=True)]
    weights: list[Tensor | None] = [None for _ in kwargs_list]
    if correction is not None and not corrects_in_pass(kwargs_list, cfg):
        found = correct_batches(kwargs_list, finite, correction, cu_seq_lens_list, sp_mesh)
        weights = [c.weight for c in found]
        metrics = [m | correction_metrics(c, correction) for m, c in zip(metrics, found, strict=True)]
        if correction.renormalize_rejected:
            takes_part = [c.kept for c in found]
            counted = [v & (c.kept | ~f) for v, c, f in zip(labelled, found, finite, strict=True)]
    if correction is None and all(k.old_logprobs is not None and k.rollout_logprobs is not None for k in kwargs_list):
        figures_of = mismatch_metrics(kwargs_list, finite, cu_seq_lens_list, sp_mesh)
        metrics = [m | figures for m, figures in zip(metrics, figures_of, strict=True)]
    narrows = cfg.nonfinite == "drop" or (correction is not None and correction.renormalize_rejected)
    out = []
    for kwargs, mask, weight, count, figures in zip(kwargs_list, takes_part, weights, counted, metrics, strict=True):
        kwargs.loss_mask = mask if narrows else None
        kwargs.rollout_weights = weight
        kwargs.keep_metrics(figures)
        out.append(kwargs.replaced({"shifted_labels": kwargs.shifted_labels.masked_fill(~count, ignore)}))
    return out


def corrects_in_pass(kwargs_list: Sequence[Any], cfg: GRPOLossConfig) -> bool:
    """Whether the correction waits for the current log-probs: there are no ``old_logprobs``. Raises where it cannot."""
    correction = cfg.rollout_correction
    if correction is None:
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


def weigh_positive_nll(kwargs_list: Sequence[Any], counted: Sequence[Any], cfg: GRPOLossConfig) -> None:
    """Set ``nll_loss_weight``: ``nll_coef / N``, N tokens of positive reward over the whole step."""
    shares = token_shares([positive_tokens(k, cfg.ignore_idx) for k in counted], cfg.nll_coef, cfg.grad_reduce)
    for kwargs, share in zip(kwargs_list, shares, strict=True):
        kwargs.nll_loss_weight = kwargs.taking_part(share)


def token_shares(masks: Sequence[Tensor], factor: float, grad_reduce: str) -> list[Tensor]:
    """``factor / N`` at the N tokens of the masks of all micro-batches and ranks, 0 elsewhere."""
    scale = factor * calibration.gradient_factor(grad_reduce) / calibration.global_sum(masks)
    return [mask * scale for mask in masks]
