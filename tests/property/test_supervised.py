"""The forms of cross-entropy against the oracle, and the laws between them.

Contract: in every mode and plan, whatever the chunk size, the loss of every micro-batch and the gradients of their sum
are the oracle's to rounding; what stands at a masked token, NaN included, changes nothing; where one loss is a special
case of another, both give the same numbers.
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
from tests.property.helpers import leaf
from tests.property.steps import assert_step, ce_items, contexts, gold_step, head_fields, run_step
from tests.property.supervised import RUNS, T, V, assert_same, both_dtypes, every_run, gold, step, tensors
from tests.strategies import StepCase, step_cases
from xloss import CELossConfig, CELossContextInputItem, finalize_metrics
from xloss.policy import supervised

FORMS: tuple[dict[str, Any], ...] = (
    {"label_smoothing": 0.1, "label_smoothing_kind": "megatron"},
    {"focal_gamma": 2.0},
    {"focal_gamma": 0.5},
    {"token_scaling": "dft"},
    {"token_scaling": "chord_phi"},
    {"token_scaling": "chord_phi", "cutoff_prob": 0.3},
)


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


@every_run
@both_dtypes
@pytest.mark.parametrize("weighted", [False, True], ids=["classes", "classes-and-tokens"])
def test_class_weight_is_torchs(run: dict[str, Any], dtype: torch.dtype, weighted: bool) -> None:
    """Mean over the sum of class weights (times token weights); the z-loss without them over tokens, as in Liger."""
    hidden, weight, labels = tensors(dtype)
    hidden[0, 3] = torch.nan
    classes = torch.rand(V, dtype=dtype) * 2
    classes[labels[0, 1]] = 0
    token_weight = torch.rand(1, T, dtype=dtype) if weighted else torch.ones(1, T, dtype=dtype)

    def want(z: Tensor) -> Tensor:
        live = labels[0] != -100
        w = token_weight[0, live].double()
        per_token = F.cross_entropy(z, labels[0], weight=classes.double(), reduction="none")[live]
        mean = (w * per_token).sum() / (w * classes[labels[0, live]]).sum()
        return mean + 0.1 * (w * z[live].logsumexp(1).square()).sum() / w.sum()

    cfg = CELossConfig(z_loss_coef=0.1, chunk_size=5, **run)
    given_weight = token_weight.masked_fill(labels == -100, torch.nan) if weighted else None
    item = CELossContextInputItem(shifted_labels=labels, class_weight=classes, token_weight=given_weight)
    assert_same(step(cfg, item, hidden, weight), gold(want, hidden, weight), dtype)
    if not weighted:
        mean = gold(lambda z: F.cross_entropy(z, labels[0], weight=classes.double()), hidden, weight)
        assert_same(step(CELossConfig(**run), item, hidden, weight), mean, dtype)


@every_run
@both_dtypes
def test_megatron_smoothing_is_its_distribution(run: dict[str, Any], dtype: torch.dtype) -> None:
    hidden, weight, labels = tensors(dtype)
    live = labels[0] != -100

    def want(z: Tensor) -> Tensor:
        q = torch.full((int(live.sum()), V), 0.2 / (V - 1), dtype=torch.float64)
        q.scatter_(1, labels[0][live, None], 0.8)
        return F.cross_entropy(z[live], q)

    cfg = CELossConfig(label_smoothing=0.2, label_smoothing_kind="megatron", chunk_size=5, **run)
    assert_same(
        step(cfg, CELossContextInputItem(shifted_labels=labels), hidden, weight), gold(want, hidden, weight), dtype
    )


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
    hidden, weight, labels = tensors()
    fields = {k: v for k, v in other.items() if k.endswith("_weight")}
    plain = step(CELossConfig(), CELossContextInputItem(shifted_labels=labels), hidden, weight)
    options = {k: v for k, v in other.items() if k not in fields}
    item = CELossContextInputItem(shifted_labels=labels, **fields)
    assert_same(step(CELossConfig(**options), item, hidden, weight), plain)


def test_focal_approaches_cross_entropy() -> None:
    hidden, weight, labels = tensors()
    item = CELossContextInputItem(shifted_labels=labels)
    assert_same(step(CELossConfig(focal_gamma=1e-9), item, hidden, weight), step(CELossConfig(), item, hidden, weight))


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
    hidden, weight, labels = tensors()
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
        assert results.pop("num_sequences") == 1
        assert set(results) == set(want)
        for name, value in want.items():
            torch.testing.assert_close(results[name], value)
