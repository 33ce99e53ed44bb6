"""Rows of a run and the JSON files they are kept in: flat, complete each by itself, one a line."""

from __future__ import annotations

import json
import statistics
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from benchmarks.cases import Case, Shape

RESULTS = Path(__file__).resolve().parent / "results"


@dataclass(frozen=True)
class Row:
    """One provider on one case.

    ``kind``: ``time`` (with memory and error), ``memory`` (measured apart), ``largest`` (``num_tokens`` is what fits),
    ``accuracy``.

    ``state``: ``ok``, ``absent`` or ``red``, the last two with a ``reason``. Ratios are medians of ratios within a
    round: to the bare GEMMs of the plain case, to eager, and for a variant to the same provider on the plain case.
    """

    kind: str
    loss: str
    provider: str
    title: str
    ours: bool
    variant: str
    num_tokens: int
    hidden_size: int
    vocab_size: int
    dtype: str
    state: str = "ok"
    reason: str = ""
    plan: str = ""
    chunk_rows: int | None = None
    rounds_ms: list[float] = field(default_factory=list)
    median_ms: float | None = None
    min_ms: float | None = None
    max_ms: float | None = None
    useful_tflops: float | None = None
    ratio_to_gemm: float | None = None
    ratio_to_eager: float | None = None
    ratio_to_plain: float | None = None
    peak_extra_bytes: int | None = None
    grad_hidden_error: float | None = None
    grad_weight_error: float | None = None
    logprob_error: float | None = None

    @property
    def shape(self) -> Shape:
        return Shape(self.num_tokens, self.hidden_size, self.vocab_size)

    @property
    def gradient_error(self) -> float | None:
        found = [e for e in (self.grad_hidden_error, self.grad_weight_error) if e is not None]
        return max(found) if found else None


def row_of(kind: str, case: Case, provider: str, title: str, ours: bool, **values: Any) -> Row:
    """A row with the case's columns filled in."""
    shape = case.shape
    return Row(
        kind=kind,
        loss=case.loss_name,
        provider=provider,
        title=title,
        ours=ours,
        variant=case.variant,
        num_tokens=shape.num_tokens,
        hidden_size=shape.hidden_size,
        vocab_size=shape.vocab_size,
        dtype=case.dtype,
        **values,
    )


def time_columns(rounds_ms: list[float]) -> dict[str, Any]:
    """Median, least and most of a row's rounds."""
    if not rounds_ms:
        return {}
    return {
        "rounds_ms": [round(t, 4) for t in rounds_ms],
        "median_ms": statistics.median(rounds_ms),
        "min_ms": min(rounds_ms),
        "max_ms": max(rounds_ms),
    }


def write(folder: Path, environment: dict[str, Any], rows: Iterable[Row]) -> Path:
    """``folder/<device>/<date>-<commit>.json``."""
    place = folder / str(environment["device_slug"])
    place.mkdir(parents=True, exist_ok=True)
    path = place / f"{environment['date'][:10]}-{environment['commit']}.json"
    path.write_text(to_json(environment, rows), encoding="utf-8")
    return path


def to_json(environment: dict[str, Any], rows: Iterable[Row]) -> str:
    """A JSON list, one row a line; every row holds the environment too."""
    lines = [json.dumps({**environment, **_rounded(asdict(row))}) for row in rows]
    return "[\n" + ",\n".join(lines) + "\n]\n"


@dataclass(frozen=True)
class Run:
    """A file read back."""

    path: Path
    environment: dict[str, Any]
    rows: list[Row]


def read(path: Path) -> Run:
    """Raises ``ValueError`` naming the file where it is no result of this benchmark."""
    try:
        data = json.loads(path.read_text("utf-8"))
        names = Row.__dataclass_fields__
        rows = [Row(**{k: v for k, v in line.items() if k in names}) for line in data]
        environment = {k: v for k, v in data[0].items() if k not in names}
        environment["device_slug"], environment["date"], environment["commit"]
    except (OSError, ValueError, TypeError, LookupError, AttributeError) as error:
        raise ValueError(f"{path} is not a result of this benchmark: {type(error).__name__}: {error}") from error
    return Run(path, environment, rows)


def read_all(folder: Path) -> dict[str, list[Run]]:
    """Runs by device, the newest first."""
    runs = [read(path) for path in sorted(folder.glob("*/*.json"))]
    found: dict[str, list[Run]] = {}
    for run in sorted(runs, key=lambda r: (r.environment["date"], r.path.name), reverse=True):
        found.setdefault(run.environment["device_slug"], []).append(run)
    return dict(sorted(found.items()))


def _rounded(values: dict[str, Any]) -> dict[str, Any]:
    """Floats to 6 significant digits: the rest is noise."""
    return {k: float(f"{v:.6g}") if isinstance(v, float) else v for k, v in values.items()}
