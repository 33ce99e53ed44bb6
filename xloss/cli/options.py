"""Options of ``xloss demo``, and the sizes they become on this machine."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Literal

import torch
from cyclopts import Parameter, validators

from xloss.cli.errors import CannotRun
from xloss.cli.memory import MIB, available_bytes

GIB = 1 << 30
Flag = Annotated[bool, Parameter(negative="", show_default=False)]
Tokens = Annotated[int | None, Parameter(validator=validators.Number(gte=64))]
Steps = Annotated[int | None, Parameter(validator=validators.Number(gte=1))]
Vocabulary = Annotated[int | None, Parameter(validator=validators.Number(gte=256))]
Hidden = Annotated[int | None, Parameter(validator=validators.Number(gte=8))]
Files = Annotated[
    tuple[Path, ...],
    Parameter(
        consume_multiple=True, negative="", show_default=False, validator=validators.Path(exists=True, dir_okay=False)
    ),
]


@Parameter(name="*")
@dataclass(frozen=True, kw_only=True)
class DemoOptions:
    """What the user may choose. ``None`` means the usual size, or the small one with ``--quick``."""

    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Where to run; auto takes CUDA if there is one."""
    tokens: Tokens = None
    """Tokens of the policy steps (4096)."""
    steps: Steps = None
    """Training steps (40)."""
    vocab_size: Vocabulary = None
    """Words in the vocabulary (65536)."""
    hidden_size: Hidden = None
    """Hidden size of the model (128)."""
    text: Files = ()
    """Text files to use instead of the standard library."""
    out: Path = Path("xloss-demo")
    """Folder for demo.json, demo.md and the plots."""
    seed: int = 0
    """Seed of everything random."""
    json: Flag = False
    """Print demo.json to stdout, and nothing else."""
    parallel: Literal["fsdp2"] | None = None
    """Instead: train on 1, 2 and 4 processes, or torchrun's; compare, resume."""
    quick: Flag = False
    """A look in seconds: 1024 tokens, 8 steps, 32768 words, hidden size 64."""


@dataclass(frozen=True)
class Sizes:
    """What will be run."""

    device: str
    tokens: int
    steps: int
    vocab_size: int
    hidden_size: int


_USUAL = {"tokens": 4096, "steps": 40, "vocab_size": 65536, "hidden_size": 128}
_QUICK = {"tokens": 1024, "steps": 8, "vocab_size": 32768, "hidden_size": 64}


def choose_sizes(options: DemoOptions, free: int | None = None) -> tuple[Sizes, list[str]]:
    """Sizes for this machine, and a sentence for each thing that was made smaller than asked for.

    Args:
        options: What the user asked for.
        free: Bytes that can be allocated; asked of the system where ``None``.

    Raises:
        CannotRun: ``device="cuda"`` without CUDA, or too little memory for any demo.
    """
    if options.device == "cuda" and not torch.cuda.is_available():
        raise CannotRun("--device cuda: this PyTorch sees no CUDA device. Accepted here: auto, cpu.")
    device = "cuda" if options.device != "cpu" and torch.cuda.is_available() else "cpu"
    usual = _QUICK if options.quick else _USUAL
    sizes = Sizes(
        device,
        **{name: default if (given := getattr(options, name)) is None else given for name, default in usual.items()},
    )
    free = available_bytes(device) if free is None else free
    return (sizes, []) if free is None else _shrink(sizes, free)


def needed_bytes(sizes: Sizes) -> int:
    """Peak of the eager policy step beside the model, two snapshots of it and AdamW's state, and a margin."""
    logits = sizes.tokens * sizes.vocab_size * 4
    weights = 2 * sizes.vocab_size * sizes.hidden_size * 4
    return int(3.2 * logits) + 8 * weights + 700 * MIB


def _shrink(sizes: Sizes, free: int) -> tuple[Sizes, list[str]]:
    asked, usable = sizes, int(0.85 * free)
    while needed_bytes(sizes) > usable and sizes.tokens > 256:
        sizes = replace(sizes, tokens=max(256, sizes.tokens // 2))
    while needed_bytes(sizes) > usable and sizes.vocab_size > 4096:
        sizes = replace(sizes, vocab_size=max(4096, sizes.vocab_size // 2))
    if needed_bytes(sizes) > usable:
        raise CannotRun(
            f"{free / GIB:.1f} GiB of memory are free; the smallest demo needs "
            f"{needed_bytes(sizes) / 0.85 / GIB:.1f} GiB. Close something, or give a smaller --hidden-size."
        )
    why = f"{free / GIB:.1f} GiB are free, {needed_bytes(asked) / GIB:.1f} GiB wanted (most of it for eager's logits)"
    notes = [
        f"made smaller: --{name.replace('_', '-')} {getattr(asked, name)} -> {getattr(sizes, name)}; {why}."
        for name in ("tokens", "vocab_size")
        if getattr(asked, name) != getattr(sizes, name)
    ]
    return sizes, notes
