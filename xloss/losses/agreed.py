"""What every rank must be given alike to calibrate one optimizer step, and the errors where it is not."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from pydantic_core import to_jsonable_python
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh

from xloss.distributed import Ranks, world_size
from xloss.distributed.agree import Terms, together
from xloss.distributed.same_tokens import labels_hash
from xloss.losses.token_batch import TokenBatch


@contextmanager
def calibrating(
    loss_cfg: Any,
    batches: Sequence[TokenBatch],
    sp_mesh: DeviceMesh | None,
    group: Ranks = None,
    *,
    may_fail_late: bool = False,
) -> Iterator[None]:
    """Around the building of ``batches`` (items or kwargs): it succeeds on every rank of ``group`` or raises on all.

    Ranks must have the same config, the same fields in their batches (a rank without a batch has no say) and as many
    sequence-parallel ranks, which in turn must have the same sequences. Number and size of the batches are else each
    rank's own.
    """
    mesh = next((batch.split.sp_mesh for batch in batches if batch.split is not None), sp_mesh)
    terms = partial(_terms, loss_cfg, batches, mesh)
    with together("building batches", terms, group, may_fail_late=may_fail_late) as meeting:
        if mesh is not None and world_size(mesh) > 1:
            meeting.hold("comparison of sequence-parallel ranks")  # by all, before some of them wait for each other
            with together("splitting sequences", partial(_split_terms, batches), mesh):
                pass
        yield


def _terms(loss_cfg: Any, batches: Sequence[TokenBatch], sp_mesh: DeviceMesh | None) -> Terms:
    chosen = {name: getattr(loss_cfg, name) for name in type(loss_cfg).model_fields}
    options = {"loss_cfg": type(loss_cfg).__qualname__, "sp_mesh": "None"}
    if sp_mesh is not None:
        options["sp_mesh"] = f"of {sp_mesh.size()} ranks"
    options |= _flat(to_jsonable_python(chosen, fallback=_name_of))
    return Terms(options, fields_given(batches) if batches else None)


def _split_terms(batches: Sequence[TokenBatch]) -> Terms:
    """What ranks that hold parts of the same sequences must have alike, so that they exchange the same of them."""
    options = {"the number of micro-batches": str(len(batches))}
    wholes = [b if b.split is None else b.split.whole for b in batches]
    hashes = [labels_hash(whole.shifted_labels) for whole in wholes]
    hashes += [labels_hash(b.split.places) for b in batches if b.split is not None]
    numbers = iter(torch.stack(hashes).tolist() if hashes else [])
    for i, whole in enumerate(wholes):
        options[f"the whole shifted_labels of micro-batch {i}"] = _hashed(whole.shifted_labels, next(numbers))
    for i, batch in enumerate(batches):
        if batch.split is not None:
            options[f"the order of the parts of micro-batch {i}"] = _hashed(batch.split.places, next(numbers))
            options[f"what was set since the split of micro-batch {i}"] = str(batch.split.changed(batch))
    return Terms(options, fields_given(batches))


def _hashed(tensor: Tensor, number: float) -> str:
    return f"{list(tensor.shape)} of hash {number:.0f}"


def fields_given(batches: Sequence[TokenBatch]) -> frozenset[str]:
    """Names of the tensors that any of ``batches`` has."""
    return frozenset(n for b in batches for n in type(b).model_fields if isinstance(getattr(b, n), Tensor))


def _flat(values: dict[str, Any], prefix: str = "") -> dict[str, str]:
    """Nested values under their dotted names, printed."""
    out: dict[str, str] = {}
    for name, value in values.items():
        out |= _flat(value, f"{prefix}{name}.") if isinstance(value, dict) else {f"{prefix}{name}": repr(value)}
    return out


def _name_of(value: object) -> str:
    """Of a function or class, the same in every process; else of the value's class."""
    return getattr(value, "__qualname__", type(value).__qualname__)
