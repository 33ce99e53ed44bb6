"""Configs of token-ratio losses and of the KL penalty.

Contract: bounds come as offsets or as thresholds, one form at a time, and a bound left out is the default in that form;
a config survives being dumped and loaded; what contradicts itself raises, naming the fields; a kernel is used exactly
where it knows the formula.
"""

from __future__ import annotations

import math
from typing import Any

import pytest
from pydantic import ValidationError

from xloss import GRPOLossConfig
from xloss.losses.policies import find_policy_loss, policy_losses


def build(loss_type: str, **fields: Any) -> Any:
    return find_policy_loss(loss_type)(**fields)


@pytest.mark.parametrize(
    ("loss_type", "fields", "bounds"),
    [
        ("ppo", {}, (0.8, 1.2)),
        ("ppo", {"cliprange_high": 0.28}, (0.8, 1.28)),
        ("ppo", {"clip_high_threshold": 1.5}, (0.8, 1.5)),
        ("ppo", {"clip_low_threshold": 0.5, "cliprange_low": None}, (0.5, 1.2)),
        ("ppo", {"cliprange_low": None, "cliprange_high": None}, (0.8, 1.2)),
        ("cispo", {}, (0.0, 5.0)),
        ("cispo", {"cliprange_low": 0.2, "cliprange_high": 0.28}, (0.8, 1.28)),
        ("cispo", {"cliprange_high": 2.0}, (0.0, 3.0)),
        ("rollout_is", {}, (0.8, 1.2)),
        ("tis", {}, (0.0, 1.0)),
    ],
)
def test_bounds(loss_type: str, fields: dict[str, Any], bounds: tuple[float, float]) -> None:
    cfg = build(loss_type, **fields)
    assert cfg.ratio_bounds() == pytest.approx(bounds)
    again = type(cfg).model_validate(cfg.model_dump())
    assert again == cfg and again.ratio_bounds() == cfg.ratio_bounds()


@pytest.mark.parametrize("name", sorted(set(policy_losses()) - {"vanilla"}))
def test_dumped_configs_load(name: str) -> None:
    cfg = GRPOLossConfig(policy_loss_cfg={"loss_type": name})
    assert GRPOLossConfig.model_validate(cfg.model_dump()) == cfg
    assert GRPOLossConfig.model_validate_json(cfg.model_dump_json()) == cfg


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"loss_type": "ppo", "cliprange_low": 0.1, "clip_high_threshold": 1.2}, "not both"),
        ({"loss_type": "cispo", "cliprange_low": 0.1, "clip_low_threshold": 0.1}, "not both"),
        ({"loss_type": "cispo", "clip_low_threshold": 2.0, "clip_high_threshold": 1.0}, "is above clip_high_threshold"),
        ({"loss_type": "ppo", "cliprange_high": 0.5, "delta": 1.4}, "delta=1.4 is below"),
        ({"loss_type": "ppo", "dual_clip_c": 1.0}, "dual_clip_c"),
        ({"loss_type": "ppo", "log_ratio_clamp": 0.0}, "log_ratio_clamp"),
        ({"loss_type": "ppo", "cliprange_low": math.nan}, "cliprange_low"),
        ({"loss_type": "cispo", "clip_high_threshold": math.inf}, "clip_high_threshold"),
        ({"loss_type": "sapo", "tau_pos": 0.0}, "tau_pos"),
        ({"loss_type": "dppo_tv", "delta_low": -0.1}, "delta_low"),
        ({"loss_type": "ppo", "clip_ratio": 0.2}, "unknown field"),
    ],
)
def test_refused(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        GRPOLossConfig(policy_loss_cfg=fields)


KL = {"use_kl_loss": True, "kl_loss_type": "k3"}


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        (KL | {"kl_ratio_anchor": "rollout"}, "describe the ratio of kl_loss_grad='unbiased'"),
        (KL | {"kl_loss_grad": "straight_through", "kl_clamp_straight_through": True}, "means nothing"),
        (KL | {"kl_clamp_weighted": True}, "kl_clamp_weighted=True is for kl_loss_grad 'unbiased' and"),
        (KL | {"kl_clamp_in": 0.0}, "kl_clamp_in"),
        (KL | {"kl_clamp_out": "k3"}, "kl_clamp_out"),
        ({"use_kl_loss": True}, "kl_loss_type must be given"),
    ],
)
def test_refused_kl(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        GRPOLossConfig(policy_loss_cfg={"loss_type": "ppo"}, **fields)


def test_kernels_know_what_they_say() -> None:
    """A formula without a kernel must not be handed to the one that is nearest."""
    without = {name for name, cls in policy_losses().items() if name != "vanilla" and cls().twin() is None}
    assert {"sapo", "topr", "rollout_is", "dppo_tv", "dppo_kl", "ref_kl"} <= without
    assert build("cispo", unified_mask=True).twin() is None
    plain = GRPOLossConfig(policy_loss_cfg={"loss_type": "ppo"}, **KL)
    assert plain.kl_in_kernel("old")
    assert not plain.model_copy(update={"kl_clamp_straight_through": True}).kl_in_kernel("old")
    other = {"kl_loss_grad": "unbiased", "kl_ratio_anchor": "rollout"}
    assert not plain.model_copy(update=other).kl_in_kernel("old")
    assert plain.model_copy(update=other).kl_in_kernel("rollout")
