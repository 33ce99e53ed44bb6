"""Statistics, a built-in loss and dlogits of a chunk of logits, in one kernel.

    loss = weight * policy + kl_weight * KL(logprob, ref) + aux_weight * (z_loss_coef * lse^2 - entropy_coef * entropy)

Pass 1 reads the row for its softmax, the loss and its adjoints are worked out in registers (`formulas.py`), pass 2
reads the row backwards, its end still in L2, and writes dlogits over it. Ignored rows, and rows whose adjoints are
all 0 (weight 0, clipped ratio), get zeros without the second read.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
import triton
import triton.language as tl

from xloss_kernels import formulas, tiles, tuned
from xloss_kernels.checks import check_rows, check_vectors, is_overlay
from xloss_kernels.row_stats import store_stats
from xloss_kernels.rows import label_logits, row_softmax, write_dlogits, write_zeros
from xloss_kernels.transform import Transform, row_inv_temperature


@dataclass(frozen=True)
class PolicySpec:
    """Which loss. Ratio bounds are absolute (PPO: 1 - cliprange_low and 1 + cliprange_high).

    `ratio_min/max` belong to ppo and cispo, `log_ratio_min/max` to these and importance_sampling, `dual_clip` and
    `delta` to ppo, `beta` to dro, `label_smoothing` to ce (torch's convention: mass epsilon / V on every entry).
    """

    loss: Literal["ce", "reinforce", "importance_sampling", "ppo", "cispo", "dro"]
    ratio_min: float = 0.8
    ratio_max: float = 1.2
    dual_clip: float | None = None
    log_ratio_min: float = -20.0
    log_ratio_max: float = 20.0
    beta: float = 0.05
    delta: float | None = None
    label_smoothing: float = 0.0
    kl: Literal["k1", "abs", "k2", "k3"] | None = None
    kl_grad: Literal["plain", "straight_through", "unbiased", "score_function"] = "plain"
    kl_clamp_in: float = math.inf
    kl_clamp_out: float = math.inf
    entropy_coef: float = 0.0
    z_loss_coef: float = 0.0


class PolicyRows(NamedTuple):
    """Per row, float32 [C]; 0 (False; `top1` -1) on ignored rows. `loss` is weighted.

    Of the statistics `entropy` is there if asked for or used, `mean_logit`, `sum_p2` and `top1` (int64) if asked for.
    """

    loss: torch.Tensor
    logprobs: torch.Tensor
    lse: torch.Tensor
    entropy: torch.Tensor | None
    mean_logit: torch.Tensor | None
    sum_p2: torch.Tensor | None
    top1: torch.Tensor | None
    log_ratio: torch.Tensor
    clipped_low: torch.Tensor  # bool
    clipped_high: torch.Tensor  # bool


@triton.jit
def load_or(pointer, row, default):
    """The value at `row`, or `default` for an absent vector."""
    value = default
    if pointer is not None:
        value = tl.load(pointer + row)
    return value


@triton.jit
def policy_term(logprob, old, advantage, ratio_min, ratio_max, dual_clip, delta, log_ratio_min, log_ratio_max, beta,
                LOSS: tl.constexpr):  # fmt: skip
    """-> (value, d value / d logprob, clipped low, clipped high)."""
    low = logprob != logprob
    high = logprob != logprob
    if LOSS == "ce":
        value, slope = formulas.reinforce(logprob, 1.0)
    elif LOSS == "reinforce":
        value, slope = formulas.reinforce(logprob, advantage)
    elif LOSS == "importance_sampling":
        value, slope = formulas.importance_sampling(logprob, old, advantage, log_ratio_min, log_ratio_max)
    elif LOSS == "dro":
        value, slope = formulas.dro(logprob, old, advantage, beta)
    elif LOSS == "cispo":
        value, slope, low, high = formulas.cispo(
            logprob, old, advantage, ratio_min, ratio_max, log_ratio_min, log_ratio_max)  # fmt: skip
    else:
        tl.static_assert(LOSS == "ppo", "unknown loss")
        value, slope, low, high = formulas.ppo_clip(
            logprob, old, advantage, ratio_min, ratio_max, dual_clip, delta, log_ratio_min, log_ratio_max)  # fmt: skip
    return value, slope, low, high


@triton.jit
def policy_rows_kernel(logits, out, labels, weight, advantages, old_logprobs, ref_logprobs, kl_weight, aux_weight,
                       grad_scale, bias, temperature, loss, logprobs, lse, entropy, mean_logit, sum_p2, top1,
                       log_ratio, clipped_low, clipped_high, num_vocab, row_stride, out_stride, ignore_index,
                       logit_scale, softcap, inv_temperature, ratio_min, ratio_max, dual_clip, delta, log_ratio_min,
                       log_ratio_max, beta, label_smoothing, entropy_coef, z_loss_coef, kl_clamp_in, kl_clamp_out,
                       LOSS: tl.constexpr, KL: tl.constexpr, KL_GRAD: tl.constexpr, WITH_GRAD: tl.constexpr,
                       OVERLAY: tl.constexpr, FOLD: tl.constexpr, LANES: tl.constexpr):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    target = out + row * out_stride
    label = tl.load(labels + row)
    if label == ignore_index:
        tl.store(loss + row, 0.0)
        tl.store(logprobs + row, 0.0)
        store_stats(row, None, False, 0.0, 0.0, 0.0, 0.0, 0, lse, entropy, mean_logit, sum_p2, top1)
        tl.store(log_ratio + row, 0.0)
        tl.store(clipped_low + row, 0)
        tl.store(clipped_high + row, 0)
        if WITH_GRAD:
            write_zeros(target, num_vocab, FOLD * LANES)
        return

    start = logits + row * row_stride
    inverse = row_inv_temperature(temperature, row, inv_temperature)
    peak, log_total, entropy_value, mean_value, p2_value, best = row_softmax(
        start, bias, num_vocab, logit_scale, softcap, inverse, entropy is not None,
        (label_smoothing is not None) or (mean_logit is not None), sum_p2 is not None, top1 is not None,
        "evict_last", FOLD, LANES)  # fmt: skip
    ids = label + tl.zeros((1,), tl.int64)
    inside = (ids >= 0) & (ids < num_vocab)
    z, _ = label_logits(start, bias, ids, inside, logit_scale, softcap, inverse)
    lse_value = peak + log_total
    logprob = tl.max((z - peak) - log_total, 0)

    old = load_or(old_logprobs, row, logprob)
    scale_of_row = load_or(weight, row, 1.0)
    value, slope, low, high = policy_term(
        logprob, old, load_or(advantages, row, 1.0), ratio_min, ratio_max, dual_clip, delta, log_ratio_min,
        log_ratio_max, beta, LOSS)  # fmt: skip
    on_lse = logprob * 0.0
    on_mean = None
    if label_smoothing is not None:
        value = value * (1.0 - label_smoothing) + label_smoothing * (lse_value - mean_value)
        slope = slope * (1.0 - label_smoothing)
        on_lse += label_smoothing * scale_of_row
        on_mean = -label_smoothing * scale_of_row / num_vocab
    counts = scale_of_row != 0  # the ratio of a token of weight 0 may overflow
    value = tl.where(counts, value * scale_of_row, 0.0)
    on_logprob = tl.where(counts, slope * scale_of_row, 0.0)
    if KL is not None:
        kl_value, kl_slope = formulas.kl_penalty(
            logprob, tl.load(ref_logprobs + row), old, kl_clamp_in, kl_clamp_out, KL, KL_GRAD)  # fmt: skip
        kl_scale = load_or(kl_weight, row, 1.0)
        value += kl_value * kl_scale
        on_logprob += kl_slope * kl_scale
    aux_scale = load_or(aux_weight, row, scale_of_row)
    on_entropy = None
    if entropy_coef is not None:
        value -= entropy_coef * aux_scale * entropy_value
        on_entropy = -entropy_coef * aux_scale
    if z_loss_coef is not None:
        value += z_loss_coef * aux_scale * lse_value * lse_value
        on_lse += 2.0 * z_loss_coef * aux_scale * lse_value

    tl.store(loss + row, value)
    tl.store(logprobs + row, logprob)
    store_stats(row, None, True, lse_value, entropy_value, mean_value, p2_value, best,
                lse, entropy, mean_logit, sum_p2, top1)  # fmt: skip
    tl.store(log_ratio + row, logprob - old)
    tl.store(clipped_low + row, low.to(tl.int8))
    tl.store(clipped_high + row, high.to(tl.int8))

    if WITH_GRAD:
        upstream = load_or(grad_scale, 0, 1.0)
        on_logprob *= upstream
        on_lse *= upstream
        work = (on_logprob != 0.0) | (on_lse != 0.0)
        if on_mean is not None:
            on_mean *= upstream
            work = work | (on_mean != 0.0)
        if on_entropy is not None:
            on_entropy *= upstream
            work = work | (on_entropy != 0.0)
        if work:
            write_dlogits(
                start, target, bias, ids, inside, on_logprob + tl.zeros((1,), tl.float32), num_vocab, peak, log_total,
                on_lse - on_logprob, on_entropy, entropy_value, on_mean, None, None, logit_scale, softcap, inverse,
                not OVERLAY, OVERLAY, FOLD * LANES)  # fmt: skip
        else:
            write_zeros(target, num_vocab, FOLD * LANES)


def policy_rows(
    logits: torch.Tensor,
    labels: torch.Tensor,
    spec: PolicySpec,
    transform: Transform | None = None,
    *,
    weight: torch.Tensor | None = None,
    advantages: torch.Tensor | None = None,
    old_logprobs: torch.Tensor | None = None,
    ref_logprobs: torch.Tensor | None = None,
    kl_weight: torch.Tensor | None = None,
    aux_weight: torch.Tensor | None = None,
    grad_scale: torch.Tensor | None = None,
    out: torch.Tensor | None = None,
    with_grad: bool = True,
    entropy: bool = False,
    mean_logit: bool = False,
    sum_p2: bool = False,
    top1: bool = False,
    ignore_index: int = -100,
    tile: tiles.RowTile | None = None,
) -> PolicyRows:
    """Loss and statistics of raw `logits` [C, V] at `labels` int64 [C]; dlogits replace the logits, or go into `out`.

    Vectors are float32 [C]. `weight` defaults to 1, `kl_weight` to 1, `aux_weight` (entropy and z-loss) to `weight`;
    `old_logprobs=None` is on-policy: ratio 1, gradient intact. `grad_scale` is a float32 device scalar on dlogits.
    `entropy`, `mean_logit`, `sum_p2` and `top1` ask for these statistics, which cost no further read.
    `out` as in `dlogits`. `with_grad=False` leaves the logits untouched and writes no dlogits.
    """
    num_rows, num_vocab, _ = check_rows(logits, labels)
    assert labels.ndim == 1, "policy_rows takes one label per row"
    assert spec.loss == "ce" or advantages is not None, f"{spec.loss} needs advantages"
    assert spec.kl is None or ref_logprobs is not None, "a KL term needs ref_logprobs"
    assert spec.label_smoothing == 0.0 or spec.loss == "ce", "label smoothing belongs to ce"
    out = logits if out is None else out
    assert out.shape == logits.shape and (out.stride(1) == 1 or num_vocab == 1), (
        "out must be [C, V] with unit column stride"
    )
    check_vectors((num_rows,), weight=weight, advantages=advantages, old_logprobs=old_logprobs,
                  ref_logprobs=ref_logprobs, kl_weight=kl_weight, aux_weight=aux_weight)  # fmt: skip
    assert grad_scale is None or (grad_scale.numel() == 1 and grad_scale.dtype == torch.float32)
    tile = tile or tuned.row(
        "policy_rows", logits.device, num_vocab, logits.dtype, out.dtype, num_warps=tiles.TWO_PASS_WARPS
    )
    transform = transform or Transform()

    def vector(dtype: torch.dtype = torch.float32) -> torch.Tensor:
        return torch.empty(num_rows, dtype=dtype, device=logits.device)

    rows = PolicyRows(
        loss=vector(),
        logprobs=vector(),
        lse=vector(),
        entropy=vector() if entropy or spec.entropy_coef != 0.0 else None,
        mean_logit=vector() if mean_logit else None,
        sum_p2=vector() if sum_p2 else None,
        top1=vector(torch.int64) if top1 else None,
        log_ratio=vector(),
        clipped_low=vector(torch.int8),
        clipped_high=vector(torch.int8),
    )
    if num_rows:
        policy_rows_kernel[(num_rows,)](
            logits=logits,
            out=out,
            labels=labels,
            weight=weight,
            advantages=advantages,
            old_logprobs=old_logprobs,
            ref_logprobs=ref_logprobs,
            kl_weight=kl_weight,
            aux_weight=aux_weight,
            grad_scale=grad_scale,
            **rows._asdict(),
            num_vocab=num_vocab,
            row_stride=logits.stride(0),
            out_stride=out.stride(0),
            ignore_index=ignore_index,
            ratio_min=spec.ratio_min,
            ratio_max=spec.ratio_max,
            dual_clip=spec.dual_clip,
            delta=spec.delta,
            log_ratio_min=spec.log_ratio_min,
            log_ratio_max=spec.log_ratio_max,
            beta=spec.beta,
            label_smoothing=spec.label_smoothing or None,
            entropy_coef=spec.entropy_coef or None,
            z_loss_coef=spec.z_loss_coef or None,
            kl_clamp_in=spec.kl_clamp_in,
            kl_clamp_out=spec.kl_clamp_out,
            LOSS=spec.loss,
            KL=spec.kl,
            KL_GRAD=spec.kl_grad,
            WITH_GRAD=with_grad,
            OVERLAY=with_grad and is_overlay(logits, out),
            **transform.arguments(num_rows, num_vocab),
            FOLD=tile.fold,
            LANES=tile.lanes,
            **tile.options(),
        )
    return rows._replace(clipped_low=rows.clipped_low.view(torch.bool), clipped_high=rows.clipped_high.view(torch.bool))
