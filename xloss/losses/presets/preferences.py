"""Preference losses under the names of their papers."""

from __future__ import annotations

from typing import Any

from xloss.losses.presets.base import of_preference

_F_DPO = "f-DPO, arXiv 2309.16240; beta 0.1"
_NO_EPS: dict[str, Any] = {"label_smoothing": 0.1}

PRESETS = [
    of_preference("dpo", "sigmoid", "direct preference optimisation", "arXiv 2305.18290; beta 0.1"),
    of_preference("dpo_norm", "sigmoid_norm", "DPO on means per token", "open-instruct; beta 5", beta=5.0),
    of_preference("cdpo", "sigmoid", "DPO with some labels wrong", "Mitchell, 2023; beta 0.1", _NO_EPS),
    of_preference("robust_dpo", "robust", "unbiased with some labels wrong", "arXiv 2403.00409; beta 0.1", _NO_EPS),
    of_preference("hinge", "hinge", "hinge loss on the margin: SLiC, RSO", "arXiv 2309.06657; beta 0.1"),
    of_preference("ipo", "ipo", "squared distance to a margin", "arXiv 2310.12036; beta 0.1, means per token"),
    of_preference("exo", "exo_pair", "reverse KL to smoothed labels", "arXiv 2402.00856; beta 0.1, eps 1e-3"),
    of_preference("nca", "nca_pair", "keeps the chosen likely in itself", "arXiv 2402.05369; beta 0.1"),
    of_preference("bco_pair", "bco_pair", "binary classifier of both answers", "arXiv 2404.04656; beta 0.1"),
    of_preference("bco", "bco", "binary classifier of single answers", "arXiv 2404.04656; beta 0.1"),
    of_preference("sppo", "sppo_hard", "self-play, scores regressed", "arXiv 2405.00675; beta 0.1"),
    of_preference("aot", "aot", "margins compared as distributions", "arXiv 2406.05882; beta 0.1"),
    of_preference("aot_unpaired", "aot_unpaired", "scores compared as distributions", "arXiv 2406.05882; beta 0.1"),
    of_preference("apo_zero", "apo_zero", "chosen up, rejected down", "arXiv 2408.06266; beta 0.1"),
    of_preference("apo_down", "apo_down", "both down, rejected more", "arXiv 2408.06266; beta 0.1"),
    of_preference("apo_zero_unpaired", "apo_zero_unpaired", "KTO around 0", "arXiv 2408.06266; beta 0.1"),
    of_preference("discopop", "discopop", "a loss found by a language model", "arXiv 2406.08414; beta 0.1, tau 0.05"),
    of_preference("f_dpo_forward_kl", "sigmoid", "DPO under forward KL", _F_DPO, f_divergence="forward_kl"),
    of_preference("f_dpo_js", "sigmoid", "DPO under Jensen-Shannon", _F_DPO, f_divergence="js"),
    of_preference("f_dpo_alpha", "sigmoid", "DPO under alpha-divergence", _F_DPO + ", alpha 0.5", f_divergence="alpha"),
    of_preference(
        "ld_dpo", "sigmoid", "less weight on surplus length", "arXiv 2409.06411; beta 0.1", {"ld_alpha": 0.5}
    ),
    of_preference(
        "wpo",
        "sigmoid",
        "pairs weighed by how likely they are now",
        "arXiv 2406.11827; beta 0.1, weights up to 1",
        use_weighting=True,
        max_weighting=1.0,
    ),
    of_preference(
        "rpo",
        ["sigmoid", "sft"],
        "DPO and likelihood of the chosen",
        "arXiv 2404.19733; beta 0.1, both terms 1",
    ),
    of_preference(
        "mpo",
        [
            {"loss_type": "sigmoid", "weight": 0.8},
            {"loss_type": "bco_pair", "weight": 0.2},
            {"loss_type": "sft", "weight": 1.0},
        ],
        "preference, quality and generation together",
        "arXiv 2411.10442; 0.8, 0.2, 1, beta 0.1",
    ),
    of_preference("cpo", "cpo", "DPO without a reference, and likelihood", "arXiv 2401.08417; beta 0.1, NLL 1"),
    of_preference("simpo", "simpo", "means per token and a target margin", "arXiv 2405.14734; beta 2, gamma 0.5"),
    of_preference("alphapo", "alphapo", "SimPO with a bent reward", "arXiv 2501.03884; beta 2, gamma 0.5, alpha 0.25"),
    of_preference("orpo", "orpo", "log odds and likelihood, no reference", "arXiv 2403.07691; beta 0.1"),
    of_preference("kto", "kto", "single answers against a reference point", "arXiv 2402.01306; beta 0.1, weights 1"),
]
