"""``accumulate_into_main_grad``: the weight's gradient in ``weight.main_grad``, as Megatron-LM keeps it.

Contract: after any number of backwards with any upstream gradients ``main_grad`` is what it was plus exactly the
weight's gradient, in the accumulator's precision and not rounded to the weight's; forward alone changes nothing; hidden
states and bias get their gradients as ever; ``weight.grad`` stays empty, or holds zeros for a DDP hook that wants one,
and the weight is marked then; two passes need no buffer of the weight's size. What cannot be honoured is an error.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from tests import budgets
from tests.unit.dispatch import Recorder
from xloss import (
    BaseLossConfig,
    BaseLossContext,
    BaseLossContextInputItem,
    BaseLossKwargs,
    CELossConfig,
    CELossContextInputItem,
    linear_logprobs,
)
from xloss.errors import OptionError, UnsupportedError

T, H, V = 20, 8, 67
UPSTREAM = (0.3, -2.0)  # of two micro-batches
CHUNK = {"mode": "chunk", "chunk_size": 7}
RUNS: dict[str, Any] = {f"{plan}": CHUNK | {"plan": plan} for plan in ("one_pass", "two_pass")}
every_run = pytest.mark.parametrize("run", RUNS.values(), ids=RUNS)


def leaves(dtype: torch.dtype = torch.float32) -> list[Tensor]:
    g = torch.Generator().manual_seed(2)
    return [torch.randn(*s, generator=g).to(dtype).requires_grad_() for s in ((T, H), (V, H), (V,))]


def with_main_grad(weight: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    """Give the weight a ``main_grad`` that is not 0."""
    buffer = torch.randn(weight.shape, generator=torch.Generator().manual_seed(9)).to(dtype)
    weight.main_grad = buffer  # type: ignore[attr-defined]
    return buffer


def contexts(fields: dict[str, Any]) -> list[BaseLossContext[Any]]:
    """Two micro-batches of one step; the last tokens are ignored."""
    cfg = CELossConfig(z_loss_coef=0.01, **fields)
    items = []
    for seed in range(2):
        labels = torch.randint(0, V, (T,), generator=torch.Generator().manual_seed(seed))
        labels[-3:] = -100
        items.append(CELossContextInputItem(shifted_labels=labels))
    made = cfg.loss_ctx_cls.build_batches_loss_kwargs(items, cfg)
    return [cfg.loss_ctx_cls(cfg, kwargs) for kwargs in made]


def step(inputs: list[Tensor], fields: dict[str, Any]) -> None:
    for ctx, upstream in zip(contexts(fields), UPSTREAM, strict=True):
        loss, _ = ctx.forward(*inputs)
        loss.backward(torch.tensor(upstream, dtype=loss.dtype))


def gold(dtype: torch.dtype) -> Tensor:
    """The weight's gradient in float64 of what is exact in ``dtype``."""
    inputs = [x.detach().double().requires_grad_() for x in leaves(dtype)]
    step(inputs, {"mode": "eager"})
    assert inputs[1].grad is not None
    return inputs[1].grad


def check_sum(run: dict[str, Any], dtype: torch.dtype, hooked: bool, relative: float) -> None:
    """Two micro-batches, with and without Megatron's attribute and hook."""
    inputs = leaves(dtype)
    weight = inputs[1]
    buffer = with_main_grad(weight)
    before = buffer.double()
    if hooked:
        weight.grad_added_to_main_grad = False  # type: ignore[attr-defined]

        def hook(param: Any) -> None:
            assert param.grad is not None
            if not param.grad_added_to_main_grad:
                param.main_grad.add_(param.grad)
            param.grad = None

        weight.register_post_accumulate_grad_hook(hook)
    step(inputs, run | {"accumulate_into_main_grad": True})
    assert weight.grad is None
    assert getattr(weight, "grad_added_to_main_grad", hooked) is hooked
    assert weight.main_grad is buffer  # type: ignore[attr-defined]
    want = gold(dtype)
    assert (buffer.double() - before - want).abs().max() <= relative * (want.abs().max() + before.abs().max())
    plain = leaves(dtype)
    step(plain, run)
    for mine, usual in ((inputs[0], plain[0]), (inputs[2], plain[2])):
        assert mine.grad is not None and usual.grad is not None and torch.equal(mine.grad, usual.grad)


@every_run
@pytest.mark.parametrize("hooked", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_what_is_added(run: dict[str, Any], dtype: torch.dtype, hooked: bool) -> None:
    """For bf16 weights too to float32's precision: no rounding to bf16 on the way."""
    check_sum(run, dtype, hooked, budgets.FUSED_RELATIVE[torch.float32])


@every_run
def test_autograd_gets_zeros_where_it_wants_some(run: dict[str, Any]) -> None:
    inputs = leaves()
    with_main_grad(inputs[1])
    inputs[1].grad_added_to_main_grad = False  # type: ignore[attr-defined]
    step(inputs, run | {"accumulate_into_main_grad": True})
    assert inputs[1].grad is not None and (inputs[1].grad == 0).all() and inputs[1].grad.is_contiguous()


@every_run
def test_forward_alone_adds_nothing(run: dict[str, Any]) -> None:
    inputs = leaves()
    buffer = with_main_grad(inputs[1])
    before = buffer.clone()
    contexts(run | {"accumulate_into_main_grad": True})[0].forward(*inputs)
    assert torch.equal(buffer, before)


@every_run
def test_a_second_backward_adds_again(run: dict[str, Any]) -> None:
    inputs = leaves()
    buffer = with_main_grad(inputs[1])
    zero = buffer.clone()
    loss, _ = contexts(run | {"accumulate_into_main_grad": True, "allow_retain_graph": True})[0].forward(*inputs)
    loss.backward(retain_graph=True)
    once = buffer - zero
    loss.backward()
    assert (buffer - zero - 2 * once).abs().max() <= budgets.rounding(torch.float32, 1.0, float(buffer.abs().max()))
    assert once.abs().max() > 0


@every_run
def test_nothing_live_adds_nothing(run: dict[str, Any]) -> None:
    inputs = leaves()
    buffer = with_main_grad(inputs[1])
    before = buffer.clone()
    cfg = CELossConfig(accumulate_into_main_grad=True, **run)
    item = CELossContextInputItem(shifted_labels=torch.full((T,), -100))
    (kwargs,) = cfg.loss_ctx_cls.build_batches_loss_kwargs([item], cfg)
    cfg.loss_ctx_cls(cfg, kwargs).forward(*inputs)[0].backward()
    assert torch.equal(buffer, before)


def test_two_passes_need_no_buffer() -> None:
    inputs = leaves()
    with_main_grad(inputs[1])
    for accumulate in (True, False):
        cfg = RUNS["two_pass"] | {"accumulate_into_main_grad": accumulate}
        with Recorder() as ran:
            contexts(cfg)[0].forward(*inputs)[0].backward()
        known = (*inputs, inputs[1].main_grad)  # type: ignore[attr-defined]
        assert ((V, H) in ran.shapes(known=known)) is not accumulate


def test_linear_logprobs() -> None:
    inputs = leaves()
    buffer = with_main_grad(inputs[1])
    before, labels = buffer.clone(), torch.arange(T)
    found = []
    for accumulate in (True, False):
        stats = linear_logprobs(*inputs[:2], labels, inputs[2], chunk_size=7, accumulate_into_main_grad=accumulate)
        stats.logprobs.sum().backward()
        found.append(inputs[1].grad)
    assert found[0] is None and found[1] is not None
    assert (buffer - before - found[1]).abs().max() <= budgets.rounding(torch.float32, 1.0, float(buffer.abs().max()))


def test_nothing_is_asked_of_a_frozen_head_or_without_gradients() -> None:
    hidden, weight, bias = leaves()
    for ctx in (contexts(fields | {"accumulate_into_main_grad": True})[0] for fields in RUNS.values()):
        ctx.forward(hidden, weight.detach(), bias)[0].backward()
        with torch.no_grad():
            ctx.forward(hidden, weight, bias)


@pytest.mark.parametrize(
    ("main_grad", "found"),
    [
        (None, "no such attribute"),
        (torch.zeros(V, H, dtype=torch.bfloat16), "torch.bfloat16"),
        (torch.zeros(V + 1, H), r"\(68, 8\)"),
        (torch.zeros(V, H, requires_grad=True), "requires a gradient"),
        (0.0, "float"),
    ],
)
@every_run
def test_a_main_grad_that_is_none(run: dict[str, Any], main_grad: Any, found: str) -> None:
    inputs = leaves()
    if main_grad is not None:
        inputs[1].main_grad = main_grad  # type: ignore[attr-defined]
    with pytest.raises(OptionError, match=rf"head_weight.main_grad, a torch.float32 .*\(67, 8\).*; got .*{found}"):
        contexts(run | {"accumulate_into_main_grad": True})[0].forward(*inputs)


class _OwnConfig(BaseLossConfig):
    @property
    def loss_ctx_cls(self) -> type[_OwnContext]:
        return _OwnContext


class _OwnContext(BaseLossContext[BaseLossContextInputItem]):
    loss_cfg: _OwnConfig
    loss_kwargs: BaseLossKwargs

    def loss_fn(self, hidden_states: Tensor, head_weight: Tensor, head_bias: Tensor | None, loss_kwargs: Any) -> Any:
        return (hidden_states @ head_weight.t()).sum()


def test_autograd_cannot() -> None:
    inputs = leaves()
    with_main_grad(inputs[1])
    kwargs = BaseLossKwargs(shifted_labels=torch.arange(T))
    for call in (
        lambda: contexts({"mode": "eager", "accumulate_into_main_grad": True})[0].forward(*inputs),
        lambda: _OwnContext(_OwnConfig(accumulate_into_main_grad=True), kwargs).forward(*inputs),
        lambda: linear_logprobs(*inputs[:2], torch.arange(T), mode="eager", accumulate_into_main_grad=True),
    ):
        with pytest.raises(UnsupportedError, match="accumulate_into_main_grad=True"):
            call()
