"""Distillation from the K best log-probs of a teacher.

Contract: loss and gradients are the float64 oracle's in every mode and plan, with fewer than K entries at some tokens,
masked tokens holding anything, a temperature, cross-entropy beside. With K the whole vocabulary every mode is the full
divergence. verl's clamps stop value and gradient where they act. The adjoints of the K log-probs are those of the
literature, and the tail stays exact from no mass left to all of it.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from tests import budgets
from tests.oracle import distill, head
from tests.property.distilled import RUNS, STUDENT, VOCAB, K, Problem, assert_same
from tests.property.helpers import leaf
from xloss.errors import OptionError
from xloss.policy.divergence import Divergence, divergence
from xloss.policy.topk import FULL_KINDS, log1mexp, topk_divergence, with_tail

every_run = pytest.mark.parametrize("run", RUNS.values(), ids=RUNS)
FORMS = [("full", kind) for kind in FULL_KINDS]
FORMS += [(mode, kind) for mode in ("renormalized", "tail") for kind in distill.KINDS if kind != "cosine"]
every_form = pytest.mark.parametrize(("mode", "kind"), FORMS)


def teacher_of(problem: Problem, tau: float = 1.0) -> tuple[Tensor, Tensor]:
    """Ids and log-probs `[.., K]` at a temperature, best first; one token has 2 of them, masked ones hold nonsense."""
    logprobs, ids = torch.log_softmax(problem.teacher_logits() / tau, -1).topk(K)
    ids = ids.masked_fill((torch.arange(len(ids)) == 5)[:, None] & (torch.arange(K) >= 2), -100)
    ids[problem.labels.reshape(-1) == -100] = VOCAB + 7
    return ids.reshape(*problem.shape, K), logprobs.to(problem.dtype).reshape(*problem.shape, K)


def _run(problem: Problem, ids: Tensor, logprobs: Tensor, **fields: Any) -> tuple[list[Tensor], Any]:
    ctx = problem.context(problem.config(**fields), teacher_topk_ids=ids, teacher_topk_logprobs=logprobs)
    inputs = [leaf(problem.hidden), leaf(problem.weight), leaf(problem.head_bias)]
    loss, info = ctx.forward(*inputs)
    return [loss.detach(), *torch.autograd.grad(loss, inputs)], info


def gold(
    problem: Problem, ids: Tensor, logprobs: Tensor, tau: float = 1.0, hard: float = 0.0, **of: Any
) -> list[Tensor]:
    inputs = head.leaves(problem.hidden, problem.weight, problem.head_bias)
    z = distill.student_logits(*inputs, STUDENT, problem.live)
    found = distill.of_topk(z / tau, ids.reshape(-1, K)[problem.live], logprobs.reshape(-1, K)[problem.live], **of)
    nll = -torch.log_softmax(z, -1).gather(1, problem.labels.reshape(-1)[problem.live, None])[:, 0]
    loss = (problem.weights() * (found + hard * nll)).sum()
    return [loss.detach(), *head.grads(loss, inputs)]


@every_run
@every_form
def test_every_form(mode: str, kind: str, run: dict[str, Any]) -> None:
    problem = Problem()
    ids, logprobs = teacher_of(problem)
    got, info = _run(problem, ids, logprobs, topk_mode=mode, divergence=kind, **run)
    outside = -100.0 if mode == "full" else None
    assert_same(got, gold(problem, ids, logprobs, kind=kind, mode=mode, outside=outside))
    mass = logprobs.exp().masked_fill(ids == -100, 0).sum(-1).reshape(-1)[problem.live].mean()
    budgets.assert_relative("mass", info.metrics["teacher_mass"].result(), mass, budgets.DISTILL_RELATIVE)


@every_form
@pytest.mark.parametrize("plan", ["eager", "one_pass"])
def test_tempered(mode: str, kind: str, plan: str) -> None:
    """`renormalized` divides both by the temperature; elsewhere the teacher's log-probs are given at it."""
    problem = Problem(tau=1.6)
    ids, logprobs = teacher_of(problem, 1.0 if mode == "renormalized" else 1.6)
    fields = {"topk_mode": mode, "divergence": kind, "outside_logprob": None, "t2_factor": True}
    want = gold(problem, ids, logprobs / (1.6 if mode == "renormalized" else 1.0), 1.6, kind=kind, mode=mode)
    assert_same(_run(problem, ids, logprobs, **fields, **RUNS[plan])[0], [1.6**2 * x for x in want])


@every_run
def test_beside_cross_entropy(run: dict[str, Any]) -> None:
    """The label's log-prob comes with the K others, at temperature 1; logits of the teacher do where only differences
    matter."""
    problem = Problem(tau=0.7)
    ids, logprobs = teacher_of(problem)
    fields = {"topk_mode": "renormalized", "divergence": "jsd", "hard_weight": 0.5}
    got, _ = _run(problem, ids, logprobs + 3.0, **fields, **run)
    assert_same(got, gold(problem, ids, logprobs / 0.7, 0.7, hard=0.5, kind="jsd", mode="renormalized"))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@every_form
def test_all_of_the_vocabulary(mode: str, kind: str, dtype: torch.dtype) -> None:
    z, other = (torch.randn(4, VOCAB, dtype=dtype, generator=torch.Generator().manual_seed(s)) for s in (0, 1))
    lp, lq = z.log_softmax(-1).requires_grad_(), other.log_softmax(-1)
    of = Divergence(kind)
    found = topk_divergence(lp, lq, of, mode, entropy=-(lp.exp() * lp).sum(-1), outside_logprob=-100.0)
    want = divergence(z, other, of)
    if mode == "tail":  # what is left is rounding, on both sides
        assert bool((found - want < budgets.eps(dtype) ** 0.5).all())
    else:
        budgets.assert_rounding("value", found, want, 110.0, 1.0)
    found.sum().backward()
    assert bool(torch.isfinite(lp.grad).all())


def test_adjoints() -> None:
    """`-q_k`; `p_k - q_k` over the K, summing to 0; `-q_k + q_tail p_k / (1 - sum p)`."""
    g = torch.Generator().manual_seed(0)
    lp = torch.randn(6, VOCAB, generator=g, dtype=torch.float64).log_softmax(-1)[:, :K].requires_grad_()
    lq = torch.randn(6, VOCAB, generator=g, dtype=torch.float64).log_softmax(-1)[:, :K]
    p, q = lp.detach().exp(), lq.exp()
    among = p / p.sum(1, keepdim=True) - q / q.sum(1, keepdim=True)
    wanted = {
        "full": -q,
        "renormalized": among,
        "tail": -q + (1 - q.sum(1, keepdim=True)) * p / (1 - p.sum(1, keepdim=True)),
    }
    for mode, want in wanted.items():
        (found,) = torch.autograd.grad(topk_divergence(lp, lq, Divergence(), mode).sum(), lp)
        budgets.assert_rounding(mode, found, want, 10.0, 1.0)
    budgets.assert_rounding("sum", among.sum(1), torch.zeros(6), 10.0, 1.0)


@every_form
def test_gradcheck(mode: str, kind: str) -> None:
    if kind == "lk_hybrid":  # its k is held constant
        return
    g = torch.Generator().manual_seed(3)
    lp = torch.randn(3, VOCAB, generator=g, dtype=torch.float64).log_softmax(-1)[:, :K].requires_grad_()
    lq = torch.randn(3, VOCAB, generator=g, dtype=torch.float64).log_softmax(-1)[:, :K]
    entropy = torch.rand(3, generator=g, dtype=torch.float64).requires_grad_()

    def value(x: Tensor, h: Tensor) -> Tensor:
        return topk_divergence(x, lq, Divergence(kind), mode, entropy=h, outside_logprob=-20.0) + 0 * h

    torch.autograd.gradcheck(value, (lp, entropy), **budgets.GRADCHECK)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_tail_is_exact_at_both_ends(dtype: torch.dtype) -> None:
    """`log(1 - e^x)` against expm1 and log1p where each is exact; no mass left is one rounding step, not -inf."""
    tiny = torch.tensor([-1e-6, -1e-3, -0.5], dtype=torch.float64)
    far = torch.tensor([-0.8, -5.0, -30.0, -80.0], dtype=torch.float64)
    got = log1mexp(torch.cat([tiny, far]).to(dtype)).double()
    want = torch.cat(
        [torch.log(-torch.expm1(tiny.to(dtype).double())), torch.log1p(-torch.exp(far.to(dtype).double()))]
    )
    assert bool(((got - want).abs() <= 4 * budgets.eps(dtype) * want.abs() + torch.finfo(dtype).tiny).all())
    logprobs = torch.tensor([[0.0, -200.0], [-torch.inf, -torch.inf]], dtype=dtype).clamp(min=-1e30).requires_grad_()
    tail = with_tail(logprobs)
    tail.sum().backward()
    assert bool(torch.isfinite(tail).all()) and bool(torch.isfinite(logprobs.grad).all())
    assert tail[0, 2] < -10 and tail[1, 2] == 0


@pytest.mark.parametrize("plan", ["eager", "one_pass", "two_pass"])
def test_clamps_of_verl(plan: str) -> None:
    """Log-probs of both raised to -3, the divergence cut at 0.4: no gradient from what was cut."""
    problem = Problem()
    ids, logprobs = teacher_of(problem)
    inputs = head.leaves(problem.hidden, problem.weight, problem.head_bias)
    logp = torch.log_softmax(distill.student_logits(*inputs, STUDENT, problem.live), -1)
    flat = ids.reshape(-1, K)[problem.live]
    known = flat != -100
    lp = logp.gather(1, flat.masked_fill(~known, 0)).clamp(min=-3.0)
    lq = logprobs.reshape(-1, K)[problem.live].clamp(min=-3.0)
    each = (torch.exp(lq) * (lq - lp) * known).sum(1)
    assert bool((lp == -3).any()) and bool((each > 0.4).any()) and bool((each < 0.4).any())
    loss = (each.clamp(-0.4, 0.4) * problem.weights()).sum()
    want = [loss.detach(), *head.grads(loss, inputs)]
    fields = {"topk_mode": "full", "log_prob_min_clamp": -3.0, "loss_max_clamp": 0.4}
    assert_same(_run(problem, ids, logprobs, **fields, **RUNS[plan])[0], want)


def test_refused() -> None:
    """What a mode cannot honour is named."""
    lp = torch.zeros(2, 3)
    for of, mode, options in [
        (Divergence("jsd"), "full", {}),
        (Divergence("cosine"), "renormalized", {}),
        (Divergence(), "tail", {"log_prob_min": -10.0}),
        (Divergence(), "half", {}),
    ]:
        with pytest.raises(OptionError):
            topk_divergence(lp, lp, of, mode, **options)
