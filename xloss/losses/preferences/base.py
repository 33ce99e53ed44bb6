"""What a preference loss is, what it sees, and how one is found by its ``loss_type``."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Any, ClassVar, Self, TypeVar

from pydantic import BeforeValidator, ConfigDict, Field, SerializeAsAny
from torch import Tensor

from xloss.errors import unknown_name
from xloss.losses.loss_type import register
from xloss.losses.model import StrictModel

SHARED = ("beta", "label_smoothing", "average_log_prob")
"""What a config sets for all its terms."""
Coef = Annotated[float, Field(allow_inf_nan=False)]


@dataclass(frozen=True)
class Side:
    """Chosen (or desirable), or rejected (or undesirable) sequences, one entry each.

    Args:
        logprobs: of the policy, summed over the sequence's tokens, or averaged if the term averages.
        ref_logprobs: the same of the reference; 0 without one.
        scores: ``logprobs - ref_logprobs``, through the f-divergence.
    """

    logprobs: Tensor
    ref_logprobs: Tensor
    scores: Tensor

    @property
    def log_ratios(self) -> Tensor:
        return self.logprobs - self.ref_logprobs


@dataclass(frozen=True)
class PreferenceBatch:
    """What a term sees: pair ``i`` is entry ``i`` of both sides; sides of an unpaired term differ in length.

    Args:
        kl: 0-d, not negative, detached; the reference point of KTO.
        reward_shift: 0-d, detached; BCO's delta, in units of ``beta log_ratio``.
    """

    chosen: Side
    rejected: Side
    kl: Tensor | None = None
    reward_shift: Tensor | None = None


class PreferenceTerm(StrictModel):
    """One term of a preference loss. What is ``None`` is the config's, and what is ``None`` there the term's default.

    Args:
        weight: factor of the term.
        beta: scale of log-ratios; by default 0.1.
        average_log_prob: divide sequences' log-probs by their numbers of tokens; default: only what is published so.
    """

    model_config = ConfigDict(frozen=True)

    formula: ClassVar[str] = ""
    """Loss of a pair (or a sequence) in plain text; symbols as in ``docs/losses/preference.md``."""
    source: ClassVar[str] = ""
    """Paper, or framework where there is none."""
    example: ClassVar[dict[str, Any]] = {}
    """Values for fields without a default, to show and to draw the loss with."""
    paired: ClassVar[bool] = True
    """Whether the term compares two sequences, or judges each alone."""
    reads_reference: ClassVar[bool] = True
    reads_scores: ClassVar[bool] = True
    """Whether an f-divergence means something to it."""
    needs: ClassVar[tuple[str, ...]] = ()
    """Optional fields of ``PreferenceBatch`` it cannot do without."""
    default_beta: ClassVar[float] = 0.1
    default_average_log_prob: ClassVar[bool] = False

    loss_type: str
    weight: Coef = 1.0
    beta: float | None = Field(default=None, gt=0, allow_inf_nan=False)
    average_log_prob: bool | None = None

    def losses(self, batch: PreferenceBatch) -> Tensor:
        """Losses of all pairs ``[P]``, or of all sequences, unweighted. ``beta`` is set."""
        raise NotImplementedError

    def nll_factor(self) -> float:
        """Factor of the chosen sequences' negative log-likelihood that belongs to the term."""
        return 0.0

    def resolved(self, shared: dict[str, Any]) -> Self:
        """With what is ``None`` taken from ``shared``, and from the term's own defaults where that is ``None`` too."""
        found = self.model_dump()
        for name in SHARED:
            if name in found and found[name] is None:
                found[name] = getattr(self, f"default_{name}") if shared[name] is None else shared[name]
        return self.model_validate(found)

    @property
    def scale(self) -> float:
        """``beta``, which the config has filled in."""
        assert self.beta is not None
        return self.beta

    def margin(self, batch: PreferenceBatch) -> Tensor:
        """``beta`` times the difference of scores."""
        return self.scale * (batch.chosen.scores - batch.rejected.scores)


class SmoothedTerm(PreferenceTerm):
    """A term with label smoothing.

    Args:
        label_smoothing: share of pairs whose label is taken to be wrong; by default 0.
    """

    default_label_smoothing: ClassVar[float] = 0.0

    label_smoothing: float | None = Field(default=None, ge=0, lt=1)

    @property
    def smoothing(self) -> float:
        assert self.label_smoothing is not None
        return self.label_smoothing


Term = TypeVar("Term", bound=PreferenceTerm)
_BY_TYPE: dict[str, type[PreferenceTerm]] = {}


def register_preference_loss(cls: type[Term]) -> type[Term]:
    """Class decorator: make a term known by its ``loss_type``.

    Raises ``OptionError`` when the tag is missing or another class has it.
    """
    return register(cls, _BY_TYPE)


def preference_losses() -> dict[str, type[PreferenceTerm]]:
    """Every registered term by its ``loss_type``."""
    return dict(_BY_TYPE)


def _from_name(value: Any) -> Any:
    fields = {"loss_type": value} if isinstance(value, str) else value
    if not isinstance(fields, dict):
        return value
    name = str(fields.get("loss_type", "sigmoid"))
    if name not in _BY_TYPE:
        raise ValueError(unknown_name("loss_type", name, list(_BY_TYPE)))
    return _BY_TYPE[name].model_validate(fields)


AnyPreferenceTerm = Annotated[SerializeAsAny[PreferenceTerm], BeforeValidator(_from_name)]
"""A typed term, a dict of its fields (without ``loss_type``: ``sigmoid``), or its name alone."""
