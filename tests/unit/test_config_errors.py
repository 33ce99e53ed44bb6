"""Bad options and items.

Contract: what cannot mean anything does not validate. The message names the field, the value and what is accepted, and
suggests the name that was probably meant. Configs are frozen and survive JSON.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from pydantic import ValidationError

from xloss import CELossConfig, GRPOLossConfig, MTPLossConfig, RLLossContextInputItem, SoftCELossConfig

T = 5
VANILLA = {"loss_type": "vanilla", "cliprange_low": 0.2, "cliprange_high": 0.2}


def rl_item(**fields: Any) -> RLLossContextInputItem:
    labels = torch.zeros(T, dtype=torch.int64)
    return RLLossContextInputItem(**({"shifted_labels": labels, "advantages": torch.ones(T)} | fields))


CONFIGS: dict[str, tuple[Callable[[], Any], tuple[str, ...]]] = {
    "chunk-0": (lambda: CELossConfig(chunk_size=0), ("chunk_size", "0")),
    "budget-negative": (lambda: CELossConfig(logits_budget=-1), ("logits_budget", "-1")),
    "temperature": (lambda: CELossConfig(temperature=0.0), ("temperature", "0")),
    "temperature-inf": (lambda: CELossConfig(temperature=float("inf")), ("temperature", "inf")),
    "softcap": (lambda: CELossConfig(softcap=-1.0), ("softcap", "-1")),
    "mode": (lambda: CELossConfig(mode="liger"), ("mode", "liger", "eager")),
    "plan": (lambda: CELossConfig(plan="three_pass"), ("plan", "three_pass", "two_pass")),
    "reduction": (lambda: CELossConfig(loss_reduction="mean"), ("loss_reduction", "mean", "square")),
    "smoothing": (lambda: CELossConfig(label_smoothing=1.5), ("label_smoothing", "1.5")),
    "smoothing-kind": (lambda: CELossConfig(label_smoothing_kind="megatron"), ("megatron", "label_smoothing > 0")),
    "two-forms": (
        lambda: CELossConfig(focal_gamma=2.0, token_scaling="dft"),
        ("focal_gamma=2.0", "token_scaling='dft'"),
    ),
    "smoothed-focal": (lambda: CELossConfig(focal_gamma=2.0, label_smoothing=0.1), ("focal_gamma=2.0", "0.1")),
    "gamma": (lambda: CELossConfig(focal_gamma=-1.0), ("focal_gamma", "-1")),
    "scaling": (lambda: CELossConfig(token_scaling="phi"), ("token_scaling", "phi", "chord_phi")),
    "cutoff": (lambda: CELossConfig(token_scaling="dft", cutoff_prob=0.5), ("cutoff_prob=0.5", "chord_phi", "dft")),
    "cutoff-0": (lambda: CELossConfig(token_scaling="chord_phi", cutoff_prob=0.0), ("cutoff_prob", "0")),
    "mtp-depth": (lambda: MTPLossConfig(mtp_depth=0), ("mtp_depth", "0")),
    "mtp-kl": (lambda: MTPLossConfig(kl_loss_type="k3", z_loss_coef=0.1), ("kl_loss_type", "z_loss_coef")),
    "soft-smoothing": (lambda: SoftCELossConfig(label_smoothing=0.1), ("label_smoothing", "SoftCELossConfig")),
    "misspelt": (lambda: CELossConfig(chunk_sise=4), ("chunk_sise", "Did you mean 'chunk_size'?")),
    "grpo-reduction": (
        lambda: GRPOLossConfig(policy_loss_cfg=VANILLA, loss_reduction="mean"),
        ("loss_reduction", "mean", "sample_sum_norm"),
    ),
    "norm-missing": (
        lambda: GRPOLossConfig(policy_loss_cfg=VANILLA, loss_reduction="sample_sum_norm"),
        ("norm_length", "sample_sum_norm"),
    ),
    "norm-unused": (lambda: CELossConfig(norm_length=7.0), ("norm_length", "token")),
    "empty-unused": (lambda: CELossConfig(count_empty_sequences=True), ("count_empty_sequences", "token")),
    "policy-misspelt": (
        lambda: GRPOLossConfig(policy_loss_cfg=VANILLA | {"cliprange_hihg": 0.3}),
        ("cliprange_hihg", "Did you mean 'cliprange_high'?"),
    ),
    "policy-type": (
        lambda: GRPOLossConfig(policy_loss_cfg={"loss_type": "vanila"}),
        ("vanila", "Did you mean 'vanilla'?", "cispo"),
    ),
    "policy-missing": (
        lambda: GRPOLossConfig(policy_loss_cfg={"loss_type": "vanilla", "cliprange_low": 0.2}),
        ("cliprange_high", "required"),
    ),
    "policy-foreign": (
        lambda: GRPOLossConfig(policy_loss_cfg={"loss_type": "reinforce", "cliprange_low": 0.2}),
        ("cliprange_low",),
    ),
    "policy-absent": (GRPOLossConfig, ("policy_loss_cfg", "required")),
    "dual-clip": (lambda: GRPOLossConfig(policy_loss_cfg=VANILLA | {"clip_ratio_c": 0.5}), ("clip_ratio_c", "0.5")),
    "thresholds": (
        lambda: GRPOLossConfig(
            policy_loss_cfg={"loss_type": "cispo", "clip_low_threshold": 3, "clip_high_threshold": 2}
        ),
        ("clip_low_threshold", "clip_high_threshold"),
    ),
    "kl-type": (lambda: GRPOLossConfig(policy_loss_cfg=VANILLA, use_kl_loss=True), ("kl_loss_type", "use_kl_loss")),
    "kl-name": (
        lambda: GRPOLossConfig(policy_loss_cfg=VANILLA, use_kl_loss=True, kl_loss_type="k4"),
        ("kl_loss_type", "k4", "low_var_kl"),
    ),
    "item-misspelt": (lambda: rl_item(advantage=torch.ones(T)), ("advantage", "Did you mean 'advantages'?")),
    "item-missing": (lambda: RLLossContextInputItem(shifted_labels=torch.zeros(T)), ("advantages", "required")),
    "item-list": (lambda: rl_item(advantages=[1.0] * T), ("advantages", "Tensor")),
}


@pytest.mark.parametrize(("run", "words"), CONFIGS.values(), ids=CONFIGS)
def test_config(run: Callable[[], Any], words: tuple[str, ...]) -> None:
    with pytest.raises(ValidationError) as caught:
        run()
    message = str(caught.value)
    assert [w for w in words if w not in message] == [], message


def test_configs_are_frozen_and_round_trip() -> None:
    cfg = GRPOLossConfig(
        policy_loss_cfg=VANILLA | {"clip_ratio_c": None}, use_kl_loss=True, kl_loss_type="k3", chunk_size=9
    )
    with pytest.raises(ValidationError, match="frozen"):
        cfg.chunk_size = 4
    with pytest.raises(ValidationError, match="frozen"):
        cfg.policy_loss_cfg.cliprange_low = 0.1
    assert GRPOLossConfig.model_validate_json(cfg.model_dump_json()) == cfg
