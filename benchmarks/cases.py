"""Cases and their data: what is computed, at which size, on tensors that look like a policy step.

Logits have the spread of a trained head (labels from unlikely to nearly certain), so that softmax gradients are as
sparse as in life. Log-ratios stay away from the clip bounds by 0.05: rounding must not flip a token's gradient between
providers.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from benchmarks.losses import LOSSES, Loss, Tokens

NUM_SEQUENCES = 8
_BLOCK_BYTES = 256 << 20
_LOGIT_STD = 2.0
# Log-ratios of sequences, and of the few tokens far off. Logs of the clip bounds: -0.22 and 0.18, or 0.25.
_HARD_SHIFT = (-0.4, 0.4, -0.1, 0.4, -0.4, 0.0, 0.1, -0.4)
_MILD_SHIFT = (-0.1, 0.1, -0.05, 0.0, 0.05, 0.1, -0.1, 0.0)
_TOKEN_SHIFT = 0.03
_FAR_SHIFT, _FAR_FRACTION = 0.4, 0.04
DTYPES = {name: getattr(torch, name) for name in ("float64", "float32", "bfloat16", "float16")}


@dataclass(frozen=True, order=True)
class Shape:
    """``num_tokens`` T, ``hidden_size`` H, ``vocab_size`` V; T is a multiple of ``NUM_SEQUENCES``."""

    num_tokens: int
    hidden_size: int
    vocab_size: int

    def __post_init__(self) -> None:
        if min(self.num_tokens, self.hidden_size, self.vocab_size) < 1 or self.num_tokens % NUM_SEQUENCES:
            raise ValueError(
                f"a shape is TxHxV of positive numbers, T a multiple of {NUM_SEQUENCES} sequences; got {self}"
            )

    @classmethod
    def parse(cls, text: str) -> Shape:
        """``"2048x512x32000"``. Raises ``ValueError`` for anything else."""
        parts = text.lower().split("x")
        if len(parts) != 3 or not all(p.isdigit() for p in parts):
            raise ValueError(f"a shape is TxHxV, as in 2048x512x32000; got {text!r}")
        return cls(*map(int, parts))

    def __str__(self) -> str:
        return f"{self.num_tokens}x{self.hidden_size}x{self.vocab_size}"


@dataclass(frozen=True)
class Case:
    """One thing to compute. ``ignored`` and ``zero_advantage`` are fractions; the last two fields are for xloss."""

    loss_name: str
    shape: Shape
    dtype: str
    device: str
    ignored: float = 0.0
    zero_advantage: float = 0.0
    frozen_head: bool = False
    chunk_size: int | None = None
    logits_budget: int | None = None

    @property
    def loss(self) -> Loss:
        return LOSSES[self.loss_name]

    @property
    def variant(self) -> str:
        """What sets this case apart from the plain one; empty for that."""
        words = []
        if self.ignored:
            words.append(f"{self.ignored:.0%} ignored")
        if self.zero_advantage:
            words.append(f"{self.zero_advantage:.0%} advantage 0")
        if self.frozen_head:
            words.append("frozen head")
        if self.logits_budget is not None:
            words.append(f"budget {self.logits_budget >> 20} MiB")
        return ", ".join(words)

    @property
    def plain(self) -> Case:
        """The case without its variant."""
        return replace(self, ignored=0.0, zero_advantage=0.0, frozen_head=False, logits_budget=None)

    @property
    def useful_flops(self) -> float:
        """``2TVH`` forward, ``6TVH`` with backward, whatever a provider spends."""
        s = self.shape
        return (2 if self.loss.forward_only else 6) * float(s.num_tokens) * s.hidden_size * s.vocab_size


@dataclass(frozen=True)
class Batch:
    """Tensors of a case: ``hidden [T, H]``, ``weight [V, H]``, and what the loss reads. ``sequence_advantages [B]``."""

    hidden: Tensor
    weight: Tensor
    tokens: Tokens
    sequence_advantages: Tensor

    @property
    def sequence_length(self) -> int:
        return self.hidden.shape[0] // NUM_SEQUENCES

    @property
    def cu_seq_lens(self) -> Tensor:
        """Bounds of the packed sequences, ``[B + 1]`` int32."""
        total = self.hidden.shape[0]
        return torch.arange(0, total + 1, self.sequence_length, dtype=torch.int32, device=self.hidden.device)

    def by_sequence(self, x: Tensor) -> Tensor:
        """``[T, ...]`` as ``[B, S, ...]``."""
        return x.view(NUM_SEQUENCES, self.sequence_length, *x.shape[1:])


def plain_logprobs(hidden: Tensor, weight: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Log-probs of ``labels [T]`` and entropies in float64 (for float64 inputs) or float32, block by block."""
    dtype = torch.float64 if hidden.dtype == torch.float64 else torch.float32
    step = max(1, _BLOCK_BYTES // (weight.shape[0] * dtype.itemsize))
    wide, found = weight.to(dtype), []
    for start in range(0, hidden.shape[0], step):
        logp = (hidden[start : start + step].to(dtype) @ wide.t()).log_softmax(1)
        picked = logp.gather(1, labels[start : start + step].clamp(min=0).unsqueeze(1)).squeeze(1)
        found.append((picked, -torch.linalg.vecdot(logp.exp(), logp)))
    return torch.cat([f[0] for f in found]), torch.cat([f[1] for f in found])


def make_batch(case: Case, seed: int = 0, *, hard: bool = False, light: bool = False) -> Batch:
    """Data of the plain case.

    ``hard``: most sequences are far off, so that every branch of a clip counts; else 4 % of the tokens, as in a healthy
    run. ``light``: the old log-probs are a guess, where only memory matters.
    """
    shape, device, dtype = case.shape, torch.device(case.device), DTYPES[case.dtype]
    made = torch.Generator(device).manual_seed(seed)
    total, hidden_size = shape.num_tokens, shape.hidden_size

    def normal(*size: int) -> Tensor:
        return torch.randn(size, generator=made, device=device)

    def uniform(*size: int) -> Tensor:
        return torch.rand(size, generator=made, device=device)

    weight = normal(shape.vocab_size, hidden_size).mul_(hidden_size**-0.5).to(dtype)
    labels = torch.randint(0, shape.vocab_size, (total,), generator=made, device=device)
    pull = 16 * uniform(total, 1)  # how much more than the others the label is expected
    hidden = normal(total, hidden_size).mul_(_LOGIT_STD).addcmul_(pull, weight[labels].float()).to(dtype)
    advantages = normal(NUM_SEQUENCES)
    advantages = advantages.sign() * (advantages.abs() + 0.1)
    length = total // NUM_SEQUENCES
    shift = torch.tensor(_HARD_SHIFT if hard else _MILD_SHIFT, device=device).repeat_interleave(length)
    if not hard:
        shift = torch.where(uniform(total) < _FAR_FRACTION, _FAR_SHIFT * normal(total).sign(), shift)
    log_ratio = shift + _TOKEN_SHIFT * (2 * uniform(total) - 1)
    logprobs = torch.full((total,), -8.0, device=device) if light else plain_logprobs(hidden, weight, labels)[0]
    tokens = Tokens(
        labels=labels,
        advantages=advantages.repeat_interleave(length),
        old=(logprobs - log_ratio).float(),
        ref=(logprobs + 0.2 * normal(total)).float(),
        weight=torch.full((total,), 1.0 / total, device=device),
        num_sequences=NUM_SEQUENCES,
    )
    return Batch(hidden, weight, tokens, advantages)


def vary(base: Batch, case: Case) -> Batch:
    """``base`` as ``case`` wants it: prompts ignored at the front of each sequence, advantage 0 for whole sequences."""
    tokens, advantages = base.tokens, base.sequence_advantages
    if case.zero_advantage:
        advantages = advantages.clone()
        advantages[: round(case.zero_advantage * NUM_SEQUENCES)] = 0
        tokens = replace(tokens, advantages=advantages.repeat_interleave(base.sequence_length))
    if case.ignored:
        at = torch.arange(base.hidden.shape[0], device=base.hidden.device) % base.sequence_length
        live = at >= round(case.ignored * base.sequence_length)
        weight = live.float() / live.sum()
        tokens = replace(tokens, labels=tokens.labels.masked_fill(~live, -100), weight=weight)
    return replace(base, tokens=tokens, sequence_advantages=advantages)
