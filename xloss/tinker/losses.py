"""Losses by the names of ``loss_fn``: Tinker's own, every other that xloss knows, and presets."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from xloss.errors import OptionError, UnsupportedError, unknown_name
from xloss.losses.catalog import CONFIGS
from xloss.losses.config import BaseLossConfig
from xloss.losses.grpo import GRPOLossConfig
from xloss.losses.mtp import MTPLossConfig
from xloss.losses.oreal import OrealLossConfig
from xloss.losses.policies import policy_losses
from xloss.losses.preference import PreferenceLossConfig
from xloss.losses.preferences import preference_losses
from xloss.losses.presets import Preset, presets

_CLIP = ("clip_low_threshold", "clip_high_threshold")
TINKER: dict[str, tuple[str, ...]] = {
    "cross_entropy": (),
    "importance_sampling": (),
    "ppo": _CLIP,
    "cispo": _CLIP,
    "dro": ("beta",),
    "gspo": _CLIP,
}
"""The names of Tinker's documentation, and the keys of ``loss_fn_config`` of each."""
_SUM = {"loss_reduction": "sum"}
_NOT_HERE = {
    "stable_reinforce": "its formula is not public",
    "custom": "give the function itself to forward_backward_custom",
    "mtp": "it is about the hidden states of a head of its own, which a LanguageModel has not",
}
_OF_CLIENT = (
    *("mode", "chunk_size", "logits_budget", "kernels", "plan", "softcap", "logit_scale", "ignore_idx"),
    *("accumulate_into_main_grad", "allow_retain_graph", "check_labels", "grad_reduce", "skip_zero_grad_rows"),
    "return_entropy",
)


def loss_names() -> list[str]:
    """Every name that ``loss_fn`` accepts. Raises nothing."""
    return sorted({*TINKER, *_known()} - set(_NOT_HERE))


def find_loss(
    loss_fn: str, loss_fn_config: Mapping[str, Any] | None, several_targets: bool, engine: Mapping[str, Any]
) -> BaseLossConfig:
    """The config of a loss by name.

    Tinker's names have Tinker's numbers and defaults, and no others; other losses their own, summed over tokens; a
    preset is what it is, its reduction included, over the data of one call.

    Args:
        loss_fn: one of ``loss_names()``.
        loss_fn_config: fields of the config, or of its policy loss or preference term. ``None``: the defaults.
        several_targets: whether a token has K targets, ``[N, K]``.
        engine: fields that the client sets: how the head runs, what stands between it and the logits.

    Raises:
        OptionError: there is no such loss, or no such field. UnsupportedError: the loss cannot be run here.
        MissingFieldError, pydantic.ValidationError: a value is missing or wrong.
    """
    if not isinstance(loss_fn, str):
        raise OptionError(f"loss_fn must be a name; got {type(loss_fn).__name__}. A function: forward_backward_custom")
    given = dict(loss_fn_config or {})
    for name in _OF_CLIENT:
        if name in given:
            raise OptionError(f"loss_fn_config has {name!r}, which is no number of the loss: the client sets it")
    for name in given if loss_fn in TINKER else ():
        if name not in TINKER[loss_fn]:
            raise OptionError(_unknown_number(loss_fn, name))
    if loss_fn in _NOT_HERE:
        raise UnsupportedError(f"loss_fn {loss_fn!r} cannot be run here: {_NOT_HERE[loss_fn]}")
    config = _preset(loss_fn, several_targets).build(**given, **engine)
    if isinstance(config, MTPLossConfig):
        raise UnsupportedError(f"loss_fn {loss_fn!r} cannot be run here: {_NOT_HERE['mtp']}")
    if isinstance(config, GRPOLossConfig) and (config.value_loss is not None or config.full_kl):
        raise UnsupportedError(
            f"loss_fn {loss_fn!r} needs a critic or the head of a reference, which the client has not"
        )
    return config


def _unknown_number(loss_fn: str, name: str) -> str:
    known = TINKER[loss_fn]
    said = (
        unknown_name(f"number of loss_fn {loss_fn!r}", name, list(known))
        if known
        else (f"loss_fn {loss_fn!r} takes no numbers; got {name!r}.")
    )
    return f"{said} loss_fn 'tinker/{loss_fn}' takes every field of the config."


def _preset(name: str, several_targets: bool) -> Preset:
    if name in TINKER:
        soft = name == "cross_entropy" and several_targets
        return presets()["tinker/soft_cross_entropy" if soft else f"tinker/{name}"]
    known = _known()
    if name not in known:
        raise OptionError(unknown_name("loss_fn", name, [*TINKER, *known], "xloss.tinker.loss_names()"))
    return known[name]


def _known() -> dict[str, Preset]:
    """Losses by name; one of the catalog before a preset of its name."""
    fit = {
        name: one
        for name, one in presets().items()
        if one.config is not MTPLossConfig and "value_loss" not in one.fields
    }
    return fit | _registry()


def _registry() -> dict[str, Preset]:
    """Every loss that the catalog lists, but a critic's, as a sum over tokens.

    Two cannot be a sum: preferences are a mean over pairs, and OREAL is a mean over tokens of each sign.
    """
    found = {
        name: Preset(name, GRPOLossConfig, {"policy_loss_cfg": {"loss_type": name}, **_SUM}, "", "")
        for name in policy_losses()
    }
    for name in preference_losses():
        found[name] = Preset(name, PreferenceLossConfig, {"loss_type": name}, "", "")
    for cls in CONFIGS:
        for form in cls.forms:
            reduction = {} if cls is OrealLossConfig else _SUM
            found[form.name] = Preset(form.name, cls, {**form.fields, **reduction}, "", "")
    return found
