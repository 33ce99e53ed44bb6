"""What a plan holds beside logits and gradients: scratch while chunks run, and copies once they are done.

Pure functions of sizes, for ``explain()``; the row work, the products and the hand-over of gradients keep to them.
Vectors of a number per token are not counted: some hundred bytes a token, most of them the loss's own.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from xloss.head.choice import Choice, PlanRequest

_BLOCK_BYTES = {"cpu": 4 << 20, "cuda": 256 << 20}
WIDEN_ROWS = 8192
"""Vocabulary rows of a low-precision product that are float32 at once beside its operands: 32 MiB at H = 1024."""
DIVERGENCE_SHARE = 4
"""A divergence makes several temporaries, so it runs over this part of a block."""
_DIVERGENCE_TENSORS = 7  # at most, each of that size (counted over all divergences)


def block_rows(row_bytes: int, device_type: str) -> int:
    """Rows that row work takes at once: as many as fit the cache, at least one."""
    return max(1, _BLOCK_BYTES.get(device_type, _BLOCK_BYTES["cuda"]) // max(1, row_bytes))


def scratch_bytes(r: PlanRequest, choice: Choice, rows: int, saved: int) -> int:
    """Most bytes held beside logits and gradients by chunks of ``rows`` tokens, ``saved`` of which wait for pass 2."""
    if r.kind in ("eager", "chunked-autograd"):
        return 0  # autograd's own business
    operands = (rows + min(saved * choice.rows, r.num_grad)) * r.hidden_size * r.operand_bytes
    if r.weight_cast:
        operands += r.vocab_size * r.hidden_size * r.operand_bytes
    if r.gathered:
        operands += r.num_rows * r.hidden_size * r.hidden_bytes
    if r.bias:
        operands += 3 * r.vocab_size * r.logit_bytes
    return operands + max(_row_work(r, choice, rows, saved), _products(r, choice, rows), _teacher(r, rows))


def copy_bytes(r: PlanRequest) -> int:
    """Bytes of gradients handed out in another dtype than they were summed in, or as copies; the logits are gone."""
    if r.kind not in ("one-pass", "two-pass"):
        return 0
    weight, hidden, one_pass = r.vocab_size * r.hidden_size, r.num_rows * r.hidden_size, r.kind == "one-pass"
    kept = one_pass and r.retain
    out = 0
    if r.weight_grad and not r.main_grad:
        cast = r.weight_bytes != r.logit_bytes
        out += weight * (r.weight_bytes if cast or kept else 0)
        out += weight * (r.logit_bytes if cast and kept and r.mode == "chunk" else 0)  # scaled before it is rounded
    if r.hidden_grad:
        cast = r.hidden_bytes != r.waiting_bytes
        out += hidden * (r.hidden_bytes if cast or kept else 0)
        if one_pass and r.mode == "chunk" and r.waiting_bytes == 2:  # scaled in float32, a block at a time
            out += 2 * min(hidden * 2, block_rows(r.hidden_size * 2, r.device_type) * r.hidden_size * 2)
        elif cast and kept and r.mode == "chunk":
            out += hidden * r.waiting_bytes
    return out


def adapter_bytes(r: PlanRequest) -> int:
    """Adapters' input where it is a copy, ``h2`` and ``B`` for the products beside the tensors, and their gradients.

    A dropout's output and mask are its own business.
    """
    if not r.rank or r.kind in ("eager", "chunked-autograd"):
        return 0
    picked = r.hidden_bytes * (r.num_live < r.num_rows)
    cast = r.adapter_bytes * (r.adapter_bytes != r.hidden_bytes)
    thin = (r.num_rows + r.vocab_size) * r.rank
    casts = thin * r.logit_bytes * (r.adapter_bytes != r.logit_bytes) + thin * r.operand_bytes * (
        r.operand_bytes != r.logit_bytes
    )
    grads = 0 if r.kind == "forward-only" else thin * r.logit_bytes * r.adapter_grad
    return r.num_live * r.hidden_size * (picked + cast) + r.num_rows * r.rank * r.adapter_bytes + casts + grads


def _row_work(r: PlanRequest, choice: Choice, rows: int, saved: int) -> int:
    """Blocks of the torch row work. The kernels work in registers."""
    if r.mode != "chunk":
        return 0
    row_bytes, stats = r.vocab_size * r.logit_bytes, r.stats
    block = block_rows(row_bytes, r.device_type)
    direct = not (stats.entropy or stats.sum_p2 or stats.divergence or r.softcap)  # softmax in place is all it takes
    kept = r.kind == "one-pass" or (r.kind == "two-pass" and saved * choice.rows >= r.num_grad)
    blocks = 0
    if not (direct and kept) or r.num_live > r.num_grad:
        blocks = 1 + stats.entropy
    if r.kind != "forward-only" and not (direct and kept):
        blocks = max(blocks, 1 + r.softcap)
    if r.kind == "two-pass" and r.device_type == "cpu":
        blocks = max(blocks, 1)  # clipped rows are moved out a block at a time
    found = blocks * min(block, rows) * row_bytes
    if stats.divergence:
        found = max(found, _DIVERGENCE_TENSORS * min(max(1, block // DIVERGENCE_SHARE), rows) * row_bytes)
    return found


def _products(r: PlanRequest, choice: Choice, rows: int) -> int:
    """What the three products hold beside operands and results."""
    low, cuda, acc = r.operand_bytes < r.logit_bytes, r.device_type == "cuda", r.logit_bytes
    chunk, columns = rows * r.hidden_size, choice.columns or r.vocab_size
    widened = min(columns, WIDEN_ROWS) * r.hidden_size * acc if low and not cuda else 0
    forward = chunk * acc + widened if low and not cuda else 0
    if r.kind == "forward-only":
        return forward
    hidden = weight = 0
    if r.hidden_grad:
        own = 0 if choice.columns else chunk * acc  # strips add to a sum that counts as a gradient
        hidden = own + widened + (chunk * r.waiting_bytes if r.waiting_bytes != acc else 0)
    if r.weight_grad and low and not cuda:
        weight = chunk * acc
    if r.scales_dlogits:  # products are brought back to scale a block at a time, before they are added
        hidden += min(rows, WIDEN_ROWS) * r.hidden_size * acc if r.hidden_grad else 0
        weight += min(columns, WIDEN_ROWS) * r.hidden_size * acc if r.weight_grad else 0
    # ranks that share the vocabulary add up the hidden gradient while the other product runs
    both = hidden + weight if r.num_parts > 1 else max(hidden, weight)
    return max(forward, rows * columns * r.narrow_bytes + both)


def _teacher(r: PlanRequest, rows: int) -> int:
    """Operands of the teacher's product, or the block in which given logits are picked."""
    if r.teacher_size is None:
        return 0
    if not r.teacher_size:
        return min(block_rows(r.vocab_size * r.logit_bytes, r.device_type), rows) * r.vocab_size * r.logit_bytes
    wide = 2 * rows * r.teacher_size * r.logit_bytes
    return wide + min(r.vocab_size, WIDEN_ROWS) * r.teacher_size * r.logit_bytes
