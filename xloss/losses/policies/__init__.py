"""Policy losses: one typed config each, tagged by ``loss_type``, whose formula is a function of ``xloss.policy``."""

from xloss.losses.policies import (
    batch_coupled,
    decoupled,
    off_policy,
    sequence,
    sequence_ratio,
    token_ratio,
    trust_region,
)
from xloss.losses.policies.base import (
    AnyPolicyLossConfig,
    PolicyLossConfig,
    find_policy_loss,
    policy_losses,
    register_policy_loss,
)

__all__ = [
    "AnyPolicyLossConfig",
    "PolicyLossConfig",
    "batch_coupled",
    "decoupled",
    "find_policy_loss",
    "off_policy",
    "policy_losses",
    "register_policy_loss",
    "sequence",
    "sequence_ratio",
    "token_ratio",
    "trust_region",
]
