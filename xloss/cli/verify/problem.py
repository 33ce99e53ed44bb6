"""The small model and the global batch that every layout of ``xloss verify`` runs on; the same in every process."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn

from xloss import LossInfo, head_weight, linear_logprobs

IGNORED = -100
EPS = 1e-6  # of the norms: torch's default differs between dtypes, and so would their results
LORA_RANK, LORA_SCALE = 4, 0.5
TARGETS = 3  # labels a token of soft cross-entropy and top-k distillation


@dataclass(frozen=True)
class Shape:
    """What the user may choose of model and batch."""

    hidden_size: int
    vocab_size: int
    tokens: int
    dtype: torch.dtype = torch.float32
    bias: bool = False
    softcap: float | None = None
    num_sequences: int = 16
    seed: int = 0


@dataclass(frozen=True)
class Kind:
    """What a layout wants of the model beside its shape."""

    bias: bool = False
    tied: bool = False
    lora: bool = False


PLAIN = Kind()


class ComputedIn(nn.Module):
    """A model whose weights are cast to ``dtype`` for the computation: what mixed precision is in one process."""

    def __init__(self, model: nn.Module, dtype: torch.dtype) -> None:
        super().__init__()
        self.module = model
        self.dtype = dtype

    def forward(self, *args: Any) -> Any:
        """The model's own, with other weights."""
        weights = {name: parameter.to(self.dtype) for name, parameter in self.module.named_parameters()}
        return torch.func.functional_call(self.module, weights, args)


class Block(nn.Module):
    """A residual layer of each token alone: attention is not the loss's business, and would need a split of its own."""

    def __init__(self, hidden_size: int) -> None:
        super().__init__()
        self.norm = nn.RMSNorm(hidden_size, eps=EPS)
        self.up = nn.Linear(hidden_size, 2 * hidden_size, bias=False)
        self.down = nn.Linear(2 * hidden_size, hidden_size, bias=False)

    def forward(self, hidden: Tensor) -> Tensor:
        out: Tensor = hidden + self.down(nn.functional.silu(self.up(self.norm(hidden))))
        return out


class SmallLM(nn.Module):
    """Embedding, two blocks, norm, lm_head; the loss runs inside ``forward``, where engines gather the weights."""

    def __init__(self, shape: Shape, kind: Kind = PLAIN) -> None:
        super().__init__()
        hidden, vocab = shape.hidden_size, shape.vocab_size
        self.embedding = nn.Embedding(vocab, hidden)
        self.blocks = nn.ModuleList([Block(hidden), Block(hidden)])
        self.norm = nn.RMSNorm(hidden, eps=EPS)
        self.lm_head = nn.Linear(hidden, vocab, bias=shape.bias or kind.bias)
        if kind.tied:
            self.lm_head.weight = self.embedding.weight
        self.lora_a = nn.Parameter(torch.empty(LORA_RANK, hidden)) if kind.lora else None
        self.lora_b = nn.Parameter(torch.empty(vocab, LORA_RANK)) if kind.lora else None
        self.lm_head.requires_grad_(not kind.lora)

    def hidden_states(self, ids: Tensor) -> Tensor:
        """``[.., H]`` of ``ids [..]``."""
        hidden = self.embedding(ids)
        for block in self.blocks:
            hidden = block(hidden)
        out: Tensor = self.norm(hidden)
        return out

    def forward(self, ids: Tensor, loss_ctx: Any) -> tuple[Tensor, LossInfo]:
        """Loss of one micro-batch."""
        hidden = self.hidden_states(ids)
        with head_weight(self.lm_head) as head:
            loss: tuple[Tensor, LossInfo] = loss_ctx(hidden, self.adapted(head.weight), head.bias)
        return loss

    def adapted(self, weight: Any) -> Any:
        """The head's weight and its adapter, as one dense matrix."""
        if self.lora_a is None or self.lora_b is None:
            return weight
        return weight + LORA_SCALE * self.lora_b @ self.lora_a


@torch.no_grad()
def build_model(
    shape: Shape,
    device: torch.device | str,
    dtype: torch.dtype | None = None,
    kind: Kind = PLAIN,
    cls: type[SmallLM] = SmallLM,
) -> SmallLM:
    """The same weights in every process: drawn in float32 on the CPU, logits of about unit scale."""
    generator = torch.Generator().manual_seed(shape.seed)
    with torch.device("meta"):
        model = cls(shape, kind)
    model = model.to_empty(device="cpu")
    for name, parameter in model.named_parameters():
        scale = 1.0 if name == "embedding.weight" and not kind.tied else shape.hidden_size**-0.5
        parameter.normal_(std=scale, generator=generator)
        if name.endswith("norm.weight"):
            parameter.mul_(0.3).add_(1.0)
    return model.to(device, shape.dtype).to(dtype or shape.dtype)


def weights_move(model: nn.Module) -> None:
    """The optimizer's step between two steps: every weight 5 % smaller, to the same bits however it is sharded."""
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(0.95)


@dataclass(frozen=True)
class GlobalBatch:
    """Sequences of uneven lengths, and everything that any loss may want of them.

    Sequences ``2 i`` and ``2 i + 1`` answer one prompt, chosen and rejected. One answer has no label, and nor has any
    of the last prompt. Per-token tensors are ``[T]`` (``[T, K]``), sequences in order, float64; ``of_batch``
    is the same for every micro-batch.
    """

    lengths: tuple[int, ...]
    ids: Tensor
    by_token: dict[str, Tensor]
    by_sequence: dict[str, Tensor]
    of_batch: dict[str, Tensor]

    @property
    def num_pairs(self) -> int:
        """Prompts."""
        return len(self.lengths) // 2

    @cached_property
    def starts(self) -> list[int]:
        """Where each sequence begins."""
        return [sum(self.lengths[:i]) for i in range(len(self.lengths))]

    def places(self, sequence: int) -> Tensor:
        """Positions of a sequence's tokens in the batch."""
        return torch.arange(self.starts[sequence], self.starts[sequence] + self.lengths[sequence])

    def laid_out(self, values: Tensor, sequences: Sequence[int], packed: bool, pad: float) -> Tensor:
        """``[1, n]`` packed or ``[B, S]`` padded, of some sequences of a per-token tensor."""
        rows = [values[self.places(i)] for i in sequences]
        if packed:
            return torch.cat(rows).unsqueeze(0)
        return nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=pad)

    def taken_back(self, values: Tensor, sequences: Sequence[int], packed: bool, into: Tensor) -> None:
        """The inverse of ``laid_out``: writes a micro-batch's values to their places in ``into [T]``."""
        at = 0
        for row, sequence in enumerate(sequences):
            length = self.lengths[sequence]
            into[self.places(sequence)] = (values[0, at : at + length] if packed else values[row, :length]).to(into)
            at += length

    def cu_seq_lens(self, sequences: Sequence[int]) -> Tensor:
        """Bounds of a pack of these sequences."""
        return torch.tensor([0, *(self.lengths[i] for i in sequences)]).cumsum(0)


def build_batch(shape: Shape) -> GlobalBatch:
    """The global batch of one optimizer step."""
    g = torch.Generator().manual_seed(shape.seed + 1)
    lengths = _lengths(shape.tokens, shape.num_sequences)
    count, number = sum(lengths), len(lengths)
    sequence = torch.repeat_interleave(torch.arange(number), torch.tensor(lengths))

    def noise(scale: float, *size: int) -> Tensor:
        return scale * torch.randn(*(size or (count,)), generator=g, dtype=torch.float64)

    ids = torch.randint(0, shape.vocab_size, (count,), generator=g)
    labels = torch.randint(0, shape.vocab_size, (count,), generator=g)
    ignored = torch.rand(count, generator=g) < 0.2
    for i in (5, number - 2, number - 1):
        ignored |= sequence == i
    now = _logprobs(shape, ids, labels)
    of_answer = noise(1.0, number)
    by_token = {
        "shifted_labels": labels.masked_fill(ignored, IGNORED),
        "advantages": of_answer[sequence] + noise(0.2),
        "old_logprobs": now + noise(0.2),
        "ref_logprobs": now + noise(0.3),
        "rollout_logprobs": now + noise(0.2),
        "is_weights": torch.rand(count, generator=g, dtype=torch.float64) + 0.5,
        "token_weight": torch.rand(count, generator=g, dtype=torch.float64) + 0.1,
        "group_ids": sequence // 2,
        "rewards": of_answer[sequence].sign(),
        "target_tokens": torch.randint(0, shape.vocab_size, (count, TARGETS), generator=g),
        "target_weights": torch.rand(count, TARGETS, generator=g, dtype=torch.float64),
        "teacher_topk_ids": torch.arange(TARGETS)
        + torch.randint(0, shape.vocab_size - TARGETS, (count, 1), generator=g),
        "teacher_topk_logprobs": torch.log_softmax(noise(1.0, count, TARGETS + 1), -1)[:, :TARGETS],
    }
    numbers = torch.arange(number)
    by_sequence = {"pair_ids": numbers // 2, "preferred": numbers % 2 == 0}
    of_batch = {"kl": torch.full((1,), 0.05).double(), "reward_shift": torch.tensor(0.1).double()}
    return GlobalBatch(tuple(lengths), ids, by_token, by_sequence, of_batch)


@torch.no_grad()
def _logprobs(shape: Shape, ids: Tensor, labels: Tensor) -> Tensor:
    """Log-probs of the model before its first step, on which the batch's old and reference ones are made up."""
    model = build_model(shape, "cpu", torch.float32)
    return linear_logprobs(
        model.hidden_states(ids), model.lm_head.weight, labels, model.lm_head.bias, softcap=shape.softcap
    ).logprobs.double()


def _lengths(tokens: int, number: int) -> list[int]:
    """``number`` uneven lengths of about ``tokens`` in all, some of them 1 or 2."""
    shares = [1 + (i * 7) % 11 if i % 5 else 1 for i in range(number)]
    return [max(1, tokens * share // sum(shares)) for share in shares]
