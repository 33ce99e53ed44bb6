"""Every kernel of xloss_kernels on the device, with its own tiles, against the float64 oracle of the interpreter lane.

Contract: in every dtype, in place and elsewhere, with and without transforms, at sizes that leave tails in every
dimension, through tensor descriptors and through pointers, values and dlogits are right to the rounding of what they
are written in. These shapes are small: compute-sanitizer gets through them (docs/kernels.md has the command).
"""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from tests import budgets
from tests.gpu.lane import DEVICE, DTYPES, INTERPRETED, each_dtype, name_of, on_device
from tests.interpret import kernel_oracle as oracle
from tests.oracle import head
from xloss_kernels import tiles
from xloss_kernels.dlogits import dlogits
from xloss_kernels.finalize import finalize
from xloss_kernels.head_backward import head_dlogits
from xloss_kernels.head_forward import head_forward
from xloss_kernels.policy_rows import PolicySpec, policy_rows
from xloss_kernels.row_stats import row_stats
from xloss_kernels.scale import cast_scale, scale_
from xloss_kernels.transform import Transform

ALL = {"entropy": True, "mean_logit": True, "sum_p2": True, "top1": True}
STATISTICS = head.STATISTICS
ADJOINTS = {name: f"d_{name}" for name in STATISTICS}
ROWS, VOCAB = (7, 300) if INTERPRETED else (37, 9001)
TOKENS, WORDS = (21, 150) if INTERPRETED else (301, 1031)
SIZES = (16, 37) if INTERPRETED else (128, 100, 64, 37)  # hidden sizes; those not a multiple of 8 go through pointers
SPECS = {
    "ce": PolicySpec("ce", label_smoothing=0.1, z_loss_coef=0.01),
    "reinforce": PolicySpec("reinforce", entropy_coef=0.2),
    "importance_sampling": PolicySpec("importance_sampling"),
    "dro": PolicySpec("dro", beta=0.3, kl="abs"),
    "cispo": PolicySpec("cispo", ratio_min=0.5, ratio_max=1.5, kl="k2"),
    "ppo": PolicySpec("ppo", dual_clip=3.0, kl="k3", entropy_coef=0.1, z_loss_coef=1e-3),
    "plain ppo": PolicySpec("ppo", kl="k1"),
    "ppo, bounded": PolicySpec("ppo", delta=4.0, kl="k3", kl_grad="straight_through", kl_clamp_in=20, kl_clamp_out=10),
    "cispo, unbiased": PolicySpec("cispo", ratio_min=0.5, ratio_max=1.5, kl="k2", kl_grad="unbiased"),
    "score function": PolicySpec("importance_sampling", kl="k1", kl_grad="score_function"),
}


def randn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def labels_for(rows: int, vocab: int, num_labels: int = 0) -> Tensor:
    g = torch.Generator().manual_seed(3)
    ids = torch.randint(0, vocab, (rows, num_labels) if num_labels else (rows,), generator=g)
    ids[0], ids[1], ids[2] = 0, vocab - 1, -100
    return ids


def transform_for(name: str, rows: int, vocab: int, dtype: torch.dtype) -> Transform:
    if name == "identity":
        return Transform()
    return Transform(0.7, 8.0, randn(rows, seed=4).abs() + 0.3, randn(vocab, seed=5).to(dtype))


def moved(transform: Transform) -> Transform:
    temperature, bias = transform.temperature, transform.bias
    if isinstance(temperature, Tensor):
        temperature = temperature.to(DEVICE)
    return replace(transform, temperature=temperature, bias=None if bias is None else on_device(bias))


def adjoints_for(labels: Tensor) -> dict[str, Tensor]:
    shapes = {name: tuple(labels.shape) if name == "logprobs" else (len(labels),) for name in STATISTICS}
    return {name: randn(*shape, seed=10 + i) for i, (name, shape) in enumerate(shapes.items())}


def given_to_kernel(adjoints: dict[str, Tensor]) -> dict[str, Tensor]:
    return {ADJOINTS[name]: value.to(DEVICE) for name, value in adjoints.items()}


def assert_values(ours: Tensor, gold: Tensor, name: str) -> None:
    """To the rounding of the dtype it is written in; float32 sums and exponentials have FLOAT32_FLOOR."""
    found, allowed = budgets.error(ours.cpu(), gold), budgets.gradient_floor(ours.dtype) * budgets.norm(gold)
    assert found <= allowed, f"{name}: error {found:.3g} > {allowed:.3g}"


def assert_stats(ours: dict[str, Tensor], gold: dict[str, Tensor], *, ties: bool) -> None:
    """`ties`: products of the head round differently, so two almost equal logits may trade places."""
    for name, value in ours.items():
        if name == "top1":
            assert (value.cpu() == gold[name]).double().mean() >= (0.98 if ties else 1.0)
        else:
            assert_values(value, gold[name], name)


each_transform = pytest.mark.parametrize("transform", ["identity", "all"])


# ---------------------------------------------------------------- rows of logits


@each_dtype
@each_transform
@pytest.mark.parametrize("num_labels", [0, 3])
def test_row_stats(num_labels: int, transform: str, dtype: torch.dtype) -> None:
    raw, labels = (3 * randn(ROWS, VOCAB)).to(dtype), labels_for(ROWS, VOCAB, num_labels)
    how = transform_for(transform, ROWS, VOCAB, dtype)
    ours = row_stats(raw.to(DEVICE), labels.to(DEVICE), moved(how), **ALL)
    assert_stats(ours._asdict(), oracle.stats(raw.double(), labels, how), ties=False)


def targets(dtype: torch.dtype) -> list[str]:
    """Where dlogits go: over the logits, elsewhere, or as half-size items over the first half of float32 rows."""
    return ["in place", "elsewhere", *(["overlay"] if dtype == torch.float32 and not INTERPRETED else [])]


WHERE = [pytest.param(dtype, where, id=f"{name_of(dtype)}-{where}") for dtype in DTYPES for where in targets(dtype)]


def target_for(where: str, logits: Tensor) -> Tensor | None:
    if where == "overlay":
        return logits.view(torch.bfloat16)[:, : logits.shape[1]]
    return torch.full_like(logits, torch.nan) if where == "elsewhere" else None


@pytest.mark.parametrize("dtype,where", WHERE)
@each_transform
def test_dlogits(transform: str, dtype: torch.dtype, where: str) -> None:
    raw, labels = (3 * randn(ROWS, VOCAB)).to(dtype), labels_for(ROWS, VOCAB)
    how, adjoints = transform_for(transform, ROWS, VOCAB, dtype), adjoints_for(labels)
    logits = on_device(raw)
    known = row_stats(logits, labels.to(DEVICE), moved(how), **ALL)
    ours = dlogits(
        logits, labels.to(DEVICE), known.lse, moved(how), entropy=known.entropy, sum_p2=known.sum_p2,
        out=target_for(where, logits), **given_to_kernel(adjoints))  # fmt: skip
    assert_values(ours, oracle.gradient(raw, labels, how, adjoints), "dlogits")
    if where == "elsewhere":
        assert torch.equal(logits.cpu(), raw)


@pytest.mark.parametrize("dtype,where", WHERE)
@each_transform
@pytest.mark.parametrize("spec", SPECS.values(), ids=SPECS)
def test_policy_rows(spec: PolicySpec, transform: str, dtype: torch.dtype, where: str) -> None:
    raw, labels = (2 * randn(ROWS, VOCAB)).to(dtype), labels_for(ROWS, VOCAB)
    how = transform_for(transform, ROWS, VOCAB, dtype)
    leaf = raw.double().requires_grad_()
    now = oracle.stats(leaf.detach(), labels, how)["logprobs"].float()
    step = torch.tensor([0.1, -0.1, 0.9, -0.9, 0.3, -0.3, 2.0]).repeat(ROWS)[:ROWS]  # off every bound
    vectors = {
        "weight": randn(ROWS, seed=20).abs() + 0.1,
        "advantages": randn(ROWS, seed=21),
        "old_logprobs": now - step,
        "ref_logprobs": now + 0.2 + randn(ROWS, seed=22).abs(),
        "kl_weight": randn(ROWS, seed=23).abs(),
    }
    gold_loss, gold = oracle.policy_loss(leaf, labels, spec, how, vectors)
    (gold_grad,) = torch.autograd.grad(gold_loss.sum(), leaf)
    logits = on_device(raw)
    out = target_for(where, logits)
    ours = policy_rows(
        logits, labels.to(DEVICE), spec, moved(how), **{n: v.to(DEVICE) for n, v in vectors.items()}, out=out,
        entropy=True)  # fmt: skip
    assert_values(logits if out is None else out, gold_grad, "dlogits")
    assert_values(ours.loss, gold_loss.detach(), "loss")
    for name in ("logprobs", "lse", "entropy"):
        assert_values(getattr(ours, name), gold[name].detach(), name)


# ---------------------------------------------------------------- the head


def operands(size: int, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """Raw products in float64, and the operands on the device."""
    hidden, weight = randn(TOKENS, size, seed=1).to(dtype), (randn(WORDS, size, seed=2) / size**0.5).to(dtype)
    return hidden.double() @ weight.double().t(), hidden.to(DEVICE), weight.to(DEVICE)


@each_dtype
@each_transform
@pytest.mark.parametrize("size", SIZES)
def test_head_forward_and_finalize(size: int, transform: str, dtype: torch.dtype) -> None:
    raw, hidden, weight = operands(size, dtype)
    labels, how = labels_for(TOKENS, WORDS), transform_for(transform, TOKENS, WORDS, dtype)
    partials, picked = head_forward(hidden, weight, labels.to(DEVICE), moved(how), **ALL)
    ours = finalize(partials, picked, labels.to(DEVICE), WORDS, **ALL)
    assert_stats(ours._asdict(), oracle.stats(raw, labels, how), ties=True)


@each_dtype
@each_transform
@pytest.mark.parametrize("size", SIZES)
def test_head_dlogits(size: int, transform: str, dtype: torch.dtype) -> None:
    raw, hidden, weight = operands(size, dtype)
    labels, how = labels_for(TOKENS, WORDS), transform_for(transform, TOKENS, WORDS, dtype)
    adjoints = adjoints_for(labels)
    known = {n: v.float().to(DEVICE) for n, v in oracle.stats(raw, labels, how).items() if n != "top1"}
    ours = head_dlogits(
        hidden, weight, labels.to(DEVICE), known["lse"], moved(how), entropy=known["entropy"],
        sum_p2=known["sum_p2"], **given_to_kernel(adjoints))  # fmt: skip
    assert ours.dtype == dtype
    assert_values(ours, oracle.gradient(raw, labels, how, adjoints), "dlogits")


@each_dtype
@pytest.mark.parametrize("strip", [WORDS // 3, 64])
def test_head_dlogits_in_strips(strip: int, dtype: torch.dtype) -> None:
    """Strips of the vocabulary, written one after the other into one buffer, are the whole."""
    raw, hidden, weight = operands(SIZES[0], dtype)
    labels, how = labels_for(TOKENS, WORDS), transform_for("all", TOKENS, WORDS, dtype)
    adjoints = adjoints_for(labels)
    known = {n: v.float().to(DEVICE) for n, v in oracle.stats(raw, labels, how).items() if n != "top1"}
    buffer = torch.full((TOKENS, strip), torch.nan, dtype=dtype, device=DEVICE)
    parts = []
    for first in range(0, WORDS, strip):
        rows = weight[first : first + strip]
        assert how.bias is not None
        own = moved(replace(how, bias=how.bias[first : first + strip].clone()))
        written = head_dlogits(
            hidden, rows, labels.to(DEVICE), known["lse"], own, entropy=known["entropy"], sum_p2=known["sum_p2"],
            first_column=first, whole_vocab=WORDS, out=buffer[:, : len(rows)], **given_to_kernel(adjoints))  # fmt: skip
        parts.append(written.cpu().clone())
    assert_values(torch.cat(parts, 1), oracle.gradient(raw, labels, how, adjoints), "dlogits")


@each_dtype
def test_every_tile_a_tuner_may_pick(dtype: torch.dtype) -> None:
    raw, hidden, weight = operands(SIZES[0], dtype)
    labels = labels_for(TOKENS, WORDS)
    gold = oracle.stats(raw, labels, Transform())
    for tile in tiles.head_candidates(dtype, tiles.arch_of(DEVICE)):
        partials, picked = head_forward(hidden, weight, labels.to(DEVICE), tile=tile, entropy=True)
        ours = finalize(partials, picked, labels.to(DEVICE), WORDS, entropy=True)
        for name in ("lse", "logprobs", "entropy"):
            assert_values(getattr(ours, name), gold[name], f"{name} with {tile}")
    wide, where = (3 * randn(ROWS, VOCAB)).to(dtype), labels_for(ROWS, VOCAB)
    gold = oracle.stats(wide.double(), where, Transform())
    for row_tile in tiles.row_candidates(VOCAB, dtype):
        found = row_stats(wide.to(DEVICE), where.to(DEVICE), entropy=True, tile=row_tile)
        for name in ("lse", "logprobs", "entropy"):
            assert_values(getattr(found, name), gold[name], f"{name} with {row_tile}")


# ---------------------------------------------------------------- scale


@each_dtype
@pytest.mark.parametrize("factor", [1.0, 0.3])
def test_scale(factor: float, dtype: torch.dtype) -> None:
    x, scale = randn(50_001), torch.tensor(factor)
    cast = cast_scale(x.to(DEVICE), dtype, scale.to(DEVICE))
    assert torch.equal(cast.cpu(), (x * scale).to(dtype))
    low = x.to(dtype)
    assert torch.equal(scale_(low.to(DEVICE, copy=True), scale.to(DEVICE)).cpu(), (low.float() * scale).to(dtype))
