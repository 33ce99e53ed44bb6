"""Policy losses under the names of their papers."""

from __future__ import annotations

from typing import Any

from xloss.losses.oreal import OrealLossConfig
from xloss.losses.presets.base import of_policy

_CLIP_HIGHER: dict[str, Any] = {"loss_type": "ppo", "cliprange_low": 0.2, "cliprange_high": 0.28}
_SEQUENCES = "sample"

PRESETS = [
    of_policy(
        "grpo",
        "ppo",
        "PPO's clip, mean over answers of token means; KL by use_kl_loss=True",
        "arXiv 2402.03300; clip 0.2, k3",
        loss_reduction="sample",
        kl_loss_type="k3",
    ),
    of_policy("bnpo", "ppo", "PPO's clip, mean over all tokens", "TRL loss_type=bnpo; clip 0.2"),
    of_policy("dapo", _CLIP_HIGHER, "wider clip upwards, mean over all tokens", "arXiv 2503.14476; clip 0.2, 0.28"),
    of_policy(
        "dr_grpo",
        "ppo",
        "sums of tokens over a constant length: no length bias",
        "arXiv 2503.20783; clip 0.2",
        required={"norm_length": 1024},
        loss_reduction="sample_sum_norm",
    ),
    of_policy("ppo", "ppo", "clip of the token's ratio, mean over all tokens", "arXiv 1707.06347; clip 0.2"),
    of_policy(
        "gspo", "gspo", "clip of the sequence's ratio", "arXiv 2507.18071; clip 3e-4, 4e-4", loss_reduction=_SEQUENCES
    ),
    of_policy(
        "gspo_token",
        "gspo_token",
        "GSPO for advantages that differ within a sequence",
        "arXiv 2507.18071; clip 3e-4, 4e-4",
        loss_reduction=_SEQUENCES,
    ),
    of_policy(
        "cispo",
        "cispo",
        "clipped importance weights: no token loses its gradient",
        "MiniMax-M1, arXiv 2506.13585; weights in [0, 5], absolute",
    ),
    of_policy("sapo", "sapo", "a sigmoid gate for a clip", "arXiv 2511.20347; tau 1, 1.05", loss_reduction=_SEQUENCES),
    of_policy(
        "gmpo",
        "gmpo",
        "geometric mean of clipped token ratios",
        "arXiv 2507.20673; clip 0.4 in log space",
        loss_reduction=_SEQUENCES,
    ),
    of_policy(
        "luspo",
        "luspo",
        "GSPO times its sequence's length",
        "arXiv 2602.05261; clip 2e-3, 2.5e-3",
        loss_reduction=_SEQUENCES,
    ),
    of_policy("vespo", "vespo", "a smooth weight of the sequence's ratio", "arXiv 2602.10693; k 2, 3, lambda 3, 2"),
    of_policy(
        "rloo",
        "rloo",
        "clip of the whole answer's ratio; advantages against the other answers",
        "arXiv 2402.14740; clip 0.2",
        loss_reduction=_SEQUENCES,
    ),
    of_policy("reinforce", "reinforce", "plain policy gradient", "Williams, 1992; GPG, arXiv 2504.02546"),
    of_policy("importance_sampling", "importance_sampling", "importance-weighted, without a clip", "Tinker"),
    of_policy("dro", "dro", "a quadratic pull for a clip", "arXiv 2405.19107; beta 0.05 as Tinker's example"),
    of_policy("kimi", "kimi", "mirror descent of Kimi k1.5", "arXiv 2501.12599; tau 0.1 as ROLL"),
    of_policy("topr", "topr", "good answers in full, bad ones tapered", "arXiv 2503.14286; weights 1"),
    of_policy("tis", "tis", "ratios truncated at 1, as weights", "ROLL pg_variant=tis; weights in [0, 1]"),
    of_policy("rollout_is", "rollout_is", "ratios to the sampler, 0 out of bounds", "GLM-5, arXiv 2602.15763; 0.2"),
    of_policy(
        "dppo_tv",
        "dppo_tv",
        "drops tokens whose probability moved too far (total variation)",
        "arXiv 2602.04879; delta 0.2, cap 20",
    ),
    of_policy(
        "dppo_kl",
        {"loss_type": "dppo_kl", "delta_low": 0.05, "delta_high": 0.05},
        "the same by the binary KL",
        "arXiv 2602.04879; delta 0.05, cap 20",
    ),
    of_policy("clip_cov", "clip_cov", "also drops tokens of high covariance", "arXiv 2505.22617; 2e-4 in (1, 5)"),
    of_policy("kl_cov", "kl_cov", "a KL penalty on tokens of high covariance", "arXiv 2505.22617; 2e-4, coef 0.1"),
    of_policy("m2po", "m2po", "second moment of the log-ratio bounded", "arXiv 2510.01161; threshold 0.04"),
    of_policy(
        "decoupled_ppo",
        "decoupled_ppo",
        "clip around the proximal policy, weight of the sampler",
        "AReaL, arXiv 2505.24298; clip 0.2, weight up to 5",
    ),
    of_policy(
        "oreal",
        {"loss_type": "vanilla", "cliprange_low": 0.2, "cliprange_high": 0.2},
        "likelihood on good answers, policy loss on all",
        "arXiv 2502.06781; XTuner's factors of 1",
        config=OrealLossConfig,
    ),
    of_policy(
        "vapo",
        _CLIP_HIGHER,
        "clip-higher and likelihood on good answers; rewards wanted",
        "arXiv 2504.05118; clip 0.2, 0.28",
        required={"positive_nll_coef": 0.1},
    ),
    of_policy("fipo", "fipo", "each token weighed by what follows it", "arXiv 2603.19835; ms-swift's numbers"),
    of_policy(
        "real",
        "real",
        "good and bad answers of a prompt as two classes",
        "arXiv 2602.05630; tau 0.5",
        loss_reduction="prompt",
    ),
    of_policy(
        "a_star_po",
        "a_star_po",
        "regression onto the optimal advantage",
        "arXiv 2505.20686; beta2 1e-3",
        loss_reduction=_SEQUENCES,
    ),
    of_policy(
        "opsm",
        "ppo",
        "GRPO without bad answers that have left the policy",
        "DeepSeek-V3.2, arXiv 2512.02556",
        required={"opsm_delta": 1e-4},
        loss_reduction=_SEQUENCES,
    ),
    of_policy(
        "ref_kl",
        {"loss_type": "ref_kl", "anchor": "rollout"},
        "distillation from the reference on one's own samples",
        "prime-rl ref_kl; delta 0.2, kl_tau 1e-3",
    ),
    of_policy(
        "segment_ratio",
        "segment_ratio",
        "clip of the ratio of a turn",
        "ROLL ratio_type=segment; clip 0.2",
        loss_reduction=_SEQUENCES,
    ),
]
