"""PyTorch's ``linear_cross_entropy``, chunked by its options; policy losses on top of ``reduction="none"``."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F

from benchmarks.cases import Batch, Case
from benchmarks.providers.base import Prepared, Provider, Result, backward, compose, leaves
from benchmarks.providers.xloss_plans import planned


def _absent(case: Case) -> str | None:
    if case.loss.entropy:
        return "has no entropy"
    if not (hasattr(F, "linear_cross_entropy") and hasattr(torch.nn, "LinearCrossEntropyOptions")):
        return f"torch {torch.__version__} has no chunked linear_cross_entropy"
    return None


def _prepare(tuned: bool) -> Callable[[Case, Batch], Prepared]:
    def prepare(case: Case, batch: Batch) -> Prepared:
        chunk = planned(case, batch).chunk_rows if tuned else None
        options = torch.nn.LinearCrossEntropyOptions(batch_chunk_size=chunk)
        labels = batch.tokens.labels

        def logprobs_of(hidden: Tensor, weight: Tensor) -> tuple[Tensor, Tensor | None]:
            return -F.linear_cross_entropy(hidden, weight, labels, reduction="none", options=options), None

        def run_ce() -> Result:
            hidden, weight = leaves(case, batch)
            loss = F.linear_cross_entropy(hidden, weight, labels, reduction="mean", options=options)
            return backward(loss, hidden, weight)

        run = run_ce if case.loss_name == "ce" else compose(case, batch, logprobs_of)
        return Prepared(run, "its own chunks" if chunk is None else f"chunks of {chunk}, xloss's", chunk)

    return prepare


TORCH_LCE = Provider("torch linear CE", _prepare(tuned=False), _absent)
TORCH_LCE_TUNED = Provider("torch linear CE, tuned", _prepare(tuned=True), _absent)
