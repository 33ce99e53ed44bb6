"""TRL's trainers: GRPO, RLOO, PPO, SFT, DPO, KTO, CPO, ORPO, GKD.

No log-ratio is clamped, means over sequences count those without a token, and the KL term is a plain k3 without clamps
(``beta`` is ``kl_loss_coef``, 0 by default, so off here). The entropy bonus is a mean over tokens.
"""

from __future__ import annotations

from typing import Any

from xloss.losses.ce import CELossConfig
from xloss.losses.presets.base import Preset, of_policy, of_preference
from xloss.losses.presets.distillation import distillation

_TERMS: dict[str, Any] = {
    "kl_loss_type": "k3",
    "kl_clamp_in": None,
    "kl_clamp_out": None,
    "entropy_reduction": "token",
}
_SEQUENCES: dict[str, Any] = {"loss_reduction": "sample", "count_empty_sequences": True}
_PAIRS: dict[str, Any] = {"layout": "halves", "count_empty_sequences": True}


def _grpo(
    name: str,
    summary: str,
    options: str,
    loss: dict[str, Any] | None = None,
    required: dict[str, Any] | None = None,
    **fields: Any,
) -> Preset:
    inner = {"loss_type": "ppo", "log_ratio_clamp": None} | (loss or {})
    return of_policy(f"trl/{name}", inner, summary, f"GRPOConfig({options})", required, **_TERMS, **fields)


def _dpo(loss_type: str, summary: str, name: str | None = None, required: dict[str, Any] | None = None) -> Preset:
    options = f"DPOConfig(loss_type='{loss_type}', beta=0.1)"
    return of_preference(f"trl/{name or loss_type}", loss_type, summary, options, required, beta=0.1, **_PAIRS)


def _kto(loss_type: str, summary: str) -> Preset:
    return of_preference(
        f"trl/{loss_type}",
        loss_type,
        summary,
        f"KTOConfig(loss_type='{loss_type}', beta=0.1)",
        beta=0.1,
        count_empty_sequences=True,
    )


PRESETS = [
    Preset("trl/sft", CELossConfig, {}, "mean over all tokens", "SFTConfig(loss_type='nll')"),
    Preset("trl/dft", CELossConfig, {"token_scaling": "dft"}, "dynamic fine-tuning", "SFTConfig(loss_type='dft')"),
    _grpo("grpo", "mean over answers of token means", "loss_type='grpo', epsilon=0.2", **_SEQUENCES),
    _grpo("bnpo", "mean over tokens (here of the global batch)", "loss_type='bnpo', epsilon=0.2"),
    _grpo("dapo", "mean over the tokens of the global batch", "loss_type='dapo', epsilon=0.2"),
    _grpo(
        "dr_grpo",
        "sums over the constant max_completion_length",
        "loss_type='dr_grpo', epsilon=0.2",
        required={"norm_length": 256},
        loss_reduction="sample_sum_norm",
        count_empty_sequences=True,
    ),
    _grpo(
        "cispo",
        "upper cap alone, absolute; TRL's own epsilon_high has no usable default",
        "loss_type='cispo', epsilon_high=5.0",
        {"loss_type": "cispo", "clip_low_threshold": 0.0, "clip_high_threshold": 5.0},
    ),
    _grpo(
        "sapo",
        "a sigmoid gate for a clip",
        "loss_type='sapo', sapo_temperature_pos=1.0, sapo_temperature_neg=1.05",
        {"loss_type": "sapo", "tau_pos": 1.0, "tau_neg": 1.05},
        **_SEQUENCES,
    ),
    _grpo(
        "luspo",
        "GSPO times its sequence's length",
        "loss_type='luspo', importance_sampling_level='sequence', epsilon=2e-3, epsilon_high=2.5e-3",
        {"loss_type": "luspo", "ratio_level": "sequence", "cliprange_low": 2e-3, "cliprange_high": 2.5e-3},
        **_SEQUENCES,
    ),
    of_policy(
        "trl/vespo",
        {"loss_type": "vespo", "k_pos": 2.0, "lambda_pos": 3.0, "k_neg": 3.0, "lambda_neg": 2.0},
        "a smooth weight of the sequence's ratio",
        "GRPOConfig(loss_type='vespo', vespo_k_pos=2, vespo_lambda_pos=3, vespo_k_neg=3, vespo_lambda_neg=2)",
        **_TERMS,
    ),
    _grpo(
        "gspo",
        "clip of the sequence's ratio; its epsilon stays 0.2 unless set",
        "loss_type='grpo', importance_sampling_level='sequence', epsilon=3e-4, epsilon_high=4e-4",
        {"ratio_level": "sequence", "cliprange_low": 3e-4, "cliprange_high": 4e-4},
        **_SEQUENCES,
    ),
    _grpo(
        "gspo_token",
        "the same with each token's own gradient",
        "loss_type='grpo', importance_sampling_level='sequence_token', epsilon=3e-4, epsilon_high=4e-4",
        {"ratio_level": "sequence_token", "cliprange_low": 3e-4, "cliprange_high": 4e-4},
        **_SEQUENCES,
    ),
    of_policy(
        "trl/gmpo",
        "gmpo",
        "geometric mean of clipped token ratios",
        "experimental GMPO, epsilon=0.4 in log space",
        **_TERMS,
        **_SEQUENCES,
    ),
    of_policy(
        "trl/a_star_po",
        "a_star_po",
        "regression onto the optimal advantage",
        "experimental A2PO, beta2=1e-3",
        **_SEQUENCES,
    ),
    of_policy(
        "trl/rloo", "rloo", "clip of the answer's ratio; KL 0.05 in the reward", "RLOOConfig(epsilon=0.2)", **_SEQUENCES
    ),
    of_policy(
        "trl/ppo",
        {"loss_type": "ppo", "log_ratio_clamp": None},
        "PPO with a critic: values and returns wanted",
        "experimental PPOConfig(cliprange=0.2, vf_coef=0.1, cliprange_value=0.2)",
        value_loss={"loss_type": "mse", "value_clip": 0.2},
        value_loss_coef=0.1,
    ),
    _dpo("sigmoid", "direct preference optimisation", name="dpo"),
    _dpo("sigmoid_norm", "DPO on means per token"),
    _dpo("hinge", "hinge loss on the margin: SLiC, RSO"),
    _dpo("ipo", "squared distance to a margin, means per token"),
    _dpo("exo_pair", "reverse KL to smoothed labels", required={"label_smoothing": 1e-3}),
    _dpo("nca_pair", "keeps the chosen likely in itself"),
    _dpo("robust", "unbiased with some labels wrong", required={"label_smoothing": 0.1}),
    _dpo("bco_pair", "binary classifier of both answers"),
    _dpo("sppo_hard", "self-play, scores regressed"),
    _dpo("aot", "margins compared as distributions"),
    _dpo("aot_unpaired", "scores compared as distributions"),
    _dpo("apo_zero", "chosen up, rejected down"),
    _dpo("apo_down", "both down, rejected more"),
    of_preference(
        "trl/discopop",
        {"loss_type": "discopop", "tau": 0.05},
        "a loss found by a language model",
        "DPOConfig(loss_type='discopop', discopop_tau=0.05, beta=0.1)",
        beta=0.1,
        **_PAIRS,
    ),
    _kto("kto", "single answers against a reference point"),
    _kto("apo_zero_unpaired", "KTO around 0"),
    _kto("bco", "binary classifier of single answers (BCOTrainer)"),
    of_preference(
        "trl/cpo",
        {"loss_type": "cpo", "nll_coef": 1.0},
        "DPO without a reference, and likelihood",
        "experimental CPOConfig(beta=0.1, cpo_alpha=1.0)",
        beta=0.1,
        layout="halves",
    ),
    of_preference(
        "trl/simpo",
        {"loss_type": "simpo", "gamma": 0.5, "nll_coef": 1.0},
        "SimPO with likelihood beside it; nll_coef=0 is SimPO",
        "experimental CPOConfig(loss_type='simpo', beta=0.1, simpo_gamma=0.5, cpo_alpha=1.0)",
        beta=0.1,
        layout="halves",
    ),
    of_preference(
        "trl/orpo",
        "orpo",
        "log odds and likelihood, no reference",
        "experimental ORPOConfig(beta=0.1)",
        beta=0.1,
        layout="halves",
    ),
    distillation(
        "trl/gkd",
        "JSD, without a T^2 factor",
        "experimental GKDConfig(beta=0.5, temperature=0.9)",
        divergence="jsd",
        beta=0.5,
        temperature=0.9,
    ),
]
