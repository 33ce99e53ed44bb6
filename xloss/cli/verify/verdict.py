"""One row a layout: the worst that any rank, loss and variant saw, and whether that is good."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch

from xloss.cli.verify.compare import CAPS, allowed_error, badness, explain
from xloss.cli.verify.layouts import Layout
from xloss.cli.verify.world import Seen

Verdict = Literal["PASS", "FAIL", "skipped"]


@dataclass(frozen=True)
class Row:
    """A layout's row. Errors are relative, ``None`` where nothing was computed.

    Args:
        ranks: processes that ran it.
        gradient: against one process of the same dtype; ``gradient64`` against float64; ``values`` of the loss, the
            log-probs and the metrics.
        allowed: what ``gradient`` and ``values`` may be, for the loss that may be off most.
        note: why it was skipped, or how it was refused.
        failures: what is wrong, in words; ``hint``: where to look in a loss of one's own.
    """

    layout: str
    what: str
    ranks: int
    losses: tuple[str, ...]
    verdict: Verdict
    gradient: float | None = None
    gradient64: float | None = None
    values: float | None = None
    allowed: float | None = None
    note: str = ""
    failures: tuple[str, ...] = ()
    hint: str = ""


def row_of(layout: Layout, seen: Sequence[Seen], dtype: torch.dtype, world: int, ended: str = "") -> Row:
    """The row of a layout that ran; ``seen`` is its own, of all ranks."""
    losses = tuple(dict.fromkeys(s.loss for s in seen))
    ranks = world if layout.ranks else 1
    failures = [ended] if ended else []
    refusals = [s.refusal for s in seen if s.refusal]
    computed = layout.compute or dtype
    allowed = allowed_error(computed, max((s.own for s in seen), key=badness, default=0.0))
    failed: dict[tuple[str, str], str] = {}
    for s in seen:
        if s.errors is None:
            continue
        well = s.errors.worst <= allowed_error(computed, s.own) and s.errors.gradient64 <= CAPS[computed]
        if not well and (s.loss, s.variant) not in failed:
            counts = {"ranks": ranks, "micro-batches": s.micro_batches} | dict(layout.counts)
            where = f"{s.loss}, {s.variant}" if s.variant else s.loss
            failed[s.loss, s.variant] = f"{where}: {explain(s.errors, allowed_error(computed, s.own), counts)}"
    failures += failed.values()
    found = [s.errors for s in seen if s.errors is not None]
    return Row(
        layout=layout.name,
        what=layout.what,
        ranks=ranks,
        losses=losses,
        verdict="FAIL" if failures else "PASS",
        gradient=_max([e.gradient for e in found]),
        gradient64=_max([e.gradient64 for e in found]),
        values=_max([e.values for e in found]),
        allowed=allowed,
        note="refused" if refusals and not failures else "",
        failures=tuple(failures),
        hint=layout.hint,
    )


def skipped_row(layout: Layout, reason: str) -> Row:
    """The row of a layout that did not run."""
    return Row(layout.name, layout.what, 0, (), "skipped", note=reason)


def _max(errors: Sequence[float]) -> float | None:
    return max(errors, key=badness, default=None)
