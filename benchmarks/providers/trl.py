"""TRL's chunked log-prob function, the losses on top. Its place and its signature have moved: both are looked up."""

from __future__ import annotations

import importlib
import inspect
from typing import Any

from torch import Tensor

from benchmarks.cases import Batch, Case
from benchmarks.providers.base import Prepared, Provider, compose, missing

_PLACES = (("trl.kernels", "ChunkedLogProbFunction"), ("trl.trainer.utils", "_ChunkedLogProbFunction"))
_VOCAB_CHUNK = 32768  # its own choice


def _find() -> Any:
    for module, name in _PLACES:
        if missing(module) is None and hasattr(importlib.import_module(module), name):
            return getattr(importlib.import_module(module), name)
    return None


def _absent(case: Case) -> str | None:
    if reason := missing("trl"):
        return reason
    return (missing(_PLACES[0][0]) or "has no chunked log-prob function") if _find() is None else None


def _prepare(case: Case, batch: Batch) -> Prepared:
    function = _find()
    names = list(inspect.signature(function.forward).parameters)[1:]
    known: dict[str, Any] = {
        "bias": None,
        "targets": batch.tokens.labels.clamp(min=0),
        "temperature": 1.0,
        "chunk_size": _VOCAB_CHUNK,
        "final_logit_softcapping": None,
        "logit_scale": 1.0,
        "outputs": ("entropy",) if case.loss.entropy else (),
    }
    unknown = [n for n in names if n not in known and n not in ("hidden", "weight")]
    if unknown:
        raise NotImplementedError(f"this TRL's chunked log-prob wants {unknown}, which this benchmark does not know")

    def logprobs_of(hidden: Tensor, weight: Tensor) -> tuple[Tensor, Tensor | None]:
        given = {"hidden": hidden, "weight": weight} | known
        out = function.apply(*(given[n] for n in names))
        return (out[0], out[1] if case.loss.entropy else None) if isinstance(out, tuple) else (out, None)

    return Prepared(compose(case, batch, logprobs_of), f"logits computed twice, {_VOCAB_CHUNK} words at a time")


TRL = Provider("TRL chunked log-prob", _prepare, _absent)
