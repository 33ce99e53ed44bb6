"""QuACK's chunked linear cross-entropy: the fastest published for plain CE on Hopper, and CE is all it computes."""

from __future__ import annotations

from benchmarks.cases import Batch, Case
from benchmarks.providers.base import Prepared, Provider, Result, backward, leaves, needs


def _prepare(case: Case, batch: Batch) -> Prepared:
    from quack.linear_cross_entropy import chunked_linear_cross_entropy

    def run() -> Result:
        hidden, weight = leaves(case, batch)
        return backward(chunked_linear_cross_entropy(hidden, weight, batch.tokens.labels), hidden, weight)

    return Prepared(run, "chunks of 4096", min(4096, case.shape.num_tokens))


QUACK = Provider("QuACK", _prepare, needs("quack.linear_cross_entropy", cuda=True, losses=("ce",)))
