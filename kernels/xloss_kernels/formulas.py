"""The built-in losses per token: value and derivative with respect to the log-prob, in registers.

Twins of the torch formulas in xloss/policy, subgradients included: at a tie `maximum` and `minimum` give half to each
side, `clamp` passes the gradient at its bounds and `abs` has gradient 0 at 0, as in torch.autograd. Arguments are
float32 scalars or blocks; losses are to be minimised. Notation: d = logprob - old, r = exp(d), A = advantage.
"""

import triton
import triton.language as tl


@triton.jit
def _inside(x, low, high):
    return ((x >= low) & (x <= high)).to(tl.float32)


@triton.jit
def _share(mine, other):
    """Part of the gradient that `maximum(mine, other)` sends to `mine`."""
    return tl.where(mine > other, 1.0, tl.where(mine == other, 0.5, 0.0))


@triton.jit
def _clamp(x, low, high):
    return tl.minimum(tl.maximum(x, low), high)


@triton.jit
def _expm1_beyond(c):
    """(exp(c) - 1 - c, exp(c) - 1): by series below 1/2, where the differences would cancel."""
    series = 1.0 / 120.0 + c * (1.0 / 720.0 + c * (1.0 / 5040.0 + c * (1.0 / 40320.0)))
    series = c * c * (0.5 + c * (1.0 / 6.0 + c * (1.0 / 24.0 + c * series)))
    small = tl.abs(c) < 0.5
    grown = tl.exp(c) - 1.0
    return tl.where(small, series, grown - c), tl.where(small, c + series, grown)


@triton.jit
def reinforce(logprob, advantage):
    """-A logprob."""
    return -advantage * logprob, -advantage


@triton.jit
def importance_sampling(logprob, old, advantage):
    """-r A."""
    value = -tl.exp(logprob - old) * advantage
    return value, value


@triton.jit
def dro(logprob, old, advantage, beta):
    """-(A logprob - beta/2 d^2)."""
    d = logprob - old
    return -(advantage * logprob - 0.5 * beta * d * d), beta * d - advantage


@triton.jit
def cispo(logprob, old, advantage, ratio_min, ratio_max):
    """-clamp(r, ratio_min, ratio_max) A logprob, the clamped ratio a constant. -> (value, derivative, low, high)."""
    ratio = tl.exp(logprob - old)
    slope = -_clamp(ratio, ratio_min, ratio_max) * advantage
    return slope * logprob, slope, ratio < ratio_min, ratio > ratio_max


@triton.jit
def ppo_clip(logprob, old, advantage, ratio_min, ratio_max, dual_clip, log_ratio_min, log_ratio_max):
    """maximum(-r A, -clamp(r, ratio_min, ratio_max) A), and for A < 0 minimum(-dual_clip A, that).

    r = exp(clamp(d, log_ratio_min, log_ratio_max)). `dual_clip` may be None. -> (value, derivative, low, high): `low`
    marks A < 0 and r < ratio_min, `high` marks A > 0 and r > ratio_max.
    """
    d = logprob - old
    ratio = tl.exp(_clamp(d, log_ratio_min, log_ratio_max))
    free = -ratio * advantage
    clipped = -_clamp(ratio, ratio_min, ratio_max) * advantage
    share = _share(free, clipped)
    value = tl.maximum(free, clipped)
    passes = share + (1.0 - share) * _inside(ratio, ratio_min, ratio_max)
    if dual_clip is not None:
        bound = -dual_clip * advantage
        share_of_bound = _share(value, bound)  # minimum: the part that goes to the larger one's rival
        passes = tl.where(advantage < 0.0, passes * (1.0 - share_of_bound), passes)
        value = tl.where(advantage < 0.0, tl.minimum(bound, value), value)
    derivative = free * passes * _inside(d, log_ratio_min, log_ratio_max)
    return value, derivative, (advantage < 0.0) & (ratio < ratio_min), (advantage > 0.0) & (ratio > ratio_max)


@triton.jit
def kl_penalty(logprob, ref, KIND: tl.constexpr):
    """KL estimators of x = logprob - ref.

        k1 x      abs |x|      k2 x^2 / 2      k3 clamp(exp(c) - 1 - c, -10, 10), c = clamp(-x, -20, 20)

    The k3 gradient, 1 - exp(c), is 0 beyond either clamp.
    """
    x = logprob - ref
    if KIND == "k1":
        value = x
        derivative = x * 0.0 + 1.0
    elif KIND == "abs":
        value = tl.abs(x)
        derivative = tl.where(x > 0.0, 1.0, tl.where(x < 0.0, -1.0, 0.0))
    elif KIND == "k2":
        value = 0.5 * x * x
        derivative = x
    else:
        tl.static_assert(KIND == "k3", "KL kind is k1, abs, k2 or k3")
        c = _clamp(-x, -20.0, 20.0)
        raw, grown = _expm1_beyond(c)
        value = _clamp(raw, -10.0, 10.0)
        derivative = -grown * _inside(-x, -20.0, 20.0) * _inside(raw, -10.0, 10.0)
    return value, derivative
