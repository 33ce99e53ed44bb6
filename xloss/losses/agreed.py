"""What every rank must be given alike to calibrate one optimizer step, and the errors where it is not."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager
from typing import Any

from pydantic_core import to_jsonable_python
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh

from xloss.distributed import Ranks
from xloss.distributed.agree import Terms, together


def calibrating(
    loss_cfg: Any, batches: Sequence[Any], sp_mesh: DeviceMesh | None, group: Ranks = None
) -> AbstractContextManager[None]:
    """Around the building of ``batches`` (items or kwargs): it succeeds on every rank of ``group`` or raises on all.

    Ranks must have the same config, the same fields in their batches (a rank without a batch has no say) and as many
    sequence-parallel ranks. Number and size of the batches are each rank's own.
    """
    return together("building batches", lambda: _terms(loss_cfg, batches, sp_mesh), group)


def _terms(loss_cfg: Any, batches: Sequence[Any], sp_mesh: DeviceMesh | None) -> Terms:
    chosen = {name: getattr(loss_cfg, name) for name in type(loss_cfg).model_fields}
    options = {"loss_cfg": type(loss_cfg).__qualname__, "sp_mesh": "None"}
    if sp_mesh is not None:
        options["sp_mesh"] = f"of {sp_mesh.size()} ranks"
    options |= _flat(to_jsonable_python(chosen, fallback=_name_of))
    if not batches:
        return Terms(options)
    found = {n for b in batches for n in type(b).model_fields if isinstance(getattr(b, n), Tensor)}
    return Terms(options, frozenset(found))


def _flat(values: dict[str, Any], prefix: str = "") -> dict[str, str]:
    """Nested values under their dotted names, printed."""
    out: dict[str, str] = {}
    for name, value in values.items():
        out |= _flat(value, f"{prefix}{name}.") if isinstance(value, dict) else {f"{prefix}{name}": repr(value)}
    return out


def _name_of(value: object) -> str:
    """Of a function or class, the same in every process; else of the value's class."""
    return getattr(value, "__qualname__", type(value).__qualname__)
