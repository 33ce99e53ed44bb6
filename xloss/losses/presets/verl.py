"""verl's policy losses by ``loss_mode``, its bypass mode, and NeMo RL's loss functions.

verl clamps log-ratios at 20 where said, dual-clips ``vanilla`` at 3, and leaves its KL term off; NeMo RL clamps no
log-ratio and has a KL term with the score function's gradient.
"""

from __future__ import annotations

from typing import Any

from xloss.losses.ce import CELossConfig
from xloss.losses.presets.base import Preset, of_policy, of_preference
from xloss.losses.presets.distillation import distillation

_KL: dict[str, Any] = {"kl_loss_type": "low_var_kl"}
_VANILLA: dict[str, Any] = {"loss_type": "ppo", "cliprange_low": 0.2, "cliprange_high": 0.2, "dual_clip_c": 3.0}
_NEMO_KL: dict[str, Any] = {
    "use_kl_loss": True,
    "kl_loss_coef": 0.01,
    "kl_loss_type": "k3",
    "kl_clamp_in": 20.0,
    "kl_clamp_out": 10.0,
    "kl_loss_grad": "score_function",
    "kl_clamp_weighted": True,
}
_NEMO_SEQUENCES: dict[str, Any] = {"loss_reduction": "sample", "count_empty_sequences": True}


def _verl(mode: str, loss: str | dict[str, Any], summary: str, options: str, **fields: Any) -> Preset:
    return of_policy(f"verl/{mode}", loss, summary, f"loss_mode={mode}: {options}", **_KL, **fields)


def _nemo(name: str, loss: str | dict[str, Any], summary: str, options: str, **fields: Any) -> Preset:
    return of_policy(f"nemo/{name}", loss, summary, f"ClippedPGLossFn: {options}", **_NEMO_KL, **fields)


_VERL = [
    Preset("verl/sft", CELossConfig, {}, "mean over all tokens", "sft_loss, loss_agg_mode=token-mean"),
    _verl("vanilla", _VANILLA, "clip with dual clip at 3", "clip_ratio=0.2, clip_ratio_c=3, token-mean"),
    _verl(
        "gspo",
        {"loss_type": "gspo_token", "cliprange_low": 3e-4, "cliprange_high": 4e-4, "log_ratio_max": 10.0},
        "clip of the sequence's ratio; verl's clip stays 0.2 unless set",
        "clip_ratio_low=3e-4, clip_ratio_high=4e-4, seq-mean-token-mean",
        loss_reduction="sample",
    ),
    _verl(
        "sapo",
        {"loss_type": "sapo", "tau_pos": 1.0, "tau_neg": 1.05},
        "a sigmoid gate for a clip",
        "tau_pos=1, tau_neg=1.05, seq-mean-token-mean",
        loss_reduction="sample",
    ),
    _verl("gpg", "reinforce", "plain policy gradient", "token-mean"),
    _verl(
        "clip_cov",
        {"loss_type": "clip_cov", "clip_cov_ratio": 2e-4, "clip_cov_lb": 1.0, "clip_cov_ub": 5.0},
        "drops tokens of high covariance",
        "clip_ratio=0.2, clip_cov_ratio=2e-4, clip_cov_lb=1, clip_cov_ub=5",
    ),
    _verl(
        "kl_cov",
        {"loss_type": "kl_cov", "kl_cov_ratio": 2e-4, "ppo_kl_coef": 0.1},
        "a KL penalty on tokens of high covariance",
        "kl_cov_ratio=2e-4, ppo_kl_coef=0.1",
    ),
    _verl(
        "geo_mean",
        {"loss_type": "gmpo", "cliprange_low": 0.2, "cliprange_high": 0.2},
        "GMPO, mean over sequences whatever loss_agg_mode says",
        "clip_ratio_low=clip_ratio_high=0.2, in log space",
        **_NEMO_SEQUENCES,
    ),
    _verl(
        "cispo",
        {"loss_type": "cispo", "cliprange_low": 0.2, "cliprange_high": 0.2},
        "two-sided at its defaults: weights in [0.8, 1.2]; 1 and 4 are the usual offsets",
        "clip_ratio_low=clip_ratio_high=0.2",
    ),
    _verl(
        "dppo_tv",
        {"loss_type": "dppo_tv", "delta_low": 0.2, "delta_high": 0.2, "ratio_cap": 3.0},
        "drops tokens whose probability moved too far",
        "clip_ratio_low=clip_ratio_high=0.2, clip_ratio_c=3",
    ),
    _verl(
        "dppo_kl",
        {"loss_type": "dppo_kl", "delta_low": 0.2, "delta_high": 0.2, "ratio_cap": 3.0},
        "the same by the binary KL",
        "clip_ratio_low=clip_ratio_high=0.2, clip_ratio_c=3",
    ),
    of_policy(
        "verl/bypass_ppo_clip",
        _VANILLA | {"anchor": "rollout"},
        "the sampler's log-probs are the old ones",
        "loss_mode=bypass_mode, loss_type=ppo_clip",
        **_KL,
    ),
    of_policy(
        "verl/bypass_reinforce",
        "reinforce",
        "policy gradient under truncated weights of the sampler",
        "loss_mode=bypass_mode, loss_type=reinforce, rollout_is=token, rollout_is_threshold=2.0",
        rollout_correction={"level": "token", "high": 2.0, "renormalize_rejected": True},
        **_KL,
    ),
    distillation(
        "verl/forward_kl_topk",
        "the teacher's top k of the whole, clamped",
        "loss_mode=forward_kl_topk, log_prob_min_clamp=-10, loss_max_clamp=10",
        topk_mode="full",
        log_prob_min_clamp=-10.0,
        loss_max_clamp=10.0,
    ),
]

_NEMO = [
    Preset("nemo/sft", CELossConfig, {}, "mean over all tokens", "NLLLossFn"),
    _nemo(
        "grpo",
        {"loss_type": "ppo", "log_ratio_clamp": None},
        "clip and KL, mean over all tokens",
        "ratio_clip_min=ratio_clip_max=0.2, reference_policy_kl_penalty=0.01",
    ),
    _nemo(
        "gspo",
        {"loss_type": "ppo", "ratio_level": "sequence", "cliprange_low": 3e-4, "cliprange_high": 4e-4}
        | {"log_ratio_clamp": None},
        "clip of the sequence's ratio",
        "sequence_level_importance_ratios, token_level_loss=False, ratio_clip_min=3e-4, ratio_clip_max=4e-4",
        **_NEMO_SEQUENCES,
    ),
    _nemo(
        "cispo",
        {"loss_type": "cispo", "cliprange_low": 1.0, "cliprange_high": 5.0, "log_ratio_clamp": None},
        "clipped importance weights",
        "use_cispo, ratio_clip_min=1, ratio_clip_max=5",
    ),
    _nemo("reinforce", "reinforce", "plain policy gradient and KL", "disable_ppo_ratio"),
    of_preference(
        "nemo/dpo",
        "sigmoid",
        "direct preference optimisation",
        "DPOLossFn: reference_policy_kl_penalty=0.05",
        beta=0.05,
    ),
    of_preference(
        "nemo/mpo",
        ["sigmoid", "bco_pair"],
        "preference and quality",
        "MPO: preference and quality weights 1, generation weight 0, beta 0.05",
        beta=0.05,
    ),
    distillation(
        "nemo/distillation",
        "both KLs on the teacher's top k, renormalised",
        "DistillationLossFn: kl_type=mixed, mixed_kl_weight=0.5, zero_outside_topk=False",
        divergence="mixed",
        mixed_kl_weight=0.5,
        topk_mode="renormalized",
    ),
    distillation("nemo/opd_full", "reverse KL from the teacher's hidden states", "OPD_FULL", divergence="reverse_kl"),
    distillation("nemo/draft", "a draft model's cross-entropy", "DraftCrossEntropyLossFn", divergence="cross_entropy"),
]

PRESETS = [*_VERL, *_NEMO]
