"""``mode="fused"`` where no logits are written: ``logits_budget=0``, ``kernels="no_logits"``, a budget too small.

Contract: every statistic and every gradient is the float64 oracle's, for any upstream gradient per token and label,
in several chunks of tokens and several strips of the vocabulary, whatever stands at ignored tokens; frozen sides save
their product and buffer; tokens whose adjoints turn out 0 leave the kernel in whole tiles; the same call gives the same
bits; nothing as large as the logits ever exists. (Built-in losses: test_fused_engine.)
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from tests import budgets
from tests.oracle import head as oracle
from tests.unit.dispatch import Recorder
from xloss import (
    CELossConfig,
    CELossContextInputItem,
    GRPOLossConfig,
    LogProbConfig,
    RLLossContextInputItem,
    linear_logprobs,
)
from xloss.errors import OptionError, UnsupportedError
from xloss.head.options import LiveRows
from xloss_kernels import head_backward
from xloss_kernels.tiles import head_tile

T, H, V = 23, 8, 131
WIDE = 2100  # three splits of the forward, three strips of 1024 columns
ALL: dict[str, Any] = {f"return_{name}": True for name in ("entropy", "mean_logit", "sum_p2", "top1")}
NO_LOGITS: dict[str, Any] = {"mode": "fused", "logits_budget": 0}
STRIPS = {"mode": "fused", "kernels": "no_logits", "logits_budget": 23 * 1024 * 4}
HEADS: dict[str, Any] = {
    "plain": {},
    "softcap": {"softcap": 5.0, "logit_scale": 0.7},
    "all": {"softcap": 9.0, "logit_scale": 1.3, "temperature": torch.linspace(2.0, 0.5, T)},
}
every_dtype = pytest.mark.parametrize("dtype", budgets.FUSED_RELATIVE, ids=["fp32", "fp16"])


def tensors(dtype: torch.dtype, vocab: int = V, tokens: int = T, several: int = 0) -> tuple[Tensor, ...]:
    """Hidden states, weight, bias, and labels with both ends of the vocabulary, an ignored row and an ignored label."""
    g = torch.Generator().manual_seed(3)
    hidden, weight, bias = (torch.randn(*shape, generator=g).to(dtype) for shape in ((tokens, H), (vocab, H), (vocab,)))
    labels = torch.randint(0, vocab, (tokens, several) if several else (tokens,), generator=g)
    labels[0], labels[1], labels[4] = 0, vocab - 1, -100
    if several:
        labels[6, 1], labels[7] = -100, labels[7, 0]
    return hidden, weight, bias, labels


def upstream(values: list[Tensor]) -> Tensor:
    """A scalar whose gradient by every entry of every statistic is a random number of its own."""
    g = torch.Generator().manual_seed(5)
    total = sum((torch.randn(x.shape, generator=g).to(x.dtype) * x).sum() for x in values)
    assert isinstance(total, Tensor)
    return total


def gold(inputs: list[Tensor], labels: Tensor, head: dict[str, Any]) -> list[Tensor]:
    """The oracle's statistics and gradients."""
    leaves = [x for x in oracle.leaves(*inputs) if x is not None]
    stats = oracle.token_stats(leaves[0], leaves[1], labels, leaves[2], oracle.Head(**head))
    values = [getattr(stats, name) for name in oracle.STATISTICS]
    grads = [g for g in oracle.grads(upstream(values), leaves) if g is not None]
    return [*(v.detach() for v in values), stats.top1, *grads]


def ours(inputs: list[Tensor], labels: Tensor, head: dict[str, Any], **how: Any) -> list[Tensor]:
    """The same from the engine."""
    leaves = [x.detach().clone().requires_grad_() for x in inputs]
    stats = linear_logprobs(leaves[0], leaves[1], labels, leaves[2], **head, **ALL, **how)
    values = [getattr(stats, name) for name in oracle.STATISTICS]
    assert stats.top1 is not None
    return [*(v.detach() for v in values), stats.top1, *torch.autograd.grad(upstream(values), leaves)]


def assert_all_close(got: list[Tensor], want: list[Tensor], dtype: torch.dtype) -> None:
    for i, (mine, wanted) in enumerate(zip(got, want, strict=True)):
        assert mine.shape == wanted.shape
        found = (mine.double() - wanted.double()).abs().max()
        allowed = budgets.FUSED_RELATIVE[dtype] * wanted.double().abs().max()
        assert found <= allowed, f"value {i}: {float(found):.2g} > {float(allowed):.2g}"


@every_dtype
@pytest.mark.parametrize("several", [0, 3])
@pytest.mark.parametrize("head", HEADS.values(), ids=HEADS)
@pytest.mark.parametrize(
    ("vocab", "how"),
    [(V, NO_LOGITS), (V, NO_LOGITS | {"chunk_size": 6}), (WIDE, STRIPS)],
    ids=["whole", "chunks", "strips"],
)
def test_every_statistic_and_gradient(
    vocab: int, how: dict[str, Any], head: dict[str, Any], several: int, dtype: torch.dtype
) -> None:
    *inputs, labels = tensors(dtype, vocab, several=several)
    assert_all_close(ours(inputs, labels, head, **how), gold(inputs, labels, head), dtype)


def test_ignored_tokens_that_were_not_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    """As on CUDA, where counting would wait: they go through the kernels, and what stands there does not matter."""
    module = __import__("xloss.head.linear_logprobs", fromlist=["live_rows"])
    monkeypatch.setattr(module, "live_rows", lambda y, _: LiveRows.all(len(y), counted=False))
    *inputs, labels = tensors(torch.float32, several=2)
    want = gold(inputs, labels, {})
    inputs[0][4] = torch.nan
    assert_all_close(ours(inputs, labels, {}, chunk_size=6, **NO_LOGITS), want, torch.float32)


@every_dtype
def test_forward_only(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """Statistics without the gradient's kernel; the plan counts partial statistics and no strip."""
    monkeypatch.setattr("xloss.head.fused.head_dlogits", None)
    *inputs, labels = tensors(dtype)
    item = CELossContextInputItem(shifted_labels=labels)
    cfg = LogProbConfig(return_entropy=True, **NO_LOGITS)
    (kwargs,) = cfg.loss_ctx_cls.build_batches_loss_kwargs([item], cfg)
    _, info = cfg.loss_ctx_cls(cfg, kwargs).forward(*inputs)
    want = gold(inputs, labels, {})
    assert info.logprobs is not None and info.entropy is not None
    assert_all_close([info.logprobs, info.entropy], [want[0], want[2]], dtype)
    assert (info.plan.kernels, info.plan.strip_columns, info.plan.logits_bytes) == ("no_logits", 0, 24 * 22)


@pytest.mark.parametrize("frozen", [0, 1, 2])
@pytest.mark.parametrize("plan", ["one_pass", "two_pass"])
def test_frozen_sides(frozen: int, plan: str) -> None:
    """Hidden states, weight or bias without a gradient: no buffer of its shape, the other gradients unchanged."""
    *inputs, labels = tensors(torch.float32)
    cfg = CELossConfig(plan=plan, **NO_LOGITS)
    (kwargs,) = cfg.loss_ctx_cls.build_batches_loss_kwargs([CELossContextInputItem(shifted_labels=labels)], cfg)

    def grads(without: int | None) -> tuple[list[Tensor | None], set[tuple[int, ...]]]:
        leaves = [x.detach().clone().requires_grad_(i != without) for i, x in enumerate(inputs)]
        with Recorder() as ran:
            cfg.loss_ctx_cls(cfg, kwargs).forward(*leaves)[0].backward()
        return [x.grad for x in leaves], ran.shapes(known=leaves)

    full, _ = grads(None)
    some, shapes = grads(frozen)
    for i, (a, b) in enumerate(zip(full, some, strict=True)):
        assert (b is None) if i == frozen else (a is not None and b is not None and torch.equal(a, b))
    assert (frozen == 0) or tuple(inputs[frozen].shape) not in shapes


def test_nothing_as_large_as_the_logits() -> None:
    *inputs, labels = tensors(torch.float32, WIDE)
    leaves = [x.requires_grad_() for x in inputs]
    with Recorder() as ran:
        stats = linear_logprobs(leaves[0], leaves[1], labels, leaves[2], return_entropy=True, **STRIPS)
        upstream([stats.logprobs, stats.entropy]).backward()  # type: ignore[list-item]
    strip = 4 * (T - 1) * 1024  # the interpreter copies it as bytes
    assert ran.largest(known=leaves) == strip < 4 * (T - 1) * WIDE


@pytest.mark.parametrize("plan", ["one_pass", "two_pass"])
@pytest.mark.parametrize("tokens", [0, 5])
def test_no_live_token(plan: str, tokens: int) -> None:
    """No token at all, or none that counts: a differentiable 0."""
    hidden, weight = torch.randn(tokens, H, requires_grad=True), torch.randn(V, H, requires_grad=True)
    item = CELossContextInputItem(shifted_labels=torch.full((tokens,), -100))
    cfg = CELossConfig(plan=plan, **NO_LOGITS)
    (kwargs,) = cfg.loss_ctx_cls.build_batches_loss_kwargs([item], cfg)
    loss, info = cfg.loss_ctx_cls(cfg, kwargs).forward(hidden, weight)
    loss.backward()
    assert loss == 0 and info.plan.num_chunks == 0
    for x in (hidden, weight):
        assert x.grad is not None and (x.grad == 0).all()
    with torch.no_grad():
        assert linear_logprobs(hidden, weight, item.shifted_labels, **NO_LOGITS).logprobs.tolist() == [0.0] * tokens


@pytest.mark.parametrize("plan", ["one_pass", "two_pass"])
def test_clipped_tokens_leave_in_whole_tiles(plan: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """130 tokens, scattered 20 of them not clipped: their one tile of three is computed again, the others are not."""
    products = []
    product = head_backward.logits_tile

    def counted(*args: Any) -> Any:
        products.append(args)
        return product(*args)

    monkeypatch.setattr(head_backward, "logits_tile", counted)
    tokens = 130
    *inputs, labels = tensors(torch.float32, tokens=tokens)
    now = oracle.token_stats(inputs[0], inputs[1], labels, inputs[2]).logprobs
    advantages = torch.where(torch.arange(tokens) % 2 == 0, 1.0, -1.0)
    old = now - advantages * 0.7  # ratio e^0.7 where A > 0, e^-0.7 where A < 0: all clipped
    alive = torch.arange(5, tokens, 6)[:20]
    old[alive] = now[alive]
    item = RLLossContextInputItem(shifted_labels=labels, advantages=advantages, old_logprobs=old.float())
    results = []
    for how in ({"mode": "eager"}, {"plan": plan, **NO_LOGITS}):
        cfg = GRPOLossConfig(
            policy_loss_cfg={"loss_type": "vanilla", "cliprange_low": 0.2, "cliprange_high": 0.2}, **how
        )  # type: ignore[arg-type]
        (kwargs,) = cfg.loss_ctx_cls.build_batches_loss_kwargs([item], cfg)
        leaves = [x.double() if how["mode"] == "eager" else x for x in inputs]
        leaves = [x.detach().clone().requires_grad_() for x in leaves]
        loss, _ = cfg.loss_ctx_cls(cfg, kwargs).forward(*leaves)
        results.append(torch.autograd.grad(loss, leaves))
    assert_all_close(list(results[1]), list(results[0]), torch.float32)
    dead = torch.ones(tokens, dtype=torch.bool).index_fill(0, alive, False)
    assert (results[1][0][dead] == 0).all()
    tile = head_tile(torch.float32, 80)
    assert tile.block_m >= 20
    assert len(products) == -(-V // tile.block_n)


@pytest.mark.parametrize("plan", ["one_pass", "two_pass"])
def test_the_same_bits_again(plan: str) -> None:
    *inputs, labels = tensors(torch.float32)
    cfg = CELossConfig(plan=plan, z_loss_coef=0.01, **NO_LOGITS)
    (kwargs,) = cfg.loss_ctx_cls.build_batches_loss_kwargs([CELossContextInputItem(shifted_labels=labels)], cfg)
    runs = []
    for _ in range(2):
        leaves = [x.detach().clone().requires_grad_() for x in inputs]
        loss, _ = cfg.loss_ctx_cls(cfg, kwargs).forward(*leaves)
        runs.append([loss.detach(), *torch.autograd.grad(loss, leaves)])
    assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True))


def test_a_budget_too_small_for_chunks_chooses_no_logits() -> None:
    """69 live tokens whose budget holds the logits of 60: the same numbers, by strips that fit the budget."""
    *inputs, labels = tensors(torch.float32, WIDE, tokens=70)
    budget = 60 * WIDE * 4
    item, cfg = CELossContextInputItem(shifted_labels=labels), CELossConfig(mode="fused", logits_budget=budget)
    (kwargs,) = cfg.loss_ctx_cls.build_batches_loss_kwargs([item], cfg)
    leaves = [x.clone().requires_grad_() for x in inputs]
    plan = cfg.loss_ctx_cls(cfg, kwargs).explain(*leaves)
    assert (plan.kernels, plan.strip_columns, plan.num_chunks) == ("no_logits", 1792, 1)
    assert plan.logits_bytes <= budget
    assert_all_close(ours(inputs, labels, {}, mode="fused", logits_budget=budget), gold(inputs, labels, {}),
                     torch.float32)  # fmt: skip


def test_a_weight_the_kernels_cannot_read() -> None:
    """Columns that are not contiguous: an error where no logits were asked for, chunks of logits where not."""
    hidden, weight, _, labels = tensors(torch.float32)
    across = weight.t().contiguous().t()
    for how in (NO_LOGITS, {"mode": "fused", "kernels": "no_logits"}):
        with pytest.raises(UnsupportedError, match=r"contiguous rows.*\(1, 131\)"):
            linear_logprobs(hidden, across, labels, **how)
    small = {"mode": "fused", "logits_budget": 10 * V * 4}
    here, there = (linear_logprobs(hidden, w, labels, **small).logprobs for w in (weight, across))
    assert (here - there).abs().max() < budgets.FUSED_LOGPROB_NATS


def test_hidden_states_of_any_strides() -> None:
    *inputs, labels = tensors(torch.float32)
    labels[4] = 0  # all live: the kernels get a view
    want = ours(inputs, labels, {}, **NO_LOGITS)
    across = inputs[0].t().contiguous().t().requires_grad_()
    stats = linear_logprobs(across, inputs[1], labels, inputs[2], **ALL, **NO_LOGITS)
    assert torch.equal(stats.logprobs.detach(), want[0])


def test_a_strip_that_fits_no_budget() -> None:
    hidden, weight, _, labels = tensors(torch.float32, WIDE)
    with pytest.raises(UnsupportedError, match=r"kernels='no_logits'.* 90112 bytes for 22 tokens.*logits_budget=1000"):
        linear_logprobs(hidden.requires_grad_(), weight, labels, mode="fused", kernels="no_logits", logits_budget=1000)
    with pytest.raises(OptionError, match=r"logits_budget=0 .* kernels='chunked_logits'"):
        linear_logprobs(hidden, weight, labels, kernels="chunked_logits", **NO_LOGITS)
