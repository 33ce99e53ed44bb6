"""Distillation from a second head or from given logits.

Contract: loss and gradients of hidden states, weight and bias are the float64 oracle's for every divergence, in every
plan, however the teacher is given, with a cap and scale of its own on each side, tempered together, apart or per token,
with free token weights, whatever stands at masked tokens. No gradient reaches the teacher. Cutting into chunks,
micro-batches or another order changes nothing. The laws of the papers hold: a student equal to its teacher has loss and
gradient 0, the ends and limits of JSD, mixed and skewed KL are the two KLs, TVD and JSD(1/2) are symmetric.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from tests import budgets
from tests.oracle import distill, head
from tests.property.distilled import RUNS, STUDENT, VOCAB, Problem, assert_same
from tests.property.helpers import leaf
from tests.property.steps import contexts
from xloss import DistillLossConfig, DistillLossContextInputItem
from xloss.errors import OptionError
from xloss.policy.divergence import DEFAULT_MIX, Divergence, divergence, divergence_grad

every_kind = pytest.mark.parametrize("kind", distill.KINDS)
every_run = pytest.mark.parametrize("run", RUNS.values(), ids=RUNS)
MIX_FIELD = {
    "jsd": "beta",
    "mixed": "mixed_kl_weight",
    "skewed_forward_kl": "skew_lambda",
    "skewed_reverse_kl": "skew_lambda",
}


@every_run
@every_kind
def test_every_divergence(kind: str, run: dict[str, Any]) -> None:
    """At another mix than the default, tempered and with the T^2 factor, mixed with cross-entropy."""
    x = 0.3 if kind in MIX_FIELD else None
    fields = {} if x is None else {MIX_FIELD[kind]: x}
    problem = Problem(tau=1.7)
    gold, found = problem.gold(kind, x, hard=0.4, soft=0.8, t2=True)
    got, info = problem.run("head", divergence=kind, hard_weight=0.4, soft_weight=0.8, t2_factor=True, **fields, **run)
    assert_same(got, gold)
    budgets.assert_relative("metric", info.metrics["divergence"].result(), found.mean(), budgets.DISTILL_RELATIVE)


@every_run
@pytest.mark.parametrize("source", ["head", "logits", "function"])
@pytest.mark.parametrize("kind", ["forward_kl", "reverse_kl", "jsd"])
def test_every_way_to_give_a_teacher(kind: str, source: str, run: dict[str, Any]) -> None:
    problem = Problem(seed=1)
    assert_same(problem.run(source, divergence=kind, **run)[0], problem.gold(kind)[0])


@every_run
@pytest.mark.parametrize("teacher_tau", [None, 0.6])
@pytest.mark.parametrize("tau", [0.7, "per token"])
def test_temperatures(tau: float | str, teacher_tau: float | None, run: dict[str, Any]) -> None:
    """They are the divergence's: the cross-entropy and the log-probs stay at 1."""
    problem = Problem(tau=tau, teacher_tau=teacher_tau, shape=(3, 5), bias=False)
    got, info = problem.run("head", divergence="jsd", hard_weight=1.0, t2_factor=True, return_entropy=True, **run)
    assert_same(got, problem.gold("jsd", hard=1.0, t2=True)[0])
    untempered = Problem(shape=(3, 5), bias=False).run("head", divergence="jsd", return_entropy=True, **run)[1]
    if problem.temperature is None:  # the other problem draws one number less
        assert torch.equal(info.logprobs, untempered.logprobs) and torch.equal(info.entropy, untempered.entropy)


@every_kind
@pytest.mark.parametrize("run", ["eager", "one_pass", "two_pass"])
def test_float32(kind: str, run: str) -> None:
    problem = Problem(torch.float32, tau=1.3)
    for source in ("head", "logits"):
        assert_same(problem.run(source, divergence=kind, **RUNS[run])[0], problem.gold(kind)[0])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision_is_judged_three_ways(dtype: torch.dtype) -> None:
    """bf16 and fp16 models: the divergence itself is made in float32."""
    exact = Problem(torch.float64, tau=1.3)
    problem = Problem(dtype, tau=1.3)
    gold = problem.gold("reverse_kl")[0]
    base = problem.run("head", divergence="reverse_kl", mode="eager")[0]
    ours = problem.run("head", divergence="reverse_kl", mode="chunk", chunk_size=4)[0]
    assert ours[0].dtype == torch.float32 and exact.dtype != dtype
    for name, mine, eager, want in zip(("loss", "dh", "dw", "db"), ours, base, gold, strict=True):
        budgets.assert_three_way(name, mine, eager, want, dtype)


@pytest.mark.parametrize("plan", ["one_pass", "two_pass"])
def test_chunks_do_not_matter(plan: str) -> None:
    problem = Problem()
    whole = problem.run("head", divergence="jsd", mode="chunk", plan=plan, chunk_size=64)[0]
    for chunk_size in (1, 2, 5, 9):
        parts = problem.run("head", divergence="jsd", mode="chunk", plan=plan, chunk_size=chunk_size)[0]
        for ours, want in zip(parts, whole, strict=True):
            budgets.assert_rounding("cut", ours, want, 10.0, 1.0)


def test_micro_batches_and_order_do_not_matter() -> None:
    """One pack, its rows in another order, and its rows as micro-batches of one step."""
    problem = Problem(shape=(4, 5), bias=False)
    cfg = DistillLossConfig(divergence="reverse_kl", mode="chunk", chunk_size=3)

    def step(parts: list[Tensor]) -> list[Tensor]:
        items = [
            DistillLossContextInputItem(
                shifted_labels=problem.labels[i], teacher_hidden_states=problem.teacher_hidden[i]
            )
            for i in parts
        ]
        hidden, weight = leaf(problem.hidden.clone()), leaf(problem.weight.clone())
        losses = [
            ctx.forward(hidden[i], weight, teacher_head_weight=problem.teacher_weight)[0]
            for ctx, i in zip(contexts(cfg, items), parts, strict=True)
        ]
        loss = torch.stack(losses).sum()
        return [loss.detach(), *torch.autograd.grad(loss, [hidden, weight])]

    rows = torch.arange(4)
    whole = step([rows])
    for parts in ([rows.flip(0)], [rows[:1], rows[1:]], [rows[2:], rows[1:2], rows[:1]]):
        for ours, want in zip(step(parts), whole, strict=True):
            budgets.assert_relative("cut", ours, want, budgets.DISTILL_RELATIVE)


@every_kind
@pytest.mark.parametrize("run", ["eager", "one_pass", "two_pass"])
def test_student_equal_to_teacher(kind: str, run: str) -> None:
    """Loss 0 and gradient 0, but for the cross-entropy, whose value is the teacher's entropy."""
    problem = Problem(bias=False)
    cfg = DistillLossConfig(divergence=kind, return_entropy=True, **RUNS[run])
    ctx = problem.context(cfg, teacher_hidden_states=problem.hidden)
    hidden, weight = leaf(problem.hidden), leaf(problem.weight)
    loss, info = ctx.forward(hidden, weight, teacher_head_weight=problem.weight.detach())
    if kind == "cross_entropy":
        entropy = (info.entropy.reshape(-1)[problem.live] * problem.weights()).sum()
        budgets.assert_relative("loss", loss, entropy, budgets.DISTILL_RELATIVE)
    else:
        budgets.assert_rounding("loss", loss, torch.zeros(()), 10.0, 1.0)
    for grad in torch.autograd.grad(loss, [hidden, weight]):
        budgets.assert_rounding("gradient", grad, torch.zeros_like(grad), 10.0, budgets.norm(problem.weight))


def test_no_gradient_to_the_teacher() -> None:
    """It may be trained elsewhere: nothing of this loss reaches it, and nothing is kept of its graph."""
    problem = Problem(bias=False)
    for run in ("eager", "one_pass", "two_pass"):
        ctx = problem.context(
            DistillLossConfig(divergence="jsd", **RUNS[run]), teacher_hidden_states=leaf(problem.teacher_hidden)
        )
        weight = leaf(problem.teacher_weight)
        loss, _ = ctx.forward(leaf(problem.hidden), leaf(problem.weight), teacher_head_weight=weight)
        loss.backward()
        assert weight.grad is None and ctx.loss_kwargs.teacher_hidden_states.grad is None
        frozen, _ = ctx.forward(problem.hidden.detach(), problem.weight.detach(), teacher_head_weight=weight)
        assert not frozen.requires_grad


def rows(seed: int = 0, count: int = 4, scale: float = 2.0) -> tuple[Tensor, Tensor]:
    g = torch.Generator().manual_seed(seed)
    z, other = (scale * torch.randn(count, VOCAB, generator=g, dtype=torch.float64) for _ in range(2))
    return z, other


@every_kind
@pytest.mark.parametrize("x", [None, 0.0, 0.2, 1.0])
def test_formulas(kind: str, x: float | None) -> None:
    """Values are the oracle's; the written derivative is autograd's, and that is the central difference."""
    if x is not None and (kind not in DEFAULT_MIX or (x == 1 and kind.startswith("skewed"))):
        with pytest.raises(OptionError, match="mix"):
            Divergence(kind, x)
        return
    z, other = rows()
    of = Divergence(kind, x)
    limit = {0.0: "forward_kl", 1.0: "reverse_kl"}.get(of.share, kind) if kind == "jsd" else kind
    want = distill.of_logits(z, other, limit, x)
    budgets.assert_rounding("value", divergence(z, other, of), want, 10.0, 1.0)
    z.requires_grad_()
    (by_autograd,) = torch.autograd.grad(divergence(z, other, of).sum(), z)
    budgets.assert_rounding("derivative", divergence_grad(z.detach(), other, of), by_autograd, 10.0, 1.0)
    if kind != "lk_hybrid":  # its k is held constant: the derivative is not that of the value
        torch.autograd.gradcheck(lambda y: divergence(y, other, of), z, **budgets.GRADCHECK)


def test_gradient_of_the_reverse_kl() -> None:
    """``p (log p - log q - KL)`` and, of the forward KL, ``p - q``: straight from the table of adjoints."""
    z, other = rows(1)
    p, q = z.softmax(-1), other.softmax(-1)
    kl = (p * (p / q).log()).sum(-1, keepdim=True)
    budgets.assert_rounding(
        "R", divergence_grad(z, other, Divergence("reverse_kl")), p * ((p / q).log() - kl), 10.0, 1.0
    )
    budgets.assert_rounding("F", divergence_grad(z, other, Divergence("forward_kl")), p - q, 10.0, 1.0)


def test_ends_and_symmetries() -> None:
    z, other = rows(2)

    def value(kind: str, x: float | None = None, a: Tensor = z, b: Tensor = other) -> Tensor:
        return divergence(a, b, Divergence(kind, x))

    forward, reverse = value("forward_kl"), value("reverse_kl")
    for kind, x, want in [
        ("jsd", 0.0, forward),
        ("jsd", 1.0, reverse),
        ("mixed", 1.0, forward),
        ("mixed", 0.0, reverse),
        ("skewed_forward_kl", 0.0, forward),
        ("skewed_reverse_kl", 0.0, reverse),
    ]:
        budgets.assert_rounding(f"{kind}({x})", value(kind, x), want, 10.0, 1.0)
    for kind, x in (("tvd", None), ("jsd", 0.5), ("nla", None), ("mixed", 0.5), ("cosine", None)):
        budgets.assert_rounding(f"{kind} turned round", value(kind, x, other, z), value(kind, x), 10.0, 1.0)
    budgets.assert_rounding("swap", value("jsd", 0.2, other, z), value("jsd", 0.8), 10.0, 1.0)
    budgets.assert_rounding("acceptance", 1 - torch.exp(-value("nla")), value("tvd"), 10.0, 1.0)


def test_limits_of_jsd() -> None:
    """``JSD(b) / b`` tends to the forward KL and ``JSD(1 - b) / b`` to the reverse one, linearly in b."""
    z, other = rows(3, scale=1.0)
    for near, limit in ((lambda b: b, "forward_kl"), (lambda b: 1 - b, "reverse_kl")):
        want = divergence(z, other, Divergence(limit))
        gaps = [(divergence(z, other, Divergence("jsd", near(b))) / b - want).abs() for b in (1e-2, 1e-3, 1e-4)]
        assert bool((gaps[1] < gaps[0] / 5).all()) and bool((gaps[2] < gaps[1] / 5).all())


@every_kind
@pytest.mark.parametrize("run", ["eager", "one_pass", "two_pass"])
def test_extreme_logits(kind: str, run: str) -> None:
    """Logits of +-1000, banned tokens on either side, and a teacher sure of one token: everything stays finite."""
    problem = Problem(torch.float32)
    problem.hidden.mul_(300)
    assert problem.head_bias is not None and problem.teacher_bias is not None
    problem.head_bias[3] = problem.teacher_bias[3] = -torch.inf
    problem.head_bias[5] = -torch.inf
    problem.options = {"softcap": None}
    ctx = problem.context(
        problem.config(divergence=kind, **RUNS[run]), teacher_hidden_states=problem.teacher_hidden * 300
    )
    inputs = [leaf(problem.hidden), leaf(problem.weight), leaf(problem.head_bias)]
    loss, _ = ctx.forward(*inputs, teacher_head_weight=problem.teacher_weight, teacher_head_bias=problem.teacher_bias)
    grads = torch.autograd.grad(loss, inputs)
    assert all(bool(torch.isfinite(x).all()) for x in (loss, *grads[1:]))
    assert bool(torch.isfinite(grads[0].reshape(-1, grads[0].shape[-1])[problem.live]).all())
    assert not bool(grads[2][3].any())


@pytest.mark.parametrize("run", ["eager", "one_pass", "two_pass"])
@pytest.mark.parametrize("shape", [(1, 0), (0, 4), (2, 3)])
def test_nothing_to_learn(shape: tuple[int, int], run: str) -> None:
    """No tokens, or all ignored: a zero that reaches hidden states and weight, whatever the teacher holds."""
    hidden, weight = torch.full((*shape, 4), torch.nan).requires_grad_(), torch.randn(7, 4).requires_grad_()
    item = DistillLossContextInputItem(
        shifted_labels=torch.full(shape, -100), teacher_hidden_states=torch.full((*shape, 3), torch.nan)
    )
    (ctx,) = contexts(DistillLossConfig(divergence="jsd", **RUNS[run]), [item])
    loss, info = ctx.forward(hidden, weight, teacher_head_weight=torch.randn(7, 3))
    loss.backward()
    assert loss == 0 and not bool(hidden.grad.any()) and not bool(weight.grad.any())
    assert info.metrics["divergence"].result() == 0


def test_teacher_of_its_own_dtype() -> None:
    """A bf16 teacher of a float32 or float64 student is its rounded self."""
    problem = Problem(bias=False)
    logits = problem.teacher_logits().bfloat16()
    for dtype in (torch.float64, torch.float32):
        student = Problem(dtype, bias=False)
        given = [logits, logits.to(dtype)]
        found = []
        for teacher in given:
            ctx = student.context(
                student.config(mode="chunk", chunk_size=4), teacher_logits=teacher.reshape(1, -1, VOCAB)
            )
            found.append(ctx.forward(student.hidden, student.weight)[0])
        assert torch.equal(*found)
        ctx = student.context(student.config(mode="chunk"), teacher_hidden_states=student.teacher_hidden.bfloat16())
        low, _ = ctx.forward(student.hidden, student.weight, teacher_head_weight=student.teacher_weight.bfloat16())
        rounded = Problem(dtype, bias=False)
        rounded.teacher_hidden = rounded.teacher_hidden.bfloat16().to(dtype)
        rounded.teacher_weight = rounded.teacher_weight.bfloat16().to(dtype)
        ctx = rounded.context(rounded.config(mode="chunk"), teacher_hidden_states=rounded.teacher_hidden)
        want, _ = ctx.forward(rounded.hidden, rounded.weight, teacher_head_weight=rounded.teacher_weight)
        budgets.assert_relative("loss", low, want, budgets.DISTILL_RELATIVE)


def test_forward_only_gives_the_same_loss() -> None:
    problem = Problem()
    (with_grad, *_), _ = problem.run("logits", divergence="tvd", mode="chunk", chunk_size=4)
    ctx = problem.context(problem.config(divergence="tvd", mode="chunk", chunk_size=4),
                          teacher_logits=problem.teacher_logits().reshape(*problem.shape, VOCAB))  # fmt: skip
    with torch.no_grad():
        loss, info = ctx.forward(problem.hidden, problem.weight, problem.head_bias)
    assert torch.equal(loss, with_grad) and info.plan.kind == "forward-only"


@pytest.mark.parametrize("run", ["eager", "one_pass", "two_pass"])
def test_autocast(run: str) -> None:
    """The student's products are bf16's; the teacher's stay in the dtype they came in."""
    student = Problem(torch.float32, bias=False)
    rounded = Problem(torch.float32, bias=False)
    rounded.hidden, rounded.weight = rounded.hidden.bfloat16().float(), rounded.weight.bfloat16().float()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        (loss, dh, _), _ = student.run("head", divergence="reverse_kl", **RUNS[run])
    gold = rounded.gold("reverse_kl")[0]
    budgets.assert_relative("loss", loss, gold[0], budgets.DISTILL_RELATIVE)
    budgets.assert_relative("d hidden", dh, gold[1], budgets.eps(torch.bfloat16))


@every_run
@pytest.mark.parametrize("source", ["head", "logits"])
@pytest.mark.parametrize("tau", [1.0, "per token"])
def test_clamped_divergence(tau: float | str, source: str, run: dict[str, Any]) -> None:
    """`loss_max_clamp` stops value and gradient; such rows leave the second pass, and the rest keep their teacher."""
    problem = Problem(tau=tau, seed=1)  # drops first rows of a chunk, not only last ones
    inputs = head.leaves(problem.hidden, problem.weight, problem.head_bias)
    z = distill.student_logits(*inputs, STUDENT, problem.live)
    found = distill.of_logits(z / problem.tau_live, problem.teacher_logits()[problem.live] / problem.tau_live, "jsd")
    limit = float(found.detach().median())
    assert bool((found > limit).any()) and bool((found < limit).any())
    loss = (problem.weights() * found.clamp(max=limit)).sum()
    gold = [loss.detach(), *head.grads(loss, inputs)]
    assert_same(problem.run(source, divergence="jsd", loss_max_clamp=limit + 1e-9, **run)[0], gold)


@every_run
def test_a_teacher_that_bans_tokens(run: dict[str, Any]) -> None:
    """Logits of -inf are probabilities of 0; the student's gradient there is its own probability."""
    problem = Problem()
    banned = problem.teacher_logits()
    banned[:, 4:9] = -torch.inf
    problem.teacher_logits = lambda: banned  # type: ignore[method-assign]
    inputs = head.leaves(problem.hidden, problem.weight, problem.head_bias)
    z = distill.student_logits(*inputs, STUDENT, problem.live)
    loss = -(problem.weights() * (banned[problem.live].softmax(-1) * z.log_softmax(-1)).sum(-1)).sum()
    gold = [loss.detach(), *head.grads(loss, inputs)]
    assert_same(problem.run("logits", divergence="cross_entropy", **run)[0], gold)
    got, _ = problem.run("function", divergence="jsd", **run)
    assert all(bool(torch.isfinite(x).all()) for x in got)
