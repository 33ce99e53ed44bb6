"""Backward of the head without a logits buffer: dlogits of a vocabulary strip, straight from hidden and weight.

`head_dlogits` recomputes a tile of logits in registers, turns it into dlogits with the known lse and the given
adjoints (the formula of `dlogits.py`), and writes it once. The caller feeds each strip to the two products, so the
only buffer is [T, strip]: each strip's dW is complete, dX accumulates in strip order. Same bits every run.

A tile of tokens that have nothing to pass back (labels ignored, adjoints 0) is written as zeros without its product:
a caller that puts such tokens last pays for them in whole tiles, and needs to know their number nowhere.

Forming both products inside the kernel was not done: a token tile's dX or a vocabulary tile's dW needs all of H
beside the logits tile, so either every tile adds to a shared accumulator (atomics) or the logits are recomputed once
per block of H.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from xloss_kernels import tiles, tuned
from xloss_kernels.checks import check_labels, check_vectors
from xloss_kernels.head_forward import load_label, tile_holds_label, tile_inv_temperature, transformed_tile
from xloss_kernels.matmul import check_head, grouped, logits_tile, operand_arguments
from xloss_kernels.rows import dlogit
from xloss_kernels.transform import Transform


@triton.jit
def load_column(pointer, rows, row_mask):
    """The vector at `rows` as [BLOCK_M, 1], or None."""
    value = None
    if pointer is not None:
        value = tl.load(pointer + rows, mask=row_mask, other=0.0)[:, None]
    return value


@triton.jit
def write_tile(acc, column0, rows, row_mask, work, holds_label, inverse, out, labels, bias, lse, entropy, sum_p2, on_p,
               d_logprobs, d_entropy, d_mean, d_sum_p2, num_vocab, num_labels, first_column, ignore_index, out_stride,
               logit_scale, softcap, WIDTH: tl.constexpr, PIECES: tl.constexpr):  # fmt: skip
    """Turn raw products [BLOCK_M, WIDTH] into dlogits and store them, in PIECES steps. Row values are [BLOCK_M, 1]."""
    if PIECES > 1:
        HALF: tl.constexpr = WIDTH // 2
        left, right = tl.split(tl.permute(tl.reshape(acc, (acc.shape[0], 2, HALF)), (0, 2, 1)))
        write_tile(left, column0, rows, row_mask, work, holds_label, inverse, out, labels, bias, lse, entropy,
                   sum_p2, on_p, d_logprobs, d_entropy, d_mean, d_sum_p2, num_vocab, num_labels, first_column,
                   ignore_index, out_stride, logit_scale, softcap, HALF, PIECES // 2)  # fmt: skip
        write_tile(right, column0 + HALF, rows, row_mask, work, holds_label, inverse, out, labels, bias, lse, entropy,
                   sum_p2, on_p, d_logprobs, d_entropy, d_mean, d_sum_p2, num_vocab, num_labels, first_column,
                   ignore_index, out_stride, logit_scale, softcap, HALF, PIECES // 2)  # fmt: skip
    else:
        columns = column0 + tl.arange(0, WIDTH)
        z, slope = transformed_tile(acc, bias, columns, num_vocab, logit_scale, softcap, inverse)
        draw = dlogit(z, slope, lse, 0.0, on_p, d_entropy, entropy, d_mean, d_sum_p2, sum_p2)
        if d_logprobs is not None:
            if holds_label:
                for k in range(num_labels):
                    at = rows.to(tl.int64) * num_labels + k
                    label, here = load_label(labels + at, row_mask, first_column, column0, WIDTH, num_vocab)
                    here = here & (label + first_column != ignore_index)
                    g = tl.load(d_logprobs + at, mask=row_mask & here, other=0.0)
                    draw += tl.where(columns[None, :] == label[:, None], g[:, None], 0.0) * slope
        draw = tl.where(work, draw, 0.0)
        at = out + rows.to(tl.int64)[:, None] * out_stride + columns[None, :]
        tl.store(at, draw.to(out.dtype.element_ty), mask=row_mask[:, None] & (columns < num_vocab)[None, :])


@triton.jit
def has_work(work, adjoint, rows, row_mask):
    """`work` [BLOCK_M], or'ed with where `adjoint` (None: nowhere) is not 0. NaN counts as work."""
    if adjoint is not None:
        work = work | (tl.load(adjoint + rows, mask=row_mask, other=0.0) != 0.0)
    return work


@triton.jit
def write_zero_tile(out, column0, rows, row_mask, num_vocab, out_stride, WIDTH: tl.constexpr, PIECES: tl.constexpr):
    """PIECES x WIDTH columns of zeros from `column0` on."""
    for piece in range(PIECES):
        columns = column0 + piece * WIDTH + tl.arange(0, WIDTH)
        at = out + rows.to(tl.int64)[:, None] * out_stride + columns[None, :]
        zeros = tl.zeros((rows.shape[0], WIDTH), out.dtype.element_ty)
        tl.store(at, zeros, mask=row_mask[:, None] & (columns < num_vocab)[None, :])


@triton.jit
def head_dlogits_kernel(hidden, weight, out, labels, lse, entropy, sum_p2, d_logprobs, d_entropy, d_lse, d_mean,
                        d_sum_p2, bias, temperature, num_tokens, num_vocab, whole_vocab, num_labels, first_column,
                        ignore_index, hidden_size, hidden_stride, weight_stride, out_stride, logit_scale, softcap,
                        inv_temperature,
                        PIECES: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
                        GROUP_M: tl.constexpr, USE_TMA: tl.constexpr, EVEN_K: tl.constexpr,
                        PRECISION: tl.constexpr):  # fmt: skip
    num_m = tl.cdiv(num_tokens, BLOCK_M)
    num_n = tl.cdiv(num_vocab, BLOCK_N)
    for unit in range(tl.program_id(0), num_m * num_n, tl.num_programs(0)):
        m, n = grouped(unit, num_m, num_n, GROUP_M)
        rows = m * BLOCK_M + tl.arange(0, BLOCK_M)
        row_mask = rows < num_tokens
        live = rows < 0
        work = rows < 0
        on_p = tl.zeros((BLOCK_M,), tl.float32)
        if d_lse is not None:
            on_p += tl.load(d_lse + rows, mask=row_mask, other=0.0)
            work = on_p != 0.0
        for k in range(num_labels):
            at = rows.to(tl.int64) * num_labels + k
            counted = row_mask & (tl.load(labels + at, mask=row_mask, other=ignore_index) != ignore_index)
            live = live | counted
            if d_logprobs is not None:
                g = tl.load(d_logprobs + at, mask=counted, other=0.0)
                on_p -= g
                work = work | (g != 0.0)
        work = has_work(has_work(has_work(work, d_entropy, rows, row_mask), d_mean, rows, row_mask),
                        d_sum_p2, rows, row_mask) & live  # fmt: skip
        if tl.max(work.to(tl.int32), 0) == 0:
            write_zero_tile(out, n * BLOCK_N, rows, row_mask, num_vocab, out_stride, BLOCK_N // PIECES, PIECES)
        else:
            holds_label = tile_holds_label(
                labels, rows, row_mask, num_labels, first_column, n * BLOCK_N, BLOCK_N, num_vocab)  # fmt: skip
            acc = logits_tile(
                hidden, weight, m * BLOCK_M, n * BLOCK_N, num_tokens, num_vocab, hidden_size, hidden_stride,
                weight_stride, BLOCK_M, BLOCK_N, BLOCK_K, USE_TMA, EVEN_K, PRECISION)  # fmt: skip
            on_mean = load_column(d_mean, rows, row_mask)
            if d_mean is not None:
                on_mean = on_mean / whole_vocab
            write_tile(
                acc, n * BLOCK_N, rows, row_mask, work[:, None], holds_label,
                tile_inv_temperature(temperature, rows, row_mask, inv_temperature), out, labels, bias,
                load_column(lse, rows, row_mask), load_column(entropy, rows, row_mask),
                load_column(sum_p2, rows, row_mask), on_p[:, None], d_logprobs, load_column(d_entropy, rows, row_mask),
                on_mean, load_column(d_sum_p2, rows, row_mask), num_vocab, num_labels, first_column, ignore_index,
                out_stride, logit_scale, softcap, BLOCK_N, PIECES)  # fmt: skip


def head_dlogits(
    hidden: torch.Tensor,
    weight: torch.Tensor,
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
    ignore_index: int = -100,
    first_column: int = 0,
    whole_vocab: int | None = None,
    out: torch.Tensor | None = None,
    tile: tiles.HeadTile | None = None,
    num_programs: int | None = None,
) -> torch.Tensor:
    """dlogits [T, S] of the vocabulary strip whose head rows are `weight` [S, H], in hidden's dtype or into `out`.

    `first_column` is the strip's first vocabulary id, `whole_vocab` the divisor of mean_logit (default S), and
    `transform.bias` the strip's. Everything else as in `dlogits.dlogits`. Rows whose labels are all ignored, or whose
    adjoints are all 0, get zeros.
    """
    num_tokens, num_vocab, _ = check_head(hidden, weight)
    num_labels = check_labels(labels, num_tokens)
    assert d_entropy is None or entropy is not None, "d_entropy needs entropy"
    assert d_sum_p2 is None or sum_p2 is not None, "d_sum_p2 needs sum_p2"
    check_vectors((num_tokens,), lse=lse, entropy=entropy, sum_p2=sum_p2, d_entropy=d_entropy, d_lse=d_lse,
                  d_mean_logit=d_mean_logit, d_sum_p2=d_sum_p2)  # fmt: skip
    check_vectors(tuple(labels.shape), d_logprobs=d_logprobs)
    if out is None:
        out = torch.empty(num_tokens, num_vocab, dtype=hidden.dtype, device=hidden.device)
    assert out.shape == (num_tokens, num_vocab) and (out.stride(1) == 1 or num_vocab == 1)
    tile = tile or tuned.head("head_dlogits", hidden.device, hidden.dtype, num_vocab, hidden.shape[1])
    transform = transform or Transform()
    if num_tokens:
        units = triton.cdiv(num_tokens, tile.block_m) * triton.cdiv(num_vocab, tile.block_n)
        head_dlogits_kernel[(min(units, num_programs or tiles.num_programs(hidden.device)),)](
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
            num_tokens=num_tokens,
            num_vocab=num_vocab,
            whole_vocab=whole_vocab or num_vocab,
            num_labels=num_labels,
            first_column=first_column,
            ignore_index=ignore_index,
            out_stride=out.stride(0),
            PIECES=tile.pieces,
            **operand_arguments(hidden, weight, tile),
            **transform.arguments(num_tokens, num_vocab),
            **tile.options(),
        )
    return out
