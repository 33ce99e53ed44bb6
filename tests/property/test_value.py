"""Value losses beside a policy loss, against the oracle, in float64.

Contract: the value term adds its weighted sum to the loss of every plan and its gradient to `values`, and changes no
gradient of the head; what stands at ignored tokens changes nothing; a missing or misplaced tensor raises.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from tests import budgets
from tests.oracle import value as oracle
from xloss import (
    GRPOLossConfig,
    GRPOLossContext,
    RLLossContextInputItem,
    ValueLossConfig,
    explained_variance,
    finalize_metrics,
)
from xloss.errors import DtypeError, MissingFieldError, OptionError, ShapeError
from xloss.policy.value import ValueLossType, value_loss

KINDS: list[tuple[ValueLossType, float]] = [
    ("mse", 1.0),
    ("mae", 1.0),
    ("huber", 0.4),
    ("smooth_l1", 0.7),
    ("cauchy", 0.3),
]
kinds = pytest.mark.parametrize(("loss_type", "scale"), KINDS)
clips = pytest.mark.parametrize("clip", [None, 0.2])
RUNS: dict[str, dict[str, Any]] = {
    "eager": {"mode": "eager"},
    "one_pass": {"mode": "chunk", "plan": "one_pass", "chunk_size": 3},
    "two_pass": {"mode": "chunk", "plan": "two_pass", "chunk_size": 3},
    "auto": {},
}
every_run = pytest.mark.parametrize("run", RUNS.values(), ids=RUNS)
POLICY = {"loss_type": "vanilla", "cliprange_low": 0.2, "cliprange_high": 0.2}


def batches(dtype: torch.dtype = torch.float64) -> list[dict[str, Tensor]]:
    """Two micro-batches, [1, 9] and [1, 4]; some tokens ignored, the second's first sequence wholly."""
    g = torch.Generator().manual_seed(3)
    found = []
    for length, ignored in ((9, [0, 1, 5]), (4, [0, 1])):
        labels = torch.randint(0, 31, (1, length), generator=g)
        labels[0, ignored] = -100
        floats = {n: torch.randn(1, length, generator=g, dtype=dtype) for n in ("advantages", "returns", "values")}
        drift = 0.5 * torch.randn(1, length, generator=g, dtype=dtype)
        found.append({"shifted_labels": labels, "old_values": floats["values"] + drift} | floats)
    return found


CU = [torch.tensor([0, 3, 9]), torch.tensor([0, 2, 4])]


def build(cfg: GRPOLossConfig, data: list[dict[str, Tensor]], **leave: Any) -> list[GRPOLossContext]:
    items = [
        RLLossContextInputItem(**{n: x for n, x in ({**d, **leave}).items() if n != "values" and x is not None})
        for d in data
    ]
    kwargs = GRPOLossContext.build_batches_loss_kwargs(items, cfg, cu_seq_lens_list=CU)
    return [GRPOLossContext(cfg, k) for k in kwargs]


def run_step(cfg: GRPOLossConfig, data: list[dict[str, Tensor]]) -> tuple[Any, ...]:
    g = torch.Generator().manual_seed(4)
    dtype = data[0]["values"].dtype
    weight = torch.randn(31, 5, generator=g, dtype=dtype).requires_grad_(True)
    hidden = [torch.randn(1, d["values"].shape[1], 5, generator=g, dtype=dtype).requires_grad_(True) for d in data]
    contexts = build(cfg, data)
    values = [d["values"].clone().requires_grad_(True) for d in data]
    given = values if cfg.value_loss is not None else [None] * len(values)
    outs = [c.forward(h, weight, values=v) for c, h, v in zip(contexts, hidden, given, strict=True)]
    loss = torch.stack([x for x, _ in outs]).sum()
    grads = torch.autograd.grad(loss, [*hidden, weight, *values], allow_unused=True)
    return loss.detach(), grads[:3], grads[3:], [info for _, info in outs], [c.loss_kwargs for c in contexts]


@every_run
@kinds
@clips
def test_beside_a_policy_loss(run: dict[str, Any], loss_type: ValueLossType, scale: float, clip: float | None) -> None:
    data = batches()
    cfg = GRPOLossConfig(
        policy_loss_cfg=POLICY,
        loss_reduction="sample",
        value_loss={"loss_type": loss_type, "scale": scale, "value_clip": clip},
        value_loss_coef=0.3,
        **run,
    )
    bare, bare_grads, _, _, _ = run_step(GRPOLossConfig(policy_loss_cfg=POLICY, loss_reduction="sample", **run), data)
    loss, head_grads, value_grads, infos, kwargs = run_step(cfg, data)
    leaves = [d["values"].clone().requires_grad_(True) for d in data]
    valid = [d["shifted_labels"] != -100 for d in data]
    per_sequence = [torch.tensor([[0, 0, 1, *[1 / 5] * 6]]), torch.tensor([[0, 0, 0.5, 0.5]])]
    weights = [k.value_loss_weight for k in kwargs]
    for got, exact, keep in zip(weights, per_sequence, valid, strict=True):  # 3 sequences have valid tokens
        budgets.assert_rounding("weights", got, 0.3 * exact * keep / 3, 1.0, 1.0)
    extra = oracle.step(
        leaves, [d["returns"] for d in data], [d["old_values"] for d in data], valid, weights, loss_type, scale, clip
    )
    budgets.assert_rounding("loss", loss, bare + extra.detach(), 10.0, 1.0)
    for ours, want in zip(value_grads, torch.autograd.grad(extra, leaves), strict=True):
        budgets.assert_rounding("d values", ours, want, 10.0, 1.0)
    for ours, want in zip(head_grads, bare_grads, strict=True):
        assert torch.equal(ours, want)
    for info in infos:
        assert info.loss.shape == ()
    if run.get("plan") != "two_pass" or infos[0].token_loss is not None:
        total = sum(info.token_loss.sum() for info in infos)
        budgets.assert_rounding("token_loss", total, loss, 10.0, 1.0)


def test_weights_of_the_token_mean() -> None:
    data = batches()
    cfg = GRPOLossConfig(policy_loss_cfg={"loss_type": "reinforce"}, value_loss=ValueLossConfig())
    loss, _, grads, _, _ = run_step(cfg, data)
    plain, *_ = run_step(GRPOLossConfig(policy_loss_cfg={"loss_type": "reinforce"}), data)
    valid = [d["shifted_labels"] != -100 for d in data]
    want = 0.1 * sum((0.5 * (d["values"] - d["returns"]) ** 2)[v].sum() for d, v in zip(data, valid, strict=True)) / 8
    assert float(loss - plain) == pytest.approx(float(want), rel=budgets.FIGURE_F32)
    for grad, d, keep in zip(grads, data, valid, strict=True):
        torch.testing.assert_close(grad, 0.1 / 8 * (d["values"] - d["returns"]) * keep, rtol=budgets.FIGURE_F32, atol=0)


@every_run
def test_what_is_ignored_does_not_matter(run: dict[str, Any]) -> None:
    cfg = GRPOLossConfig(policy_loss_cfg=POLICY, value_loss={"value_clip": 0.1}, **run)
    clean, bad = batches(), batches()
    for d in bad:
        for name in ("values", "returns", "old_values"):
            d[name][d["shifted_labels"] == -100] = torch.nan if name == "returns" else torch.inf
    a, b = run_step(cfg, clean), run_step(cfg, bad)
    assert torch.equal(a[0], b[0])
    for x, y in zip([*a[1], *a[2]], [*b[1], *b[2]], strict=True):
        assert torch.equal(x, y)
    for x, y in zip(a[3], b[3], strict=True):
        assert all(torch.equal(m.result(), y.metrics[n].result()) for n, m in x.metrics.items())


@every_run
def test_nothing_to_learn_from(run: dict[str, Any]) -> None:
    """All tokens ignored: a loss of 0 with gradients of 0, to values too."""
    data = batches()
    for d in data:
        d["shifted_labels"].fill_(-100)
    cfg = GRPOLossConfig(policy_loss_cfg=POLICY, value_loss={"value_clip": 0.2}, **run)
    loss, head_grads, value_grads, _, _ = run_step(cfg, data)
    assert float(loss) == 0 and not any(bool(g.any()) for g in [*head_grads, *value_grads])


def test_metrics_and_explained_variance() -> None:
    data = batches()
    cfg = GRPOLossConfig(policy_loss_cfg=POLICY, value_loss={"value_clip": 0.2})
    _, _, _, infos, _ = run_step(cfg, data)
    results = finalize_metrics([info.metrics for info in infos])
    keep = [d["shifted_labels"] != -100 for d in data]
    v, ret, old = (
        torch.cat([d[n][k] for d, k in zip(data, keep, strict=True)]) for n in ("values", "returns", "old_values")
    )
    want = 1 - (ret - v).var(unbiased=False) / ret.var(unbiased=False)
    assert float(explained_variance(results)) == pytest.approx(float(want), rel=budgets.FIGURE_F64)
    tokens = [oracle.token(*x, "mse", 1.0, 0.2) for x in zip(v, ret, old, strict=True)]
    free = [oracle.token(*x, "mse", 1.0, None) for x in zip(v, ret, old, strict=True)]
    assert float(results["value_loss"]) == pytest.approx(float(torch.stack(tokens).mean()), rel=budgets.FIGURE_F64)
    stopped = sum(bool(a > b) for a, b in zip(tokens, free, strict=True)) / len(free)
    assert 0 < stopped < 1 and float(results["value_clip_frac"]) == pytest.approx(stopped)
    flat = {n: torch.zeros(()) for n in results}
    assert float(explained_variance(flat)) == 0


@kinds
@clips
def test_gradcheck(loss_type: ValueLossType, scale: float, clip: float | None) -> None:
    g = torch.Generator().manual_seed(0)
    v, ret, old = (torch.randn(40, generator=g, dtype=torch.float64) for _ in range(3))
    v.requires_grad_(True)
    assert torch.autograd.gradcheck(
        lambda x: value_loss(x, ret, old, loss_type=loss_type, scale=scale, value_clip=clip), (v,), **budgets.GRADCHECK
    )


@kinds
def test_extremes(loss_type: ValueLossType, scale: float) -> None:
    v = torch.tensor([-1e4, -1.0, 0.0, 1.0, 1e4], requires_grad=True)
    loss = value_loss(v, torch.zeros(5), torch.zeros(5), loss_type=loss_type, scale=scale, value_clip=0.5)
    (grad,) = torch.autograd.grad(loss.sum(), v)
    assert bool(loss.isfinite().all()) and bool(grad.isfinite().all()) and loss[2] == 0


def test_laws() -> None:
    e = torch.linspace(-3, 3, 41, dtype=torch.float64)
    zero = torch.zeros_like(e)

    def of(loss_type: ValueLossType, scale: float = 1.0, clip: float | None = None) -> Tensor:
        return value_loss(e, zero, zero, loss_type=loss_type, scale=scale, value_clip=clip)

    torch.testing.assert_close(of("huber", 0.7), 0.7 * of("smooth_l1", 0.7))
    torch.testing.assert_close(of("huber", 10.0), of("mse"))
    torch.testing.assert_close(of("cauchy", 1e6), of("mse"))
    torch.testing.assert_close(of("smooth_l1", 1e-9), of("mae"), rtol=0, atol=budgets.FIGURE_F64)
    assert torch.equal(of("mse", clip=100.0), of("mse"))
    assert bool((of("cauchy") <= of("huber")).all()) and bool((of("huber") <= of("mse")).all())


def test_what_is_missing_or_wrong() -> None:
    data = batches()
    hidden, weight = torch.randn(1, 9, 5, dtype=torch.float64), torch.randn(31, 5, dtype=torch.float64)
    cfg = GRPOLossConfig(policy_loss_cfg=POLICY, value_loss={"value_clip": 0.2})
    context = build(cfg, data)[0]
    with pytest.raises(MissingFieldError, match="values"):
        context.forward(hidden, weight)
    with pytest.raises(ShapeError, match="values"):
        context.forward(hidden, weight, values=data[0]["values"][..., None])
    with pytest.raises(DtypeError, match="values"):
        context.forward(hidden, weight, values=data[0]["shifted_labels"])
    with pytest.raises(MissingFieldError, match="returns"):
        build(cfg, data, returns=None)[0].forward(hidden, weight, values=data[0]["values"])
    with pytest.raises(MissingFieldError, match="old_values"):
        build(cfg, data, old_values=None)[0].forward(hidden, weight, values=data[0]["values"])
    plain = build(GRPOLossConfig(policy_loss_cfg=POLICY), data)[0]
    with pytest.raises(OptionError, match="values"):
        plain.forward(hidden, weight, values=data[0]["values"])
    with pytest.raises(ValueError, match="scale"):
        ValueLossConfig(loss_type="mse", scale=2.0)
    with pytest.raises(ValueError, match="old_values"):
        value_loss(torch.zeros(2), torch.zeros(2), value_clip=0.1)
    with pytest.raises(ValueError, match="loss_type"):
        value_loss(torch.zeros(2), torch.zeros(2), loss_type="mean")  # type: ignore[arg-type]


def test_float32_and_bfloat16_values() -> None:
    """The loss is float32 for float32 hidden states, whatever the values' dtype; their gradient has their dtype."""
    data = [{n: x.float() if x.is_floating_point() else x for n, x in d.items()} for d in batches()]
    cfg = GRPOLossConfig(policy_loss_cfg=POLICY, value_loss={"loss_type": "huber"})
    context = build(cfg, data)[0]
    hidden, weight = torch.randn(1, 9, 5), torch.randn(31, 5)
    for dtype in (torch.float32, torch.bfloat16, torch.float64):
        values = data[0]["values"].to(dtype).detach().clone().requires_grad_(True)
        loss, _ = context.forward(hidden, weight, values=values)
        loss.backward()
        assert loss.dtype == torch.float32 and values.grad is not None and values.grad.dtype == dtype
