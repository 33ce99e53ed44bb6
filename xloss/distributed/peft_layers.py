"""What PEFT put around a head: a trained copy of it, or LoRA. Read as PEFT's own forward reads it; never imported."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from xloss.errors import UnsupportedError
from xloss.lora import Lora


def is_wrapped(module: nn.Module) -> bool:
    """Whether ``module`` is PEFT's, around the layer of the model."""
    return hasattr(module, "base_layer") or "original_module" in module._modules


def chosen_module(wrapper: Any) -> nn.Module:
    """The module that a wrapper's forward would call: the base layer, or a copy trained by ``modules_to_save``."""
    if "original_module" not in wrapper._modules:
        base: nn.Module = wrapper.base_layer
        return base
    if "modules_to_save" not in wrapper._modules:
        raise UnsupportedError(
            f"the head carries a {type(wrapper).__name__} of PEFT, whose forward is more than a product with a weight; "
            "train the head by modules_to_save or LoRA"
        )
    active = wrapper.active_adapters
    original = wrapper.disable_adapters or not active or any(name not in wrapper.modules_to_save for name in active)
    chosen: nn.Module = wrapper.original_module if original else wrapper.modules_to_save[active[0]]
    return chosen


def active_adapters(layer: Any) -> tuple[tuple[Lora, ...], Tensor | None]:
    """Adapters that a PEFT layer's forward would add to its base layer, and what they add to the bias.

    No adapter where they are disabled or merged into the base layer.
    """
    if "original_module" in layer._modules:
        return (), None
    if layer.disable_adapters:
        if layer.merged:
            raise UnsupportedError("the head's adapters are disabled and merged at once; unmerge them first")
        return (), None
    if layer.merged:
        return (), None
    if "lora_A" not in layer._modules or not isinstance(layer.get_base_layer(), nn.Linear):
        raise UnsupportedError(
            f"the head is a {type(layer).__module__}.{type(layer).__name__} of PEFT around a "
            f"{type(layer.get_base_layer()).__name__}; only LoRA on an nn.Linear is known: merge the adapter, or leave "
            "the head out of target_modules"
        )
    found, bias = [], None
    for name in layer.active_adapters:
        if name not in layer.lora_A:
            continue
        variant = getattr(layer, "lora_variant", {}).get(name)
        if variant is not None or getattr(layer, "use_dora", {}).get(name):
            kind = "DoRA" if variant is None else type(variant).__name__
            raise UnsupportedError(
                f"adapter {name!r} on the head is a variant of LoRA ({kind}) that is not W + s B A; use plain LoRA or "
                "rsLoRA there, or leave the head out of target_modules"
            )
        up, scale = layer.lora_B[name], float(layer.scaling[name])
        dropout = layer.lora_dropout[name]
        found.append(
            Lora(layer.lora_A[name].weight, up.weight, scale, None if isinstance(dropout, nn.Identity) else dropout)
        )
        if up.bias is not None:
            bias = up.bias * scale if bias is None else bias + up.bias * scale
    return tuple(found), bias
