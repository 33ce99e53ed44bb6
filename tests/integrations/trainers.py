"""A tokenizer and data for trainers, made here."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from tests.integrations.models import VOCAB

PLAIN_STEPS: dict[str, Any] = {
    "optim": "sgd",
    "learning_rate": 0.1,
    "max_grad_norm": 0.0,  # clipping would hide a factor
    "lr_scheduler_type": "constant",
    "logging_steps": 1,
    "report_to": "none",
    "save_strategy": "no",
    "use_cpu": True,
    "seed": 3,
}
"""Of a trainer whose weights show its gradients."""


def tokenizer() -> Any:
    """Words ``w0`` to ``w{VOCAB - 4}`` and three special tokens."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = ["<pad>", "<bos>", "<eos>", *(f"w{i}" for i in range(VOCAB - 3))]
    made = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<pad>"))
    made.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=made, pad_token="<pad>", bos_token="<bos>", eos_token="<eos>")


def token_rows(rows: int = 16, longest: int = 14, seed: int = 5) -> list[list[int]]:
    """Sequences of uneven lengths."""
    random = torch.Generator().manual_seed(seed)
    lengths = torch.randint(3, longest + 1, (rows,), generator=random).tolist()
    return [torch.randint(3, VOCAB, (n,), generator=random).tolist() for n in lengths]


def parameters(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: p.detach().clone() for name, p in model.named_parameters()}
