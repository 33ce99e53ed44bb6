"""The forms of cross-entropy, soft cross-entropy and MTP against the oracle, and the laws between them.

Contract: in every mode and plan, whatever the chunk size, the loss of every micro-batch and the gradients of their sum
are the oracle's to rounding; what stands at a masked token or target, NaN included, changes nothing; where one loss is
a special case of another, both give the same numbers.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from tests import budgets
from tests.oracle import ce, grpo
from tests.property.helpers import leaf
from tests.property.steps import assert_step, ce_items, contexts, gold_step, head_fields, run_step
from tests.strategies import StepCase, step_cases
from xloss import (
    CELossConfig,
    CELossContextInputItem,
    MTPLossConfig,
    MTPLossContextInputItem,
    SoftCELossConfig,
    SoftCELossContextInputItem,
    finalize_metrics,
)
from xloss.policy import supervised

RUNS: dict[str, dict[str, Any]] = {
    "eager": {"mode": "eager"},
    "one_pass": {"mode": "chunk", "plan": "one_pass"},
    "two_pass": {"mode": "chunk", "plan": "two_pass"},
    "auto": {},
}
every_run = pytest.mark.parametrize("run", RUNS.values(), ids=RUNS)
FORMS: tuple[dict[str, Any], ...] = (
    {"label_smoothing": 0.1, "label_smoothing_kind": "megatron"},
    {"focal_gamma": 2.0},
    {"focal_gamma": 0.5},
    {"token_scaling": "dft"},
    {"token_scaling": "chord_phi"},
    {"token_scaling": "chord_phi", "cutoff_prob": 0.3},
)
both_dtypes = pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=["f64", "f32"])


@every_run
@given(
    case=step_cases(),
    form=st.sampled_from(FORMS),
    z_loss_coef=st.sampled_from((0.0, 0.3)),
    reduction=st.sampled_from(("token", "sample", "square")),
)
def test_forms(run: dict[str, Any], case: StepCase, form: dict[str, Any], z_loss_coef: float, reduction: str) -> None:
    if case.cu_seq_lens is None and any(b.labels.dim() == 1 or b.labels.shape[0] == 1 for b in case.batches):
        reduction = "token"
    cfg = CELossConfig(loss_reduction=reduction, z_loss_coef=z_loss_coef, **form, **head_fields(case), **run)
    got = run_step(cfg, ce_items(case), case)
    options = {k: v for k, v in form.items() if k != "label_smoothing_kind"} | {"z_loss_coef": z_loss_coef}
    if "label_smoothing_kind" in form:
        options["others_of"] = case.weight.shape[0]
    assert_step(got, gold_step(case, got, reduction=reduction, **options), case)


T, H, V = 12, 5, 11
BOUNDS = torch.tensor([0, 5, 5, 6, 12], dtype=torch.int32)


def _tensors(dtype: torch.dtype = torch.float64, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """Hidden states [1, T, H], weight and labels, some ignored, one of them with a NaN hidden state."""
    g = torch.Generator().manual_seed(seed)
    hidden, weight = torch.randn(1, T, H, generator=g, dtype=dtype), torch.randn(V, H, generator=g, dtype=dtype)
    labels = torch.randint(0, V, (1, T), generator=g)
    labels[0, 0], labels[0, 1], labels[0, [3, 5, 7]] = V - 1, 0, -100
    return hidden, weight, labels


def _step(
    cfg: Any, item: Any, hidden: Tensor, weight: Tensor, bounds: Tensor | None = BOUNDS, upstream: float = 1.7
) -> list[Tensor]:
    """Loss and gradients of one micro-batch."""
    leaves = [leaf(hidden), leaf(weight)]
    (ctx,) = contexts(cfg, [item], None if bounds is None else [bounds])
    loss, _ = ctx.forward(*leaves)
    return [loss.detach(), *torch.autograd.grad(upstream * loss, leaves)]


def _same(ours: list[Tensor], theirs: list[Tensor], dtype: torch.dtype = torch.float64) -> None:
    """Calibrated weights are float32, whence the float64 budget."""
    relative = budgets.F32_GRADIENT if dtype == torch.float64 else 10 * budgets.F32_GRADIENT
    for name, a, b in zip(("loss", "d hidden", "d weight"), ours, theirs, strict=True):
        budgets.assert_relative(name, a.double(), b.double(), relative)


def _gold(loss: Any, hidden: Tensor, weight: Tensor, upstream: float = 1.7) -> list[Tensor]:
    """Loss of materialised logits [T, V] and its gradients, float64."""
    leaves = [hidden.double().nan_to_num(0).requires_grad_(), weight.double().requires_grad_()]
    value = loss((leaves[0] @ leaves[1].T).flatten(0, -2))
    return [value.detach(), *torch.autograd.grad(upstream * value, leaves)]


@every_run
@both_dtypes
def test_class_weight_is_torchs(run: dict[str, Any], dtype: torch.dtype) -> None:
    """Mean over the sum of class weights; the z-loss over tokens, as in Liger."""
    hidden, weight, labels = _tensors(dtype)
    hidden[0, 3] = torch.nan
    classes = torch.rand(V, dtype=dtype) * 2
    classes[labels[0, 1]] = 0

    def want(z: Tensor) -> Tensor:
        mean = F.cross_entropy(z, labels[0], weight=classes.double())
        live = labels[0] != -100
        return mean + 0.1 * z[live].logsumexp(1).square().mean()

    cfg = CELossConfig(z_loss_coef=0.1, chunk_size=5, **run)
    item = CELossContextInputItem(shifted_labels=labels, class_weight=classes)
    _same(_step(cfg, item, hidden, weight), _gold(want, hidden, weight), dtype)


@every_run
@both_dtypes
def test_megatron_smoothing_is_its_distribution(run: dict[str, Any], dtype: torch.dtype) -> None:
    hidden, weight, labels = _tensors(dtype)
    live = labels[0] != -100

    def want(z: Tensor) -> Tensor:
        q = torch.full((int(live.sum()), V), 0.2 / (V - 1), dtype=torch.float64)
        q.scatter_(1, labels[0][live, None], 0.8)
        return F.cross_entropy(z[live], q)

    cfg = CELossConfig(label_smoothing=0.2, label_smoothing_kind="megatron", chunk_size=5, **run)
    _same(_step(cfg, CELossContextInputItem(shifted_labels=labels), hidden, weight), _gold(want, hidden, weight), dtype)


@pytest.mark.parametrize(
    "other",
    [
        {"focal_gamma": 0.0},
        {"label_smoothing": 0.0},
        {"token_scaling": None},
        {"class_weight": torch.full((V,), 3.0)},
        {"token_weight": torch.full((1, T), 0.2)},
    ],
    ids=["gamma-0", "no-smoothing", "no-scaling", "uniform-classes", "uniform-tokens"],
)
def test_special_cases_are_cross_entropy(other: dict[str, Any]) -> None:
    hidden, weight, labels = _tensors()
    fields = {k: v for k, v in other.items() if k.endswith("_weight")}
    plain = _step(CELossConfig(), CELossContextInputItem(shifted_labels=labels), hidden, weight)
    options = {k: v for k, v in other.items() if k not in fields}
    item = CELossContextInputItem(shifted_labels=labels, **fields)
    _same(_step(CELossConfig(**options), item, hidden, weight), plain)


def test_focal_approaches_cross_entropy() -> None:
    hidden, weight, labels = _tensors()
    item = CELossContextInputItem(shifted_labels=labels)
    _same(_step(CELossConfig(focal_gamma=1e-9), item, hidden, weight), _step(CELossConfig(), item, hidden, weight))


@pytest.mark.parametrize("gamma", [0.3, 1.0, 2.0])
def test_focal_of_a_certain_label(gamma: float) -> None:
    """p = 1, also by a rounding above it: loss 0 and a finite gradient; far below it the gradient is -1."""
    logprobs = torch.tensor([0.0, 1e-7, -1e-30, -800.0], dtype=torch.float64, requires_grad=True)
    loss = supervised.focal(logprobs, gamma=gamma)
    (grad,) = torch.autograd.grad(loss.sum(), logprobs)
    assert torch.equal(loss[:1], torch.zeros(1, dtype=torch.float64)) and float(loss[3].detach()) == 800.0
    assert bool(torch.isfinite(grad).all()) and float(grad[3]) == -1.0


def test_pure_gradients() -> None:
    """d DFT = -p, d CHORD-phi = -p (1 - p), 0 above the cutoff; and central differences for the rest."""
    logprobs = torch.log(torch.tensor([0.01, 0.3, 0.5, 0.9, 0.99], dtype=torch.float64)).requires_grad_()
    p = logprobs.detach().exp()
    for loss, want in (
        (supervised.dft(logprobs), -p),
        (supervised.chord_phi(logprobs), -p * (1 - p)),
        (supervised.chord_phi(logprobs, cutoff_prob=0.6), -p * (1 - p) * (p < 0.6)),
    ):
        torch.testing.assert_close(torch.autograd.grad(loss.sum(), logprobs)[0], want)
    lse, mean = (torch.randn(5, dtype=torch.float64, requires_grad=True) for _ in range(2))
    weights = torch.randn(5, 3, dtype=torch.float64)
    for fn, inputs in (
        (lambda x: supervised.focal(x, gamma=2.0), (logprobs,)),
        (lambda x: supervised.focal(x, gamma=0.5), (logprobs,)),
        (lambda x, y, z: supervised.label_smoothed_nll(x, y, z, label_smoothing=0.1), (logprobs, lse, mean)),
        (lambda x: supervised.z_loss(x, coef=0.3), (lse,)),
        (lambda x: supervised.soft_cross_entropy(x.unsqueeze(1) * 0.5, weights[:, :1]), (logprobs,)),
    ):
        assert torch.autograd.gradcheck(fn, inputs, **budgets.GRADCHECK)


def test_metrics() -> None:
    """Sums and counts for accuracy, entropy and perplexity, over live tokens."""
    hidden, weight, labels = _tensors()
    z = (hidden @ weight.T)[0]
    labels[0, [1, 4, 8]] = z.argmax(1)[[1, 4, 8]]
    live = labels[0] != -100
    item = CELossContextInputItem(shifted_labels=labels)
    for run in RUNS.values():
        cfg = CELossConfig(return_token_accuracy=True, return_entropy=True, z_loss_coef=0.1, chunk_size=5, **run)
        (ctx,) = contexts(cfg, [item])
        _, info = ctx.forward(leaf(hidden), leaf(weight))
        logp = torch.log_softmax(z[live], 1)
        assert float(info.metrics["token_accuracy"].value) == int((z[live].argmax(1) == labels[0][live]).sum())
        want = {
            "token_accuracy": (z[live].argmax(1) == labels[0][live]).double().mean(),
            "entropy": -(logp.exp() * logp).sum(1).mean(),
            "nll": F.cross_entropy(z, labels[0]),
            "z_loss": 0.1 * z[live].logsumexp(1).square().mean(),
            "num_tokens": live.sum().double(),
        }
        results = finalize_metrics([info.metrics])
        assert set(results) == set(want)
        for name, value in want.items():
            torch.testing.assert_close(results[name], value)


# -- K targets


def _targets(seed: int = 1, several: int = 3) -> tuple[Tensor, Tensor]:
    g = torch.Generator().manual_seed(seed)
    targets = torch.randint(0, V, (1, T, several), generator=g)
    weights = torch.randn(1, T, several, generator=g, dtype=torch.float64)
    if several > 2:
        targets[0, 2, 1] = targets[0, 2, 0]  # one token twice
        targets[0, 4, 2], targets[0, 8, :2] = -100, -100
        weights[0, 9, 1], weights[0, 10] = 0.0, 0.0
    return targets, weights


def _soft(reduction: str, labels: Tensor, targets: Tensor, weights: Tensor) -> Any:
    live = (labels[0] != -100).double()
    return lambda z: (ce.soft(z, targets[0], weights[0]) * live).sum() / (live.sum() if reduction == "token" else 1.0)


@every_run
@both_dtypes
@pytest.mark.parametrize("reduction", ["sum", "token"])
@pytest.mark.parametrize("chunk_size", [None, 1, 5])
def test_soft_cross_entropy(run: dict[str, Any], dtype: torch.dtype, reduction: str, chunk_size: int | None) -> None:
    hidden, weight, labels = _tensors(dtype)
    targets, weights = _targets()
    gold = _gold(_soft(reduction, labels, targets, weights), hidden, weight)
    hidden[0, 7] = torch.nan
    weights[0, 7], weights[0, 8, 0] = torch.inf, torch.nan  # at an ignored token, at an ignored target
    item = SoftCELossContextInputItem(shifted_labels=labels, target_tokens=targets, target_weights=weights.to(dtype))
    cfg = SoftCELossConfig(loss_reduction=reduction, chunk_size=chunk_size, **run)
    _same(_step(cfg, item, hidden, weight), gold, dtype)


def test_one_target_is_weighted_cross_entropy() -> None:
    hidden, weight, labels = _tensors()
    _, weights = _targets(several=1)
    soft = SoftCELossContextInputItem(shifted_labels=labels, target_tokens=labels[..., None], target_weights=weights)
    hard = CELossContextInputItem(shifted_labels=labels, token_weight=weights[..., 0])
    _same(
        _step(SoftCELossConfig(), soft, hidden, weight), _step(CELossConfig(loss_reduction="sum"), hard, hidden, weight)
    )


def test_all_targets_are_a_distribution() -> None:
    """K = V with q as weights: torch's cross-entropy with probabilities, which is Megatron's for its q."""
    hidden, weight, labels = _tensors()
    live = labels[0] != -100
    q = torch.full((1, T, V), 0.2 / (V - 1), dtype=torch.float64)
    q.scatter_(2, labels.masked_fill(~live, 0)[..., None], 0.8)
    targets = torch.arange(V).expand(1, T, V).contiguous()
    item = SoftCELossContextInputItem(shifted_labels=labels, target_tokens=targets, target_weights=q)
    soft = _step(SoftCELossConfig(loss_reduction="token"), item, hidden, weight)
    _same(soft, _gold(lambda z: F.cross_entropy(z[live], q[0][live]), hidden, weight))
    smooth = CELossConfig(label_smoothing=0.2, label_smoothing_kind="megatron")
    _same(soft, _step(smooth, CELossContextInputItem(shifted_labels=labels), hidden, weight))


@pytest.mark.parametrize("skip", [False, True])
def test_targets_of_no_weight_have_statistics_only(skip: bool) -> None:
    hidden, weight, labels = _tensors()
    targets, weights = _targets()
    item = SoftCELossContextInputItem(shifted_labels=labels, target_tokens=targets, target_weights=weights)
    (ctx,) = contexts(SoftCELossConfig(mode="chunk", skip_zero_grad_rows=skip), [item])
    _, info = ctx.forward(leaf(hidden), leaf(weight))
    assert info.logprobs is not None and info.logprobs.shape == targets.shape
    want = torch.log_softmax((hidden @ weight.T)[0], 1).gather(1, targets[0].clamp(min=0))
    left_out = (targets[0] == -100) | (labels[0] == -100).unsqueeze(1)
    left_out = left_out | ((weights[0].masked_fill(left_out, 0) == 0).all(1, keepdim=True) & skip)
    torch.testing.assert_close(info.logprobs[0], want.masked_fill(left_out, 0))
    assert info.plan.num_grad == int(((weights[0] != 0) & ~left_out).any(1).sum())


def test_a_banned_target_of_no_weight() -> None:
    """A head bias of -inf at a target with weight 0: no NaN."""
    hidden, weight, labels = _tensors()
    targets, weights = _targets()
    weights[..., 2] = 0
    targets[..., 2], targets[..., :2] = 6, targets[..., :2].where(targets[..., :2] != 6, 5)
    bias = torch.zeros(V, dtype=torch.float64)
    bias[6] = -torch.inf
    item = SoftCELossContextInputItem(shifted_labels=labels, target_tokens=targets, target_weights=weights)
    for run in RUNS.values():
        (ctx,) = contexts(SoftCELossConfig(**run), [item])
        leaves = [leaf(hidden), leaf(weight)]
        loss, _ = ctx.forward(*leaves, bias)
        assert all(bool(torch.isfinite(x).all()) for x in (loss, *torch.autograd.grad(loss, leaves)))


def test_soft_kwargs_in_pieces() -> None:
    """chunk, cat: K rides along; the pieces' losses and gradients are the whole's."""
    hidden, weight, labels = _tensors()
    targets, weights = _targets()
    cfg = SoftCELossConfig(loss_reduction="sample")
    item = SoftCELossContextInputItem(shifted_labels=labels, target_tokens=targets, target_weights=weights)
    (ctx,) = contexts(cfg, [item], [BOUNDS])
    pieces = ctx.loss_kwargs.chunk(5)
    assert [p.target_tokens.shape for p in pieces] == [(1, 5, 3), (1, 5, 3), (1, 2, 3)]
    joined = type(ctx).cat([type(ctx)(cfg, p) for p in pieces])
    assert torch.equal(joined.loss_kwargs.target_tokens, targets)
    whole, again = [leaf(hidden), leaf(weight)], [leaf(hidden.clone()), leaf(weight.clone())]
    loss = ctx.forward(*whole)[0]
    total = torch.stack(
        [type(ctx)(cfg, p).forward(h, again[1])[0] for p, h in zip(pieces, again[0].split(5, 1), strict=True)]
    ).sum()
    _same([total.detach(), *torch.autograd.grad(total, again)], [loss.detach(), *torch.autograd.grad(loss, whole)])


# -- multi-token prediction


def _mtp_gold(labels: Tensor, depth: int, rollout: Tensor | None = None) -> Any:
    bounds = BOUNDS.tolist()
    rolled = torch.tensor(ce.rolled(labels[0].tolist(), bounds, depth, -100))
    if rollout is None:
        return lambda z: F.cross_entropy(z, rolled, reduction="sum") / max(int((rolled != -100).sum()), 1)
    live = rolled != -100
    rolled_rollout = torch.tensor(ce.rolled(rollout[0].tolist(), bounds, depth, 0.0), dtype=torch.float64)[live]

    def want(z: Tensor) -> Tensor:
        logprobs = torch.log_softmax(z[live], 1).gather(1, rolled[live, None])[:, 0]
        return grpo.kl(logprobs, rolled_rollout, "k3").sum() / max(int(live.sum()), 1)

    return want


@every_run
@both_dtypes
@pytest.mark.parametrize("depth", [1, 2, 6])
@pytest.mark.parametrize("kl", [False, True], ids=["ce", "kl"])
def test_mtp(run: dict[str, Any], dtype: torch.dtype, depth: int, kl: bool) -> None:
    """Depth 6 leaves nothing: the longest sequence has six tokens."""
    hidden, weight, labels = _tensors(dtype)
    rollout = -torch.rand(1, T, dtype=dtype) * 3
    gold = _gold(_mtp_gold(labels, depth, rollout if kl else None), hidden, weight)
    hidden[0, -1], rollout[0, 3] = torch.nan, torch.nan  # the last position predicts nothing; label 3 is ignored
    cfg = MTPLossConfig(mtp_depth=depth, kl_loss_type="k3" if kl else None, chunk_size=5, **run)
    item = MTPLossContextInputItem(shifted_labels=labels, rollout_logprobs=rollout if kl else None)
    _same(_step(cfg, item, hidden, weight), gold, dtype)


def test_mtp_is_cross_entropy_on_rolled_labels() -> None:
    """Options, weights and reductions are those of cross-entropy; calibrating twice rolls once."""
    hidden, weight, labels = _tensors()
    token_weight, classes = torch.rand(1, T), torch.rand(V)
    options: dict[str, Any] = {"loss_reduction": "sample", "focal_gamma": 2.0, "z_loss_coef": 0.1}
    rolled = torch.tensor([ce.rolled(labels[0].tolist(), BOUNDS.tolist(), 2, -100)])
    rolled_weight = torch.tensor([ce.rolled(token_weight[0].tolist(), BOUNDS.tolist(), 2, 0.0)])
    want = _step(
        CELossConfig(**options),
        CELossContextInputItem(shifted_labels=rolled, token_weight=rolled_weight, class_weight=classes),
        hidden,
        weight,
    )
    cfg = MTPLossConfig(mtp_depth=2, **options)
    item = MTPLossContextInputItem(shifted_labels=labels, token_weight=token_weight, class_weight=classes)
    _same(_step(cfg, item, hidden, weight), want)
    ctx = cfg.build({"shifted_labels": labels, "token_weight": token_weight, "class_weight": classes})
    assert ctx is not None
    for _ in range(2):
        (built,) = type(ctx).build_batches([ctx], [BOUNDS])
    leaves = [leaf(hidden), leaf(weight)]
    loss, _ = built.forward(*leaves)
    _same([loss.detach(), *torch.autograd.grad(1.7 * loss, leaves)], want)


def test_mtp_detached_head() -> None:
    hidden, weight, labels = _tensors()
    bias = torch.zeros(V, dtype=torch.float64, requires_grad=True)
    leaves = [leaf(hidden), leaf(weight)]
    item = MTPLossContextInputItem(shifted_labels=labels)
    (ctx,) = contexts(MTPLossConfig(detach_mtp_lm_head_weight=True), [item], [BOUNDS])
    loss, _ = ctx.forward(*leaves, bias)
    loss.backward()
    (free,) = contexts(MTPLossConfig(), [item], [BOUNDS])
    (want,) = torch.autograd.grad(free.forward(*leaves, bias)[0], leaves[:1])
    assert leaves[1].grad is None and bias.grad is None
    torch.testing.assert_close(leaves[0].grad, want)
    assert ctx.explain(*leaves, bias).grad_bytes < free.explain(*leaves, bias).grad_bytes


@pytest.mark.parametrize("build", [CELossConfig, SoftCELossConfig, MTPLossConfig])
@every_run
def test_nothing_to_learn(build: Any, run: dict[str, Any]) -> None:
    """All labels ignored, and no tokens at all: 0 with zero gradients."""
    for count in (0, 4):
        labels = torch.full((1, count), -100)
        fields: dict[str, Any] = {"shifted_labels": labels}
        if build is SoftCELossConfig:
            fields |= {"target_tokens": labels[..., None], "target_weights": torch.full((1, count, 1), torch.nan)}
        item = {
            CELossConfig: CELossContextInputItem,
            SoftCELossConfig: SoftCELossContextInputItem,
            MTPLossConfig: MTPLossContextInputItem,
        }[build](**fields)
        hidden = torch.full((1, count, H), torch.nan, dtype=torch.float64)
        bounds = torch.tensor([0, count])
        for x in _step(build(**run), item, hidden, _tensors()[1], bounds):
            assert torch.equal(x, torch.zeros_like(x))
