"""What the command line of the benchmark accepts."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import torch
from cyclopts import Parameter, validators

from benchmarks.cases import DTYPES, Shape
from benchmarks.environment import ROOT
from benchmarks.losses import LOSSES
from benchmarks.providers import PROVIDERS
from benchmarks.results import RESULTS
from benchmarks.suite import Suite, chosen, standard

LossName = Literal[*LOSSES]  # type: ignore[valid-type]
ProviderName = Literal[*PROVIDERS]  # type: ignore[valid-type]
DtypeName = Literal[*DTYPES]  # type: ignore[valid-type]
Device = Literal["auto", "cpu", "cuda"]
STANDARD_MINUTES = 8.0
Flag = Annotated[bool, Parameter(negative="")]
_many = Parameter(consume_multiple=True, negative="", show_default=False)


@Parameter(name="*")
@dataclass(frozen=True, kw_only=True)
class RunOptions:
    """Options of a run. Without any of losses, providers, shapes and dtype the standard set is measured."""

    quick: Flag = False
    """Small shapes: a look in seconds."""
    device: Device = "auto"
    """Where to run; auto takes CUDA if there is one."""
    losses: Annotated[tuple[LossName, ...], _many] = ()
    """Only these losses."""
    providers: Annotated[tuple[ProviderName, ...], _many] = ()
    """Only these providers, also those that do not run by themselves, and the bare GEMMs."""
    shapes: Annotated[tuple[str, ...], _many] = ()
    """These shapes instead, TxHxV, each with every loss that is named, or else the standard ones."""
    dtype: DtypeName | None = None
    """dtype of hidden states and head."""
    rounds: Annotated[int | None, Parameter(validator=validators.Number(gte=1))] = None
    """Timed rounds; at least 7 by default."""
    minutes: Annotated[float | None, Parameter(validator=validators.Number(gt=0), show_default=False)] = None
    """Wall time to stay within: slow runs get fewer rounds, and peers for which none is left are absent. 8 for the
    standard set on CUDA, else no limit."""
    threads: Annotated[int | None, Parameter(validator=validators.Number(gte=1))] = None
    """Threads of torch on the CPU; its own choice by default."""
    out: Path | None = None
    """Folder of the result; benchmarks/results for the standard set, else out/benchmarks."""
    commit: str | None = None
    """Commit to write down where git cannot be asked."""
    json: Flag = False
    """Print the rows as JSON to stdout, and nothing else."""

    @property
    def narrowed(self) -> bool:
        """Whether this is something else than the standard set."""
        return bool(
            self.quick or self.losses or self.providers or self.shapes or self.dtype or self.rounds or self.threads
        )

    def seconds(self, device: str) -> float | None:
        """Wall time to stay within, or ``None``."""
        minutes = self.minutes
        if minutes is None and device == "cuda" and not self.narrowed:
            minutes = STANDARD_MINUTES
        return None if minutes is None else 60 * minutes

    @property
    def folder(self) -> Path:
        """Where the result goes: only whole runs go where results are kept."""
        return self.out or (ROOT / "out" / "benchmarks" if self.narrowed else RESULTS)

    def suite(self, device: str) -> Suite:
        """What to run. Raises ``ValueError`` for a shape that is none, or where nothing is left."""
        shapes = [Shape.parse(text) for text in self.shapes]
        found = chosen(standard(device, quick=self.quick), self.losses, self.providers, shapes, self.dtype, self.rounds)
        if not found.groups:
            raise ValueError(f"no shape of this set has {', '.join(self.losses)}; give --shapes TxHxV")
        return found


def resolve(device: Device) -> str:
    """Raises ``ValueError`` for ``cuda`` where there is none."""
    if device == "cuda" and not torch.cuda.is_available():
        raise ValueError("--device cuda: this PyTorch sees no CUDA device. Accepted here: auto, cpu.")
    return "cuda" if device != "cpu" and torch.cuda.is_available() else "cpu"
