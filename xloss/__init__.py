"""xloss: the loss engine of LLM post-training. Hidden states and a head go in; loss and exact gradients come out."""

from xloss.errors import XlossError
from xloss.head.linear_logprobs import linear_logprobs
from xloss.losses.base import BaseLossConfig, BaseLossContext
from xloss.losses.ce import CELossConfig, CELossContext, CELossContextInputItem, CELossKwargs
from xloss.losses.grpo import GRPOLossConfig, GRPOLossContext, GRPOLossKwargs, RLLossContextInputItem
from xloss.losses.info import LossInfo
from xloss.losses.logprob import LogProbConfig, LogProbContext, LogProbKwargs
from xloss.losses.model import BaseLossContextInputItem, BaseLossKwargs, PerBatch, PerToken
from xloss.losses.oreal import OrealLossConfig, OrealLossContext, OrealLossKwargs
from xloss.losses.policies import PolicyLossConfig, register_policy_loss
from xloss.losses.rollout_correction import Rejection, RolloutCorrection
from xloss.losses.xtuner_rollout import RolloutImportanceSampling
from xloss.metrics import Metric, finalize_metrics, merge_metrics
from xloss.stats import StatSpec, TokenStats

__version__ = "0.1.0"

__all__ = [
    "BaseLossConfig",
    "BaseLossContext",
    "BaseLossContextInputItem",
    "BaseLossKwargs",
    "CELossConfig",
    "CELossContext",
    "CELossContextInputItem",
    "CELossKwargs",
    "GRPOLossConfig",
    "GRPOLossContext",
    "GRPOLossKwargs",
    "LogProbConfig",
    "LogProbContext",
    "LogProbKwargs",
    "LossInfo",
    "Metric",
    "OrealLossConfig",
    "OrealLossContext",
    "OrealLossKwargs",
    "PerBatch",
    "PerToken",
    "PolicyLossConfig",
    "RLLossContextInputItem",
    "Rejection",
    "RolloutCorrection",
    "RolloutImportanceSampling",
    "StatSpec",
    "TokenStats",
    "XlossError",
    "__version__",
    "finalize_metrics",
    "linear_logprobs",
    "merge_metrics",
    "register_policy_loss",
]
