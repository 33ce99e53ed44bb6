"""Policy losses that couple tokens, at the public door.

Contract: they run the two-pass plan and `explain()` says what couples; what they need is asked for by name; a sequence
or a prompt whose parts stand in several places is an error, never a smaller one; metrics are taken at the level used.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from pydantic import ValidationError
from torch import Tensor

from tests.unit.trio import T, every_mode, tensors
from xloss import GRPOLossConfig, GRPOLossContext, GRPOLossKwargs, RLLossContextInputItem
from xloss.errors import MissingFieldError, OptionError, UnsupportedError

VANILLA = {"loss_type": "vanilla", "cliprange_low": 0.2, "cliprange_high": 0.2}
BOUNDS = torch.tensor([0, 4, 5, T])
COUPLED: dict[str, tuple[dict[str, Any], str]] = {
    "gspo": ({"policy_loss_cfg": {"loss_type": "gspo"}}, "GSPOConfig couples the tokens of a sequence"),
    "level": (
        {"policy_loss_cfg": {"loss_type": "sapo", "ratio_level": "segment"}},
        "SAPOConfig couples the tokens of a sequence",
    ),
    "real": ({"policy_loss_cfg": {"loss_type": "real"}}, "REALConfig couples the answers of a prompt"),
    "opsm": ({"policy_loss_cfg": VANILLA, "opsm_delta": 0.1}, "opsm_delta masks by the mean over a sequence"),
    "entropy": (
        {"policy_loss_cfg": VANILLA, "top_entropy_quantile": 0.2},
        "top_entropy_quantile ranks the tokens of the micro-batch",
    ),
}
every_coupled = pytest.mark.parametrize(("fields", "why"), COUPLED.values(), ids=COUPLED)


def item(labels: Tensor, **fields: Any) -> RLLossContextInputItem:
    g = torch.Generator().manual_seed(1)
    drawn = {n: torch.randn(labels.shape, generator=g) for n in ("advantages", "old_logprobs", "rollout_logprobs")}
    groups = torch.tensor([[0] * 5 + [1] * (T - 5)])
    given = drawn | {"group_ids": groups} | fields
    return RLLossContextInputItem(shifted_labels=labels, **{n: x for n, x in given.items() if x is not None})


def build(labels: Tensor, cfg: GRPOLossConfig, bounds: Tensor | None = BOUNDS, **fields: Any) -> GRPOLossContext:
    (kwargs,) = GRPOLossContext.build_batches_loss_kwargs(
        [item(labels, **fields)], cfg, cu_seq_lens_list=None if bounds is None else [bounds]
    )
    return GRPOLossContext(cfg, kwargs)


@every_coupled
def test_explain_says_what_couples(fields: dict[str, Any], why: str) -> None:
    hidden, weight, labels = tensors()
    ctx = build(labels, GRPOLossConfig(mode="chunk", **fields))
    plan = ctx.explain(hidden, weight)
    assert plan.kind == "two-pass"
    assert f"the loss couples tokens: {why}" in plan.reasons
    _, info = ctx.forward(hidden, weight)
    assert info.plan.kind == "two-pass"


@every_coupled
def test_one_pass_is_refused(fields: dict[str, Any], why: str) -> None:
    hidden, weight, labels = tensors()
    ctx = build(labels, GRPOLossConfig(mode="chunk", plan="one_pass", **fields))
    with pytest.raises(UnsupportedError, match=why):
        ctx.forward(hidden, weight)


def test_several_reasons() -> None:
    cfg = GRPOLossConfig(policy_loss_cfg={"loss_type": "gspo"}, top_entropy_quantile=0.5)
    assert list(cfg.coupled_by()) == ["batch", "sequence"]


@pytest.mark.parametrize("name", ["gspo", "level", "real", "opsm"])
def test_a_pack_needs_bounds(name: str) -> None:
    hidden, weight, labels = tensors()
    fields, why = COUPLED[name]
    ctx = build(labels, GRPOLossConfig(**fields), bounds=None)
    with pytest.raises(MissingFieldError, match=f"cu_seq_lens.*{why}"):
        ctx.forward(hidden, weight)


@every_mode
def test_ranking_by_entropy_needs_no_bounds(run: dict[str, Any]) -> None:
    hidden, weight, labels = tensors()
    fields, _ = COUPLED["entropy"]
    _, info = build(labels, GRPOLossConfig(**fields, **run), bounds=None).forward(hidden, weight)
    masked = round(float(info.metrics["low_entropy_masked_frac"].result()) * 9)
    assert masked == 7  # of 9 live tokens, 0.2: those at or above the 0.8 quantile, which lies between the last two


@every_coupled
def test_a_cut_sequence_is_refused(fields: dict[str, Any], why: str) -> None:
    """chunk() would leave shorter sequences; joined again, the pieces are whole."""
    hidden, weight, labels = tensors()
    ctx = build(labels, GRPOLossConfig(mode="chunk", **fields))
    loss, _ = ctx.forward(hidden, weight)
    pieces = ctx.loss_kwargs.chunk(6)
    with pytest.raises(UnsupportedError, match=f"{why}.*chunk"):
        GRPOLossContext(ctx.loss_cfg, pieces[0]).forward(hidden[:, :6], weight)
    joined = GRPOLossKwargs.cat(pieces)
    assert torch.equal(GRPOLossContext(ctx.loss_cfg, joined).forward(hidden, weight)[0], loss)
    for some in (pieces[:1], pieces[::-1], [pieces[0], pieces[0]]):
        with pytest.raises(UnsupportedError, match=f"{why}.*chunk"):
            GRPOLossContext(ctx.loss_cfg, GRPOLossKwargs.cat(some)).forward(hidden, weight)
    (whole,) = ctx.loss_kwargs.chunk(T)
    assert torch.equal(GRPOLossContext(ctx.loss_cfg, whole).forward(hidden, weight)[0], loss)


def test_a_prompt_in_two_micro_batches() -> None:
    _, _, labels = tensors()
    cfg = GRPOLossConfig(policy_loss_cfg={"loss_type": "real"})
    with pytest.raises(OptionError, match=r"one micro-batch.*\[0, 1\]"):
        GRPOLossContext.build_batches_loss_kwargs([item(labels)] * 2, cfg, cu_seq_lens_list=[BOUNDS] * 2)
    other = item(labels, group_ids=torch.full((1, T), 7))
    GRPOLossContext.build_batches_loss_kwargs([item(labels), other], cfg, cu_seq_lens_list=[BOUNDS] * 2)
    negative = item(labels, group_ids=torch.full((1, T), -1))
    with pytest.raises(OptionError, match="negative"):
        GRPOLossContext.build_batches_loss_kwargs([negative], cfg, cu_seq_lens_list=[BOUNDS])


@pytest.mark.parametrize(
    ("policy", "field", "given"),
    [
        ({"loss_type": "real"}, "group_ids", {"group_ids": None}),
        ({"loss_type": "a_star_po"}, "ref_logprobs", {}),
        ({"loss_type": "m2po", "moment_of": "old"}, "rollout_logprobs", {"rollout_logprobs": None}),
        ({"loss_type": "m2po", "moment_of": "old"}, "old_logprobs", {"old_logprobs": None}),
    ],
)
def test_what_a_loss_cannot_do_without(policy: dict[str, Any], field: str, given: dict[str, Any]) -> None:
    hidden, weight, labels = tensors()
    with pytest.raises(MissingFieldError, match=field):
        build(labels, GRPOLossConfig(policy_loss_cfg=policy), **given).forward(hidden, weight)


@pytest.mark.parametrize(
    ("fields", "names"),
    [
        ({"top_entropy_quantile": 0.0}, ("top_entropy_quantile", "0")),
        ({"top_entropy_quantile": 1.5}, ("top_entropy_quantile", "1.5")),
        ({"entropy_reduction": "mean"}, ("entropy_reduction", "mean", "token")),
        ({"entropy_reduction": "sample_sum_norm"}, ("norm_length",)),
        ({"policy_loss_cfg": {"loss_type": "gspo", "ratio_level": "token"}}, ("ratio_level", "token", "sequence")),
        ({"policy_loss_cfg": {"loss_type": "dppo_tv", "ratio_level": "sequence"}}, ("ratio_level",)),
        ({"policy_loss_cfg": {"loss_type": "real", "tau": 0.0}}, ("tau",)),
        ({"policy_loss_cfg": {"loss_type": "fipo", "decay_rate": 0.0}}, ("decay_rate",)),
    ],
)
def test_what_does_not_validate(fields: dict[str, Any], names: tuple[str, ...]) -> None:
    with pytest.raises(ValidationError) as caught:
        GRPOLossConfig(**{"policy_loss_cfg": VANILLA} | fields)
    assert all(name in str(caught.value) for name in names)


def test_metrics_at_the_level_used() -> None:
    """Ratios of sequences; clip fractions over tokens and, with seq_, over sequences. KL stays the tokens'."""
    hidden, weight, labels = tensors()
    clip = {"cliprange_low": 0.05, "cliprange_high": 0.05}
    old = torch.zeros(1, T)
    ctx = build(labels, GRPOLossConfig(policy_loss_cfg={"loss_type": "gspo"} | clip), old_logprobs=old)
    _, info = ctx.forward(hidden, weight)
    lp, live = info.logprobs.detach().reshape(-1), labels.reshape(-1) != -100
    spans = [range(4), range(5, T)]  # the sequence at 4 has no token
    ratios = [lp[[t for t in span if live[t]]].mean().exp() for span in spans]
    counts = [sum(bool(live[t]) for t in span) for span in spans]
    found = {name: float(m.result()) for name, m in info.metrics.items()}
    assert found["seq_ratio_mean"] == pytest.approx(float(sum(ratios)) / 2)
    assert found["ratio_mean"] == pytest.approx(sum(float(r) * n for r, n in zip(ratios, counts, strict=True)) / 9)
    assert found["ratio_min"] == pytest.approx(float(min(ratios)))
    assert found["approx_kl_k1"] == pytest.approx(-float(lp[live].mean()))
    losing = item(labels).advantages.reshape(-1) < 0  # all ratios are below the clip
    share = [sum(bool(live[t] & losing[t]) for t in s) / n for s, n in zip(spans, counts, strict=True)]
    assert found["seq_clip_frac_low"] == pytest.approx(sum(share) / 2)
    assert found["clip_frac_low"] == pytest.approx(float((losing & live).sum()) / 9)
    assert found["ratio_low_frac"] == 1.0
    assert found["clip_frac_high"] == 0.0
