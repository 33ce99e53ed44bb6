"""Policy steps, eager and xloss side by side: loss, gradients against float64, peak memory, time.

"eager" is what everybody writes first: ``log_softmax(hidden @ weight.T)`` and plain autograd, nothing of the engine.

On a CPU each run gets a process of its own, so that one run's memory is never another's. On CUDA the allocator counts
exactly and the runs share this process.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from xloss import GRPOLossConfig, GRPOLossContext, RLLossContextInputItem
from xloss.cli import float64
from xloss.cli.errors import MeasurementFailed
from xloss.cli.memory import MIB, start_peak
from xloss.cli.rollouts import Rollouts
from xloss.cli.spawn import process_context

Run = Literal["eager", "xloss"]
ENOUGH_MS = 2500.0  # a step is repeated until it took this long in all, five times at most; the fastest counts
CHECKED_WORDS = 4096  # rows of the head's gradient that are compared with float64
Formula = Callable[[Tensor, Rollouts, slice], Tensor]
_PPO = {"loss_type": "vanilla", "cliprange_low": float64.CLIP_LOW, "cliprange_high": float64.CLIP_HIGH}
_CISPO = {
    "loss_type": "cispo",
    "clip_low_threshold": float64.CISPO_LOW,
    "clip_high_threshold": float64.CISPO_HIGH,
}
LOSSES: dict[str, tuple[dict[str, Any], Formula]] = {  # fields of GRPOLossConfig, and the same loss as a formula
    "GRPO": ({"policy_loss_cfg": _PPO}, float64.grpo),
    "CISPO": ({"policy_loss_cfg": _CISPO}, float64.cispo),
    "GRPO + KL": (
        {"policy_loss_cfg": _PPO, "use_kl_loss": True, "kl_loss_coef": float64.KL_COEF, "kl_loss_type": "k3"},
        float64.grpo_kl,
    ),
}


@dataclass(frozen=True)
class Step:
    """One run of one loss, forward and backward. ``peak_mib`` is above what was held before, gradients included."""

    loss_name: str
    run: Run
    loss: float
    reference_loss: float
    grad_error: float  # ||grad - float64|| / ||float64||, the larger of hidden states and head
    peak_mib: float | None
    time_ms: float  # the fastest of the repeats that fit 2.5 s
    metrics: dict[str, float]  # xloss only
    plan: str  # xloss only


@dataclass(frozen=True)
class _Job:
    """What one measured run needs; tensors travel in a file."""

    loss_name: str
    run: Run
    batch_file: str
    result_file: str
    device: str
    num_threads: int


def run_steps(batch: Rollouts, tick: Callable[[str], None] = lambda note: None) -> list[Step]:
    """All losses of ``LOSSES`` both ways, then the float64 check. ``tick`` is called ``num_ticks(batch)`` times.

    Raises:
        MeasurementFailed: a measured process died (out of memory, say).
    """
    with tempfile.TemporaryDirectory(prefix="xloss-demo-") as folder:
        results: dict[tuple[str, Run], dict[str, Any]] = {}
        batch_file = Path(folder) / "batch.pt"
        torch.save(asdict(batch), batch_file)
        for loss_name in LOSSES:
            for run in get_args(Run):
                tick(f"{loss_name}, {run}")
                job = _Job(
                    loss_name=loss_name,
                    run=run,
                    batch_file=str(batch_file),
                    result_file=str(Path(folder) / f"{len(results)}.pt"),
                    device=str(batch.hidden_states.device),
                    num_threads=torch.get_num_threads(),
                )
                _measure_apart(job)
                results[loss_name, run] = torch.load(job.result_file)
    words = _checked_words(batch)
    tick("float64")
    formulas = [formula for _, formula in LOSSES.values()]
    expected = dict(zip(LOSSES, float64.references(batch, formulas, words, tick=lambda: tick("float64")), strict=True))
    return [_compare(key, result, expected[key[0]], words) for key, result in results.items()]


def num_ticks(batch: Rollouts) -> int:
    """How often ``run_steps`` ticks: once a run, once a block of 256 tokens in float64."""
    return len(LOSSES) * len(get_args(Run)) + 1 + -(-batch.num_tokens // 256)


def _checked_words(batch: Rollouts, count: int = CHECKED_WORDS) -> Tensor:
    """Words whose rows of the head's gradient are compared: those that were sampled, then others. ``[M]``."""
    sampled = batch.shifted_labels.unique()[: count // 2]
    others = torch.arange(len(batch.head_weight), device=sampled.device)
    others = others[torch.isin(others, sampled, invert=True)]
    stride = max(1, len(others) // (count - len(sampled)))
    return torch.cat([sampled, others[::stride][: count - len(sampled)]])


def _compare(key: tuple[str, Run], result: Mapping[str, Any], expected: float64.Reference, words: Tensor) -> Step:
    errors = (
        float64.relative(result["d_hidden"].to(words.device), expected.d_hidden),
        float64.relative(result["d_weight"].to(words.device)[words], expected.d_words),
    )
    return Step(
        loss_name=key[0],
        run=key[1],
        loss=result["loss"],
        reference_loss=expected.loss,
        grad_error=max(errors),
        peak_mib=result["peak_mib"],
        time_ms=result["time_ms"],
        metrics=result["metrics"],
        plan=result["plan"],
    )


def _measure_apart(job: _Job) -> None:
    """Run ``measure`` in a fresh process (CPU) or here (CUDA)."""
    if job.device.startswith("cuda"):
        measure(job)
        return
    context = process_context(__name__)
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=_child, args=(job, sender), daemon=True)
    process.start()
    sender.close()
    try:
        failure = receiver.recv()
    except EOFError:
        process.join()
        failure = f"the process ended with status {process.exitcode} (out of memory?)"
    process.join()
    if failure:
        raise MeasurementFailed(f"measuring {job.loss_name} with {job.run} failed: {failure}")


def _child(job: _Job, sender: Connection) -> None:
    try:
        measure(job)
        sender.send("")
    except Exception as error:  # reported by the parent
        sender.send(f"{type(error).__name__}: {error}")


def measure(job: _Job) -> None:
    """Run one step and save loss, gradients, peak memory, the best time and what the engine says."""
    if not job.device.startswith("cuda"):
        torch.set_num_threads(job.num_threads)
    batch = Rollouts(**torch.load(job.batch_file, map_location=job.device))
    step = _xloss_step if job.run == "xloss" else _eager_step
    step(batch, job.loss_name, slice(0, 8))  # first use of every library, outside the measurement
    peak = start_peak(job.device)
    time_ms, result = _timed(step, batch, job)
    peak_bytes = peak()
    times_ms = [time_ms]
    while sum(times_ms) < ENOUGH_MS and len(times_ms) < 5:
        times_ms.append(_timed(step, batch, job)[0])
    result |= {"time_ms": min(times_ms), "peak_mib": None if peak_bytes is None else peak_bytes / MIB}
    torch.save(result, job.result_file)


def _timed(step: Callable[..., dict[str, Any]], batch: Rollouts, job: _Job) -> tuple[float, dict[str, Any]]:
    start = time.perf_counter()
    result = step(batch, job.loss_name, slice(None))
    if job.device.startswith("cuda"):
        torch.cuda.synchronize(job.device)
    return (time.perf_counter() - start) * 1e3, result


def _leaves(batch: Rollouts, rows: slice) -> tuple[Tensor, Tensor]:
    return batch.hidden_states[rows].clone().requires_grad_(), batch.head_weight.detach().requires_grad_()


def _eager_step(batch: Rollouts, loss_name: str, rows: slice) -> dict[str, Any]:
    """Forward and backward of one loss over ``rows`` with all logits, in plain PyTorch."""
    hidden, weight = _leaves(batch, rows)
    labels = batch.shifted_labels[rows, None]
    logprobs = (hidden @ weight.T).log_softmax(-1).gather(-1, labels)[:, 0]
    loss = LOSSES[loss_name][1](logprobs, batch, rows).mean()
    loss.backward()
    return {"loss": loss.item(), "d_hidden": hidden.grad, "d_weight": weight.grad, "metrics": {}, "plan": ""}


def _xloss_step(batch: Rollouts, loss_name: str, rows: slice) -> dict[str, Any]:
    """The same with xloss, as a trainer would write it."""
    hidden, weight = _leaves(batch, rows)
    loss_cfg = GRPOLossConfig(**LOSSES[loss_name][0])
    item = RLLossContextInputItem(
        shifted_labels=batch.shifted_labels[rows],
        advantages=batch.advantages[rows],
        old_logprobs=batch.old_logprobs[rows],
        ref_logprobs=batch.ref_logprobs[rows] if loss_cfg.use_kl_loss else None,
    )
    (loss_kwargs,) = GRPOLossContext.build_batches_loss_kwargs([item], loss_cfg)
    loss, info = GRPOLossContext(loss_cfg, loss_kwargs).forward(hidden, weight)
    loss.backward()
    metrics = {name: metric.result().item() for name, metric in info.metrics.items()}
    return {
        "loss": loss.item(),
        "d_hidden": hidden.grad,
        "d_weight": weight.grad,
        "metrics": metrics,
        "plan": str(info.plan),
    }
