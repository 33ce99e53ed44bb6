"""Contract of ``forward_backward_custom``: any function of all log-probs, one forward and one backward of the model."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor

from tests import budgets
from tests.unit.tinker_data import VOCAB, alone, check, client_of, grads, ints, same, supervised, want
from xloss.errors import GraphError, NonFiniteError, OptionError
from xloss.tinker import Datum, passes


def variance(data: list[Any], logprobs: list[Tensor]) -> tuple[Tensor, dict[str, float]]:
    """Couples every token of every sequence."""
    joined = torch.cat([lp.flatten() for lp in logprobs])
    return joined.var(), {"mean": float(joined.detach().mean())}


@pytest.mark.parametrize("pack", [None, 8])
def test_custom_loss_over_all_sequences(pack: int | None) -> None:
    client = client_of(max_pack_tokens=pack)
    data = [*supervised(), Datum(ints(3), {"target_tokens": ints(3, 2)})]
    model = copy.deepcopy(client.model)
    dense = [alone(model, d) for d in data]
    targets = [torch.as_tensor(d.loss_fn_inputs["target_tokens"]) for d in data]
    lps = [x.gather(1, t.reshape(len(t), -1)).reshape(t.shape) for x, t in zip(dense, targets, strict=True)]
    loss, metrics = variance(data, lps)
    loss.backward()
    out = client.forward_backward_custom(data, variance).result()
    check(client, data, out, ([lp.detach() for lp in lps], float(loss.detach()), grads(model)))
    assert out.metrics["mean"] == pytest.approx(metrics["mean"], rel=budgets.FIGURE_F64)


def test_custom_loss_is_one_forward_and_one_backward() -> None:
    client, data = client_of(), supervised()
    backward: list[int] = []
    client.model.backbone.qkv.register_full_backward_hook(lambda *_: backward.append(1))
    client.forward_backward_custom(data, variance)
    assert client.model.backbone.calls == 1
    assert len(backward) == 1


def test_custom_loss_gets_what_tinker_gives() -> None:
    """The data as given; leaves on the CPU, one for each datum; a sequence it does not look at has no gradient."""
    client, data = client_of(), supervised()
    seen = {}

    def first_only(given: list[Any], logprobs: list[Tensor]) -> tuple[Tensor, dict[str, float]]:
        seen["data"] = [a is b for a, b in zip(given, data, strict=True)]
        seen["leaves"] = [lp.is_leaf and lp.requires_grad and lp.device.type == "cpu" for lp in logprobs]
        return logprobs[0].sum(), {}

    out = client.forward_backward_custom(data, first_only).result()
    assert all(seen["data"]) and all(seen["leaves"])
    expected = want(client.model, data[:1], lambda lp, d: lp)
    assert out.metrics["loss:sum"] == pytest.approx(expected[1], rel=budgets.FIGURE_F64)
    same(grads(client.model), expected[2])


def test_cross_entropy_as_a_custom_loss() -> None:
    data = supervised()
    named = client_of()
    custom = client_of(copy.deepcopy(named.model))

    def nll(given: list[Any], logprobs: list[Tensor]) -> tuple[Tensor, dict[str, float]]:
        terms = [-(lp * d.loss_fn_inputs["weights"]).sum() for lp, d in zip(logprobs, given, strict=True)]
        return torch.stack(terms).sum(), {}

    a, b = named.forward_backward(data, "cross_entropy").result(), custom.forward_backward_custom(data, nll).result()
    assert a.metrics["loss:sum"] == pytest.approx(b.metrics["loss:sum"], rel=budgets.FIGURE_SAME)
    same(grads(named.model), grads(custom.model))
    assert b.metrics["surrogate_loss:sum"] == pytest.approx(b.metrics["loss:sum"], rel=budgets.FIGURE_SAME)


@pytest.mark.parametrize(
    ("fn", "error"),
    [
        (lambda data, lps: (torch.cat(lps).detach().sum(), {}), GraphError),
        (lambda data, lps: (torch.zeros((), requires_grad=True) * 2, {}), GraphError),
        (lambda data, lps: torch.cat(lps).sum(), OptionError),
        (lambda data, lps: (torch.cat(lps), {}), OptionError),
        (lambda data, lps: (1.0, {}), OptionError),
        ("cross_entropy", OptionError),
        (lambda data, lps: (torch.cat(lps).sum(), None), OptionError),
        (lambda data, lps: (torch.cat(lps).sum(), {"figure": torch.zeros(2)}), OptionError),
        (lambda data, lps: ((torch.cat(lps) - torch.cat(lps).detach()).sqrt().sum(), {}), NonFiniteError),
    ],
)
def test_custom_losses_that_are_none(fn: Any, error: type[Exception]) -> None:
    client = client_of()
    with pytest.raises(error):
        client.forward_backward_custom(supervised(), fn)
    assert all(p.grad is None for p in client.model.parameters())


@pytest.mark.parametrize(
    ("options", "kept"), [({}, True), ({"logits_budget": 2000}, False), ({"max_pack_tokens": 8}, True)]
)
def test_logits_are_kept_within_the_budget(
    options: dict[str, Any], kept: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By default they are, so that the head's products are as many as in one pass; packs share a budget."""
    seen = []
    ours = passes.linear_logprobs

    def noted(*args: Any, **kwargs: Any) -> Any:
        seen.append(kwargs["logits_budget"])
        return ours(*args, **kwargs)

    monkeypatch.setattr(passes, "linear_logprobs", noted)
    data = supervised()
    client_of(**options).forward_backward_custom(data, variance)
    needed = 8 * VOCAB * sum(len(d.model_input) for d in data)
    assert (sum(seen) >= needed) == kept
    assert len(set(seen)) == 1 and sum(seen) <= options.get("logits_budget", 1 << 30)
