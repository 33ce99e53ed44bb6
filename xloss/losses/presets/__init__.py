"""The field's losses under the field's names and numbers: ``preset("trl/dr_grpo", norm_length=512)``."""

from xloss.losses.presets import distillation, more, policy, preferences, supervised, trl, verl
from xloss.losses.presets.base import Preset, find_preset, preset, presets, register_preset

register_preset(
    *policy.PRESETS,
    *supervised.PRESETS,
    *preferences.PRESETS,
    *distillation.PRESETS,
    *trl.PRESETS,
    *verl.PRESETS,
    *more.PRESETS,
)

__all__ = ["Preset", "find_preset", "preset", "presets", "register_preset"]
