"""What a provider is: something that computes a case. One peer a file; this file is what they share."""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor

from benchmarks.cases import Batch, Case


@dataclass(frozen=True)
class Result:
    """What one step returns: the loss and its gradients, or log-probs and entropies of a forward-only case."""

    loss: Tensor | None = None
    d_hidden: Tensor | None = None
    d_weight: Tensor | None = None
    logprobs: Tensor | None = None
    entropy: Tensor | None = None


Step = Callable[[], Result]


@dataclass(frozen=True)
class Prepared:
    """A step ready to be run many times; ``plan`` and ``chunk_rows`` say how it will run, where that is known."""

    run: Step
    plan: str = ""
    chunk_rows: int | None = None


@dataclass(frozen=True)
class Provider:
    """A way to compute cases.

    Args:
        title: name in tables.
        prepare: everything a training loop would do once per batch, outside of the step.
        absent: why it cannot run a case here, or ``None``.
        applies: whether the row makes sense at all; where not, there is no row.
        default_on: device types on which it runs without being asked for by name.
        ours: xloss.
    """

    title: str
    prepare: Callable[[Case, Batch], Prepared]
    absent: Callable[[Case], str | None] = lambda case: None
    applies: Callable[[Case], bool] = lambda case: True
    default_on: tuple[str, ...] = ("cpu", "cuda")
    ours: bool = False


@cache
def missing(module: str) -> str | None:
    """Why ``module`` cannot be imported, in a few words, or ``None``."""
    try:
        importlib.import_module(module)
    except ModuleNotFoundError as error:
        top = module.split(".")[0]
        return "not installed" if error.name == top else f"{top} needs {error.name}, which is not installed"
    except Exception as error:
        return f"import fails: {type(error).__name__}: {first_line(error)}"
    return None


def needs(module: str, *, cuda: bool = False, losses: tuple[str, ...] | None = None) -> Callable[[Case], str | None]:
    """An ``absent`` for a peer in ``module`` that knows only ``losses`` and, with ``cuda``, only that device."""

    def absent(case: Case) -> str | None:
        if losses is not None and case.loss_name not in losses:
            return f"has no {case.loss.title}"
        if cuda and not case.device.startswith("cuda"):
            return "needs CUDA"
        return missing(module)

    return absent


def first_line(error: BaseException) -> str:
    """The first line of an error's message, shortened."""
    lines = str(error).strip().splitlines()
    return lines[0][:160] if lines else type(error).__name__


def leaves(case: Case, batch: Batch) -> tuple[Tensor, Tensor]:
    """Hidden states and weight as a model hands them over: leaves that want a gradient, the weight unless frozen."""
    hidden = batch.hidden.detach().requires_grad_(not case.loss.forward_only)
    return hidden, batch.weight.detach().requires_grad_(not case.frozen_head and not case.loss.forward_only)


def backward(loss: Tensor, hidden: Tensor, weight: Tensor) -> Result:
    """Gradients of ``loss`` by the leaves that want one."""
    wanted = [x for x in (hidden, weight) if x.requires_grad]
    grads = torch.autograd.grad(loss, wanted)
    return Result(loss.detach(), grads[0], grads[1] if len(grads) > 1 else None)


def widened(logits: Tensor) -> Tensor:
    """float32 for half precision, as is else."""
    return logits.float() if logits.dtype in (torch.bfloat16, torch.float16) else logits


def compose(case: Case, batch: Batch, logprobs_of: Callable[[Tensor, Tensor], tuple[Tensor, Tensor | None]]) -> Step:
    """A step from a function ``(hidden, weight) -> (logprobs [T], entropy [T] or None)`` and the case's formula."""

    def run() -> Result:
        hidden, weight = leaves(case, batch)
        with torch.set_grad_enabled(not case.loss.forward_only):
            logprobs, entropy = logprobs_of(hidden, weight)
            if case.loss.forward_only:
                return Result(logprobs=logprobs, entropy=entropy)
            return backward(case.loss(logprobs, entropy, batch.tokens), hidden, weight)

    return run
