"""The floor: the bare matrix products of a step, over xloss's chunks, into buffers allocated beforehand. No loss."""

from __future__ import annotations

import torch
from torch import Tensor

from benchmarks.cases import Batch, Case
from benchmarks.providers.base import Prepared, Provider, Result
from benchmarks.providers.xloss_plans import planned


def prepare(case: Case, batch: Batch) -> Prepared:
    """One product per chunk forward-only, else three. Operands of the backward are real softmax gradients: on a GPU the
    speed of a product depends on its data."""
    plan = planned(case, batch)
    spans = plan.chunks(0, case.shape.num_tokens)
    hidden, weight = batch.hidden, batch.weight
    rows = max(stop - start for start, stop in spans)
    logits = hidden.new_empty(rows, weight.shape[0])
    forward_only = case.loss.forward_only
    dlogits = None if forward_only else _softmax_gradient(batch, rows)
    d_hidden = torch.empty_like(hidden)
    # several chunks add up in float32; a single one is written in the operands' dtype, which is the cheaper
    fp32 = hidden.is_cuda and hidden.dtype != torch.float32 and len(spans) > 1
    d_weight = torch.empty_like(weight, dtype=torch.float32 if fp32 else None)

    def run() -> Result:
        for start, stop in spans:
            part, size = hidden[start:stop], stop - start
            torch.mm(part, weight.t(), out=logits[:size])
            if dlogits is None:
                continue
            torch.mm(dlogits[:size], weight, out=d_hidden[start:stop])
            if not case.frozen_head:
                _add_product(d_weight, dlogits[:size].t(), part, first=start == 0, fp32=fp32)
        return Result()

    kind = "one product" if forward_only else "three products"
    return Prepared(run, f"{kind} a chunk, {len(spans)} of up to {rows} tokens", rows)


def _add_product(out: Tensor, a: Tensor, b: Tensor, *, first: bool, fp32: bool) -> None:
    if fp32:
        if first:
            torch.mm(a, b, out_dtype=torch.float32, out=out)
        else:
            torch.addmm(out, a, b, out_dtype=torch.float32, out=out)
    elif first:
        torch.mm(a, b, out=out)
    else:
        out.addmm_(a, b)


def _softmax_gradient(batch: Batch, rows: int) -> Tensor:
    """``(p - onehot) / T`` of the first ``rows`` tokens, in the operands' dtype, made a block at a time."""
    out = batch.hidden.new_empty(rows, batch.weight.shape[0])
    step = 256
    for start in range(0, rows, step):
        part = out[start : start + step]
        z = (batch.hidden[start : start + part.shape[0]] @ batch.weight.t()).float().softmax(1)
        z.scatter_add_(
            1, batch.tokens.labels[start : start + part.shape[0]].clamp(min=0).unsqueeze(1), -torch.ones_like(z[:, :1])
        )
        part.copy_(z.div_(batch.hidden.shape[0]))
    return out


GEMM = Provider("bare GEMMs", prepare)
