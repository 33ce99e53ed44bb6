"""The loss formulas against their torch twins in ``xloss.policy`` under autograd.

Over their whole parameter space, switch points and exact ties included.

Everything is float32 on both sides: a tie in float64 is not one in float32. exp of numpy (the interpreter) and of
torch may differ by one unit, so points that sit exactly on a ratio bound are built from log-ratios where the two agree.
"""

from __future__ import annotations

import numpy as np
import pytest
import torch
import triton
import triton.language as tl
from hypothesis import given, settings
from hypothesis import strategies as st

from tests import budgets
from tests.interpret.kernel_oracle import kl_term, policy_term
from xloss_kernels import formulas
from xloss_kernels import policy_rows as rows
from xloss_kernels.policy_rows import PolicySpec

SIZE = 64
K3_LIMITS = {"kl_clamp_in": 20.0, "kl_clamp_out": 10.0}  # XTuner's and verl's
K3 = PolicySpec("ppo", kl="k3", **K3_LIMITS)


@triton.jit
def policy_kernel(lp, old, advantage, value, slope, low, high, ratio_min, ratio_max, dual_clip, delta, log_ratio_min,
                  log_ratio_max, beta, LOSS: tl.constexpr, SIZE: tl.constexpr):  # fmt: skip
    at = tl.arange(0, SIZE)
    v, d, is_low, is_high = rows.policy_term(
        tl.load(lp + at), tl.load(old + at), tl.load(advantage + at), ratio_min, ratio_max, dual_clip, delta,
        log_ratio_min, log_ratio_max, beta, LOSS)  # fmt: skip
    tl.store(value + at, v)
    tl.store(slope + at, d)
    tl.store(low + at, is_low.to(tl.int8))
    tl.store(high + at, is_high.to(tl.int8))


@triton.jit
def kl_kernel(lp, ref, old, value, slope, clamp_in, clamp_out, KIND: tl.constexpr, GRAD: tl.constexpr,
              SIZE: tl.constexpr):  # fmt: skip
    at = tl.arange(0, SIZE)
    v, d = formulas.kl_penalty(
        tl.load(lp + at), tl.load(ref + at), tl.load(old + at), clamp_in, clamp_out, KIND, GRAD)  # fmt: skip
    tl.store(value + at, v)
    tl.store(slope + at, d)


def fill(values) -> torch.Tensor:
    """SIZE float32 numbers that repeat `values`."""
    values = torch.as_tensor(values, dtype=torch.float32).reshape(-1)
    return values.repeat(-(-SIZE // len(values)))[:SIZE].clone()


def compare(value, slope, expected, lp):
    wanted = torch.autograd.grad(expected.sum(), lp)[0]
    torch.testing.assert_close(value, expected.detach(), **budgets.KERNEL_FORMULA)
    torch.testing.assert_close(slope, wanted, **budgets.KERNEL_SLOPE)


def run_policy(lp, old, advantage, spec):
    lp, old, advantage = fill(lp), fill(old), fill(advantage)
    value, slope, low, high = (torch.empty(SIZE) for _ in range(4))
    low, high = torch.empty(SIZE, dtype=torch.int8), torch.empty(SIZE, dtype=torch.int8)
    policy_kernel[(1,)](lp, old, advantage, value, slope, low, high, spec.ratio_min, spec.ratio_max, spec.dual_clip,
                        spec.delta, spec.log_ratio_min, spec.log_ratio_max, spec.beta, LOSS=spec.loss,
                        SIZE=SIZE)  # fmt: skip
    lp.requires_grad_()
    compare(value, slope, policy_term(lp, spec, advantage, old), lp)
    return value, slope, low.bool(), high.bool()


floats = st.floats(-4, 4, width=32, allow_subnormal=False)
log_ratios = st.lists(
    st.one_of(st.just(0.0), st.floats(-3, 3, width=32), st.sampled_from([-20.0, 20.0, -25.0, 25.0])),
    min_size=1,
    max_size=SIZE,
)
advantages = st.lists(st.one_of(st.just(0.0), floats, st.floats(2**-126, 2**-120, width=32)), min_size=1, max_size=SIZE)
LOSSES = ("ce", "reinforce", "importance_sampling", "dro", "cispo", "ppo")


@settings(max_examples=60, deadline=None)
@given(
    loss=st.sampled_from(LOSSES), d=log_ratios, advantage=advantages, lp=st.floats(-30, 0, width=32),
    low=st.floats(0, 1, width=32), high=st.floats(0, 4, width=32), dual=st.one_of(st.none(), st.floats(1, 4, width=32)),
    delta=st.one_of(st.none(), st.floats(1, 6, width=32)), beta=st.floats(0, 1, width=32),
    limit=st.sampled_from([0.5, 20.0]))  # fmt: skip
def test_policy_terms(loss, d, advantage, lp, low, high, dual, delta, beta, limit):
    spec = PolicySpec(loss, 1.0 - low, 1.0 + high, dual, -limit, limit, beta, delta)
    d = (
        fill(d).clamp(-3, 3) if loss in ("importance_sampling", "dro") else fill(d)
    )  # unclamped: exp(25)^2 tells nothing
    lp = torch.full_like(d, lp)
    old = lp - d
    agree = torch.from_numpy(np.exp((lp - old).clamp(-limit, limit).numpy())) == (lp - old).clamp(-limit, limit).exp()
    run_policy(torch.where(agree, lp, old), old, advantage, spec)


def agreeing_log_ratios() -> torch.Tensor:
    """Log-ratios whose exp is the same float in numpy and torch."""
    d = torch.linspace(-2, 2, 401)
    return d[torch.from_numpy(np.exp(d.numpy())) == d.exp()]


@pytest.mark.parametrize("sign", [1.0, -1.0, 0.0])
@pytest.mark.parametrize("dual", [None, 3.0])
def test_ppo_exactly_on_its_bounds(sign, dual):
    d = agreeing_log_ratios()
    for x in (d[d < 0][::40], d[d > 0][::40]):
        for item in x:
            bound = float(item.exp())
            low, high = (bound, 4.0) if bound < 1 else (0.25, bound)
            _, slope, below, above = run_policy(item, 0.0, sign, PolicySpec("ppo", low, high, dual))
            assert not below.any() and not above.any()
            assert (slope != 0).all() or sign == 0 or (sign < 0 and dual is not None and bound > dual)


def test_ppo_exactly_on_the_dual_clip_splits_the_gradient():
    d = agreeing_log_ratios()
    item = d[d > 1][0]
    ratio = float(item.exp())
    _, slope, _, _ = run_policy(item, 0.0, -2.0, PolicySpec("ppo", 0.8, 1.2, ratio))
    assert torch.allclose(slope, torch.full_like(slope, ratio), rtol=budgets.KERNEL_KINK_SLOPE)  # half of -A r = 2 r


def test_ppo_ties_by_underflow_split_the_gradient():
    """Advantages so small that -r A and -clamp(r) A round to the same number."""
    tiny = 2.0**-149
    _, slope, _, _ = run_policy(0.3, 0.0, tiny, PolicySpec("ppo"))
    assert slope.abs().max() <= tiny


def test_ppo_flags():
    lp = torch.tensor([0.5, 0.5, -0.5, -0.5, 0.0])
    advantage = torch.tensor([1.0, -1.0, 1.0, -1.0, 1.0])
    _, _, low, high = run_policy(lp, 0.0, advantage, PolicySpec("ppo"))
    assert low[:5].tolist() == [False, False, False, True, False]
    assert high[:5].tolist() == [True, False, False, False, False]


@pytest.mark.parametrize("kind", ["k1", "abs", "k2", "k3"])
@settings(max_examples=30, deadline=None)
@given(
    x=st.lists(st.one_of(st.floats(-25, 25, width=32), st.sampled_from([0.0, 20.0, -20.0, 1e-6, -1e-6])), min_size=1)
)
def test_kl_terms(kind, x):
    check_kl(x, PolicySpec("ppo", kl=kind, **K3_LIMITS if kind == "k3" else {}))


@pytest.mark.parametrize("grad", ["plain", "straight_through", "unbiased", "score_function"])
@pytest.mark.parametrize("kind", ["k1", "abs", "k2", "k3"])
@settings(max_examples=10, deadline=None)
@given(
    x=st.lists(st.floats(-4, 4, width=32), min_size=1),
    limits=st.sampled_from([{}, {"kl_clamp_in": 1.5}, {"kl_clamp_in": 3.0, "kl_clamp_out": 2.5}]),
    d=st.lists(st.floats(-2, 2, width=32), min_size=1),
)
def test_kl_gradients(kind, grad, x, limits, d):
    check_kl(x, PolicySpec("ppo", kl=kind, kl_grad=grad, **limits), d)


def check_kl(x, spec, d=(0.0,)):
    lp = fill(x)
    old = lp - fill(d)
    ref, value, slope = torch.zeros(SIZE), torch.empty(SIZE), torch.empty(SIZE)
    kl_kernel[(1,)](lp, ref, old, value, slope, spec.kl_clamp_in, spec.kl_clamp_out, KIND=spec.kl, GRAD=spec.kl_grad,
                    SIZE=SIZE)  # fmt: skip
    lp.requires_grad_()
    compare(value, slope, kl_term(lp, ref, old, spec), lp)
    return slope


def neighbours(x: float, count: int = 4000) -> torch.Tensor:
    """The `count` floats around x."""
    middle = torch.tensor(x).view(torch.int32)
    return (middle + torch.arange(-count // 2, count // 2, dtype=torch.int32)).view(torch.float32)


def test_k3_output_clamp_passes_the_gradient_exactly_at_its_bound():
    x = neighbours(10.999983)
    raw = torch.expm1(-x) + x
    agree = raw == torch.from_numpy(np.exp(-x.numpy())) - 1.0 + x  # one unit apart, the two sides fall on either side
    at_bound, beyond = x[agree & (raw == 10.0)], x[agree & (raw > 10.0)]
    assert len(at_bound) and len(beyond)
    assert (check_kl(at_bound[:SIZE], K3) != 0).all()
    assert (check_kl(beyond[:SIZE], K3) == 0).all()


def test_k3_output_clamp_where_the_exponential_dominates():
    assert (check_kl(neighbours(-2.60, SIZE), K3) != 0).all()
    assert (check_kl(neighbours(-2.63, SIZE), K3) == 0).all()


def test_k3_is_exact_near_zero():
    """exp(c) - 1 - c would keep no digit here."""
    lp = fill([1e-4, -1e-4, 1e-3, 0.1, -0.3, 0.49999, -0.5, 0.50001])
    value, slope = torch.empty(SIZE), torch.empty(SIZE)
    kl_kernel[(1,)](lp, torch.zeros(SIZE), lp, value, slope, 20.0, 10.0, KIND="k3", GRAD="plain", SIZE=SIZE)
    exact = torch.expm1(-lp.double())
    torch.testing.assert_close(value.double(), exact + lp.double(), **budgets.KERNEL_EXACT_VALUE)
    torch.testing.assert_close(slope.double(), -exact, **budgets.KERNEL_EXACT_SLOPE)


def test_k3_input_clamp():
    check_kl([20.0, 20.000002, -20.0, -20.000002, 0.0], K3)
