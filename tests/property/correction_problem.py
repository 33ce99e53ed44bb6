"""A step of packed rollouts with everything a rollout correction can meet, for the tests of this folder."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from tests.oracle import head
from xloss import RLLossContextInputItem

VOCAB, HIDDEN = 17, 6
LENGTHS = ([5, 1, 0, 7], [3, 6])  # of the sequences of each micro-batch; the last of the first is ignored altogether
POISON = (torch.nan, torch.inf, -torch.inf)


@dataclass
class Problem:
    """Tensors in the shape [1, T]; float fields hold NaN and inf at ignored tokens."""

    hidden: list[Tensor]
    weight: Tensor
    labels: list[Tensor]
    fields: list[dict[str, Tensor]]  # advantages, old_logprobs, rollout_logprobs, ref_logprobs, is_weights, rewards
    cu_seq_lens: list[Tensor]

    def items(self, **changed: Any) -> list[RLLossContextInputItem]:
        """`changed`: fields to replace in every micro-batch, None to leave out."""
        return [
            RLLossContextInputItem(shifted_labels=y, **(f | changed))
            for y, f in zip(self.labels, self.fields, strict=True)
        ]

    def current(self) -> list[Tensor]:
        """Log-probs of the current policy, float64, [1, T]."""
        return [head.token_stats(h, self.weight, y).logprobs for h, y in zip(self.hidden, self.labels, strict=True)]

    def to(self, dtype: torch.dtype) -> Problem:
        hidden = [h.to(dtype) for h in self.hidden]
        fields = [{k: v.to(dtype) for k, v in f.items()} for f in self.fields]
        return Problem(hidden, self.weight.to(dtype), self.labels, fields, self.cu_seq_lens)


def problem(seed: int = 0, *, spread: float = 0.4, far: bool = False, poison: bool = True) -> Problem:
    """`spread`: of x. `far`: some |x| beyond 20."""
    g = torch.Generator().manual_seed(seed)

    def randn(*size: int) -> Tensor:
        return torch.randn(size, generator=g, dtype=torch.float64)

    weight = randn(VOCAB, HIDDEN)
    hidden, all_labels, fields, bounds = [], [], [], []
    for number, lengths in enumerate(LENGTHS):
        total = sum(lengths)
        h = randn(1, total, HIDDEN)
        labels = torch.randint(0, VOCAB, (1, total), generator=g)
        labels[0, 1::5] = -100
        if number == 0:
            labels[0, -lengths[-1] :] = -100
        now = head.token_stats(h, weight, labels).logprobs
        old = now + 0.4 * randn(1, total)
        rollout = old - spread * randn(1, total)
        if far:
            rollout[0, 2::6] -= 25.0
            rollout[0, 3::6] += 25.0
        found = {
            "advantages": randn(1, total),
            "old_logprobs": old,
            "rollout_logprobs": rollout,
            "ref_logprobs": now + 0.3 * randn(1, total),
            "is_weights": 0.5 + torch.rand(1, total, generator=g, dtype=torch.float64),
            "rewards": (torch.rand(1, total, generator=g) > 0.5).double(),
        }
        if poison:
            for i, value in enumerate(found.values()):
                value[labels == -100] = POISON[i % len(POISON)]
        hidden.append(h)
        all_labels.append(labels)
        fields.append(found)
        bounds.append(torch.tensor([0, *torch.tensor(lengths).cumsum(0).tolist()], dtype=torch.int32))
    return Problem(hidden, weight, all_labels, fields, bounds)
