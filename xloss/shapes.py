"""Checks at the public door: shapes, dtypes, devices, labels. They raise before any work and change nothing."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from xloss.errors import DeviceError, DtypeError, LabelError, OptionError, ShapeError, UnsupportedError

FLOATS = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


def check_head(
    hidden_states: Tensor, head_weight: Tensor, head_bias: Tensor | None, autocast: bool, least_rows: int = 1
) -> None:
    """``hidden_states [.., H]``, ``head_weight [V, H]``, ``head_bias [V]`` of one float dtype and one device.

    Under autocast their dtypes may differ: all are cast to autocast's. ``least_rows``: the least V.
    """
    named = {"hidden_states": hidden_states, "head_weight": head_weight}
    if head_bias is not None:
        named["head_bias"] = head_bias
    for name, tensor in named.items():
        if not isinstance(tensor, Tensor):
            raise DtypeError(f"{name} must be a torch.Tensor; got {type(tensor).__name__}")
        if hasattr(tensor, "device_mesh"):
            raise UnsupportedError(f"{name} is a DTensor and head_weight is not; give both in one form")
        if tensor.dtype not in FLOATS:
            raise DtypeError(f"{name} must be one of {', '.join(map(str, FLOATS))}; got {tensor.dtype}")
        if tensor.dtype != head_weight.dtype and not autocast:
            raise DtypeError(
                f"{name} is {tensor.dtype} but head_weight is {head_weight.dtype}; "
                "give both one dtype or use torch.autocast"
            )
        if tensor.device != head_weight.device:
            raise DeviceError(f"{name} is on {tensor.device} but head_weight is on {head_weight.device}")
    if head_weight.ndim != 2 or head_weight.shape[0] < least_rows:
        raise ShapeError(f"head_weight must be [V, H] with V >= {least_rows}; got {tuple(head_weight.shape)}")
    if hidden_states.ndim not in (2, 3) or hidden_states.shape[-1] != head_weight.shape[1]:
        raise ShapeError(
            f"hidden_states must be [T, H] or [B, S, H] with H = {head_weight.shape[1]} of head_weight; "
            f"got {tuple(hidden_states.shape)}"
        )
    if head_bias is not None and head_bias.shape != head_weight.shape[:1]:
        raise ShapeError(f"head_bias must be [V] = ({head_weight.shape[0]},); got {tuple(head_bias.shape)}")


def check_labels(labels: Tensor, hidden_states: Tensor, name: str = "labels") -> None:
    """Integer labels of the leading shape of ``hidden_states``, or that and one axis K; on its device."""
    if not isinstance(labels, Tensor) or labels.dtype not in (torch.int64, torch.int32):
        given = labels.dtype if isinstance(labels, Tensor) else type(labels).__name__
        raise DtypeError(f"{name} must be an int64 or int32 tensor; got {given}")
    lead = hidden_states.shape[:-1]
    if labels.shape != lead and not (
        labels.ndim == len(lead) + 1 and labels.shape[:-1] == lead and labels.shape[-1] > 0
    ):
        raise ShapeError(
            f"{name} must be {tuple(lead)} (or {(*lead, 'K')}) like hidden_states {tuple(hidden_states.shape)}; "
            f"got {tuple(labels.shape)}"
        )
    if labels.device != hidden_states.device:
        raise DeviceError(f"{name} is on {labels.device} but hidden_states is on {hidden_states.device}")


def check_label_range(labels: Tensor, vocab_size: int, ignore_index: int, name: str = "labels") -> None:
    """Every label is ``ignore_index`` or in ``[0, V)``. On CUDA the device checks: a later call fails."""
    bad = ((labels < 0) | (labels >= vocab_size)) & (labels != ignore_index)
    if labels.is_cuda:
        torch._assert_async(~bad.any(), f"{name} holds a label outside [0, {vocab_size}) that is not {ignore_index}")
        return
    wrong = labels[bad]
    if wrong.numel():
        raise LabelError(
            f"{name} holds {int(wrong[0])}, and {wrong.numel()} such in all; accepted: 0 to {vocab_size - 1}, "
            f"or {ignore_index} to ignore a token"
        )


def check_per_token(name: str, tensor: Tensor, like: Tensor, *, floating: bool = True, trailing: bool = False) -> None:
    """``tensor`` has the shape and device of ``like`` (the labels); ``trailing``: and one more axis, not empty."""
    if not isinstance(tensor, Tensor):
        raise DtypeError(f"{name} must be a torch.Tensor; got {type(tensor).__name__}")
    if floating and not tensor.dtype.is_floating_point:
        raise DtypeError(f"{name} must be floating point; got {tensor.dtype}")
    if trailing and (tensor.ndim != like.ndim + 1 or tensor.shape[:-1] != like.shape or tensor.shape[-1] < 1):
        raise ShapeError(
            f"{name} must have the shape of shifted_labels and an axis K, {(*like.shape, 'K')}; "
            f"got {tuple(tensor.shape)}"
        )
    if not trailing and tensor.shape != like.shape:
        raise ShapeError(
            f"{name} must have the shape of shifted_labels, {tuple(like.shape)}; got {tuple(tensor.shape)}"
        )
    if tensor.device != like.device:
        raise DeviceError(f"{name} is on {tensor.device} but shifted_labels is on {like.device}")


def check_temperature(
    temperature: float | Tensor, lead: torch.Size, device: torch.device, *, live: Tensor | None
) -> None:
    """A positive number, or one per token without gradient; its values are read where ``live``, if that is given."""
    if not isinstance(temperature, Tensor):
        check_positive("temperature", temperature)
        return
    if temperature.shape != lead:
        raise ShapeError(
            f"temperature must be a number or {tuple(lead)}, one per token; got {tuple(temperature.shape)}"
        )
    if temperature.device != device:
        raise DeviceError(f"temperature is on {temperature.device} but hidden_states is on {device}")
    if temperature.requires_grad:
        raise OptionError("temperature requires grad; it is a constant here: pass temperature.detach()")
    if live is None:
        return
    good = (temperature > 0) | ~live
    if temperature.is_cuda:
        torch._assert_async(good.all(), "temperature must be positive")
    elif not bool(good.all()):
        raise OptionError(f"temperature must be positive; got a minimum of {float(temperature[live].min())}")


def check_positive(name: str, value: float | None) -> None:
    """A finite number greater than 0 (``None``: not given)."""
    if value is not None and not (value > 0 and math.isfinite(value)):
        raise OptionError(f"{name} must be a finite number > 0; got {value}")
