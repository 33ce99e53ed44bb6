"""What a policy loss is, and how one is found by its ``loss_type``."""

from __future__ import annotations

import importlib
from typing import Annotated, Any, ClassVar, Literal, TypeVar

from pydantic import BeforeValidator, ConfigDict, SerializeAsAny
from torch import Tensor

from xloss.errors import unknown_name
from xloss.head.backend import TwinName
from xloss.losses.loss_type import register
from xloss.losses.model import StrictModel
from xloss.metrics import Metric
from xloss.policy.batch import PolicyBatch
from xloss.policy.level import RatioLevel

Twin = tuple[TwinName, dict[str, float | None]]
Coupling = Literal["token", "sequence", "group", "batch"]
Anchor = Literal["old", "rollout"]


class PolicyLossConfig(StrictModel):
    """Parameters of one policy loss; ``per_token`` is its formula from ``xloss.policy``.

    A subclass declares ``loss_type: Literal["its name"] = "its name"`` and registers with ``register_policy_loss``.
    """

    model_config = ConfigDict(frozen=True)

    formula: ClassVar[str] = ""
    """Loss of a token in plain text; symbols as in ``docs/losses/policy-token.md``."""
    source: ClassVar[str] = ""
    """Paper, or framework where there is none."""
    example: ClassVar[dict[str, Any]] = {}
    """Values for fields without a default, to show and to draw the loss with."""
    coupling: ClassVar[Coupling] = "token"
    """``token``: a token's loss depends on its own vectors alone (one-pass plan). ``sequence``: also on its sequence's,
    so bounds of sequences are needed. ``group``: on the sequences of its prompt group, all in one micro-batch.
    ``batch``: on the whole micro-batch."""
    needs: ClassVar[tuple[str, ...]] = ()
    """Optional fields of ``PolicyBatch`` that this loss cannot do without."""
    needs_entropy: ClassVar[bool] = False
    zero_at_zero_advantage: ClassVar[bool] = True
    """Whether a token with advantage 0 has no gradient, whatever its log-probs."""
    folds_is_weights: ClassVar[bool] = False
    """Whether ``is_weights`` enter the formula (``batch.is_weights``) instead of multiplying the loss."""

    def level(self) -> RatioLevel:
        """The level of ``batch.log_ratio`` as ``per_token`` sees it, and of the ratio metrics."""
        return "token"

    def couples(self) -> Coupling:
        """``coupling``, or ``sequence`` where the level asks for it."""
        return "sequence" if self.coupling == "token" and self.level() != "token" else self.coupling

    def per_token(self, batch: PolicyBatch) -> Tensor:
        """Loss of each token ``[T]``, unweighted, to minimise."""
        raise NotImplementedError

    def ratio_anchor(self) -> Anchor:
        """Which log-probs ``PolicyBatch.old_logprobs`` holds: the trainer's at the start of the step, or the
        sampler's."""
        return "old"

    def needed(self) -> tuple[str, ...]:
        """``needs``, for losses whose fields decide."""
        return self.needs

    def no_gradient_without_advantage(self) -> bool:
        """``zero_at_zero_advantage``, for losses whose fields decide."""
        return self.zero_at_zero_advantage

    def ratio_bounds(self) -> tuple[float, float] | None:
        """Lowest and highest ratio that is not clipped, or ``None`` where nothing clips."""
        return None

    def metrics(self, batch: PolicyBatch) -> dict[str, Metric]:
        """Figures of this loss beside those that every policy loss has."""
        return {}

    def twin(self) -> Twin | None:
        """Name and numbers of the kernel that knows this formula, or ``None``."""
        return None


Config = TypeVar("Config", bound=PolicyLossConfig)
_BY_TYPE: dict[str, type[PolicyLossConfig]] = {}


def register_policy_loss(cls: type[Config]) -> type[Config]:
    """Class decorator: make a policy loss known by its ``loss_type``, for dicts and the command line.

    Raises ``OptionError`` when the tag is missing or another class has it.
    """
    return register(cls, _BY_TYPE)


def policy_losses() -> dict[str, type[PolicyLossConfig]]:
    """Every registered policy loss by its ``loss_type``."""
    return dict(_BY_TYPE)


def find_policy_loss(name: str) -> type[PolicyLossConfig]:
    """A registered loss, or the class at a dotted import path (``my_package.my_module.MyLossConfig``)."""
    if name in _BY_TYPE:
        return _BY_TYPE[name]
    module, _, attribute = name.rpartition(".")
    if not module:
        raise ValueError(
            unknown_name("loss_type", name, list(_BY_TYPE))
            + " A loss of your own needs register_policy_loss, or its dotted import path as loss_type."
        )
    try:
        found = getattr(importlib.import_module(module), attribute)
    except (ImportError, AttributeError) as error:
        raise ValueError(f"loss_type {name!r} looks like an import path, but: {error}") from error
    if not (isinstance(found, type) and issubclass(found, PolicyLossConfig)):
        raise ValueError(f"loss_type {name!r} is {found!r}, not a subclass of PolicyLossConfig")
    return found


def _from_dict(value: Any) -> Any:
    if not isinstance(value, dict):
        return value
    loss_type = str(value.get("loss_type", "vanilla"))
    found = find_policy_loss(loss_type)
    fields = {k: v for k, v in value.items() if k != "loss_type"} if loss_type not in _BY_TYPE else value
    return found.model_validate(fields)


AnyPolicyLossConfig = Annotated[SerializeAsAny[PolicyLossConfig], BeforeValidator(_from_dict)]
"""A typed policy loss, or a dict of its fields; a dict without ``loss_type`` is ``vanilla`` (XTuner)."""
