"""Supervised losses under the names of their papers."""

from __future__ import annotations

from xloss.losses.ce import CELossConfig
from xloss.losses.mtp import MTPLossConfig
from xloss.losses.presets.base import Preset
from xloss.losses.soft_ce import SoftCELossConfig

PRESETS = [
    Preset("cross_entropy", CELossConfig, {}, "mean over all tokens", "-"),
    Preset(
        "label_smoothing",
        CELossConfig,
        {},
        "mass on every token, the label included",
        "arXiv 1512.00567",
        {"label_smoothing": 0.1},
    ),
    Preset(
        "label_smoothing_megatron",
        CELossConfig,
        {"label_smoothing_kind": "megatron"},
        "mass on every token but the label",
        "Megatron-LM, NeMo",
        {"label_smoothing": 0.1},
    ),
    Preset("z_loss", CELossConfig, {"z_loss_coef": 1e-4}, "cross-entropy and lse^2", "PaLM, arXiv 2204.02311; 1e-4"),
    Preset("focal", CELossConfig, {"focal_gamma": 2.0}, "less weight on easy tokens", "arXiv 1708.02002; gamma 2"),
    Preset("dft", CELossConfig, {"token_scaling": "dft"}, "weighed by the label's probability", "arXiv 2508.05629"),
    Preset(
        "chord_phi",
        CELossConfig,
        {"token_scaling": "chord_phi"},
        "weighed by p (1 - p)",
        "arXiv 2508.11408; no cutoff",
    ),
    Preset("soft_cross_entropy", SoftCELossConfig, {}, "K weighted targets a token, summed", "Tinker"),
    Preset("mtp", MTPLossConfig, {}, "one token further ahead", "DeepSeek-V3, arXiv 2412.19437; depth 1"),
]
