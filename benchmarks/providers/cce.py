"""Apple's cut-cross-entropy: its Triton kernels on CUDA, its ``torch_compile`` implementation elsewhere."""

from __future__ import annotations

from torch import Tensor

from benchmarks.cases import Batch, Case
from benchmarks.providers.base import Prepared, Provider, Result, backward, compose, leaves, missing


def _absent(case: Case) -> str | None:
    return "has no entropy" if case.loss.entropy else missing("cut_cross_entropy")


def _prepare(case: Case, batch: Batch) -> Prepared:
    from cut_cross_entropy import linear_cross_entropy

    labels = batch.tokens.labels
    impl = "cce" if batch.hidden.is_cuda else "torch_compile"

    def logprobs_of(hidden: Tensor, weight: Tensor) -> tuple[Tensor, Tensor | None]:
        return -linear_cross_entropy(hidden, weight, labels, reduction="none", impl=impl), None

    def run_ce() -> Result:
        hidden, weight = leaves(case, batch)
        return backward(linear_cross_entropy(hidden, weight, labels, impl=impl), hidden, weight)

    return Prepared(run_ce if case.loss_name == "ce" else compose(case, batch, logprobs_of), f"impl={impl}")


CCE = Provider("cut-cross-entropy", _prepare, _absent)
