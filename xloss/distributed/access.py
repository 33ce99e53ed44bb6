"""The weight and bias of an lm_head, whole and with a gradient that arrives, wherever a framework keeps them."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import NamedTuple

import torch
from torch import Tensor, nn

from xloss.distributed.peft_layers import active_adapters, chosen_module, is_wrapped
from xloss.distributed.routes import INSIDE, fsdp_groups, gather, in_backward, is_dtensor, is_fsdp2, is_fsdp_shard
from xloss.errors import OptionError, UnsupportedError
from xloss.lora import Lora, LoraWeight


class Head(NamedTuple):
    """What ``head_weight`` yields, in the order of ``forward``: ``weight [V, H]``, ``bias [V]`` or ``None``."""

    weight: Tensor | LoraWeight
    bias: Tensor | None


@contextmanager
def head_weight(module: nn.Module) -> Iterator[Head]:
    """The head of a model inside that model's ``forward``, ready for a loss, with gradients that reach its parameters.

    ``with xloss.head_weight(self.lm_head) as head: loss, info = ctx.forward(hidden_states, *head)``

    It serves a plain or ``DistributedDataParallel`` model and every layout of ``fully_shard``: a head owned by the
    root, grouped with the norm, a unit of its own, tied to the embedding. A unit of its own is gathered, and stays so
    until the backward is over (until the end of the ``with`` where no gradient is wanted). A tensor-parallel weight is
    handed out as the DTensor it is. Of a layer of PEFT it is what that layer's forward would use: the copy of
    ``modules_to_save``, or a ``LoraWeight`` of the active adapters.

    Args:
        module: ``nn.Linear``, or ``nn.Embedding`` of tied weights; PEFT's layer around it where there is one.

    Raises:
        OptionError: ``module`` is something else, whose forward may be more than a product with a weight.
        UnsupportedError: gradients would not arrive, as outside the forward of the sharded model; or an adapter is not
            ``W + s B A`` (DoRA).
    """
    wrappers = []
    while is_wrapped(module):
        wrappers.append(module)
        module = chosen_module(module)
    linear = _linear(module)
    units = [m for m in (wrappers[0] if wrappers else linear).modules() if is_fsdp2(m)]
    if units and torch.is_grad_enabled():
        _check_root(units[0])
    gathered = [unit for unit in units if any(not group.is_unsharded for group in fsdp_groups(unit))]
    for unit in gathered:
        gather(unit)
    try:
        yield _read(linear, wrappers)
    finally:
        if not torch.is_grad_enabled():
            for unit in gathered:
                unit.reshard()  # type: ignore[operator]


def _linear(module: nn.Module) -> nn.Linear | nn.Embedding:
    fsdp = sys.modules.get("torch.distributed.fsdp")
    if fsdp is not None and isinstance(module, fsdp.FullyShardedDataParallel):
        raise UnsupportedError(
            "the head is a FullyShardedDataParallel unit of its own, whose weight exists in its own forward alone; "
            "leave the head out of the wrapping policy, so that the root unit owns it, or use fully_shard"
        )
    if not isinstance(module, (nn.Linear, nn.Embedding)):
        raise OptionError(f"head_weight takes the head, an nn.Linear or nn.Embedding; got {type(module).__name__}")
    if type(module).forward not in (nn.Linear.forward, nn.Embedding.forward):
        raise OptionError(
            f"{type(module).__name__} has a forward of its own, which may be more than a product with its weight; "
            "give the loss its weight and bias yourself if it is not"
        )
    return module


def _check_root(unit: nn.Module) -> None:
    """Gradients of a unit whose forward is not called are reduced when the root's backward ends: so one must run."""
    state = unit._get_fsdp_state()  # type: ignore[operator]
    if state._state_ctx.iter_forward_root is None and not in_backward():
        raise UnsupportedError(
            "the head is a unit of fully_shard and no forward of the sharded model is running, so its gradients would "
            f"not be reduced; {INSIDE}, with fully_shard applied to that model too"
        )


def _read(linear: nn.Linear | nn.Embedding, wrappers: list[nn.Module]) -> Head:
    weight, bias = linear.weight, getattr(linear, "bias", None)
    if is_dtensor(weight) and is_fsdp_shard(weight):
        raise UnsupportedError(
            f"the head's weight is a shard of fully_shard's: the forward of the module that owns it is not running; "
            f"{INSIDE}"
        )
    if weight.ndim != 2 or weight.shape[0] == 0:
        raise UnsupportedError(
            f"the head's weight is {tuple(weight.shape)}, not [V, H]: it is sharded, and the forward of what owns it "
            f"is not running; {INSIDE}"
        )
    adapters: list[Lora] = []
    for layer in wrappers:
        found, more = active_adapters(layer)
        adapters += found
        if more is not None:
            bias = more.to(weight.dtype) if bias is None else bias + more.to(bias.dtype)
    return Head(LoraWeight(weight, tuple(adapters)) if adapters else weight, bias)
