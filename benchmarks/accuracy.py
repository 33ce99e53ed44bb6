"""Correctness: the float64 reference, the gate that comes before the clock, and the table of errors by dtype.

Errors of gradients are ``max |got - want| / max |want|``; of log-probs and entropies ``max |got - want|``, in nats.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from benchmarks.cases import Batch, Case, Shape, make_batch, vary
from benchmarks.losses import Tokens
from benchmarks.providers import PROVIDERS
from benchmarks.providers.base import Provider, Result, first_line

GATE_SHAPE = {"cpu": Shape(192, 64, 1031), "cuda": Shape(512, 256, 2048)}  # peers' CUDA kernels want round sizes
TABLE_SHAPE = Shape(512, 128, 4096)
# A wrong term is off by a tenth and more. bf16 logits, which some peers hold, are off by 0.04 nats: that must pass.
GRADIENT_LIMIT = {"float64": 1e-9, "float32": 1e-4, "bfloat16": 5e-2, "float16": 5e-2}
NATS_LIMIT = {"float64": 1e-9, "float32": 1e-4, "bfloat16": 1e-1, "float16": 1e-1}


@dataclass(frozen=True)
class Reference:
    """The case in float64 by plain autograd on all logits."""

    loss: Tensor | None
    d_hidden: Tensor | None
    d_weight: Tensor | None
    logprobs: Tensor
    entropy: Tensor
    live: Tensor


@dataclass(frozen=True)
class Errors:
    """Largest errors of one run; ``None`` where the provider does not return the thing."""

    d_hidden: float | None = None
    d_weight: float | None = None
    logprob: float | None = None
    entropy: float | None = None
    loss: float | None = None

    @property
    def gradient(self) -> float | None:
        found = [e for e in (self.d_hidden, self.d_weight) if e is not None]
        return max(found) if found else None


@dataclass(frozen=True)
class Verdict:
    """``state`` is ``ok``, ``absent`` or ``red``; ``reason`` says why not ``ok``."""

    state: str
    errors: Errors = Errors()
    reason: str = ""


def reference(case: Case, batch: Batch) -> Reference:
    """Float64 result from the same (rounded) inputs, on the batch's device."""
    hidden = batch.hidden.double().requires_grad_()
    weight = batch.weight.double().requires_grad_()
    tokens = batch.tokens.to(torch.float64)
    logp = (hidden @ weight.t()).log_softmax(1)
    lp = logp.gather(1, tokens.labels.clamp(min=0).unsqueeze(1)).squeeze(1)
    entropy = -(logp.exp() * logp).sum(1)
    live = tokens.labels >= 0
    if case.loss.forward_only:
        return Reference(None, None, None, lp.detach(), entropy.detach(), live)
    loss = case.loss(lp, entropy if case.loss.entropy else None, tokens)
    d_hidden, d_weight = torch.autograd.grad(loss, (hidden, weight))
    d_head = None if case.frozen_head else d_weight
    return Reference(loss.detach(), d_hidden, d_head, lp.detach(), entropy.detach(), live)


def compare(result: Result, want: Reference) -> Errors:
    """Errors of a result; a gradient that is missing, superfluous or not finite is an infinite one."""
    return Errors(
        d_hidden=_relative(result.d_hidden, want.d_hidden),
        d_weight=_relative(result.d_weight, want.d_weight),
        logprob=_nats(result.logprobs, want.logprobs, want.live),
        entropy=_nats(result.entropy, want.entropy, want.live),
        loss=_relative(result.loss, want.loss),
    )


def gate(provider: Provider, case: Case, batch: Batch, want: Reference) -> Verdict:
    """Whether a provider computes the (small) case rightly. It may fail in any way: that is red, not a crash."""
    if reason := provider.absent(case):
        return Verdict("absent", reason=reason)
    try:
        errors = compare(provider.prepare(case, batch).run(), want)
    except ImportError as error:
        return Verdict("absent", reason=first_line(error))
    except Exception as error:
        return Verdict("red", reason=f"{type(error).__name__}: {first_line(error)}")
    return judge(errors, case)


def judge(errors: Errors, case: Case) -> Verdict:
    """``red`` where an error is beyond what the dtype explains."""
    limits = {
        "d_hidden": GRADIENT_LIMIT[case.dtype],
        "d_weight": GRADIENT_LIMIT[case.dtype],
        "logprob": NATS_LIMIT[case.dtype],
        "entropy": NATS_LIMIT[case.dtype],
        "loss": 10 * GRADIENT_LIMIT[case.dtype],  # terms of both signs cancel
    }
    for name, limit in limits.items():
        found = getattr(errors, name)
        if found is not None and not found <= limit:
            return Verdict("red", errors, f"{name} is off by {found:.2g}, allowed {limit:.0e}")
    return Verdict("ok", errors)


def slice_errors(case: Case, batch: Batch, result: Result, num_rows: int = 64) -> Errors:
    """Errors of some rows of dH (or of log-probs), the last token among them, at the full size.

    A row of dH needs that token alone: ``dh_t = g (W[y] - p W) - e (p (log p + entropy)) W``, by autograd in float64.
    Coupled losses have no such rows; for them nothing is checked here.
    """
    if case.loss.coupled:
        return Errors()
    live = (batch.tokens.labels >= 0).nonzero().squeeze(1)
    index = live[torch.linspace(0, live.numel() - 1, min(num_rows, live.numel()), device=live.device).round().long()]
    hidden = batch.hidden[index].double()
    tokens = batch.tokens.pick(index).to(torch.float64)
    lp, entropy, d_logits = _row_gradients(case, hidden, batch.weight, tokens)
    if case.loss.forward_only:
        assert result.logprobs is not None
        got = None if result.entropy is None else result.entropy[index]
        everything = torch.ones_like(index, dtype=torch.bool)
        return Errors(logprob=_nats(result.logprobs[index], lp, everything), entropy=_nats(got, entropy, everything))
    assert result.d_hidden is not None and d_logits is not None
    want = _blockwise(lambda rows: d_logits[:, rows] @ batch.weight[rows].double(), batch.weight.shape[0])
    return Errors(d_hidden=_relative(result.d_hidden[index], want))


def _row_gradients(case: Case, hidden: Tensor, weight: Tensor, tokens: Tokens) -> tuple[Tensor, Tensor, Tensor | None]:
    """Log-probs, entropies and the gradient by the logits ``[M, V]`` of a few rows."""
    step = 1 << 14
    parts = [hidden @ weight[a : a + step].double().t() for a in range(0, weight.shape[0], step)]
    logits = torch.cat(parts, 1).requires_grad_()
    logp = logits.log_softmax(1)
    lp = logp.gather(1, tokens.labels.unsqueeze(1)).squeeze(1)
    entropy = -(logp.exp() * logp).sum(1)
    if case.loss.forward_only:
        return lp.detach(), entropy.detach(), None
    loss = case.loss(lp, entropy if case.loss.entropy else None, tokens)
    return lp.detach(), entropy.detach(), torch.autograd.grad(loss, logits)[0]


def _blockwise(product: Callable[[slice], Tensor], vocab: int, step: int = 1 << 14) -> Tensor:
    """Sum of ``product(rows)`` over blocks of the vocabulary: the weight is never wide as a whole."""
    total = product(slice(0, min(step, vocab)))
    for start in range(step, vocab, step):
        total = total + product(slice(start, start + step))
    return total


def _relative(got: Tensor | None, want: Tensor | None) -> float | None:
    if got is None and want is None:
        return None
    if got is None or want is None or got.shape != want.shape or not bool(torch.isfinite(got).all()):
        return float("inf")
    size = float(want.abs().max())
    gap = float((got.double() - want).abs().max())
    return gap / size if size else gap


def _nats(got: Tensor | None, want: Tensor, live: Tensor) -> float | None:
    if got is None:
        return None
    if got.numel() != want.numel() or not bool(torch.isfinite(got).all()):
        return float("inf")
    return float((got.reshape(-1).double() - want)[live].abs().max())


# ---------------------------------------------------------------- the table of errors

TABLE_PROVIDERS: tuple[str, ...] = (
    *("eager", "torch-lce", "liger-grpo", "liger-scaled-ce", "xtuner-loop"),
    *("xloss-eager", "xloss-one-pass", "xloss-two-pass", "xloss-fused-one-pass", "xloss-fused-two-pass"),
)
TABLE_DTYPES = ("float64", "float32", "bfloat16", "float16")
_FORWARD_OF = {"eager": "eager", "liger-scaled-ce": "liger-scaled-ce", "xloss-eager": "xloss-eager"}


def error_table(device: str, shape: Shape, tick: Callable[[str], None]) -> list[tuple[str, str, Verdict]]:
    """``(provider, dtype, verdict)`` of GRPO in several chunks; log-probs from the same kind of forward-only pass."""
    found = []
    for dtype in TABLE_DTYPES:
        case = Case("grpo", shape, dtype, device, chunk_size=shape.num_tokens // 3 + 1)
        forward = Case("logprob", shape, dtype, device, chunk_size=case.chunk_size)
        batch = vary(make_batch(case, hard=True), case)
        want = reference(case, batch)
        for name in TABLE_PROVIDERS:
            tick(f"{name} {dtype}")
            verdict = gate(PROVIDERS[name], case, batch, want)
            if verdict.state != "absent":
                verdict = _with_nats(verdict, name, forward, batch, want)
            found.append((name, dtype, verdict))
    return found


def _with_nats(verdict: Verdict, name: str, case: Case, batch: Batch, want: Reference) -> Verdict:
    other = _FORWARD_OF.get(name)
    if other is None and name.startswith("xloss"):
        other = "xloss-fused-forward" if "fused" in name else "xloss-forward"
    if other is None or PROVIDERS[other].absent(case):
        return verdict
    result = PROVIDERS[other].prepare(case, batch).run()
    e = verdict.errors
    errors = Errors(e.d_hidden, e.d_weight, _nats(result.logprobs, want.logprobs, want.live), e.entropy, e.loss)
    return Verdict(verdict.state, errors, verdict.reason)
