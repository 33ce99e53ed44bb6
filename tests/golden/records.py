"""Recorded outputs of other libraries' own code: finding, loading and comparing.

`data/` and `index.json` hold what the peers' own functions gave on fixed inputs, in float64 and float32; the commits
are in the index, and a note with each case says how its inputs map to the peer's arguments. Gradients are of the sum
over the micro-batches of one optimizer step. Nothing here knows xloss.
"""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

HERE = Path(__file__).parent
PROJECTION_SEED, PROJECTION_ROWS = 20260826, 8  # a wide-vocabulary dW is stored as P @ dW only
Entry = dict[str, Any]


@cache
def index() -> dict[str, Any]:
    found: dict[str, Any] = json.loads((HERE / "index.json").read_text())
    return found


def entries(peer: str, *loss_names: str) -> list[Entry]:
    """Cases of one peer, of all its losses or of those named."""
    return [c for c in index()["cases"] if c["peer"] == peer and (not loss_names or c["loss_name"] in loss_names)]


def case_id(entry: Entry) -> str:
    """For `pytest.mark.parametrize(..., ids=case_id)`."""
    return str(entry["id"])


@cache
def arrays(file: str) -> dict[str, np.ndarray]:
    """Arrays of one file of `data/`; not to be written to."""
    return dict(np.load(HERE / "data" / file))


def tensors(file: str) -> dict[str, Tensor]:
    """The same as tensors, copies."""
    return {name: torch.from_numpy(np.array(value)) for name, value in arrays(file).items()}


def tolerance(entry: Entry) -> dict[str, dict[str, float]]:
    """`{"f64" | "f32": {"rtol", "atol"}}`, relative to the largest recorded value."""
    return dict(index()["default_tolerance"] | entry.get("tolerance", {}))


def reference(entry: Entry, name: str) -> np.ndarray | None:
    """What was recorded under `name`; where the peer has a known bug, the independent float64 result instead."""
    out = arrays(entry["file"])
    if "PEER BUG" in index()["notes"][entry["notes"]]:
        name = "out_loss_ref64" if name == "loss" else f"out_gref_{name.removeprefix('grad_')}"
    found = out.get(name)
    return None if found is None else found.astype(np.float64)


def projected(name: str, got: np.ndarray, recorded: dict[str, np.ndarray]) -> tuple[str, np.ndarray]:
    """`grad_weight` as it was stored: whole, or a fixed projection of it."""
    if name == "grad_weight" and name not in recorded and "grad_weight_proj" in recorded:
        rows = np.random.default_rng(PROJECTION_SEED).standard_normal((PROJECTION_ROWS, got.shape[0]))
        return "grad_weight_proj", rows @ got
    return name, got


def mismatches(entry: Entry, found: dict[str, Tensor | float | list[float]], precision: str = "f64") -> list[str]:
    """What is wrong with our `loss`, `grad_hidden...`, `grad_weight`, `out_...` against what the peer gave."""
    wrong = []
    for name, ours in found.items():
        got = np.asarray(ours.detach().double() if isinstance(ours, Tensor) else ours, dtype=np.float64)
        got = np.atleast_1d(got) if name == "loss" else got
        name, got = projected(name, got, arrays(entry["file"]))
        want = reference(entry, name)
        if want is None:  # no gradient at the peer: ours must be exactly 0
            if np.abs(got).max(initial=0):
                wrong.append(f"{name}: the peer has none, ours is not 0")
            continue
        problem = differ(name, got, np.atleast_1d(want) if name == "loss" else want, tolerance(entry)[precision])
        wrong += [problem] if problem else []
    return wrong


def differ(name: str, got: np.ndarray, want: np.ndarray, tolerance: dict[str, float]) -> str | None:
    """Largest absolute error against `rtol * max|want| + atol`; a NaN, an inf or another shape never passes."""
    if got.shape != want.shape:
        return f"{name}: shape {got.shape}, recorded {want.shape}"
    if not np.isfinite(got).all():
        return f"{name}: not finite"
    error, allowed = (
        np.abs(got - want).max(initial=0),
        tolerance["rtol"] * np.abs(want).max(initial=0) + tolerance["atol"],
    )
    return f"{name}: off by {error:.3g}, allowed {allowed:.3g}" if error > allowed else None
