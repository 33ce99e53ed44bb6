"""What the demo found, in one record, and whether that is good."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from xloss.cli.calibration import Cut
from xloss.cli.demo_steps import Step
from xloss.cli.options import Sizes
from xloss.cli.tiny_lm import Training

EXACT = 1e-5  # float32: what a drift or a loss may differ by and still count as equal


@dataclass(frozen=True)
class DemoResult:
    """Everything ``demo.json`` holds, but the verdict and the plots."""

    environment: dict[str, Any]
    sizes: Sizes
    notes: tuple[str, ...]  # what was made smaller than asked for, and what disturbs the figures
    text: dict[str, Any]
    training: Training
    batch: dict[str, Any]
    steps: tuple[Step, ...]
    calibration: tuple[Cut, ...]
    seconds: dict[str, float]


@dataclass(frozen=True)
class Verdict:
    """``line`` is what the demo ends with."""

    passed: bool
    line: str
    failures: tuple[str, ...]


def pairs(steps: tuple[Step, ...]) -> list[tuple[Step, Step]]:
    """``(eager, xloss)`` of each loss."""
    ours = {step.loss_name: step for step in steps if step.run == "xloss"}
    return [(step, ours[step.loss_name]) for step in steps if step.run == "eager"]


def memory_ratio(steps: tuple[Step, ...]) -> float | None:
    """Eager's peak over xloss's, the worst of the losses; ``None`` where peaks cannot be read."""
    ratios = [
        eager.peak_mib / max(ours.peak_mib, 1e-3) for eager, ours in pairs(steps) if eager.peak_mib and ours.peak_mib
    ]
    return min(ratios, default=None)


def judge(result: DemoResult) -> Verdict:
    """PASS if the loss fell, gradients are as good as eager's, memory is less, and no cut of the batch matters."""
    training = result.training
    failures: list[str] = []

    def check(well: bool, failure: str) -> None:  # a NaN compares false, so it fails
        if not well:
            failures.append(failure)

    check(
        training.held_out_after < training.held_out_before,
        f"the loss did not fall: {training.held_out_before:.2f} -> {training.held_out_after:.2f}",
    )
    for eager, ours in pairs(result.steps):
        name = ours.loss_name
        check(
            ours.grad_error <= 2 * eager.grad_error + 1e-6,
            f"{name}: gradient error {ours.grad_error:.0e} against float64, eager {eager.grad_error:.0e}",
        )
        check(
            abs(ours.loss - ours.reference_loss) <= EXACT * max(1.0, abs(ours.reference_loss)),
            f"{name}: loss {ours.loss:.7g} instead of {ours.reference_loss:.7g}",
        )
        if eager.peak_mib is not None and ours.peak_mib is not None:
            check(
                ours.peak_mib < eager.peak_mib, f"{name}: peak {ours.peak_mib:.0f} MiB, eager {eager.peak_mib:.0f} MiB"
            )
    drift = max(max(cut.xloss_grad_drift, cut.xloss_loss_drift) for cut in result.calibration)
    check(drift <= EXACT, f"cutting the batch changes the result by {drift:.0e}")
    if failures:
        return Verdict(False, "FAIL " + "; ".join(failures), tuple(failures))
    return Verdict(True, "PASS " + ", ".join(_praise(result, drift)), ())


def _praise(result: DemoResult, drift: float) -> list[str]:
    ratio = memory_ratio(result.steps)
    speed = speedup(result.steps)
    worst = max(ours.grad_error for _, ours in pairs(result.steps))
    return [
        "peak memory not measured on this system" if ratio is None else f"{ratio:.0f}x less memory",
        f"{speed:.1f}x faster" if speed >= 1.05 else f"{speed:.2f}x the speed",
        f"gradients equal to {worst:.0e} of float64",
        f"any cut of the batch the same to {drift:.0e}",
    ]


def speedup(steps: tuple[Step, ...]) -> float:
    """Eager's time over xloss's, all losses together."""
    both = pairs(steps)
    return sum(eager.time_ms for eager, _ in both) / sum(ours.time_ms for _, ours in both)
