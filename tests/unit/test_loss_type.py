"""Contract: a class of formulas is known by its tag; one without a tag, or with another's, is refused, and told why."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal

import pytest

from xloss import PolicyLossConfig, register_policy_loss
from xloss.errors import OptionError
from xloss.losses.policies import policy_losses
from xloss.losses.preferences import preference_losses, register_preference_loss
from xloss.losses.preferences.base import PreferenceTerm

KINDS = [
    (register_policy_loss, PolicyLossConfig, policy_losses, "vanilla"),
    (register_preference_loss, PreferenceTerm, preference_losses, "sigmoid"),
]


@pytest.mark.parametrize("register, base, known, taken", KINDS, ids=["policy", "preference"])
def test_tags(register: Callable[[Any], Any], base: type[Any], known: Callable[[], dict[str, Any]], taken: str) -> None:
    before = known()

    class Untagged(base):  # type: ignore[misc]
        pass

    class Undefaulted(base):  # type: ignore[misc]
        loss_type: Literal["mine"]

    class Taken(base):  # type: ignore[misc]
        loss_type: str = taken

    for cls in (Untagged, Undefaulted):
        with pytest.raises(OptionError, match=f"{cls.__name__} must declare its tag with a default: loss_type"):
            register(cls)
    with pytest.raises(OptionError, match=f"loss_type '{taken}' of Taken is taken by {before[taken].__name__}"):
        register(Taken)
    assert known() == before
    assert register(before[taken]) is before[taken]  # a module that is imported again
