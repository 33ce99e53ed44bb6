"""A small transformer whose sequences are split over ranks, with the loss inside its forward."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from xloss import CELossContext, head_weight

NUM_HEADS = 4
NUM_BLOCKS = 2


class GatherSequence(torch.autograd.Function):
    """``[B, part, ..]`` of this rank to ``[B, S, ..]`` of all ranks of a group.

    Each rank's loss reads the whole, so the gradient of a part is the sum of what all ranks send back for it.
    """

    @staticmethod
    def forward(ctx: Any, part: Tensor, group: dist.ProcessGroup) -> Tensor:
        ctx.group = group
        parts = [torch.empty_like(part) for _ in range(group.size())]
        dist.all_gather(parts, part.contiguous(), group=group)
        return torch.cat(parts, 1)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        whole = grads[0].contiguous()
        dist.all_reduce(whole, group=ctx.group)
        return whole.chunk(ctx.group.size(), 1)[ctx.group.rank()], None


class Block(nn.Module):
    """Causal attention over keys of all ranks, and two layers on each token alone."""

    def __init__(self, hidden_size: int) -> None:
        super().__init__()
        self.attention_norm = nn.LayerNorm(hidden_size)
        self.query = nn.Linear(hidden_size, hidden_size, bias=False)
        self.key_value = nn.Linear(hidden_size, 2 * hidden_size, bias=False)
        self.out = nn.Linear(hidden_size, hidden_size, bias=False)
        self.mlp_norm = nn.LayerNorm(hidden_size)
        self.up = nn.Linear(hidden_size, 4 * hidden_size)
        self.down = nn.Linear(4 * hidden_size, hidden_size)

    def forward(self, hidden: Tensor, positions: Tensor, sp_group: dist.ProcessGroup | None) -> Tensor:
        x = self.attention_norm(hidden)
        key_value = self.key_value(x)
        if sp_group is not None:
            key_value = GatherSequence.apply(key_value, sp_group)
        query, key, value = (
            t.unflatten(2, (NUM_HEADS, -1)).transpose(1, 2) for t in (self.query(x), *key_value.chunk(2, -1))
        )
        seen = positions[:, None] >= torch.arange(key.shape[2], device=key.device)
        mixed = F.scaled_dot_product_attention(query, key, value, attn_mask=seen)
        hidden = hidden + self.out(mixed.transpose(1, 2).flatten(2))
        out: Tensor = hidden + self.down(F.gelu(self.up(self.mlp_norm(hidden))))
        return out


class SplitLM(nn.Module):
    """Two blocks and a head. FSDP gathers its weights around ``forward``, so the loss is computed there."""

    def __init__(self, vocab_size: int, hidden_size: int, length: int) -> None:
        super().__init__()
        self.embedding = nn.Embedding(vocab_size, hidden_size)
        self.position = nn.Embedding(length, hidden_size)
        self.blocks = nn.ModuleList(Block(hidden_size) for _ in range(NUM_BLOCKS))
        self.norm = nn.LayerNorm(hidden_size)
        self.lm_head = nn.Linear(hidden_size, vocab_size, bias=False)
        nn.init.normal_(self.lm_head.weight, std=0.02)  # the first loss is log V: all words equally likely

    def forward(
        self, ids: Tensor, positions: Tensor, loss_ctx: CELossContext, sp_group: dist.ProcessGroup | None
    ) -> Tensor:
        """This rank's share of the loss, 0-d.

        Args:
            ids: ``[B, part]``, this rank's part of each sequence.
            positions: ``[part]``, where it stands in them.
            loss_ctx: with the labels of this part, calibrated over all ranks.
            sp_group: ranks that hold the other parts; ``None`` where sequences are whole.
        """
        hidden = self.embedding(ids) + self.position(positions)
        for block in self.blocks:
            hidden = block(hidden, positions, sp_group)
        with head_weight(self.lm_head) as head:
            loss, _ = loss_ctx.forward(self.norm(hidden), *head)
        return loss
