"""Two optimizer steps' losses and gradients under one layout, brought back to the shape that one process has."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor

from xloss import LossInfo, finalize_metrics
from xloss.cli.verify.cases import LossCase
from xloss.cli.verify.problem import GlobalBatch, weights_move
from xloss.distributed import Order, sp_gather, sp_split

STEPS = 2  # the second one shows weights, shards or gradients that are left over from the first
Cut = tuple[tuple[int, ...], ...]
"""The micro-batches of one process, each some sequences of the global batch."""


def full_gradients(module: nn.Module) -> dict[str, Tensor | None]:
    """Gradients by the names that the parameters have in the bare model, shards joined.

    0 where nothing reached a parameter, ``None`` where it wants no gradient and has none.
    """
    found: dict[str, Tensor | None] = {}
    for name, parameter in module.named_parameters():
        grad = parameter.grad
        if grad is None and parameter.requires_grad:
            grad = torch.zeros_like(parameter)
        if isinstance(grad, DTensor):
            grad = grad.full_tensor()
        found[name.removeprefix("module.")] = None if grad is None else grad.detach().clone()
    return found


@dataclass
class Setup:
    """A model as a layout wraps it, and this rank's part of the batch.

    Args:
        module: called as ``module(ids, loss_ctx)``, unless ``call`` is given.
        cut: this rank's micro-batches.
        packed: whether they are packed, or padded rows.
        options: replaced in the loss's config.
        sp_mesh: ranks that hold parts of each sequence, in ``sp_order``.
        before: called with ``(i, n)`` before micro-batch ``i`` of ``n``: where an engine is told when to reduce.
        data_mesh: ranks that hold distinct tokens; ``None``: all.
        gradients: how to read them.
        call: what to call in the place of ``module``.
    """

    module: nn.Module
    cut: Cut
    packed: bool = True
    options: dict[str, Any] = field(default_factory=dict)
    before: Callable[[int, int], None] = lambda i, n: None
    sp_mesh: DeviceMesh | None = None
    sp_order: Order = "contiguous"
    data_mesh: DeviceMesh | None = None
    gradients: Callable[[nn.Module], dict[str, Tensor | None]] = full_gradients
    call: Callable[[Tensor, Any], tuple[Tensor, LossInfo]] | None = None


@dataclass
class Outcome:
    """What one optimizer step came to, over all ranks. ``scale``: the sum of the absolute losses of its tokens."""

    loss: float
    scale: float
    grads: dict[str, Tensor | None]
    logprobs: Tensor
    metrics: dict[str, float]


def take_steps(setup: Setup, case: LossCase, batch: GlobalBatch) -> list[Outcome]:
    """``STEPS`` optimizer steps from the setup's weights, without an optimizer: they are scaled down in between."""
    outcomes = []
    first = [parameter.detach().clone() for parameter in setup.module.parameters()]
    for _ in range(STEPS):
        setup.module.zero_grad(set_to_none=True)
        outcomes.append(_step(setup, case, batch))
        weights_move(setup.module)
    with torch.no_grad():
        for parameter, value in zip(setup.module.parameters(), first, strict=True):
            parameter.copy_(value)
    return outcomes


def _step(setup: Setup, case: LossCase, batch: GlobalBatch) -> Outcome:
    parameter = next(setup.module.parameters())
    device, dtype = parameter.device, parameter.dtype
    config = case.configured(**setup.options)
    items = [case.build_item(batch, sequences, setup.packed, device, dtype) for sequences in setup.cut]
    ids = [batch.laid_out(batch.ids, sequences, setup.packed, 0).to(device) for sequences in setup.cut]
    shapes = [each.shape for each in ids]
    if setup.sp_mesh is not None:
        items = [item.sp_split(setup.sp_mesh, order=setup.sp_order) for item in items]
        ids = [sp_split(each, setup.sp_mesh, 0, order=setup.sp_order) for each in ids]
    bounds = [batch.cu_seq_lens(sequences) for sequences in setup.cut] if setup.packed else None
    context = config.loss_ctx_cls
    ranks = {"sp_mesh": setup.sp_mesh, "data_mesh": setup.data_mesh}
    ranks = {n: m for n, m in ranks.items() if m is not None}
    built = context.build_batches_loss_kwargs(items, config, cu_seq_lens_list=bounds, **ranks)
    total, scale = torch.zeros((), dtype=torch.float64), torch.zeros((), dtype=torch.float64)
    seen = torch.zeros(2, len(batch.ids), dtype=torch.float64)  # log-probs, and how many ranks saw the token
    metrics = []
    for i, loss_kwargs in enumerate(built):
        setup.before(i, len(built))
        loss, info = (setup.call or setup.module)(ids[i], context(config, loss_kwargs))
        loss.backward()
        total += loss.detach().double().cpu()
        scale += (loss if info.token_loss is None else info.token_loss).detach().abs().sum().double().cpu()
        metrics.append(info.metrics)
        logprobs = _whole_logprobs(setup, info, shapes[i])
        batch.taken_back(logprobs, setup.cut[i], setup.packed, seen[0])
        batch.taken_back(torch.ones(shapes[i]), setup.cut[i], setup.packed, seen[1])
    numbers = _over_ranks(torch.cat([torch.stack([total, scale]), seen.flatten()]), device)
    size = dist.get_world_size() if dist.is_initialized() else 1
    seen = numbers[2:].view(2, -1)
    return Outcome(
        loss=float(numbers[0]) / size,  # weights hold the number of ranks, for engines that average
        scale=float(numbers[1]) / size,
        grads={name: None if g is None else g.cpu() for name, g in setup.gradients(setup.module).items()},
        logprobs=seen[0] / seen[1],  # NaN where no rank saw the token, which no comparison passes
        metrics={name: float(value) for name, value in finalize_metrics(metrics, setup.data_mesh).items()},
    )


def _whole_logprobs(setup: Setup, info: LossInfo, shape: torch.Size) -> Tensor:
    """Log-probs of a micro-batch in the shape of its ids, of K labels their sum."""
    if info.logprobs is None:
        return torch.zeros(shape)
    found = info.logprobs.detach()
    found = found.sum(-1) if found.ndim > len(shape) else found
    if setup.sp_mesh is not None:
        found = sp_gather(found, setup.sp_mesh, order=setup.sp_order, length=shape[-1])
    return found.cpu()


def _over_ranks(numbers: Tensor, device: torch.device) -> Tensor:
    if dist.is_initialized():
        numbers = numbers.to(device)
        dist.all_reduce(numbers)
    return numbers.cpu()
