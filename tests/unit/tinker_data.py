"""For the tests of the training client: data, a client, and plain autograd on dense logits of each sequence alone."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from tests import budgets
from tests.packed_models import attention_model
from xloss.tinker import Datum, LanguageModel, TrainingClient

VOCAB, LENGTHS = 29, (5, 1, 7, 3)
TINKER = ("importance_sampling", "ppo", "cispo", "dro")


def client_of(model: LanguageModel | None = None, **options: Any) -> TrainingClient:
    return TrainingClient(attention_model(VOCAB) if model is None else model, returns="torch", **options)


def ints(*shape: int) -> Tensor:
    return torch.randint(0, VOCAB, shape)


def supervised(lengths: tuple[int, ...] = LENGTHS) -> list[Datum]:
    return [Datum(ints(n), {"target_tokens": ints(n), "weights": torch.rand(n).double()}) for n in lengths]


def rollouts(lengths: tuple[int, ...] = LENGTHS) -> list[Datum]:
    """Ratios on both sides of every bound, advantages of both signs and 0."""
    found = []
    for n in lengths:
        advantages = torch.randn(n).double() * (torch.rand(n) < 0.8)
        inputs = {"target_tokens": ints(n), "logprobs": -4 * torch.rand(n).double() - 1, "advantages": advantages}
        found.append(Datum(ints(n), inputs))
    return found


def alone(model: LanguageModel, datum: Datum) -> Tensor:
    """Log-probs ``[N, V]`` of one sequence by itself."""
    n = len(datum.model_input)
    hidden = model(torch.as_tensor(datum.model_input)[None], torch.arange(n)[None], torch.tensor([0, n]))
    return (hidden[0] @ model.head.weight.T).log_softmax(-1)


def want(model: LanguageModel, data: list[Datum], token_loss: Callable[[Tensor, Datum], Tensor]) -> tuple[Any, ...]:
    """Log-probs, loss and gradients of the sum of ``token_loss(logprobs, datum)``."""
    model = copy.deepcopy(model)
    logprobs = []
    for datum in data:
        targets = torch.as_tensor(datum.loss_fn_inputs["target_tokens"])
        rows = alone(model, datum)
        logprobs.append(rows.gather(1, targets if targets.ndim == 2 else targets[:, None]).reshape(targets.shape))
    loss = sum((token_loss(lp, d).sum() for lp, d in zip(logprobs, data, strict=True)), torch.zeros(()).double())
    loss.backward()
    return [lp.detach() for lp in logprobs], float(loss.detach()), grads(model)


def grads(model: LanguageModel) -> list[Tensor]:
    return [torch.zeros_like(p) if p.grad is None else p.grad for p in model.parameters()]


def same(got: Any, expected: Any) -> None:
    torch.testing.assert_close(got, expected, rtol=budgets.FIGURE_F64, atol=budgets.FIGURE_F64)


def check(client: TrainingClient, data: list[Datum], out: Any, expected: tuple[Any, ...]) -> None:
    logprobs, loss, gradients = expected
    same([x["logprobs"] for x in out.loss_fn_outputs], logprobs)
    assert out.metrics["loss:sum"] == pytest.approx(loss, rel=budgets.FIGURE_F64)
    same(grads(client.model), gradients)


def formula(name: str, low: float | None = None, high: float | None = None, beta: float = 0.05) -> Any:
    """Tinker's documentation, as losses."""

    def loss(lp: Tensor, datum: Datum) -> Tensor:
        old, adv = datum.loss_fn_inputs["logprobs"], datum.loss_fn_inputs["advantages"]
        ratio = (lp - old).exp()
        if name == "importance_sampling":
            return -ratio * adv
        if name == "dro":
            return -(adv * lp - 0.5 * beta * (lp - old) ** 2)
        if name == "cispo":
            return -ratio.clamp(0.0 if low is None else low, 4.0 if high is None else high).detach() * lp * adv
        return -torch.minimum(ratio * adv, ratio.clamp(low or 0.8, high or 1.2) * adv)

    return loss
