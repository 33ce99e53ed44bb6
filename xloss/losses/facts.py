"""What people want to know of a loss, stated beside the class that computes it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class LossForm:
    """One of the losses that a config class computes, for catalog, presets and command line.

    Args:
        name: what the field calls it.
        formula: loss of a token (or a sequence) in plain text.
        source: paper, or framework where there is none.
        summary: one line.
        fields: of the config, to make this form of it.
    """

    name: str
    formula: str
    source: str
    summary: str
    fields: Mapping[str, Any] = field(default_factory=dict)
