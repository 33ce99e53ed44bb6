"""The losses inside a training step.

Contract: with activation checkpointing of either kind, gradient accumulation, tied embeddings, frozen parts, an
upstream factor or a context called twice, gradients are those of the plain float64 formula. A second backward through
a one-pass loss is right where it was asked for and an error elsewhere, never other numbers; so is a second
derivative.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from tests import budgets
from tests.oracle import ce, head
from tests.property.helpers import leaf
from tests.property.problem import RUNS, TOKENS, VOCAB, Problem, assert_grads, every_run
from tests.property.steps import contexts
from xloss import BaseLossContextInputItem, CELossConfig, CELossContextInputItem, LogProbConfig, XlossError


@every_run
def test_context_called_twice(run: dict[str, Any]) -> None:
    """Two forwards of one context, backwards in the other order: nothing is shared between them."""
    problem, other = Problem(), Problem(seed=1)
    ctx = problem.context(**run)
    first, second = [leaf(problem.hidden), leaf(problem.weight)], [leaf(other.hidden), leaf(other.weight)]
    a, b = ctx.forward(*first)[0], ctx(*second)[0]
    b.backward()
    a.backward()
    assert_grads(first, problem.gold())
    problem.hidden, problem.weight = other.hidden, other.weight
    assert_grads(second, problem.gold())


@every_run
def test_gradient_accumulation(run: dict[str, Any]) -> None:
    """Three micro-batches, backward after each: .grad is that of the one big batch, whatever their lengths."""
    lengths = (3, 1, 9)
    problems = [Problem(shape=(1, n), seed=n) for n in lengths]
    weight = leaf(problems[0].weight)
    items = [CELossContextInputItem(shifted_labels=p.batch.labels) for p in problems]
    hidden = [leaf(p.hidden) for p in problems]
    for ctx, h in zip(contexts(CELossConfig(**run), items), hidden, strict=True):
        ctx.forward(h, weight)[0].backward()
    labels = torch.cat([p.batch.labels for p in problems], 1)
    leaves = head.leaves(torch.cat([p.hidden for p in problems], 1), problems[0].weight)
    (weights,) = ce.step_weights([labels])
    want = head.grads(ce.loss(*leaves, labels, weights), leaves)
    budgets.assert_relative("d hidden", torch.cat([h.grad for h in hidden], 1), want[0], 1e-6)
    budgets.assert_relative("d weight", weight.grad, want[1], 1e-6)


@every_run
@pytest.mark.parametrize("reentrant", [True, False], ids=["reentrant", "non-reentrant"])
def test_activation_checkpointing(run: dict[str, Any], reentrant: bool) -> None:
    """The loss inside the checkpointed region, its forward run twice."""
    problem = Problem()
    ctx = problem.context(**run)
    inputs = [leaf(problem.hidden), leaf(problem.weight)]

    def segment(hidden: Tensor, weight: Tensor) -> Tensor:
        return ctx.forward(hidden * 1.0, weight)[0]

    loss = checkpoint(segment, *inputs, use_reentrant=reentrant)
    budgets.assert_relative("loss", loss, problem.loss(problem.hidden, problem.weight), 1e-6)
    (2.0 * loss).backward()
    assert_grads(inputs, problem.gold(2.0))


@every_run
def test_tied_embeddings(run: dict[str, Any]) -> None:
    """One tensor is the embedding and the head: both of its gradients arrive."""
    problem = Problem()
    ids = torch.arange(TOKENS).reshape(1, TOKENS) % VOCAB
    weight = leaf(problem.weight)
    problem.context(**run).forward(F.embedding(ids, weight).tanh(), weight)[0].backward()
    (gold,) = head.leaves(problem.weight)
    want = head.grads(problem.loss(F.embedding(ids, gold).tanh(), gold), [gold])[0]
    budgets.assert_relative("d weight", weight.grad, want, 1e-6)


@every_run
@pytest.mark.parametrize("scale", [1.0, -0.5, 65536.0])
def test_upstream_factor(run: dict[str, Any], scale: float) -> None:
    problem = Problem()
    inputs = [leaf(problem.hidden), leaf(problem.weight)]
    loss, _ = problem.context(**run).forward(*inputs)
    (loss * scale + loss.detach()).backward()
    assert_grads(inputs, problem.gold(scale))


@every_run
def test_loss_inside_a_larger_one(run: dict[str, Any]) -> None:
    """A non-linear function of the loss: the upstream gradient depends on its value."""
    problem = Problem()
    inputs = [leaf(problem.hidden), leaf(problem.weight)]
    loss, _ = problem.context(**run).forward(*inputs)
    (loss.square() + inputs[0].sum()).backward()
    value = float(problem.loss(problem.hidden, problem.weight))
    gold = problem.gold(2 * value)
    assert_grads(inputs, [gold[0] + 1, gold[1]])


@every_run
@pytest.mark.parametrize("frozen", ["hidden", "weight"])
def test_frozen(run: dict[str, Any], frozen: str) -> None:
    problem = Problem()
    inputs = {n: leaf(getattr(problem, n), n != frozen) for n in ("hidden", "weight")}
    problem.context(**run).forward(*inputs.values())[0].backward()
    gold = dict(zip(inputs, problem.gold(), strict=True))
    for name, x in inputs.items():
        assert (x.grad is None) == (name == frozen)
        if x.grad is not None:
            budgets.assert_relative(f"d {name}", x.grad, gold[name], 1e-6)


@every_run
def test_no_grad(run: dict[str, Any]) -> None:
    problem = Problem()
    with torch.no_grad():
        loss, info = problem.context(**run).forward(leaf(problem.hidden), leaf(problem.weight))
    assert not loss.requires_grad
    assert not info.logprobs.requires_grad
    budgets.assert_relative("loss", loss, problem.loss(problem.hidden, problem.weight), 1e-6)


def test_inference_mode() -> None:
    problem = Problem()
    with torch.inference_mode():
        loss, _ = problem.context(mode="chunk").forward(problem.hidden.clone(), problem.weight.clone())
    budgets.assert_relative("loss", loss.clone(), problem.loss(problem.hidden, problem.weight), 1e-6)


def test_second_backward_through_one_pass() -> None:
    """Refused by default; right with allow_retain_graph, and right under two_pass."""
    problem = Problem()
    for extra, allowed in (({}, False), ({"allow_retain_graph": True}, True), ({"plan": "two_pass"}, True)):
        inputs = [leaf(problem.hidden), leaf(problem.weight)]
        loss, _ = problem.context(mode="chunk", chunk_size=5, **extra).forward(*inputs)
        for grad in torch.autograd.grad(loss, inputs, retain_graph=True) if allowed else ():
            grad.fill_(torch.nan)  # what was handed out is the caller's own
        loss.backward(retain_graph=True)
        assert_grads(inputs, problem.gold())
        if not allowed:
            with pytest.raises(XlossError, match="allow_retain_graph"):
                loss.backward()
            assert_grads(inputs, problem.gold())
            continue
        (3 * loss).backward()
        assert_grads(inputs, problem.gold(4.0))


@every_run
def test_gradient_penalty_is_refused(run: dict[str, Any]) -> None:
    """A second derivative of the chunked plans must be an error; eager has one."""
    problem = Problem()
    inputs = [leaf(problem.hidden), leaf(problem.weight)]

    def penalised(loss: Tensor, hidden: Tensor) -> Tensor:
        (grad,) = torch.autograd.grad(loss, hidden, create_graph=True)
        return grad.square().sum() + hidden.sum() * 0

    loss, _ = problem.context(**run).forward(*inputs)
    if run["mode"] != "eager":
        with pytest.raises(RuntimeError, match="second derivative"):
            penalised(loss, inputs[0]).backward()
        return
    penalised(loss, inputs[0]).backward()
    leaves = head.leaves(problem.hidden, problem.weight)
    want = head.grads(penalised(problem.loss(*leaves), leaves[0]), leaves)
    assert_grads(inputs, want)


@pytest.mark.parametrize("run", [RUNS["eager"], {"mode": "chunk", "chunk_size": 4}], ids=["eager", "chunk"])
def test_logprob_context_is_differentiable(run: dict[str, Any]) -> None:
    problem = Problem()
    item = BaseLossContextInputItem(shifted_labels=problem.batch.labels)
    (ctx,) = contexts(LogProbConfig(**run), [item])
    inputs = [leaf(problem.hidden), leaf(problem.weight)]
    logprobs, _ = ctx.forward(*inputs)
    upstream = torch.randn(logprobs.shape, dtype=torch.float64)
    (logprobs * upstream).sum().backward()
    leaves = head.leaves(problem.hidden, problem.weight)
    stats = head.token_stats(*leaves, problem.batch.labels)
    assert_grads(inputs, head.grads((stats.logprobs * upstream).sum(), leaves), 1e-12)


def test_info_logprobs_are_differentiable_under_two_pass() -> None:
    """info.logprobs of a two-pass run may enter another loss."""
    problem = Problem()
    inputs = [leaf(problem.hidden), leaf(problem.weight)]
    _, info = problem.context(mode="chunk", plan="two_pass", chunk_size=4).forward(*inputs)
    info.logprobs.square().sum().backward()
    leaves = head.leaves(problem.hidden, problem.weight)
    stats = head.token_stats(*leaves, problem.batch.labels)
    assert_grads(inputs, head.grads(stats.logprobs.square().sum(), leaves), 1e-12)
