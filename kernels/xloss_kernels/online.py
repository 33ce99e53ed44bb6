"""The running softmax: six accumulators that any split of a row can keep and any two splits can merge.

    peak   max z                      moment   sum (z - peak) e           plain   sum z
    total  sum e,  e = exp(z - peak)  square   sum e^2                    best    lowest column where z = peak

All float32 but `best` (int32). `peak` starts at -inf, and only differences to it are exponentiated, so rows of any
magnitude and sign are exact. An accumulator whose flag is off is passed through untouched and compiled away.
"""

import triton
import triton.language as tl

NEG_INF = tl.constexpr(float("-inf"))
LARGEST_COLUMN = tl.constexpr(2147483647)


@triton.jit
def empty(LANES: tl.constexpr):
    """State of LANES independent splits that have seen nothing."""
    zero = tl.zeros((LANES,), tl.float32)
    return zero + NEG_INF, zero, zero, zero, zero, tl.zeros((LANES,), tl.int32)


@triton.jit
def _drop(old_peak, new_peak):
    """old_peak - new_peak, and 0 for a split that has seen nothing (its sums are 0)."""
    return tl.where(old_peak == NEG_INF, 0.0, old_peak - new_peak)


@triton.jit
def update(peak, total, moment, square, plain, best, z, counted, columns, AXIS: tl.constexpr,
           ENTROPY: tl.constexpr, MEAN: tl.constexpr, SUM_P2: tl.constexpr, TOP1: tl.constexpr):  # fmt: skip
    """Fold the 2-D block `z` into the state along AXIS.

    `z` is -inf outside the vocabulary, `counted` is z with 0 there; `columns` are vocabulary ids of z's shape.
    Blocks must come in ascending column order for `best` to be the lowest.
    """
    block_peak = tl.max(z, AXIS)
    if TOP1:
        first = tl.min(tl.where(z == tl.expand_dims(block_peak, AXIS), columns, LARGEST_COLUMN), AXIS)
        best = tl.where(block_peak > peak, first, best)
    new_peak = tl.maximum(peak, block_peak)
    drop = _drop(peak, new_peak)
    keep = tl.exp(drop)
    lowered = z - tl.expand_dims(tl.where(new_peak == NEG_INF, 0.0, new_peak), AXIS)
    e = tl.exp(lowered)
    if ENTROPY:  # the floor keeps 0 * -inf out of the sum; it cannot touch a term that is not 0
        moment = (moment + drop * total) * keep + tl.sum(tl.maximum(lowered, -1e30) * e, AXIS)
    if SUM_P2:
        square = square * keep * keep + tl.sum(e * e, AXIS)
    if MEAN:
        plain = plain + tl.sum(counted, AXIS)
    total = total * keep + tl.sum(e, AXIS)
    return new_peak, total, moment, square, plain, best


@triton.jit
def merge(peak, total, moment, square, plain, best, AXIS: tl.constexpr,
          ENTROPY: tl.constexpr, MEAN: tl.constexpr, SUM_P2: tl.constexpr, TOP1: tl.constexpr):  # fmt: skip
    """Merge the splits that lie along AXIS of every accumulator into one, in a fixed order."""
    whole = tl.max(peak, AXIS)
    spread = tl.expand_dims(whole, AXIS)
    drop = _drop(peak, spread)
    keep = tl.exp(drop)
    if TOP1:
        best_of = tl.min(tl.where(peak == spread, best, LARGEST_COLUMN), AXIS)
    else:
        best_of = tl.max(best, AXIS)
    if ENTROPY:
        moment_of = tl.sum((moment + drop * total) * keep, AXIS)
    else:
        moment_of = tl.max(moment, AXIS)
    if SUM_P2:
        square_of = tl.sum(square * keep * keep, AXIS)
    else:
        square_of = tl.max(square, AXIS)
    if MEAN:
        plain_of = tl.sum(plain, AXIS)
    else:
        plain_of = tl.max(plain, AXIS)
    return whole, tl.sum(total * keep, AXIS), moment_of, square_of, plain_of, best_of


@triton.jit
def conclude(total, moment, square, plain, num_vocab):
    """Merged accumulators -> (log total, entropy, mean logit, sum p^2).  lse = peak + log total."""
    log_total = tl.log(total)
    return log_total, log_total - moment / total, plain / num_vocab, square / (total * total)
