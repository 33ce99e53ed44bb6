"""NeMo RL's loss protocol, restated from its documentation (``nemo_rl.algorithms.loss.interfaces`` of 0.8), for the
package itself cannot be installed: three enums, the frames of a batch, and how a trainer calls a loss.
"""

from __future__ import annotations

import enum
import sys
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor

LossType = enum.Enum("LossType", {"TOKEN_LEVEL": "token_level", "SEQUENCE_LEVEL": "sequence_level"})
LossInputType = enum.Enum("LossInputType", {"LOGIT": "logit", "LOGPROB": "logprob", "DISTILLATION": "distillation"})
MetricNormalizer = enum.Enum("MetricNormalizer", {"TOKENS": "tokens", "SEQUENCES": "sequences", "NONE": "none"})


@pytest.fixture
def nemo_rl(monkeypatch: pytest.MonkeyPatch) -> None:
    """Makes ``nemo_rl.algorithms.loss.interfaces`` importable, with the enums alone."""
    parts = ["nemo_rl", "algorithms", "loss", "interfaces"]
    for end in range(1, len(parts) + 1):
        monkeypatch.setitem(sys.modules, ".".join(parts[:end]), ModuleType(".".join(parts[:end])))
    for enumeration in (LossType, LossInputType, MetricNormalizer):
        setattr(sys.modules[".".join(parts)], enumeration.__name__, enumeration)


def in_token_frame(x: Tensor, fill: float = 0) -> Tensor:
    """``[B, S - 1]`` about predictions as the ``[B, S]`` about tokens that NeMo RL has: the first tells nothing."""
    return torch.cat([torch.full_like(x[:, :1], fill), x], 1)


def call(
    loss_fn: Any, data: dict[str, Any], logits: Tensor, seqs: Any = None, toks: Any = None
) -> tuple[Tensor, dict[str, Any]]:
    """A loss on one micro-batch: log-probs or logits by its ``input_type``; without counts, those of the batch."""
    mask = data["token_mask"][:, 1:] * data["sample_mask"].unsqueeze(-1)
    if loss_fn.input_type.value == "logit":
        given = {"logits": logits}
    else:
        logprobs = torch.log_softmax(logits[:, :-1], -1)
        given = {"next_token_logprobs": logprobs.gather(-1, data["input_ids"][:, 1:, None]).squeeze(-1)}
    found: tuple[Tensor, dict[str, Any]] = loss_fn(
        data=data,
        global_valid_seqs=data["sample_mask"].sum() if seqs is None else torch.tensor(seqs),
        global_valid_toks=mask.sum() if toks is None else torch.tensor(toks),
        **given,
    )
    return found
