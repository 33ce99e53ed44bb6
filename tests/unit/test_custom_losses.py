"""Losses of one's own, both ways.

Contract: a `loss_fn`, run whole or in chunks, and a `token_loss`, token-local or coupling tokens, give the loss and the
gradients that the same formula gives on materialised logits, in every mode; what cannot run is an error that says why.
"""

from __future__ import annotations

from typing import Annotated, Any

import pytest
import torch
import torch.nn.functional as F
from pydantic import ValidationError
from torch import Tensor

from tests import budgets
from tests.oracle import head
from tests.unit.trio import H, T, V, assert_same, every_mode, grads, tensors
from xloss import (
    BaseLossConfig,
    BaseLossContext,
    BaseLossContextInputItem,
    BaseLossKwargs,
    CELossContextInputItem,
    Metric,
    PerToken,
    TokenStats,
)
from xloss.errors import OptionError, UnsupportedError

# -- a loss of one's own, the XTuner way: config, kwargs, context with loss_fn


class CustomLossConfig(BaseLossConfig):
    """The walk-through of the XTuner docs: extra fields and a context class."""

    focus: float
    returns: str = "pair"

    @property
    def loss_ctx_cls(self) -> type[CustomLossContext]:
        return CustomLossContext


class CustomLossKwargs(BaseLossKwargs):
    shifted_labels: Tensor
    loss_weight: Tensor
    note: Any = None


class CustomLossContext(BaseLossContext[CELossContextInputItem]):
    loss_cfg: CustomLossConfig
    loss_kwargs: CustomLossKwargs

    @classmethod
    def build_batches_loss_kwargs(
        cls,
        data_batches: list[CELossContextInputItem],
        loss_cfg: CustomLossConfig,
        cu_seq_lens_list: list[Tensor] | None = None,
        sp_mesh: Any = None,
    ) -> list[CustomLossKwargs]:
        total = sum((b.shifted_labels != loss_cfg.ignore_idx).sum() for b in data_batches)
        return [
            CustomLossKwargs(
                shifted_labels=b.shifted_labels, loss_weight=(b.shifted_labels != loss_cfg.ignore_idx) / total, note="x"
            )
            for b in data_batches
        ]

    def loss_fn(
        self, hidden_states: Tensor, head_weight: Tensor, head_bias: Tensor | None, loss_kwargs: CustomLossKwargs
    ) -> Any:
        assert loss_kwargs.note == "x"
        logits = F.linear(hidden_states, head_weight, head_bias).double()
        loss = focal(logits, loss_kwargs.shifted_labels, loss_kwargs.loss_weight, self.loss_cfg.focus)
        extra = {"seen": torch.tensor(float(loss_kwargs.shifted_labels.numel())), "n": Metric.count_of(logits[..., 0])}
        return {"loss": loss, "pair": (loss, logits), "triple": (loss, (logits, extra))}[self.loss_cfg.returns]


def focal(logits: Tensor, labels: Tensor, weight: Tensor, focus: float) -> Tensor:
    """(1 - p_y)^focus * nll, weighted."""
    logprobs = torch.log_softmax(logits, -1).gather(-1, labels.clamp(min=0)[..., None])[..., 0]
    return ((1 - logprobs.exp()) ** focus * -logprobs * weight).sum()


@every_mode
@pytest.mark.parametrize("returns", ["loss", "pair", "triple"])
def test_custom_loss_fn(run: dict[str, Any], returns: str) -> None:
    hidden, weight, labels = tensors()
    bias = torch.randn(V, dtype=torch.float64, requires_grad=True)
    cfg = CustomLossConfig(focus=2.0, returns=returns, **run)
    (kwargs,) = cfg.loss_ctx_cls.build_batches_loss_kwargs([CELossContextInputItem(shifted_labels=labels)], cfg)
    ctx = CustomLossContext(cfg, kwargs)
    loss, info = ctx.forward(hidden, weight, bias)
    plain = focal(F.linear(hidden, weight, bias), labels, kwargs.loss_weight, 2.0)
    inputs = (hidden, weight, bias)
    assert_same([loss, *grads(3 * loss, *inputs)], [plain, *grads(3 * plain, *inputs)], 1e-12)
    if returns == "triple":
        assert float(info.metrics["n"].result()) == T
        seen = info.extra_info["seen"]
        assert float(seen) == T if run["mode"] == "eager" else sum(map(float, seen)) == T
    with torch.no_grad():
        budgets.assert_relative("no_grad", ctx.forward(hidden, weight, bias)[0], plain, 1e-12)
    assert (info.logits is not None) == (run["mode"] == "eager" and returns != "loss")


@pytest.mark.parametrize("shape", [(T,), (2, 5)], ids=["T", "BS"])
@pytest.mark.parametrize("frozen", [None, 0, 1], ids=["all", "hidden-frozen", "weight-frozen"])
def test_custom_loss_fn_layouts_and_frozen(shape: tuple[int, ...], frozen: int | None) -> None:
    inputs = [torch.randn(*shape, H, dtype=torch.float64), torch.randn(V, H, dtype=torch.float64)]
    for i, x in enumerate(inputs):
        x.requires_grad_(i != frozen)
    labels = torch.randint(0, V, shape)
    labels.view(-1)[2] = -100
    cfg = CustomLossConfig(focus=1.0, mode="chunk", chunk_size=3)
    (kwargs,) = CustomLossContext.build_batches_loss_kwargs([CELossContextInputItem(shifted_labels=labels)], cfg)
    loss, _ = CustomLossContext(cfg, kwargs).forward(*inputs)
    plain = focal(F.linear(*inputs), labels, kwargs.loss_weight, 1.0)
    trained = [x for x in inputs if x.requires_grad]
    assert_same(grads(loss, *trained), grads(plain, *trained), 1e-12)


def test_custom_loss_fn_second_backward() -> None:
    hidden, weight, labels = tensors()
    for keep in (False, True):
        cfg = CustomLossConfig(focus=1.0, mode="chunk", chunk_size=3, allow_retain_graph=keep)
        (kwargs,) = CustomLossContext.build_batches_loss_kwargs([CELossContextInputItem(shifted_labels=labels)], cfg)
        loss, _ = CustomLossContext(cfg, kwargs).forward(hidden, weight)
        first = torch.autograd.grad(loss, (hidden, weight), retain_graph=True)
        if keep:
            assert_same(grads(loss, hidden, weight), list(first), 1e-15)
        else:
            with pytest.raises(RuntimeError, match="allow_retain_graph"):
                loss.backward()


@pytest.mark.parametrize("mode", ["eager", "chunk"])
def test_custom_loss_fn_under_a_gradient_scaler(mode: str) -> None:
    """float16, and gradients too small for it until the factor arrives, after the chunks were differentiated."""
    inputs = [(torch.randn(1, 2048, 2) * size).half().requires_grad_() for size in (1e-2, 1e-3)]
    inputs[1] = inputs[1].detach()[0, :5].requires_grad_()
    labels = torch.randint(0, 5, (1, 2048))
    cfg = CustomLossConfig(focus=0.0, mode=mode, chunk_size=700)
    (kwargs,) = CustomLossContext.build_batches_loss_kwargs([CELossContextInputItem(shifted_labels=labels)], cfg)
    loss, _ = CustomLossContext(cfg, kwargs).forward(*inputs)
    leaves = head.leaves(*inputs)
    plain = focal(F.linear(*leaves), labels, kwargs.loss_weight.double(), 0.0)
    scale = 2.0**22
    assert_same(grads(loss * scale, *inputs), head.grads(plain * scale, leaves), 4 * budgets.eps(torch.float16))


def test_custom_loss_fn_errors() -> None:
    hidden, weight, labels = tensors()
    with pytest.raises(ValidationError, match="Did you mean 'focus'"):
        CustomLossConfig(focuss=1.0)
    for run in ({"mode": "fused"}, {"plan": "one_pass"}):
        cfg = CustomLossConfig(focus=1.0, **run)
        (kwargs,) = CustomLossContext.build_batches_loss_kwargs([CELossContextInputItem(shifted_labels=labels)], cfg)
        with pytest.raises(UnsupportedError, match="loss_fn"):
            CustomLossContext(cfg, kwargs).forward(hidden, weight)


# -- and the cheap way: token_loss on the per-token vectors


class FocalConfig(BaseLossConfig):
    focus: float = 2.0

    @property
    def loss_ctx_cls(self) -> type[FocalContext]:
        return FocalContext


class FocalKwargs(BaseLossKwargs):
    loss_weight: Annotated[Tensor, PerToken(pad=0.0, weight=True)]


class FocalContext(BaseLossContext[BaseLossContextInputItem]):
    loss_cfg: FocalConfig
    loss_kwargs: FocalKwargs
    token_local = True

    def token_loss(self, stats: TokenStats, loss_kwargs: FocalKwargs) -> tuple[Tensor, dict[str, Metric]]:
        nll = -stats.logprobs
        return (1 - (-nll).exp()) ** self.loss_cfg.focus * nll * loss_kwargs.loss_weight, {"nll": Metric.mean(nll)}


@every_mode
@pytest.mark.parametrize("plan", ["auto", "two_pass"])
def test_custom_token_loss(run: dict[str, Any], plan: str) -> None:
    """Token-local: one pass by default, and tokens of weight 0 are left out because the field says weight=True."""
    hidden, weight, labels = tensors()
    factor = torch.rand(1, T, dtype=torch.float64)
    factor[0, 7] = 0
    plan = "auto" if run["mode"] == "eager" else plan
    ctx = FocalContext(FocalConfig(plan=plan, **run), FocalKwargs(shifted_labels=labels, loss_weight=factor))
    loss, info = ctx.forward(hidden, weight)
    plain = focal(F.linear(hidden, weight), labels, factor * (labels != -100), 2.0)
    assert_same([loss, *grads(loss, hidden, weight)], [plain, *grads(plain, hidden, weight)], 1e-12)
    assert info.plan.num_live == T - 3
    live = head.token_stats(hidden, weight, labels.where(factor != 0, -100)).logprobs
    assert float(info.metrics["nll"].result()) == pytest.approx(-float(live.sum().detach()) / (T - 3))


class SequenceConfig(BaseLossConfig):
    returns: str = "vector"

    @property
    def loss_ctx_cls(self) -> type[SequenceContext]:
        return SequenceContext


class SequenceKwargs(BaseLossKwargs):
    advantages: Annotated[Tensor, PerToken()]
    old_logprobs: Tensor  # not annotated: per token because it has the shape of the labels


class SequenceContext(BaseLossContext[BaseLossContextInputItem]):
    """One ratio per sequence, the mean of its log-ratios exponentiated: couples tokens."""

    loss_cfg: SequenceConfig
    loss_kwargs: SequenceKwargs

    def token_loss(self, stats: TokenStats, loss_kwargs: SequenceKwargs) -> Any:
        live = (loss_kwargs.shifted_labels != -100).double()
        loss = sequence_ratio_loss(stats.logprobs, loss_kwargs.old_logprobs, loss_kwargs.advantages, live, (2, -1))
        returns = {"vector": loss.reshape(-1), "scalar": loss.sum(), "metrics": (loss.sum(), {"n": Metric.total(live)})}
        return returns[self.loss_cfg.returns]


def sequence_ratio_loss(lp: Tensor, old: Tensor, advantages: Tensor, live: Tensor, shape: tuple[int, int]) -> Tensor:
    lp, old, advantages, live = (x.reshape(shape) for x in (lp, old, advantages, live))
    ratio = (((lp - old) * live).sum(1) / live.sum(1)).exp()
    return -ratio[:, None] * advantages * live


@every_mode
@pytest.mark.parametrize("returns", ["vector", "scalar", "metrics"])
def test_custom_coupled_loss(run: dict[str, Any], returns: str) -> None:
    """Sees all tokens in order with 0 at ignored ones, NaN there or not; runs as two passes."""
    hidden = torch.randn(2, 6, H, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(V, H, dtype=torch.float64, requires_grad=True)
    labels = torch.randint(0, V, (2, 6))
    labels[0, 4:] = labels[1, :1] = -100
    live = labels != -100
    advantages = torch.randn(2, 6, dtype=torch.float64).masked_fill(~live, torch.nan)
    old = (torch.randn(2, 6, dtype=torch.float64) - 2).masked_fill(~live, torch.nan)
    kwargs = SequenceKwargs(shifted_labels=labels, advantages=advantages, old_logprobs=old)
    ctx = SequenceContext(SequenceConfig(returns=returns, **run), kwargs)
    loss, info = ctx.forward(hidden, weight)
    leaves = head.leaves(hidden, weight)
    lp = head.token_stats(*leaves, labels).logprobs
    plain = sequence_ratio_loss(lp, old.nan_to_num(), advantages.nan_to_num(), live.double(), (2, 6)).sum()
    assert_same([loss, *grads(loss, hidden, weight)], [plain.detach(), *head.grads(plain, leaves)], 1e-12)
    assert info.plan.kind == ("eager" if run["mode"] == "eager" else "two-pass")
    assert info.plan.num_live == int(live.sum())
    if returns == "metrics":
        assert float(info.metrics["n"].result()) == int(live.sum())


def test_coupled_loss_refuses_one_pass() -> None:
    hidden, weight, labels = tensors()
    kwargs = SequenceKwargs(shifted_labels=labels, advantages=torch.ones(1, T), old_logprobs=torch.ones(1, T))
    with pytest.raises(UnsupportedError, match="token_local"):
        SequenceContext(SequenceConfig(plan="one_pass"), kwargs).forward(hidden, weight)


@every_mode
def test_token_local_must_return_a_vector(run: dict[str, Any]) -> None:
    class Broken(FocalContext):
        def token_loss(self, stats: TokenStats, loss_kwargs: FocalKwargs) -> Any:
            return stats.logprobs.sum()

    hidden, weight, labels = tensors()
    ctx = Broken(FocalConfig(**run), FocalKwargs(shifted_labels=labels, loss_weight=torch.ones(1, T)))
    with pytest.raises(OptionError, match="one loss per token"):
        ctx.forward(hidden, weight)


@every_mode
def test_a_loss_that_ignores_the_statistics(run: dict[str, Any]) -> None:
    """A constant: zero gradients, not an error from autograd."""

    class Constant(FocalContext):
        def token_loss(self, stats: TokenStats, loss_kwargs: FocalKwargs) -> Any:
            return torch.ones_like(stats.logprobs) * loss_kwargs.loss_weight

    hidden, weight, labels = tensors()
    ctx = Constant(FocalConfig(**run), FocalKwargs(shifted_labels=labels, loss_weight=torch.ones(1, T)))
    loss, _ = ctx.forward(hidden, weight)
    assert float(loss.detach()) == T - 2
    if run["mode"] != "eager":
        assert not any(bool(g.any()) for g in grads(loss, hidden, weight))
