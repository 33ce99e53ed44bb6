"""One row of logits: its softmax in one read, and its dlogits in one more.

Loops run unmasked over whole blocks, then once masked over the tail: a mask whose bound is not a multiple of the
vector width would turn every 16-byte load of the row into scalar loads.
"""

import triton
import triton.language as tl

from xloss_kernels import online
from xloss_kernels.transform import effective


@triton.jit
def load_effective(row, bias, columns, num_vocab, logit_scale, softcap, inv_temperature,
                   MASKED: tl.constexpr, EVICT: tl.constexpr):  # fmt: skip
    """Effective logits and slopes of `columns`; outside the vocabulary z is whatever, the caller masks it."""
    offset = None
    if MASKED:
        inside = columns < num_vocab
        raw = tl.load(row + columns, mask=inside, other=0.0, eviction_policy=EVICT).to(tl.float32)
        if bias is not None:
            offset = tl.load(bias + columns, mask=inside, other=0.0).to(tl.float32)
    else:
        raw = tl.load(row + columns, eviction_policy=EVICT).to(tl.float32)
        if bias is not None:
            offset = tl.load(bias + columns).to(tl.float32)
    return effective(raw, offset, logit_scale, softcap, inv_temperature)


@triton.jit
def label_logits(row, bias, labels, live, logit_scale, softcap, inv_temperature):
    """Effective logits and slopes at `labels` [K] where `live`; -inf elsewhere."""
    raw = tl.load(row + labels, mask=live, other=0.0).to(tl.float32)
    offset = None
    if bias is not None:
        offset = tl.load(bias + labels, mask=live, other=0.0).to(tl.float32)
    z, slope = effective(raw, offset, logit_scale, softcap, inv_temperature)
    return tl.where(live, z, online.NEG_INF), slope


@triton.jit
def row_softmax(row, bias, num_vocab, logit_scale, softcap, inv_temperature,
                ENTROPY: tl.constexpr, MEAN: tl.constexpr, SUM_P2: tl.constexpr, TOP1: tl.constexpr,
                EVICT: tl.constexpr, FOLD: tl.constexpr, LANES: tl.constexpr):  # fmt: skip
    """One read of a row -> scalars (peak, log total, entropy, mean logit, sum p^2, top1).  lse = peak + log total."""
    BLOCK: tl.constexpr = FOLD * LANES
    whole = num_vocab // BLOCK * BLOCK
    step = tl.arange(0, BLOCK)
    peak, total, moment, square, plain, best = online.empty(LANES)
    for start in range(0, whole, BLOCK):
        columns = start + step
        z, _ = load_effective(row, bias, columns, num_vocab, logit_scale, softcap, inv_temperature, False, EVICT)
        z = tl.reshape(z, (FOLD, LANES))
        peak, total, moment, square, plain, best = online.update(
            peak, total, moment, square, plain, best, z, z, tl.reshape(columns, (FOLD, LANES)), 0,
            ENTROPY, MEAN, SUM_P2, TOP1)  # fmt: skip
    for start in range(whole, num_vocab, BLOCK):
        columns = start + step
        z, _ = load_effective(row, bias, columns, num_vocab, logit_scale, softcap, inv_temperature, True, EVICT)
        counted = tl.where(columns < num_vocab, z, 0.0)
        z = tl.where(columns < num_vocab, z, online.NEG_INF)  # after the softcap, which would lift -inf to -c
        peak, total, moment, square, plain, best = online.update(
            peak, total, moment, square, plain, best, tl.reshape(z, (FOLD, LANES)), tl.reshape(counted, (FOLD, LANES)),
            tl.reshape(columns, (FOLD, LANES)), 0, ENTROPY, MEAN, SUM_P2, TOP1)  # fmt: skip
    peak, total, moment, square, plain, best = online.merge(
        peak, total, moment, square, plain, best, 0, ENTROPY, MEAN, SUM_P2, TOP1)  # fmt: skip
    log_total, entropy, mean_logit, sum_p2 = online.conclude(total, moment, square, plain, num_vocab)
    return peak, log_total, entropy, mean_logit, sum_p2, best


@triton.jit
def dlogit(z, slope, peak, log_total, on_p, d_entropy, entropy, d_mean, d_sum_p2, sum_p2):
    """Gradient on a raw logit that is no label; a label adds its own adjoint times `slope`.

        dz = p (on_p - d_entropy (log p + entropy) + 2 d_sum_p2 (p - sum_p2)) + d_mean        on_p = d_lse - sum of g

    `d_entropy`, `d_mean` (already over V) and `d_sum_p2` may be None.
    """
    logp = (z - peak) - log_total
    p = tl.exp(logp)
    weight = on_p
    if d_entropy is not None:
        weight = weight - d_entropy * (tl.maximum(logp, -1e30) + entropy)
    if d_sum_p2 is not None:
        weight = weight + 2.0 * d_sum_p2 * (p - sum_p2)
    dz = p * weight
    if d_mean is not None:
        dz = dz + d_mean
    return dz * slope


@triton.jit
def write_zeros(out, num_vocab, BLOCK: tl.constexpr):
    """A row of zeros."""
    step = tl.arange(0, BLOCK)
    zero = tl.zeros((BLOCK,), out.dtype.element_ty)
    whole = num_vocab // BLOCK * BLOCK
    for start in range(0, whole, BLOCK):
        tl.store(out + start + step, zero)
    for start in range(whole, num_vocab, BLOCK):
        tl.store(out + start + step, zero, mask=start + step < num_vocab)


@triton.jit
def _write_block(start, row, out, bias, num_vocab, peak, log_total, on_p, d_entropy, entropy, d_mean, d_sum_p2, sum_p2,
                 logit_scale, softcap, inv_temperature, MASKED: tl.constexpr, OVERLAY: tl.constexpr,
                 BLOCK: tl.constexpr):  # fmt: skip
    columns = start + tl.arange(0, BLOCK)
    z, slope = load_effective(
        row, bias, columns, num_vocab, logit_scale, softcap, inv_temperature, MASKED, "evict_first")  # fmt: skip
    draw = dlogit(z, slope, peak, log_total, on_p, d_entropy, entropy, d_mean, d_sum_p2, sum_p2)
    if OVERLAY:
        tl.debug_barrier()
    if MASKED:
        tl.store(out + columns, draw.to(out.dtype.element_ty), mask=columns < num_vocab)
    else:
        tl.store(out + columns, draw.to(out.dtype.element_ty))


@triton.jit
def write_dlogits(row, out, bias, labels, live, d_labels, num_vocab, peak, log_total, on_p, d_entropy, entropy, d_mean,
                  d_sum_p2, sum_p2, logit_scale, softcap, inv_temperature,
                  DESCENDING: tl.constexpr, OVERLAY: tl.constexpr, BLOCK: tl.constexpr):  # fmt: skip
    """Write one row of dlogits; `labels`, `live`, `d_labels` are [K], `d_labels` 0 where not live.

    The label columns are worked out first, in float32, and written last, behind a barrier: the loop needs no compare,
    and K labels cost no more than one. A label given twice gets the sum of its adjoints from both places.

    OVERLAY: `out` has half the item size and starts at the row's own first byte. Column j of out lies on column j/2 of
    the row, so ascending blocks only overwrite columns read in this step or before, and the barrier between load and
    store finishes those reads. DESCENDING starts at the end of the row, which the pass before has left in L2.
    """
    z, slope = label_logits(row, bias, labels, live, logit_scale, softcap, inv_temperature)
    same = (labels[:, None] == labels[None, :]) & live[:, None] & live[None, :]
    on_label = tl.sum(tl.where(same, d_labels[None, :], 0.0), 1)
    at_label = dlogit(z, slope, peak, log_total, on_p, d_entropy, entropy, d_mean, d_sum_p2, sum_p2) + on_label * slope
    tl.debug_barrier()  # in place, no thread may store before every thread holds the label logits

    whole = num_vocab // BLOCK * BLOCK
    if not DESCENDING:
        for start in range(0, whole, BLOCK):
            _write_block(start, row, out, bias, num_vocab, peak, log_total, on_p, d_entropy, entropy, d_mean, d_sum_p2,
                         sum_p2, logit_scale, softcap, inv_temperature, False, OVERLAY, BLOCK)  # fmt: skip
    for start in range(whole, num_vocab, BLOCK):
        _write_block(start, row, out, bias, num_vocab, peak, log_total, on_p, d_entropy, entropy, d_mean, d_sum_p2,
                     sum_p2, logit_scale, softcap, inv_temperature, True, OVERLAY, BLOCK)  # fmt: skip
    if DESCENDING:
        for done in range(0, whole, BLOCK):
            _write_block(whole - BLOCK - done, row, out, bias, num_vocab, peak, log_total, on_p, d_entropy, entropy,
                         d_mean, d_sum_p2, sum_p2, logit_scale, softcap, inv_temperature, False, OVERLAY,
                         BLOCK)  # fmt: skip
    tl.debug_barrier()
    tl.store(out + labels, at_label.to(out.dtype.element_ty), mask=live)
