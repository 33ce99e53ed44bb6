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
def importance_sampling(logprob, old, advantage, log_ratio_min, log_ratio_max):
    """-r A, r = exp(clamp(d, log_ratio_min, log_ratio_max))."""
    d = logprob - old
    value = -tl.exp(_clamp(d, log_ratio_min, log_ratio_max)) * advantage
    return value, value * _inside(d, log_ratio_min, log_ratio_max)


@triton.jit
def dro(logprob, old, advantage, beta):
    """-(A logprob - beta/2 d^2)."""
    d = logprob - old
    return -(advantage * logprob - 0.5 * beta * d * d), beta * d - advantage


@triton.jit
def cispo(logprob, old, advantage, ratio_min, ratio_max, log_ratio_min, log_ratio_max):
    """-clamp(r, ratio_min, ratio_max) A logprob, the clamped ratio a constant. -> (value, derivative, low, high).

    r = exp(clamp(d, log_ratio_min, log_ratio_max)).
    """
    ratio = tl.exp(_clamp(logprob - old, log_ratio_min, log_ratio_max))
    slope = -_clamp(ratio, ratio_min, ratio_max) * advantage
    return slope * logprob, slope, ratio < ratio_min, ratio > ratio_max


@triton.jit
def ppo_clip(logprob, old, advantage, ratio_min, ratio_max, dual_clip, delta, log_ratio_min, log_ratio_max):
    """maximum(-min(r, delta) A, -clamp(r, ratio_min, ratio_max) A), and for A < 0 minimum(-dual_clip A, that).

    r = exp(clamp(d, log_ratio_min, log_ratio_max)). `dual_clip` and `delta` may be None. -> (value, derivative, low,
    high): `low` marks A < 0 and r < ratio_min, `high` marks A > 0 and r > ratio_max.
    """
    d = logprob - old
    ratio = tl.exp(_clamp(d, log_ratio_min, log_ratio_max))
    slope = -ratio * advantage
    free = slope
    grows = 1.0
    if delta is not None:
        free = -tl.minimum(ratio, delta) * advantage
        grows = (ratio <= delta).to(tl.float32)
    clipped = -_clamp(ratio, ratio_min, ratio_max) * advantage
    share = _share(free, clipped)
    value = tl.maximum(free, clipped)
    passes = share * grows + (1.0 - share) * _inside(ratio, ratio_min, ratio_max)
    if dual_clip is not None:
        bound = -dual_clip * advantage
        share_of_bound = _share(value, bound)  # minimum: the part that goes to the larger one's rival
        passes = tl.where(advantage < 0.0, passes * (1.0 - share_of_bound), passes)
        value = tl.where(advantage < 0.0, tl.minimum(bound, value), value)
    derivative = slope * passes * _inside(d, log_ratio_min, log_ratio_max)
    return value, derivative, (advantage < 0.0) & (ratio < ratio_min), (advantage > 0.0) & (ratio > ratio_max)


@triton.jit
def kl_penalty(logprob, ref, old, clamp_in, clamp_out, KIND: tl.constexpr, GRAD: tl.constexpr):
    """KL estimators of x = logprob - ref, c = clamp(x, -clamp_in, clamp_in), the value clamped to +-clamp_out.

        k1 c      abs |c|      k2 c^2 / 2      k3 exp(-c) - 1 + c

    The gradient is 0 beyond either clamp. GRAD: "plain"; "straight_through" has gradient x instead; "score_function"
    adds the value to it; "unbiased" does so too and multiplies value and gradient by exp(logprob - old).
    """
    x = logprob - ref
    c = _clamp(x, -clamp_in, clamp_in)
    if KIND == "k1":
        raw = c
        slope = c * 0.0 + 1.0
    elif KIND == "abs":
        raw = tl.abs(c)
        slope = tl.where(c > 0.0, 1.0, tl.where(c < 0.0, -1.0, 0.0))
    elif KIND == "k2":
        raw = 0.5 * c * c
        slope = c
    else:
        tl.static_assert(KIND == "k3", "KL kind is k1, abs, k2 or k3")
        raw, grown = _expm1_beyond(-c)
        slope = -grown
    value = _clamp(raw, -clamp_out, clamp_out)
    derivative = slope * _inside(x, -clamp_in, clamp_in) * _inside(raw, -clamp_out, clamp_out)
    if GRAD == "straight_through":
        derivative = x
    elif GRAD == "score_function":
        derivative += value
    elif GRAD == "unbiased":
        ratio = tl.exp(logprob - old)
        derivative = ratio * (derivative + value)
        value = ratio * value
    else:
        tl.static_assert(GRAD == "plain", "KL gradient is plain, straight_through, score_function or unbiased")
    return value, derivative
