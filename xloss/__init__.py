"""xloss: the loss engine of LLM post-training. Hidden states and a head go in; loss and exact gradients come out."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from xloss.distributed import TokenRanks
from xloss.distributed.access import Head, head_weight
from xloss.distributed.vocab import VocabShard
from xloss.errors import XlossError
from xloss.head.linear_logprobs import linear_logprobs
from xloss.lora import Lora, LoraWeight
from xloss.losses.base import BaseLossContext
from xloss.losses.ce import CELossConfig, CELossContext, CELossContextInputItem, CELossKwargs
from xloss.losses.config import BaseLossConfig
from xloss.losses.distill import DistillLossConfig, DistillLossContext
from xloss.losses.distill_kwargs import DistillLossContextInputItem, DistillLossKwargs
from xloss.losses.facts import LossForm
from xloss.losses.grpo import GRPOLossConfig, GRPOLossContext
from xloss.losses.grpo_kwargs import GRPOLossKwargs, RLLossContextInputItem
from xloss.losses.info import LossInfo
from xloss.losses.logprob import LogProbConfig, LogProbContext, LogProbKwargs
from xloss.losses.metric_names import rename_metrics
from xloss.losses.model import BaseLossContextInputItem, BaseLossKwargs, PerBatch, PerToken
from xloss.losses.mtp import MTPLossConfig, MTPLossContext, MTPLossContextInputItem, MTPLossKwargs
from xloss.losses.oreal import OrealLossConfig, OrealLossContext, OrealLossKwargs
from xloss.losses.policies import PolicyLossConfig, register_policy_loss
from xloss.losses.preference import PreferenceLossConfig, PreferenceLossContext
from xloss.losses.preferences import PreferenceTerm, register_preference_loss
from xloss.losses.preferences.kwargs import PreferenceLossContextInputItem, PreferenceLossKwargs
from xloss.losses.presets import Preset, preset, presets, register_preset
from xloss.losses.rollout_correction import Rejection, RolloutCorrection
from xloss.losses.soft_ce import SoftCELossConfig, SoftCELossContext, SoftCELossContextInputItem, SoftCELossKwargs
from xloss.losses.value import ValueLossConfig, explained_variance
from xloss.losses.xtuner_rollout import RolloutImportanceSampling
from xloss.metrics import Metric, finalize_metrics, merge_metrics
from xloss.packing import roll_labels, shift_labels
from xloss.policy.sequence import optimal_value
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
    "DistillLossConfig",
    "DistillLossContext",
    "DistillLossContextInputItem",
    "DistillLossKwargs",
    "GRPOLossConfig",
    "GRPOLossContext",
    "GRPOLossKwargs",
    "Head",
    "LogProbConfig",
    "LogProbContext",
    "LogProbKwargs",
    "Lora",
    "LoraWeight",
    "LossForm",
    "LossInfo",
    "MTPLossConfig",
    "MTPLossContext",
    "MTPLossContextInputItem",
    "MTPLossKwargs",
    "Metric",
    "OrealLossConfig",
    "OrealLossContext",
    "OrealLossKwargs",
    "PerBatch",
    "PerToken",
    "PolicyLossConfig",
    "PreferenceLossConfig",
    "PreferenceLossContext",
    "PreferenceLossContextInputItem",
    "PreferenceLossKwargs",
    "PreferenceTerm",
    "Preset",
    "RLLossContextInputItem",
    "Rejection",
    "RolloutCorrection",
    "RolloutImportanceSampling",
    "SoftCELossConfig",
    "SoftCELossContext",
    "SoftCELossContextInputItem",
    "SoftCELossKwargs",
    "StatSpec",
    "TokenRanks",
    "TokenStats",
    "ValueLossConfig",
    "VocabShard",
    "XlossError",
    "__version__",
    "explained_variance",
    "finalize_metrics",
    "head_weight",
    "linear_logprobs",
    "merge_metrics",
    "optimal_value",
    "preset",
    "presets",
    "register_policy_loss",
    "register_preference_loss",
    "register_preset",
    "rename_metrics",
    "roll_labels",
    "shift_labels",
]

if not TYPE_CHECKING:

    def __getattr__(name: str) -> Any:
        """Rooms that import another framework, on first use: ``xloss.hf``."""
        if name in ("hf",):
            return import_module(f"xloss.{name}")
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
