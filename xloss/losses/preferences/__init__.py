"""Preference losses: one typed term each, tagged by ``loss_type``, whose formula is in ``xloss.policy.preference``."""

from xloss.losses.preferences import paired, reference_free, unpaired
from xloss.losses.preferences.base import (
    AnyPreferenceTerm,
    PreferenceBatch,
    PreferenceTerm,
    Side,
    preference_losses,
    register_preference_loss,
)

__all__ = [
    "AnyPreferenceTerm",
    "PreferenceBatch",
    "PreferenceTerm",
    "Side",
    "paired",
    "preference_losses",
    "reference_free",
    "register_preference_loss",
    "unpaired",
]
