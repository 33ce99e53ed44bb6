"""A small language model, its training with xloss, and the text it samples."""

from __future__ import annotations

import copy
import math
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from xloss import CELossConfig, CELossContext, CELossContextInputItem

CONTEXT = 8  # words the model looks back on


class TinyLM(nn.Module):
    """The last 8 words' embeddings through two layers (Bengio et al., JMLR 2003), and an lm_head.

    The head shares nothing with the embedding, and is where the work is, as in any model with a large vocabulary.
    """

    def __init__(self, vocab_size: int, hidden_size: int) -> None:
        super().__init__()
        self.embedding = nn.Embedding(vocab_size, hidden_size)
        self.up = nn.Linear(CONTEXT * hidden_size, 4 * hidden_size)
        self.down = nn.Linear(4 * hidden_size, hidden_size)
        self.norm = nn.LayerNorm(hidden_size)
        self.lm_head = nn.Linear(hidden_size, vocab_size, bias=False)
        nn.init.normal_(self.lm_head.weight, std=0.02)  # the first loss is log V: all words equally likely

    def forward(self, ids: Tensor) -> Tensor:
        """Hidden states ``[B, S, H]`` of ``ids [B, S]``, each of its word and those before; the loss does the head."""
        words = self.embedding(ids)
        context = F.pad(words, (0, 0, CONTEXT - 1, 0)).unfold(1, CONTEXT, 1)  # [B, S, H, CONTEXT]
        hidden: Tensor = self.norm(words + self.down(F.gelu(self.up(context.flatten(2)))))
        return hidden


@dataclass(frozen=True)
class Training:
    """One training run. Losses are in nats per token."""

    num_steps: int
    tokens_per_step: int
    curve: tuple[float, ...]
    held_out_before: float
    held_out_after: float
    uniform: float  # log V, the loss of a model that knows nothing
    seconds: float


@dataclass(frozen=True)
class TrainSettings:
    """How to train. The two snapshots are taken on the way, for the policy steps that follow."""

    num_steps: int
    num_sequences: int = 8
    sequence_length: int = 64
    learning_rate: float = 1e-2
    weight_decay: float = 1.0  # strong, or the rows of words never seen drift far away and cost float32 its digits
    old_steps_back: int = 2
    seed: int = 0


@dataclass(frozen=True)
class Policies:
    """The model now, as it was a few steps ago (it samples), and as it was earlier (the KL reference)."""

    current: TinyLM
    old: TinyLM
    reference: TinyLM


def ce_loss(model: TinyLM, ids: Tensor) -> Tensor:
    """Mean cross-entropy of ``ids [B, S + 1]``, each word predicted from those before it. 0-d, nats."""
    loss_cfg = CELossConfig()
    item = CELossContextInputItem(shifted_labels=ids[:, 1:].contiguous())
    (loss_kwargs,) = CELossContext.build_batches_loss_kwargs([item], loss_cfg)
    loss, _ = CELossContext(loss_cfg, loss_kwargs).forward(model(ids[:, :-1]), model.lm_head.weight)
    return loss


def windows(ids: Tensor, count: int, length: int, generator: torch.Generator) -> Tensor:
    """``count`` random stretches of the text, ``[count, length]``."""
    starts = torch.randint(len(ids) - length, (count, 1), generator=generator)
    return ids[starts + torch.arange(length)]


def train(
    model: TinyLM,
    text: Tensor,
    held_out: Tensor,
    settings: TrainSettings,
    tick: Callable[[str], None] = lambda note: None,
) -> tuple[Training, Policies]:
    """Train ``model`` in place on random windows of ``text``. ``tick(note)`` is called after each step."""
    device = model.lm_head.weight.device
    generator = torch.Generator().manual_seed(settings.seed)
    length = min(settings.sequence_length, len(held_out) - 2)
    probe = windows(held_out, settings.num_sequences, length + 1, generator).to(device)
    optimizer = torch.optim.AdamW(
        model.parameters(),
        lr=settings.learning_rate,
        betas=(0.9, 0.95),
        weight_decay=settings.weight_decay,
        fused=True,
    )
    snapshots: dict[str, TinyLM] = {}
    at = {settings.num_steps * 3 // 4: "reference", max(0, settings.num_steps - settings.old_steps_back): "old"}
    curve: list[float] = []
    before = _evaluate(model, probe)
    start = time.perf_counter()
    for step in range(settings.num_steps):
        optimizer.zero_grad(set_to_none=True)
        if step in at:
            snapshots[at[step]] = copy.deepcopy(model)
        batch = windows(text, settings.num_sequences, length + 1, generator).to(device)
        loss = ce_loss(model, batch)
        loss.backward()
        optimizer.step()
        curve.append(loss.item())
        tick(f"loss {curve[-1]:.2f}")
    seconds = time.perf_counter() - start
    training = Training(
        num_steps=settings.num_steps,
        tokens_per_step=settings.num_sequences * length,
        curve=tuple(curve),
        held_out_before=before,
        held_out_after=_evaluate(model, probe),
        uniform=math.log(model.lm_head.out_features),
        seconds=seconds,
    )
    old = snapshots["old"]
    return training, Policies(current=model, old=old, reference=snapshots.get("reference", old))


@torch.no_grad()
def _evaluate(model: TinyLM, ids: Tensor) -> float:
    return ce_loss(model, ids).item()


@torch.no_grad()
def sample(
    model: TinyLM,
    prompts: Tensor,
    length: int,
    generator: torch.Generator,
    tick: Callable[[], None] = lambda: None,
) -> Tensor:
    """``length`` words drawn from the model after each of ``prompts [B, P]``, at temperature 1. ``[B, length]``."""
    text = prompts
    for _ in range(length):
        hidden = model(text[:, -CONTEXT:])[:, -1]
        heap = (hidden @ model.lm_head.weight.T).softmax(-1).cumsum(-1)
        draw = torch.rand(len(prompts), 1, generator=generator).to(heap) * heap[:, -1:]
        word = torch.searchsorted(heap, draw).clamp_max(heap.shape[1] - 1)
        text = torch.cat([text, word], 1)
        tick()
    return text[:, prompts.shape[1] :]
