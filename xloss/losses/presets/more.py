"""Tinker, XTuner, slime, prime-rl, OpenRLHF, AReaL, SkyRL, ROLL, ms-swift, open-instruct, Liger."""

from __future__ import annotations

from typing import Any

from xloss.losses.ce import CELossConfig
from xloss.losses.mtp import MTPLossConfig
from xloss.losses.oreal import OrealLossConfig
from xloss.losses.presets.base import Preset, of_policy, of_preference
from xloss.losses.presets.distillation import distillation
from xloss.losses.soft_ce import SoftCELossConfig

_XTUNER: dict[str, Any] = {"loss_type": "vanilla", "cliprange_low": 0.2, "cliprange_high": 0.2}
_FREE: dict[str, Any] = {"log_ratio_clamp": None}
_GSPO: dict[str, Any] = {"cliprange_low": 3e-4, "cliprange_high": 4e-4}


def _tinker(name: str, summary: str, options: str, **loss: Any) -> Preset:
    """Sums over tokens and batch; the sampler's log-probs are the old ones."""
    fields = {"loss_type": name} | loss
    return of_policy(f"tinker/{name}", fields, summary, f"loss_fn={name}{options}", loss_reduction="sum")


_TINKER = [
    Preset(
        "tinker/cross_entropy",
        CELossConfig,
        {"loss_reduction": "sum"},
        "summed, weights as token_weight",
        "loss_fn=cross_entropy",
    ),
    Preset(
        "tinker/soft_cross_entropy",
        SoftCELossConfig,
        {"loss_reduction": "sum"},
        "K weighted targets a token, summed",
        "loss_fn=cross_entropy with target_tokens (N, K)",
    ),
    _tinker("importance_sampling", "importance-weighted, summed", "", **_FREE),
    _tinker(
        "ppo",
        "clip of the ratio, summed",
        ", clip_low_threshold=0.8, clip_high_threshold=1.2",
        clip_low_threshold=0.8,
        clip_high_threshold=1.2,
        **_FREE,
    ),
    _tinker(
        "cispo",
        "clipped importance weights, summed",
        ", clip_low_threshold=0, clip_high_threshold=4",
        clip_low_threshold=0.0,
        clip_high_threshold=4.0,
        **_FREE,
    ),
    _tinker("dro", "a quadratic pull for a clip, summed", ", beta=0.05", beta=0.05),
    of_policy(
        "tinker/gspo",
        {"loss_type": "gspo_token", "clip_low_threshold": 0.8, "clip_high_threshold": 1.2},
        "clip of the sequence's ratio, summed; the thresholds are those of its ppo",
        "loss_fn=gspo, clip_low_threshold=0.8, clip_high_threshold=1.2",
        loss_reduction="sum",
    ),
]

_XTUNER_PRESETS = [
    Preset("xtuner/ce", CELossConfig, {}, "token mean; loss_reduction sample or square", "CELossConfig"),
    Preset("xtuner/mtp", MTPLossConfig, {}, "one token further ahead", "MTPLossConfig"),
    Preset(
        "xtuner/mtp_rl",
        MTPLossConfig,
        {"kl_loss_type": "low_var_kl", "detach_mtp_lm_head_weight": True},
        "KL to the sampler at labels further ahead",
        "MTPLossConfig in RL",
    ),
    of_policy(
        "xtuner/grpo", _XTUNER, "clip with dual clip at 3", "GRPOLossConfig, cliprange 0.2", kl_loss_type="low_var_kl"
    ),
    of_policy(
        "xtuner/oreal",
        _XTUNER,
        "likelihood on good answers, policy loss on all",
        "OrealLossConfig, cliprange 0.2, all factors 1",
        config=OrealLossConfig,
        kl_loss_type="low_var_kl",
    ),
]

_SAMPLES: dict[str, Any] = {"loss_reduction": "sample", "count_empty_sequences": True}
_SLIME = [
    Preset("slime/sft", CELossConfig, _SAMPLES, "mean over samples", "loss_type=sft_loss"),
    of_policy(
        "slime/grpo",
        {"loss_type": "ppo", **_FREE},
        "mean over samples",
        "eps_clip=0.2, eps_clip_high=None",
        **_SAMPLES,
        kl_loss_type="k1",
        kl_clamp_in=None,
        kl_clamp_out=None,
    ),
    of_policy(
        "slime/gspo",
        {"loss_type": "gspo", **_GSPO},
        "clip of the sequence's ratio; its clip stays 0.2 unless set",
        "advantage_estimator=gspo, eps_clip=3e-4, eps_clip_high=4e-4",
        **_SAMPLES,
    ),
    of_policy(
        "slime/cispo",
        {"loss_type": "cispo", "cliprange_low": 1.0, "cliprange_high": 4.0, **_FREE},
        "clipped importance weights",
        "advantage_estimator=cispo, eps_clip=1, eps_clip_high=4",
        **_SAMPLES,
    ),
    of_policy(
        "slime/opsm",
        {"loss_type": "ppo", **_FREE},
        "GRPO without bad answers that have left the policy",
        "use_opsm, opsm_delta=1e-4, eps_clip=0.2",
        **_SAMPLES,
        opsm_delta=1e-4,
    ),
]

_PRIME_MASK: dict[str, Any] = {"loss_type": "dppo_tv", "anchor": "rollout", "ratio_cap": None, "kl_tau": 1e-3, **_FREE}
_PRIME = [
    of_policy(
        "prime/default",
        _PRIME_MASK | {"delta_low": 0.2, "delta_high": 0.2},
        "drops tokens that moved too far; a pull on all",
        "type=default, dppo_mask_low=dppo_mask_high=0.2, kl_tau=1e-3, adv_tau=1",
    ),
    of_policy(
        "prime/ipo",
        _PRIME_MASK | {"delta_low": 0.1, "delta_high": 0.1, "one_sided": False},
        "the same on both sides",
        "type=ipo, ipo_threshold=0.1, kl_tau=1e-3",
    ),
    of_policy(
        "prime/ref_kl",
        {"loss_type": "ref_kl", "anchor": "rollout"},
        "distillation on one's own samples",
        "ref_kl, kl_tau=1e-3",
    ),
    Preset("prime/ce", CELossConfig, {}, "mean over all tokens", "ce"),
]

_SKYRL_KL: dict[str, Any] = {"use_kl_loss": True, "kl_loss_coef": 0.001, "kl_loss_type": "k3"}


def _skyrl(name: str, loss: dict[str, Any], summary: str, options: str, **fields: Any) -> Preset:
    return of_policy(f"skyrl/{name}", loss, summary, f"policy_loss_type={name}: {options}", **_SKYRL_KL, **fields)


_SKYRL = [
    _skyrl("regular", {"loss_type": "ppo"}, "clip and KL 0.001", "eps_clip_low=eps_clip_high=0.2"),
    _skyrl("dual_clip", {"loss_type": "ppo", "dual_clip_c": 3.0}, "with dual clip", "eps_clip 0.2, clip_ratio_c=3"),
    _skyrl(
        "gspo",
        {"loss_type": "gspo_token", **_GSPO},
        "clip of the sequence's ratio",
        "eps_clip_low=3e-4, eps_clip_high=4e-4, sequence_mean",
        loss_reduction="sample",
    ),
    _skyrl("sapo", {"loss_type": "sapo"}, "a sigmoid gate", "tau_pos=1, tau_neg=1.05", loss_reduction="sample"),
    _skyrl(
        "cispo",
        {"loss_type": "cispo", "cliprange_low": 1.0, "cliprange_high": 4.0},
        "weights in [0, 5]",
        "cispo_eps_clip_low=1, cispo_eps_clip_high=4",
    ),
    _skyrl("clip_cov", {"loss_type": "clip_cov"}, "drops tokens of high covariance", "2e-4 in (1, 5)"),
    _skyrl(
        "kl_cov",
        {"loss_type": "kl_cov", "kl_cov_ratio": 0.2, "ppo_kl_coef": 1.0},
        "a KL penalty on tokens of high covariance",
        "kl_cov_frac=0.2, ppo_kl_coef=1",
    ),
    _skyrl(
        "dppo",
        {"loss_type": "dppo_tv", "anchor": "rollout", "ratio_cap": None},
        "drops tokens that moved too far from the sampler",
        "binary_tv, 0.2",
    ),
    _skyrl("rollout_is", {"loss_type": "rollout_is"}, "ratios to the sampler, 0 out of bounds", "eps_clip 0.2"),
]

_OTHERS = [
    of_policy("openrlhf/ppo", "ppo", "clip of the ratio; KL 0.01 in the reward", "PolicyLoss: eps_clip 0.2"),
    of_policy(
        "openrlhf/gspo",
        {"loss_type": "gspo", **_GSPO},
        "clip of the sequence's ratio",
        "policy_loss_type=gspo, eps_clip 3e-4, 4e-4",
        loss_reduction="sample",
    ),
    of_preference("openrlhf/dpo", "sigmoid", "direct preference optimisation", "DPOLoss: beta=0.1", beta=0.1),
    of_preference(
        "openrlhf/ipo",
        {"loss_type": "ipo", "average_log_prob": False},
        "on sums over tokens",
        "DPOLoss(ipo=True)",
        beta=0.1,
    ),
    of_policy("areal/ppo", {"loss_type": "ppo", **_FREE}, "clip of the ratio", "eps_clip=0.2"),
    of_policy(
        "areal/decoupled_ppo",
        {"loss_type": "decoupled_ppo", "behave_action": "mask", "behave_high": 5.0},
        "clip around the proximal policy",
        "use_decoupled_loss, eps_clip=0.2, behave_imp_weight upper 5.0",
    ),
    of_policy(
        "areal/m2po",
        {"loss_type": "m2po", "trust_region_only": False, "moment_of": "old", "cliprange_low": 0.2}
        | {"cliprange_high": 0.2},
        "second moment of old against sampler bounded",
        "m2_threshold, eps_clip=0.2",
        required={"m2_threshold": 0.04},
    ),
    of_policy("areal/sapo", {"loss_type": "sapo", **_FREE}, "a sigmoid gate", "sapo_tau_pos=1, sapo_tau_neg=1.05"),
    of_policy("roll/ppo", "ppo", "mean over sequences", "pg_clip=0.2", loss_reduction="sample"),
    of_policy(
        "roll/dual_clip",
        {"loss_type": "ppo", "dual_clip_c": 1.4},
        "dual clip at 1 + 2 pg_clip",
        "pg_clip=0.2, dual_clip_loss",
        loss_reduction="sample",
    ),
    of_policy("roll/kimi15", "kimi", "mirror descent", "pg_variant=kimi15, tau 0.1", loss_reduction="sample"),
    of_policy("roll/topr", "topr", "bad answers tapered", "pg_variant=topr, weights 1", loss_reduction="sample"),
    of_policy("roll/tis", "tis", "ratios truncated at 1", "pg_variant=tis, caps 0, 1", loss_reduction="sample"),
    of_policy(
        "roll/cispo",
        {"loss_type": "cispo", "cliprange_low": 0.1, "cliprange_high": 0.1},
        "clipped importance weights",
        "pg_variant=cispo, 0.1",
        loss_reduction="sample",
    ),
    of_policy("swift/fipo", {"loss_type": "fipo", **_FREE}, "each token weighed by what follows", "fipo_decay_rate=32"),
    of_policy(
        "swift/real", "real", "good and bad answers as classes", "loss_type=real, tau 0.5", loss_reduction="prompt"
    ),
    of_policy(
        "open_instruct/grpo",
        {"loss_type": "ppo", "cliprange_low": 0.2, "cliprange_high": 0.272},
        "clip higher; its KL of 0.05 is left to use_kl_loss",
        "clip_lower=0.2, clip_higher=0.272",
    ),
    of_policy(
        "open_instruct/cispo",
        {"loss_type": "cispo", "clip_low_threshold": 0.0, "clip_high_threshold": 1.272},
        "upper cap alone",
        "loss_fn=cispo, clip_higher=0.272",
    ),
    of_preference("open_instruct/dpo_norm", "sigmoid_norm", "DPO on means per token", "dpo_norm, beta=5", beta=5.0),
    distillation(
        "liger/jsd",
        "half cross-entropy, half JSD",
        "LigerFusedLinearJSDLoss: beta=0.5, weights 0.5, temperature 1",
        divergence="jsd",
        beta=0.5,
        hard_weight=0.5,
        soft_weight=0.5,
    ),
]

PRESETS = [*_TINKER, *_XTUNER_PRESETS, *_SLIME, *_PRIME, *_SKYRL, *_OTHERS]
