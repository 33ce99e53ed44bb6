"""dlogits from given adjoints: one read, one write.

    dz = sum_k g_k (onehot(y_k) - p)  -  e p (log p + entropy)  +  l p  +  m / V  +  2 s p (p - sum_p2)
    dlogits = dz * dz/draw                      (back through temperature, softcap and scale, see transform.py)

with g, e, l, m, s the adjoints of logprobs, entropy, lse, mean_logit and sum_p2. A row whose labels are all ignored, or
whose adjoints are all 0, is written as zeros and not read; an ignored label of a live row contributes nothing.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from xloss_kernels import tiles, tuned
from xloss_kernels.checks import check_rows, check_vectors, is_overlay
from xloss_kernels.rows import write_dlogits, write_zeros
from xloss_kernels.transform import Transform, row_inv_temperature


@triton.jit
def load_or_none(pointer, row):
    """The value at `row`, or None for an absent vector."""
    value = None
    if pointer is not None:
        value = tl.load(pointer + row)
    return value


@triton.jit
def dlogits_kernel(logits, out, labels, lse, entropy, sum_p2, d_logprobs, d_entropy, d_lse, d_mean, d_sum_p2,
                   bias, temperature, num_vocab, num_labels, row_stride, out_stride, ignore_index,
                   logit_scale, softcap, inv_temperature,
                   OVERLAY: tl.constexpr, LABELS: tl.constexpr, BLOCK: tl.constexpr):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    start = out + row * out_stride
    k = tl.arange(0, LABELS)
    ids = tl.load(labels + row * num_labels + k, mask=k < num_labels, other=ignore_index)
    counted = ids != ignore_index
    g = tl.zeros((LABELS,), tl.float32)
    if d_logprobs is not None:
        g = tl.load(d_logprobs + row * num_labels + k, mask=counted, other=0.0)
    # one number that is 0 only when every adjoint is (NaN counts as work)
    work = tl.max((g != 0.0).to(tl.int32), 0)
    on_p = -tl.sum(g, 0)
    e = load_or_none(d_entropy, row)
    if d_entropy is not None:
        work = work | (e != 0.0).to(tl.int32)
    if d_lse is not None:
        on_lse = tl.load(d_lse + row)
        on_p += on_lse
        work = work | (on_lse != 0.0).to(tl.int32)
    m = None
    if d_mean is not None:
        m = tl.load(d_mean + row) / num_vocab
        work = work | (m != 0.0).to(tl.int32)
    s = load_or_none(d_sum_p2, row)
    if d_sum_p2 is not None:
        work = work | (s != 0.0).to(tl.int32)
    if tl.max(counted.to(tl.int32), 0) * work == 0:
        write_zeros(start, num_vocab, BLOCK)
        return

    inverse = row_inv_temperature(temperature, row, inv_temperature)
    inside = counted & (ids >= 0) & (ids < num_vocab)
    write_dlogits(
        logits + row * row_stride, start, bias, ids, inside, g, num_vocab, tl.load(lse + row), 0.0, on_p,
        e, load_or_none(entropy, row), m, s, load_or_none(sum_p2, row), logit_scale, softcap, inverse,
        False, OVERLAY, BLOCK)  # fmt: skip


def dlogits(
    logits: torch.Tensor,
    labels: torch.Tensor,
    lse: torch.Tensor,
    transform: Transform | None = None,
    *,
    entropy: torch.Tensor | None = None,
    sum_p2: torch.Tensor | None = None,
    d_logprobs: torch.Tensor | None = None,
    d_entropy: torch.Tensor | None = None,
    d_lse: torch.Tensor | None = None,
    d_mean_logit: torch.Tensor | None = None,
    d_sum_p2: torch.Tensor | None = None,
    out: torch.Tensor | None = None,
    ignore_index: int = -100,
    tile: tiles.RowTile | None = None,
) -> torch.Tensor:
    """Gradient on raw `logits` [C, V], written over them or into `out`; returns where it was written.

    `lse`, `entropy`, `sum_p2` and the adjoints are float32 [C] (`d_logprobs` has the labels' shape); an absent
    adjoint is 0. `entropy` is needed with `d_entropy`, `sum_p2` with `d_sum_p2`. `out` may have another dtype and row
    stride; it may be memory of its own, the logits, or a half-size overlay of float32 logits:

        logits.view(torch.bfloat16)[:, :V]
    """
    num_rows, num_vocab, num_labels = check_rows(logits, labels)
    out = logits if out is None else out
    assert out.shape == logits.shape and (out.stride(1) == 1 or num_vocab == 1), (
        "out must be [C, V] with unit column stride"
    )
    assert d_entropy is None or entropy is not None, "d_entropy needs entropy"
    assert d_sum_p2 is None or sum_p2 is not None, "d_sum_p2 needs sum_p2"
    check_vectors((num_rows,), lse=lse, entropy=entropy, sum_p2=sum_p2, d_entropy=d_entropy, d_lse=d_lse,
                  d_mean_logit=d_mean_logit, d_sum_p2=d_sum_p2)  # fmt: skip
    check_vectors(tuple(labels.shape), d_logprobs=d_logprobs)
    tile = tile or tuned.row("dlogits", logits.device, num_vocab, logits.dtype, out.dtype)
    transform = transform or Transform()
    if num_rows:
        dlogits_kernel[(num_rows,)](
            logits=logits,
            out=out,
            labels=labels,
            lse=lse,
            entropy=entropy if d_entropy is not None else None,
            sum_p2=sum_p2 if d_sum_p2 is not None else None,
            d_logprobs=d_logprobs,
            d_entropy=d_entropy,
            d_lse=d_lse,
            d_mean=d_mean_logit,
            d_sum_p2=d_sum_p2,
            num_vocab=num_vocab,
            num_labels=num_labels,
            row_stride=logits.stride(0),
            out_stride=out.stride(0),
            ignore_index=ignore_index,
            **transform.arguments(num_rows, num_vocab),
            OVERLAY=is_overlay(logits, out),
            LABELS=triton.next_power_of_2(num_labels),
            BLOCK=tile.block,
            **tile.options(),
        )
    return out
