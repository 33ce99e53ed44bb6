"""A preset: the name that a paper or a framework gives a loss, and the config that computes it with their numbers."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from xloss.errors import MissingFieldError, OptionError, unknown_name
from xloss.losses.config import BaseLossConfig
from xloss.losses.grpo import GRPOLossConfig
from xloss.losses.policies import find_policy_loss
from xloss.losses.preference import PreferenceLossConfig
from xloss.losses.preferences import preference_losses


@dataclass(frozen=True)
class Preset:
    """Numbers of a loss under the name it has elsewhere.

    Args:
        name: ``grpo``, or ``framework/name``.
        config: the class to build.
        fields: its arguments.
        summary: one line.
        source: paper, or the framework's options that it stands for.
        required: fields without a default there either, each with a value to try it with.
    """

    name: str
    config: type[BaseLossConfig]
    fields: Mapping[str, Any]
    summary: str
    source: str
    required: Mapping[str, Any] = field(default_factory=dict)

    @property
    def framework(self) -> str:
        """What stands before the slash; empty for a paper or method."""
        return self.name.rpartition("/")[0]

    def build(self, **overrides: Any) -> BaseLossConfig:
        """The config, ``overrides`` on top: fields of the config, or of its policy loss or preference term.

        A dict for a dict is merged into it, unless it names another loss.

        Raises:
            MissingFieldError: a required field is not among them.
            OptionError: there is no such field.
            pydantic.ValidationError: a value is wrong.
        """
        missing = [name for name in self.required if overrides.get(name) is None]
        if missing:
            raise MissingFieldError(f"preset {self.name!r} needs {', '.join(missing)}: {self.source} has no default")
        outer = {name: value for name, value in overrides.items() if name in self.config.model_fields}
        inner = {name: value for name, value in overrides.items() if name not in outer}
        fields = _merged(self.fields, outer)
        if inner:
            self._put_inside(fields, inner)
        return self.config(**fields)

    def example(self) -> BaseLossConfig:
        """The config with the required fields at their example values."""
        return self.build(**self.required)

    def _put_inside(self, fields: dict[str, Any], inner: dict[str, Any]) -> None:
        """Set fields of the one loss that the config holds."""
        at, known = "", dict[str, Any]()
        if issubclass(self.config, GRPOLossConfig):
            at = "policy_loss_cfg"
        elif issubclass(self.config, PreferenceLossConfig):
            at = "loss_type"
        held = fields.get(at)
        held = {"loss_type": held} if isinstance(held, str) else held
        if isinstance(held, dict):
            terms = preference_losses() if at == "loss_type" else {}
            known = (terms.get(held["loss_type"]) or find_policy_loss(held["loss_type"])).model_fields
        for name in inner:
            if name not in known:
                raise OptionError(
                    unknown_name(f"field of preset {self.name!r}", name, [*self.config.model_fields, *known])
                )
        fields[at] = {**held, **inner} if isinstance(held, dict) else held


def _merged(base: Mapping[str, Any], over: Mapping[str, Any]) -> dict[str, Any]:
    merged = dict(base)
    for name, value in over.items():
        old = merged.get(name)
        if isinstance(old, dict) and isinstance(value, dict):
            tag = old.get("loss_type")
            if value.get("loss_type", tag) == tag:  # the numbers of one loss mean nothing to another
                value = {**old, **value}
        merged[name] = value
    return merged


_PRESETS: dict[str, Preset] = {}


def register_preset(*presets: Preset) -> None:
    """Make presets known to ``preset`` and the command line. Raises ``OptionError`` where a name is taken."""
    for new in presets:
        if _PRESETS.get(new.name, new) != new:
            raise OptionError(f"preset {new.name!r} exists already; choose another name")
        _PRESETS[new.name] = new


def presets() -> dict[str, Preset]:
    """All presets by name."""
    return dict(_PRESETS)


def find_preset(name: str) -> Preset:
    """The preset of that name. Raises ``OptionError`` with the nearest one where there is none."""
    if name not in _PRESETS:
        raise OptionError(unknown_name("preset", name, list(_PRESETS), "presets()"))
    return _PRESETS[name]


def preset(name: str, **overrides: Any) -> BaseLossConfig:
    """The config of a preset: ``preset("dapo")``, ``preset("trl/dr_grpo", norm_length=512)``.

    Args:
        name: one that ``xloss losses`` lists.
        overrides: fields to set otherwise, of the config, or of its policy loss or preference term.

    Raises:
        OptionError: there is no such preset, or no such field.
        MissingFieldError: a number that the source has no default for is not given.
        pydantic.ValidationError: a value is wrong.
    """
    return find_preset(name).build(**overrides)


def of_policy(
    name: str,
    policy: str | dict[str, Any],
    summary: str,
    source: str,
    required: Mapping[str, Any] | None = None,
    config: type[GRPOLossConfig] = GRPOLossConfig,
    **fields: Any,
) -> Preset:
    """A preset of a policy loss, given by its tag or its fields."""
    inner = {"loss_type": policy} if isinstance(policy, str) else policy
    return Preset(name, config, {"policy_loss_cfg": inner, **fields}, summary, source, required or {})


def of_preference(
    name: str,
    loss_type: Any,
    summary: str,
    source: str,
    required: Mapping[str, Any] | None = None,
    **fields: Any,
) -> Preset:
    """A preset of a preference loss, given by its tag, its fields, or a list of either."""
    return Preset(name, PreferenceLossConfig, {"loss_type": loss_type, **fields}, summary, source, required or {})
