"""The step of `tests.property.world`, dealt to ranks: data x sequence parallel, replicated or not, any micro-batches.

A rank runs its part of every micro-batch it holds; `merged` puts what the ranks saw together as one process sees it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh

from tests.property.world import LENGTHS, WORLD, Case
from xloss import finalize_metrics
from xloss.distributed import sp_split
from xloss.distributed.sequence import Order

Batches = tuple[tuple[int, ...], ...]


@dataclass(frozen=True)
class Cut:
    """Micro-batches of each data-parallel rank, as numbers of sequences, and how sequences are split."""

    batches: tuple[Batches, ...]
    packed: bool = True
    order: Order = "contiguous"
    parts: bool = False  # items are made of this rank's parts, and say so


def run_rank(
    case: Case, cut: Cut, dp_rank: int, sp_mesh: DeviceMesh | None, data_mesh: Any = None, **run: Any
) -> dict[str, Any]:
    """One rank's loss, gradients (per micro-batch for those of tokens) and reduced metrics."""
    cfg = case.make(**run)
    live, batches = WORLD.live_hidden(cfg), cut.batches[dp_rank]
    items, args, leaves, token_leaves = [], [], {}, []
    head = {n: x.clone().requires_grad_() for n, x in WORLD.head.items()}
    leaves |= head
    others = {f"{kind}_head_{n}": x for n, x in WORLD.other_head.items() for kind in ("ref", "teacher")}

    def own(x: Tensor, pad: float) -> Tensor:
        return x if sp_mesh is None else sp_split(x, sp_mesh, pad, 1, cut.order)

    for batch in batches:
        item = WORLD.item(case, batch, cut.packed, torch.float64, None, live)
        if sp_mesh is not None:
            length = item.shifted_labels.shape[1]
            if cut.parts:
                for name, (value, mark) in item.per_token().items():
                    setattr(item, name, sp_split(value, sp_mesh, mark.pad, item.token_axis, cut.order))
                item.sp_parts(sp_mesh, cut.order, length)
            else:
                item.sp_split(sp_mesh, cut.order)
        items.append(item)
        inputs = {
            name: own(WORLD.lay_out(name, batch, cut.packed, torch.float64, None, mask), 0.0).requires_grad_()
            for name, mask in (("hidden", live), ("values", WORLD.live))
            if name == "hidden" or name in case.forward
        }
        token_leaves.append(inputs)
        more = {n: others[n] for n in case.forward if n in others} | {n: inputs[n] for n in inputs if n != "hidden"}
        args.append(([inputs["hidden"], *head.values()], more))
    bounds = [torch.tensor([0, *(LENGTHS[i] for i in b)]).cumsum(0) for b in batches] if cut.packed else None
    ctx_cls = cfg.loss_ctx_cls
    built = ctx_cls.build_batches_loss_kwargs(items, cfg, bounds, sp_mesh, data_mesh)
    losses, metrics = [torch.zeros((), dtype=torch.float64)], []
    for kwargs, (positional, keywords), batch in zip(built, args, batches, strict=True):
        loss, info = ctx_cls(cfg, kwargs).forward(*positional, **keywords)
        if loss.ndim:  # log-probs, not a loss
            upstream = WORLD.lay_out("upstream", batch, cut.packed, loss.dtype, None, WORLD.live).nan_to_num(0.0)
            loss = (loss * own(upstream, 0.0)).sum()
        losses.append(loss)
        metrics.append(info.metrics)
    total = torch.stack(losses).sum()
    flat = [*leaves.values(), *(x for inputs in token_leaves for x in inputs.values())]
    grads = [torch.zeros_like(x) for x in flat]
    if total.requires_grad:
        grads = list(torch.autograd.grad(1.7 * total, flat, allow_unused=True, materialize_grads=True))
    found = iter(grads)
    return {
        "loss": total.detach(),
        **{name: next(found) for name in leaves},
        "tokens": [{name: next(found) for name in inputs} for inputs in token_leaves],
        "metrics": {n: float(x) for n, x in finalize_metrics(metrics, data_mesh).items()},
    }


def joined(parts: Sequence[Tensor], length: int, order: Order) -> Tensor:
    """Gradients of the parts ``[B, S, ..]`` as of the whole; those of padding are 0."""
    if len(parts) == 1:
        return parts[0]
    if order == "head_tail":  # a rank holds a piece from the front and one from the back
        front, back = zip(*(part.tensor_split(2, 1) for part in parts), strict=True)
        parts = [*front, *reversed(back)]
    whole = torch.cat(list(parts), 1)
    assert not bool(whole[:, length:].any())
    return whole[:, :length]


def merged(seen: Sequence[Sequence[dict[str, Any]]], cut: Cut) -> dict[str, Any]:
    """What the ranks ``[dp][sp]`` saw, gradients and losses added, tokens in the order of the world."""
    every = [s for row in seen for s in row]
    out: dict[str, Any] = {"loss": torch.stack([s["loss"] for s in every]).sum()}
    out |= {name: torch.stack([s[name] for s in every]).sum(0) for name in ("weight", "bias")}
    for row, batches in zip(seen, cut.batches, strict=True):
        for number, batch in enumerate(batches):
            rows = WORLD.rows(batch)
            length = sum(map(len, rows)) if cut.packed else max(map(len, rows), default=0)
            for name in row[0]["tokens"][number]:
                whole = joined([s["tokens"][number][name] for s in row], length, cut.order)
                into = out.setdefault(name, torch.zeros(sum(LENGTHS), *whole.shape[2:], dtype=torch.float64))
                at = 0
                for i, places in enumerate(rows):
                    into[places] = whole[0, at : at + len(places)] if cut.packed else whole[i, : len(places)]
                    at += len(places)
    out["metrics"] = [s["metrics"] for s in every]
    return out
