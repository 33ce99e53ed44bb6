"""The only place where a tolerance is written. Every one follows from a dtype's rounding step and a size.

Errors are measured norm-wise: `|got - want|_F <= factor * eps * (1 + max|z|) * scale`.
- A logit of size |z| is known to eps |z|, and so is everything made of it: hence `1 + max|z|`.
- `scale` is the size the quantity could have, not the one it happens to have: a gradient `g (onehot - p)` may cancel to
  0 and still carries the rounding of its terms. For dW that is |upstream| |hidden| d(logit)/d(raw), and so on.
In float64 that leaves 1e-13: a wrong term cannot hide there. Low precision is judged three ways: float64 gold, eager in
the working dtype, ours; ours may be at most THREE_WAY_FACTOR times as far from gold as eager is.
"""

from __future__ import annotations

import torch
from torch import Tensor

ROUNDING_FACTOR = 64.0  # GEMM of up to 64 terms, exp, sum over V: each adds a few eps
F32_GRADIENT = 1e-6  # design bar: float32 gradients against float64, norm-wise relative, logits of unit scale
F32_LOSS = 1e-6  # the same for a loss, relative to the sum of its absolute terms
BF16_LOGPROB_NATS = 2e-3  # design bar: log-probs of bf16 inputs against float64 on the same inputs
THREE_WAY_FACTOR = 1.5
GRADCHECK = {"eps": 1e-6, "atol": 1e-7, "rtol": 1e-5}  # central differences: h^2 truncation and eps / h rounding
CHUNK_GROWTH = 1.5  # error with one token per chunk over error with one chunk: accumulation must not depend on the cut


def eps(dtype: torch.dtype) -> float:
    return torch.finfo(dtype).eps


def norm(x: Tensor | None) -> float:
    return 0.0 if x is None else float(torch.linalg.vector_norm(x.detach().double()))


def error(got: Tensor, want: Tensor) -> float:
    """Frobenius norm of the difference; inf when a shape differs or anything is not finite."""
    if got.shape != want.shape or not bool(torch.isfinite(got).all()):
        return float("inf")
    return norm(got.detach().double() - want.detach().double())


def rounding(dtype: torch.dtype, max_logit: float, scale: float) -> float:
    """Allowed norm-wise error of something of size `scale` computed in `dtype` from logits up to `max_logit`."""
    return ROUNDING_FACTOR * eps(dtype) * (1.0 + max_logit) * scale


def wide_sum(dtype: torch.dtype, terms: int) -> float:
    """Relative error of a sum of `terms` products, kept in float32 or wider and rounded once to `dtype`."""
    accumulator = torch.float64 if dtype == torch.float64 else torch.float32
    return eps(accumulator) * terms**0.5 + eps(dtype)


def assert_rounding(name: str, got: Tensor, want: Tensor, max_logit: float, scale: float) -> None:
    """`got` is `want` up to the rounding of its own dtype."""
    found, allowed = error(got, want), rounding(got.dtype, max_logit, scale + norm(want))
    assert found <= allowed, f"{name}: error {found:.3g} > {allowed:.3g} (|want| = {norm(want):.3g})"


def assert_relative(name: str, got: Tensor, want: Tensor, relative: float) -> None:
    """`got` is `want` to a relative norm-wise error; a zero `want` must be met exactly."""
    found, allowed = error(got, want), relative * norm(want)
    assert found <= allowed, f"{name}: error {found:.3g} > {allowed:.3g} ({relative:.1g} of {norm(want):.3g})"


def assert_three_way(name: str, ours: Tensor, base: Tensor, gold: Tensor, working: torch.dtype | None = None) -> None:
    """Ours is as close to float64 as eager in the working dtype is. The floor is the rounding of the result itself."""
    mine, theirs = error(ours, gold), error(base, gold)
    floor = eps(working or ours.dtype) * norm(gold)
    assert mine <= THREE_WAY_FACTOR * theirs + floor, f"{name}: error {mine:.3g}, eager {theirs:.3g}, floor {floor:.3g}"


FLOAT32_FLOOR = 3e-6  # float32 sums in another order, relative: some tens of eps
LOSS_NATS_FACTOR = 2.0  # a ratio's error is its log-prob's, and log-probs of two models may be off in opposite senses


def gradient_floor(working: torch.dtype) -> float:
    """Relative norm-wise error of a right gradient: `dz` and the result are each rounded once to the working dtype,
    half an eps each; float32 sums in another order."""
    return FLOAT32_FLOOR if working == torch.float32 else eps(working)


def assert_gradient(name: str, ours: Tensor, base: Tensor, gold: Tensor) -> None:
    """Three ways, whatever the device: at most THREE_WAY_FACTOR times as far from gold as eager, plus two roundings."""
    assert ours.dtype == base.dtype, f"{name} is {ours.dtype}, eager's {base.dtype}"
    mine, theirs = error(ours, gold), error(base, gold)
    allowed = THREE_WAY_FACTOR * theirs + gradient_floor(ours.dtype) * norm(gold)
    assert mine <= allowed, f"{name}: error {mine:.3g} > {allowed:.3g}, eager {theirs:.3g}, |gold| {norm(gold):.3g}"


def assert_statistic(name: str, ours: Tensor, base: Tensor, gold: Tensor, working: torch.dtype) -> None:
    """float32 inputs: as close as eager. Lower ones, which tensor cores multiply: within BF16_LOGPROB_NATS each."""
    assert ours.dtype == torch.float32, f"{name} is {ours.dtype}"
    if working == torch.float32:
        mine, allowed = error(ours, gold), THREE_WAY_FACTOR * error(base, gold) + FLOAT32_FLOOR * norm(gold)
    else:
        mine, allowed = float((ours.double() - gold).abs().max()), BF16_LOGPROB_NATS
    assert mine <= allowed, f"{name}: error {mine:.3g} > {allowed:.3g}"


def assert_loss(ours: Tensor, base: Tensor, gold: Tensor, terms: Tensor, working: torch.dtype) -> None:
    """A loss against the sum of its absolute terms: they may cancel."""
    each = FLOAT32_FLOOR if working == torch.float32 else LOSS_NATS_FACTOR * BF16_LOGPROB_NATS
    mine = abs(float(ours) - float(gold))
    allowed = THREE_WAY_FACTOR * abs(float(base) - float(gold)) + each * float(terms.detach().abs().sum())
    assert mine <= allowed, f"loss: error {mine:.3g} > {allowed:.3g}"


PEAK_SLACK_BYTES = {"cpu": 64 << 10, "cuda": 32 << 20}
"""Above a plan's peak by an allocator's count: per-token vectors, and what it rounds up to."""
RESIDENT_SLACK_BYTES = 4 << 20  # above it by the kernel's count: pages, arenas, what a product's library packs
LEAST_OF_A_PROMISE = 0.8  # of a plan's peak; dW counts before it is written, when its pages are not resident yet

FUSED_RELATIVE = {torch.float32: 3e-6, torch.float16: 2e-3}
"""The interpreted fused mode against float64, max |error| / max |value|: float32 sums; float16 inputs, gradients."""

DISTILL_RELATIVE = 4e-6
"""Losses and gradients of a small distillation, norm-wise: calibrated weights are float32, also in float64; in float32
a divergence is a difference of log-probs of size up to 10, each known to 1e-6."""
TINKER_DOOR = 1e-5  # of two passes that hand each other log-probs and weights in float32, and of sums cut elsewhere
TINKER_PACKED = 2e-6  # a float64 model's sequences packed and alone: its norms and softmax are in float32
FUSED_LOGPROB_NATS = 1e-5  # log-probs of float32 inputs near -10: some tens of eps

# Kernels by themselves, under the interpreter: max |error| / max |value| against float64.
KERNEL_EAGER_FACTOR = 4.0  # or as many times eager's own error in the working precision, where that is more
KERNEL_LEAST_SCALE = 1e-3  # a result smaller than this is judged as if it had this size
KERNEL_ROWS = 2e-6  # statistics and dlogits of given logits: exp, a sum over V
KERNEL_LOSS = 3e-6  # the same with a loss formula between
KERNEL_SHARP = 2e-5  # temperatures of 0.1 make logits of 100
KERNEL_HALF = 1e-3  # anything rounded to float16 at the end
KERNEL_HEAD = 3e-6  # statistics of hidden x weight: the product's own sums come on top
KERNEL_HEAD_TRANSFORMED = 1e-5  # through softcap, temperatures and bias, or from float16 operands
KERNEL_HEAD_GRADIENT = 1e-5  # dlogits of logits computed twice, in two orders of sums
KERNEL_HEAD_GRADIENT_TRANSFORMED = 3e-5
KERNEL_FORMULA = {"rtol": 2e-6, "atol": 3e-6}  # a twin's value against the torch formula, both float32
KERNEL_SLOPE = {"rtol": 2e-6, "atol": 1e-6}
KERNEL_EXACT_VALUE = {"rtol": 2e-6, "atol": 0.0}  # k3 near 0, where every digit counts
KERNEL_EXACT_SLOPE = {"rtol": 5e-7, "atol": 0.0}
KERNEL_KINK_SLOPE = 1e-6  # relative
KERNEL_SHIFT = {"rtol": 1e-5, "atol": 1e-5}  # differences of log-probs and merged shards, both known to float32
KERNEL_SAME = {"rtol": 2e-5, "atol": 2e-6}  # two kernels for one gradient


def kernel_logits(base: float, max_logit: float) -> float:
    """`base` and the rounding of logits (or of an lse) of this size to float32, an error on every p."""
    return base + 2.0**-22 * max_logit


F64_STEP = 5e-7  # a step in float64, relative: weights of tokens, and norms inside models, are kept in float32
TRAINER_GRADIENT = 5e-6  # float32 gradients of two trainers on one batch: sums over layers and tokens in other orders
TRAINER_STEPS = 5e-5  # the same after a few steps of SGD, relative to how far the weights moved from where they were
LOGGED = {"rel": 1e-4, "abs": 1e-5}  # what trainers log: float32 sums, rounded for printing by some

# Single figures (a metric, a loss, a log-prob), relative or absolute.
FIGURE_SAME = 1e-12  # float64, the same terms in another order
FIGURE_MOVED = 1e-10  # mean KL between sampler and trainer: below it no step was taken, above it one was
FIGURE_F64 = 1e-9  # float64, through a few formulas
FIGURE_STEP = 1e-8  # a weight after AdamW's step, which divides rounding by eps
FIGURE_WEIGHTED = 1e-7  # float64 with weights of tokens in float32
FIGURE_F32 = 1e-6  # float32, or a mean of it
FIGURE_F32_CHAIN = 1e-5  # the same after exp, or over several steps
FIGURE_PEER = 2e-5  # as a peer recorded it, from float32 logits
FIGURE_LOGGED = 1e-4  # as a peer prints it
FIGURE_LIMIT = 1e-3  # against a limit that is only approached, or central differences
FIGURE_SHARE = 0.01  # a share that was counted in a sample
FIGURE_DRAWN = 0.05  # the loss of an untrained model against log V
