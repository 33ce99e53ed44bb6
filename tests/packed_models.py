"""Tiny models that take packed sequences: one whose hidden states are given, one with causal attention."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from xloss.tinker import LanguageModel


class _Lookup(nn.Module):
    def __init__(self, hidden: Tensor) -> None:
        super().__init__()
        self.hidden = nn.Parameter(hidden.clone())

    def forward(self, tokens: Tensor, position_ids: Tensor, cu_seq_lens: Tensor) -> Tensor:
        return self.hidden[tokens]


class _Attention(nn.Module):
    """Embeddings of tokens and positions, one head of causal attention inside each sequence, a residual."""

    def __init__(self, vocab: int, width: int) -> None:
        super().__init__()
        self.tokens, self.positions = nn.Embedding(vocab, width), nn.Embedding(64, width)
        self.qkv = nn.Linear(width, 3 * width)
        self.calls = 0

    def forward(self, tokens: Tensor, position_ids: Tensor, cu_seq_lens: Tensor) -> Tensor:
        self.calls += 1
        x = self.tokens(tokens) + self.positions(position_ids)
        q, k, v = self.qkv(x).chunk(3, -1)
        length = tokens.shape[1]
        ids = torch.searchsorted(cu_seq_lens[1:].contiguous(), torch.arange(length), right=True)
        seen = (ids[:, None] == ids[None]) & torch.ones(length, length).tril().bool()
        scores = (q @ k.mT / x.shape[-1] ** 0.5).masked_fill(~seen, -torch.inf)
        return x + scores.softmax(-1) @ v


def _headed(backbone: nn.Module, weight: Tensor) -> LanguageModel:
    head = nn.Linear(weight.shape[1], weight.shape[0], bias=False)
    model = LanguageModel(backbone, head)
    head.weight = nn.Parameter(weight.clone())
    return model


def lookup_model(hidden: Tensor, weight: Tensor) -> LanguageModel:
    """Hidden states of token i are ``hidden[i]``, a parameter ``[N, H]``."""
    return _headed(_Lookup(hidden), weight)


def attention_model(vocab: int = 29, width: int = 8, dtype: torch.dtype = torch.float64) -> LanguageModel:
    """A model in which a sequence that sees another shows."""
    return _headed(_Attention(vocab, width), torch.randn(vocab, width)).to(dtype)
