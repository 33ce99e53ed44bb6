"""Token statistics straight from hidden states and the head, without writing a logit.

A persistent grid walks (token tile, vocabulary split) units. A unit computes its logits tile by tile in registers,
folds them into a running softmax per token, and writes one partial. `finalize.py` merges the partials in a fixed
order. No atomics, and tiles depend on dtype and architecture alone: a token's result does not depend on the tokens
around it.

Layout of the partials (those of several parts of a vocabulary are concatenated along axis 0):

    partials      float32 [num_splits, 6, T], one row each of
                  max z | sum e | sum (z - max) e | sum e^2 | sum z | lowest argmax id,  e = exp(z - max);
                  rows whose statistic was not asked for are not written
    label_logits  float32 [T] or [T, K]: effective logit of each label, -inf where the label is not in this shard
                  (parts merge by maximum)
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from xloss_kernels import online, tiles, tuned
from xloss_kernels.checks import check_labels
from xloss_kernels.matmul import check_head, grouped, logits_tile, operand_arguments
from xloss_kernels.transform import Transform, effective

NUM_PARTIALS = 6


@triton.jit
def transformed_tile(acc, bias, columns, num_vocab, logit_scale, softcap, inverse):
    """Raw tile -> effective tile and slopes. `inverse` is a scalar or [BLOCK_M, 1]."""
    offset = None
    if bias is not None:
        offset = tl.load(bias + columns, mask=columns < num_vocab, other=0.0).to(tl.float32)[None, :]
    return effective(acc, offset, logit_scale, softcap, inverse)


@triton.jit
def tile_inv_temperature(temperature, rows, row_mask, inv_temperature):
    """1 / temperature as [BLOCK_M, 1], or the scalar."""
    if temperature is not None:
        inv_temperature = (1.0 / tl.load(temperature + rows, mask=row_mask, other=1.0))[:, None]
    return inv_temperature


@triton.jit
def load_label(at, row_mask, first_column, column0, width, num_vocab):
    """Labels as columns of this shard, and whether each lies among the `width` columns from `column0`."""
    label = tl.load(at, mask=row_mask, other=-1) - first_column
    return label, (label >= column0) & (label < column0 + width) & (label < num_vocab)


@triton.jit
def tile_holds_label(labels, rows, row_mask, num_labels, first_column, column0, width, num_vocab):
    """Whether any label of these rows lies in the tile; for one label a row, most tiles hold none."""
    found = 0
    for k in range(num_labels):
        at = labels + rows.to(tl.int64) * num_labels + k
        _, here = load_label(at, row_mask, first_column, column0, width, num_vocab)
        found = tl.maximum(found, tl.max((row_mask & here).to(tl.int32), 0))
    return found > 0


@triton.jit
def fold_tile(peak, total, moment, square, plain, best, acc, column0, rows, row_mask, holds_label, inverse, labels,
              label_logits, bias, num_vocab, num_labels, first_column, logit_scale, softcap, ENTROPY: tl.constexpr,
              MEAN: tl.constexpr, SUM_P2: tl.constexpr, TOP1: tl.constexpr, WIDTH: tl.constexpr,
              PIECES: tl.constexpr):  # fmt: skip
    """Fold raw products [BLOCK_M, WIDTH] into the state, PIECES steps a tile: each adds only its own registers."""
    if PIECES > 1:
        HALF: tl.constexpr = WIDTH // 2
        left, right = tl.split(tl.permute(tl.reshape(acc, (acc.shape[0], 2, HALF)), (0, 2, 1)))
        peak, total, moment, square, plain, best = fold_tile(
            peak, total, moment, square, plain, best, left, column0, rows, row_mask, holds_label, inverse, labels,
            label_logits, bias, num_vocab, num_labels, first_column, logit_scale, softcap, ENTROPY, MEAN, SUM_P2, TOP1,
            HALF, PIECES // 2)  # fmt: skip
        peak, total, moment, square, plain, best = fold_tile(
            peak, total, moment, square, plain, best, right, column0 + HALF, rows, row_mask, holds_label, inverse,
            labels, label_logits, bias, num_vocab, num_labels, first_column, logit_scale, softcap, ENTROPY, MEAN,
            SUM_P2, TOP1, HALF, PIECES // 2)  # fmt: skip
    else:
        columns = column0 + tl.arange(0, WIDTH)
        z, _ = transformed_tile(acc, bias, columns, num_vocab, logit_scale, softcap, inverse)
        if holds_label:
            for k in range(num_labels):
                at = rows.to(tl.int64) * num_labels + k
                label, here = load_label(labels + at, row_mask, first_column, column0, WIDTH, num_vocab)
                z_label = tl.sum(tl.where(columns[None, :] == label[:, None], z, 0.0), 1)
                tl.store(label_logits + at, z_label, mask=row_mask & here)
        inside = (columns < num_vocab)[None, :]
        counted = z
        if MEAN:
            counted = tl.where(inside, z, 0.0)
        z = tl.where(inside, z, online.NEG_INF)  # after the softcap, which would lift -inf to -c
        peak, total, moment, square, plain, best = online.update(
            peak, total, moment, square, plain, best, z, counted, (first_column + columns)[None, :], 1,
            ENTROPY, MEAN, SUM_P2, TOP1)  # fmt: skip
    return peak, total, moment, square, plain, best


@triton.jit
def head_forward_kernel(hidden, weight, labels, bias, temperature, partials, label_logits,
                        num_tokens, num_vocab, num_labels, first_column, hidden_size, hidden_stride, weight_stride,
                        logit_scale, softcap, inv_temperature,
                        ENTROPY: tl.constexpr, MEAN: tl.constexpr, SUM_P2: tl.constexpr, TOP1: tl.constexpr,
                        TILES: tl.constexpr, PIECES: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
                        BLOCK_K: tl.constexpr, GROUP_M: tl.constexpr, USE_TMA: tl.constexpr, EVEN_K: tl.constexpr,
                        PRECISION: tl.constexpr):  # fmt: skip
    num_m = tl.cdiv(num_tokens, BLOCK_M)
    num_n = tl.cdiv(num_vocab, BLOCK_N)
    num_splits = tl.cdiv(num_n, TILES)
    for unit in range(tl.program_id(0), num_m * num_splits, tl.num_programs(0)):
        m, split = grouped(unit, num_m, num_splits, GROUP_M)
        rows = m * BLOCK_M + tl.arange(0, BLOCK_M)
        row_mask = rows < num_tokens
        inverse = tile_inv_temperature(temperature, rows, row_mask, inv_temperature)
        peak, total, moment, square, plain, best = online.empty(BLOCK_M)
        for n in range(split * TILES, tl.minimum(split * TILES + TILES, num_n)):
            holds_label = tile_holds_label(
                labels, rows, row_mask, num_labels, first_column, n * BLOCK_N, BLOCK_N, num_vocab)  # fmt: skip
            acc = logits_tile(
                hidden, weight, m * BLOCK_M, n * BLOCK_N, num_tokens, num_vocab, hidden_size, hidden_stride,
                weight_stride, BLOCK_M, BLOCK_N, BLOCK_K, USE_TMA, EVEN_K, PRECISION)  # fmt: skip
            peak, total, moment, square, plain, best = fold_tile(
                peak, total, moment, square, plain, best, acc, n * BLOCK_N, rows, row_mask, holds_label, inverse,
                labels, label_logits, bias, num_vocab, num_labels, first_column, logit_scale, softcap,
                ENTROPY, MEAN, SUM_P2, TOP1, BLOCK_N, PIECES)  # fmt: skip
        at = partials + split.to(tl.int64) * 6 * num_tokens + rows
        tl.store(at, peak, mask=row_mask)
        tl.store(at + num_tokens, total, mask=row_mask)
        if ENTROPY:
            tl.store(at + 2 * num_tokens, moment, mask=row_mask)
        if SUM_P2:
            tl.store(at + 3 * num_tokens, square, mask=row_mask)
        if MEAN:
            tl.store(at + 4 * num_tokens, plain, mask=row_mask)
        if TOP1:
            tl.store(at + 5 * num_tokens, best.to(tl.float32), mask=row_mask)


def head_forward(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    labels: torch.Tensor,
    transform: Transform | None = None,
    *,
    entropy: bool = False,
    mean_logit: bool = False,
    sum_p2: bool = False,
    top1: bool = False,
    first_column: int = 0,
    tile: tiles.HeadTile | None = None,
    num_programs: int | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """(partials, label_logits) of hidden [T, H] x weight [V, H] at labels int64 [T] or [T, K]; see the module's header.

    float32 operands are multiplied in full float32. `first_column` is the id of weight's first row (a vocabulary
    shard). Labels outside the shard, ignored ones among them, get -inf. A few labels per token cost little: each is
    compared only with tiles that hold a label.
    """
    num_tokens, num_vocab, _ = check_head(hidden, weight)
    num_labels = check_labels(labels, num_tokens)
    tile = tile or tuned.head("head_forward", hidden.device, hidden.dtype, num_vocab, hidden.shape[1])
    transform = transform or Transform()
    num_splits = triton.cdiv(num_vocab, tile.split)
    device = hidden.device
    partials = torch.empty(num_splits, NUM_PARTIALS, num_tokens, dtype=torch.float32, device=device)
    label_logits = torch.full(labels.shape, float("-inf"), dtype=torch.float32, device=device)
    if num_tokens:
        units = triton.cdiv(num_tokens, tile.block_m) * num_splits
        head_forward_kernel[(min(units, num_programs or tiles.num_programs(device)),)](
            labels=labels,
            partials=partials,
            label_logits=label_logits,
            num_tokens=num_tokens,
            num_vocab=num_vocab,
            num_labels=num_labels,
            first_column=first_column,
            ENTROPY=entropy,
            MEAN=mean_logit,
            SUM_P2=sum_p2,
            TOP1=top1,
            TILES=tile.tiles_per_split,
            PIECES=tile.pieces,
            **operand_arguments(hidden, weight, tile),
            **transform.arguments(num_tokens, num_vocab),
            **tile.options(),
        )
    return partials, label_logits
