"""The losses at the edges: nothing to learn, and half precision.

Contract: empty, fully masked and one-token batches give the right value, or a zero that backward runs through, with
the same metrics as any other batch. Half-precision weights, autocast and a gradient scaler's factor give gradients as
good as the exact one rounded, however small a token's share is. All layouts of one batch are one batch.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from tests import budgets
from tests.oracle import ce, head
from tests.property.helpers import leaf
from tests.property.problem import HIDDEN, POLICY, RUNS, TOKENS, VOCAB, Problem, assert_grads, every_run
from tests.property.steps import contexts
from xloss import CELossConfig, CELossContextInputItem, GRPOLossConfig, RLLossContextInputItem

LOW = {"bf16": torch.bfloat16, "fp16": torch.float16}

CONFIGS: dict[str, Callable[..., Any]] = {
    "ce": lambda **run: CELossConfig(z_loss_coef=0.1, label_smoothing=0.1, **run),
    "ce-square": lambda **run: CELossConfig(loss_reduction="square", **run),
    "grpo": lambda **run: GRPOLossConfig(
        policy_loss_cfg=POLICY, use_kl_loss=True, kl_loss_type="k2", entropy_coef=0.1, **run
    ),
}


def _alone(name: str, labels: Tensor, **run: Any) -> Any:
    """A context of one micro-batch; [T] and [1, T] are one packed sequence."""
    one_row = labels.dim() == 1 or labels.shape[0] == 1
    bounds = [torch.tensor([0, labels.numel()])] if one_row else None
    return contexts(CONFIGS[name](**run), [_item(name, labels)], bounds)[0]


def _item(name: str, labels: Tensor) -> Any:
    if name.startswith("ce"):
        return CELossContextInputItem(shifted_labels=labels)
    like = torch.randn(labels.shape, dtype=torch.float64)
    return RLLossContextInputItem(shifted_labels=labels, advantages=like, old_logprobs=like - 3, ref_logprobs=like - 3)


@every_run
@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize(
    "labels",
    [
        torch.empty(0, dtype=torch.int64),
        torch.empty(1, 0, dtype=torch.int64),
        torch.full((1, 5), -100),
        torch.full((2, 3), -100),
        torch.full((1,), -100),
    ],
    ids=["T0", "1xT0", "ignored", "BxS-ignored", "one-ignored"],
)
def test_nothing_to_learn(run: dict[str, Any], name: str, labels: Tensor) -> None:
    """A zero that still touches hidden states, weight and bias, so that every rank runs the same backward."""
    hidden = torch.randn(*labels.shape, HIDDEN, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(VOCAB, HIDDEN, dtype=torch.float64, requires_grad=True)
    bias = torch.randn(VOCAB, dtype=torch.float64, requires_grad=True)
    loss, info = _alone(name, labels, return_entropy=True, **run).forward(hidden, weight, bias)
    assert float(loss.detach()) == 0
    loss.backward()
    for x in (hidden, weight, bias):
        assert x.grad is not None
        assert x.grad.shape == x.shape
        assert not bool(x.grad.any())
    assert info.logprobs.shape == labels.shape
    assert not bool(info.logprobs.any())
    assert all(float(m.result()) == 0 for m in info.metrics.values())


@pytest.mark.parametrize("name", CONFIGS)
def test_metric_names_do_not_depend_on_the_data(name: str) -> None:
    """Ranks reduce metrics by name: one that has only masked tokens must have the same ones, in the same order."""
    names = set()
    for labels in (torch.tensor([1, 2, -100]), torch.full((3,), -100), torch.empty(0, dtype=torch.int64)):
        for run in RUNS.values():
            for grad in (True, False):
                ctx = _alone(name, labels, **run)
                hidden = torch.randn(*labels.shape, HIDDEN, dtype=torch.float64, requires_grad=grad)
                weight = torch.randn(VOCAB, HIDDEN, dtype=torch.float64)
                names.add(tuple(ctx.forward(hidden, weight)[1].metrics))
    assert len(names) == 1, names


@every_run
def test_masked_batch_beside_a_live_one(run: dict[str, Any]) -> None:
    """An all-ignored micro-batch of a step: 0, and the others keep the global denominator."""
    live, dead = Problem(shape=(1, 7)), torch.full((1, 4), -100)
    items = [CELossContextInputItem(shifted_labels=x) for x in (live.batch.labels, dead)]
    built = contexts(CELossConfig(**run), items)
    weight = leaf(live.weight)
    hidden = torch.randn(1, 4, HIDDEN, dtype=torch.float64, requires_grad=True)
    loss, _ = built[1].forward(hidden, weight)
    loss.backward()
    assert not bool(hidden.grad.any())
    assert not bool(weight.grad.any())
    (weights,) = ce.step_weights([live.batch.labels])
    want = ce.loss(live.hidden, live.weight, live.batch.labels, weights)
    budgets.assert_relative("loss", built[0].forward(leaf(live.hidden), weight)[0], want, 1e-6)


@every_run
@pytest.mark.parametrize("dtype", LOW.values(), ids=LOW)
@pytest.mark.parametrize("scale", [1.0, 65536.0], ids=["plain", "scaled"])
def test_half_precision(run: dict[str, Any], dtype: torch.dtype, scale: float) -> None:
    """Half-precision parameters, with and without a scaler's factor: as good as rounding the exact gradient."""
    problem = Problem(dtype)
    inputs = [leaf(problem.hidden), leaf(problem.weight)]
    loss, info = problem.context(**run).forward(*inputs)
    assert loss.dtype == info.logprobs.dtype == torch.float32
    budgets.assert_relative("loss", loss, problem.loss(problem.hidden, problem.weight), budgets.eps(torch.float32) * 64)
    (loss * scale).backward()
    assert all(x.grad.dtype == dtype for x in inputs)
    assert_grads(inputs, problem.gold(scale), budgets.eps(dtype))


@every_run
def test_small_gradients_survive_float16(run: dict[str, Any]) -> None:
    """A token among 4096 has a gradient below float16's smallest number; the scaler's factor must reach it first."""
    torch.manual_seed(0)
    hidden, weight = torch.randn(1, 4096, 2).half(), torch.randn(5, 2).half()
    labels = torch.randint(0, 5, (1, 4096))
    inputs = [leaf(hidden * 0.01), leaf(weight * 0.01)]
    run = run | {"chunk_size": 1500}
    (ctx,) = contexts(CELossConfig(**run), [CELossContextInputItem(shifted_labels=labels)])
    (ctx.forward(*inputs)[0] * 2.0**20).backward()
    leaves = head.leaves(*inputs)
    (weights,) = ce.step_weights([labels])
    want = head.grads(2.0**20 * ce.loss(*leaves, labels, weights), leaves)
    assert_grads(inputs, want, 2 * budgets.eps(torch.float16))


@every_run
def test_float32(run: dict[str, Any]) -> None:
    problem = Problem(torch.float32)
    inputs = [leaf(problem.hidden), leaf(problem.weight)]
    problem.context(**run).forward(*inputs)[0].backward()
    assert_grads(inputs, problem.gold(), budgets.F32_GRADIENT)


@every_run
@pytest.mark.parametrize("dtype", LOW.values(), ids=LOW)
def test_autocast(run: dict[str, Any], dtype: torch.dtype) -> None:
    """float32 parameters, forward under autocast, backward outside, as trainers do."""
    problem, rounded = Problem(torch.float32), Problem(torch.float32)
    rounded.hidden, rounded.weight = problem.hidden.to(dtype), problem.weight.to(dtype)
    inputs = [leaf(problem.hidden), leaf(problem.weight)]
    with torch.autocast("cpu", dtype=dtype):
        loss, _ = problem.context(**run).forward(*inputs)
    assert loss.dtype == torch.float32
    loss.backward()
    assert all(x.grad.dtype == torch.float32 for x in inputs)
    assert_grads(inputs, rounded.gold(), budgets.eps(dtype))


@every_run
@pytest.mark.parametrize("shape", [(TOKENS,), (1, TOKENS), (3, 6)], ids=["T", "1T", "BS"])
def test_layouts(run: dict[str, Any], shape: tuple[int, ...]) -> None:
    problem = Problem(shape=shape)
    inputs = [leaf(problem.hidden), leaf(problem.weight)]
    problem.context(**run).forward(*inputs)[0].backward()
    assert_grads(inputs, problem.gold())
