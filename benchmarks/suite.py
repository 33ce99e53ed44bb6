"""Which rows a run has: shapes, losses, providers and variants by device, and what the command line changes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from benchmarks.accuracy import GATE_SHAPE, TABLE_SHAPE
from benchmarks.cases import Case, Shape
from benchmarks.losses import STANDARD
from benchmarks.providers import PROVIDERS

MIB = 1 << 20
VARIANTS: tuple[dict[str, Any], ...] = (
    {"ignored": 0.3},
    {"ignored": 0.5},
    {"ignored": 0.7},
    {"zero_advantage": 0.5},
    {"frozen_head": True},
)
SMALL_BUDGET: dict[str, Any] = {"logits_budget": 512 * MIB}
VARIED = ("xloss-one-pass", "xloss-fused-one-pass")
ALL = tuple(name for name in PROVIDERS if name != "xloss-eager")
CORE = (
    *("gemm", "eager", "xloss-forward", "xloss-one-pass", "xloss-two-pass"),
    *("xloss-fused-forward", "xloss-fused-one-pass", "xloss-fused-two-pass"),
    *("xloss-no-logits-forward", "xloss-no-logits-one-pass", "xloss-no-logits-two-pass"),
)
_APART = ("eager", "torch-lce", "liger-grpo", "xtuner-loop", "xloss-one-pass", "xloss-two-pass")


@dataclass(frozen=True)
class Group:
    """Rows that are timed in turn: one shape and dtype. ``extra`` are providers for one loss beside ``providers``."""

    shape: Shape
    dtype: str
    losses: tuple[str, ...]
    providers: tuple[str, ...]
    extra: tuple[tuple[str, tuple[str, ...]], ...] = ()
    variants: tuple[str, ...] = ()  # losses whose variants are run
    small_budget: bool = False
    rounds: int = 7

    def entries(self, device: str, *, asked_for: bool) -> list[tuple[Case, str]]:
        """``(case, provider)`` in the order of the table. ``asked_for``: the providers were named by the user."""
        found = []
        for loss in self.losses:
            case = Case(loss, self.shape, self.dtype, device)
            names = self.providers if asked_for else (*self.providers, *dict(self.extra).get(loss, ()))
            for name in (n for n in PROVIDERS if n in names):
                provider = PROVIDERS[name]
                if not provider.applies(case) or not (asked_for or device_type(device) in provider.default_on):
                    continue
                found.append((case, name))
                if loss in self.variants and name in VARIED:
                    changes = (*VARIANTS, SMALL_BUDGET) if self.small_budget else VARIANTS
                    found += [(replace(case, **change), name) for change in changes]
        return found

    def work(self, device: str, *, asked_for: bool) -> float:
        """How long it takes beside other groups, roughly: products times runs."""
        return sum(case.useful_flops for case, _ in self.entries(device, asked_for=asked_for)) * (4 + self.rounds)


@dataclass(frozen=True)
class Suite:
    """A whole run. ``memory``: the shape and providers measured apart, ``None`` where the allocator counts exactly.

    ``largest``: head, most tokens to try, and providers of the largest batch that fits; ``None`` where running out of
    memory would end the process.
    """

    groups: tuple[Group, ...]
    gate: Shape
    memory: tuple[Shape, tuple[str, ...]] | None
    accuracy: Shape | None
    largest: tuple[Shape, int, tuple[str, ...]] | None = None


def device_type(device: str) -> str:
    return device.split(":", maxsplit=1)[0]


def standard(device: str, *, quick: bool) -> Suite:
    """The set that is run when nothing is asked for."""
    return _on_cuda(quick) if device_type(device) == "cuda" else _on_cpu(quick)


def _on_cpu(quick: bool) -> Suite:
    """GRPO against everything, with its variants; every other loss, at half the tokens, against eager."""
    main = Shape(512, 64, 4096) if quick else Shape(2048, 512, 32000)
    half = replace(main, num_tokens=main.num_tokens // 2)
    others = tuple(name for name in STANDARD if name != "grpo")
    own = tuple(name for name in CORE if "two-pass" not in name)
    extra = (
        ("ce", ("torch-lce",)),
        ("gspo", ("xloss-two-pass", "xloss-fused-two-pass")),
    )
    return Suite(
        groups=(
            Group(main, "float32", ("grpo",), ALL, variants=("grpo",)),
            Group(half, "float32", others, own, extra=extra),
        ),
        gate=GATE_SHAPE["cpu"],
        memory=(Shape(512, 64, 16384), ("eager", "xloss-one-pass")) if quick else (Shape(4096, 256, 65536), _APART),
        accuracy=GATE_SHAPE["cpu"] if quick else TABLE_SHAPE,
    )


def _on_cuda(quick: bool) -> Suite:
    if quick:
        shape = Shape(2048, 2048, 32768)
        return Suite((Group(shape, "bfloat16", STANDARD, ALL, rounds=15),), GATE_SHAPE["cuda"], None, None)
    # heads of models: Llama 3 (also at the published T), Qwen 2.5 / 3, Qwen 3 small, Qwen 3.5, Gemma 2
    main, some = Shape(8192, 4096, 128256), ("ce", "grpo", "logprob")
    most = tuple(name for name in ALL if name != "compile")  # compiling takes longer than all else together
    compiled = tuple((loss, ("compile",)) for loss in some)
    groups = (
        Group(main, "bfloat16", STANDARD, most, extra=compiled, variants=("grpo",), rounds=15),
        Group(Shape(4096, 4096, 128256), "bfloat16", ("ce",), ALL, rounds=15),
        Group(Shape(8192, 4096, 151936), "bfloat16", some, most, rounds=9),
        Group(Shape(16384, 2048, 151936), "bfloat16", some, most, rounds=9),
        Group(Shape(16384, 2048, 248320), "bfloat16", some, CORE, rounds=9),
        Group(Shape(8192, 2304, 256000), "bfloat16", some, most, rounds=9),
        Group(
            Shape(32768, 4096, 151936),
            "bfloat16",
            ("ce", "grpo"),
            CORE,
            variants=("grpo",),
            small_budget=True,
            rounds=7,
        ),
    )
    largest = (Shape(1024, 4096, 151936), 1 << 18, ("eager", "xloss-one-pass", "xloss-fused-one-pass"))
    return Suite(groups, GATE_SHAPE["cuda"], None, TABLE_SHAPE, largest)


def chosen(
    suite: Suite,
    losses: Sequence[str] = (),
    providers: Sequence[str] = (),
    shapes: Sequence[Shape] = (),
    dtype: str | None = None,
    rounds: int | None = None,
) -> Suite:
    """The suite as the command line wants it: only these losses and providers, these shapes instead.

    Shapes that are named have every loss that is named, or else the standard ones. A loss that is not standard is
    measured at the first shape.
    ``providers`` that a group does not have by itself are added to it; the bare GEMMs are always there, as the unit.
    """
    groups = suite.groups
    if shapes:
        first = groups[0]
        groups = tuple(
            Group(s, first.dtype, tuple(losses) or STANDARD, ALL, variants=first.variants, rounds=first.rounds)
            for s in shapes
        )
    elif others := tuple(name for name in losses if name not in STANDARD):
        groups = (replace(groups[0], losses=(*groups[0].losses, *others)), *groups[1:])
    found = []
    for group in groups:
        wanted = tuple(name for name in group.losses if not losses or name in losses)
        names = tuple(dict.fromkeys(("gemm", *providers))) if providers else group.providers
        if wanted:
            found.append(
                replace(
                    group, losses=wanted, providers=names, dtype=dtype or group.dtype, rounds=rounds or group.rounds
                )
            )
    narrowed = bool(losses or providers or shapes or dtype)
    return replace(
        suite,
        groups=tuple(found),
        memory=None if narrowed else suite.memory,
        accuracy=None if narrowed else suite.accuracy,
        largest=None if narrowed else suite.largest,
    )
