"""Contract of the client's door: data in any form is one, and what cannot be right raises and names itself."""

from __future__ import annotations

import copy
from types import SimpleNamespace
from typing import Any

import numpy as np
import pydantic
import pytest
import torch
from torch import nn

from tests import budgets
from tests.packed_models import attention_model
from tests.unit.tinker_data import VOCAB, client_of, grads, ints, rollouts, same, supervised, want
from xloss.errors import (
    DtypeError,
    LabelError,
    MissingFieldError,
    NonFiniteError,
    OptionError,
    ShapeError,
    UnsupportedError,
)
from xloss.tinker import Datum, LanguageModel, TrainingClient


def test_tensors_arrays_and_lists_are_one() -> None:
    """So are objects with ``to_ints()`` and ``to_torch()``, which tinker's are."""
    data = supervised((4, 2))
    forms: list[list[Datum]] = [data]
    for as_form in (np.asarray, lambda x: x.tolist(), lambda x: SimpleNamespace(to_torch=lambda: x)):
        tokens = [SimpleNamespace(to_ints=d.model_input.tolist, chunks=[]) for d in data]
        inputs = [{name: as_form(x) for name, x in d.loss_fn_inputs.items()} for d in data]
        forms.append([Datum(t, i) for t, i in zip(tokens, inputs, strict=True)])
    model, found = attention_model(), []
    for form in forms:
        client = client_of(copy.deepcopy(model))
        found.append((client.forward_backward(form, "cross_entropy").result(), grads(client.model)))
    for out, gradient in found[1:]:
        torch.testing.assert_close(out.loss_fn_outputs, found[0][0].loss_fn_outputs)
        torch.testing.assert_close(
            gradient, found[0][1], rtol=budgets.FIGURE_F32, atol=budgets.FIGURE_F32
        )  # a list's weights are float32


def test_weights_may_be_left_out_of_cross_entropy() -> None:
    client, data = client_of(), supervised()
    for datum in data:
        del datum.loss_fn_inputs["weights"]
    expected = want(client.model, data, lambda lp, d: -lp)
    assert client.forward(data, "cross_entropy").result().metrics["loss:sum"] == pytest.approx(
        expected[1], rel=budgets.FIGURE_F64
    )


def test_targets_of_minus_100_are_left_out() -> None:
    client, data = client_of(), supervised((4,))
    data[0].loss_fn_inputs["target_tokens"][1] = -100
    (out,) = client.forward_backward(data, "cross_entropy").result().loss_fn_outputs
    assert (out["logprobs"] == 0).tolist() == [False, True, False, False]


def test_log_probs_of_dead_tokens_on_request_only() -> None:
    model, data = attention_model(), supervised((6,))
    data[0].loss_fn_inputs["weights"][:4] = 0
    lazy, full = client_of(model, all_logprobs=False), client_of(copy.deepcopy(model))
    (a,), (b,) = (c.forward(data, "cross_entropy").result().loss_fn_outputs for c in (lazy, full))
    assert bool((a["logprobs"][:4] == 0).all())
    assert bool((b["logprobs"] < 0).all())
    same(a["logprobs"][4:], b["logprobs"][4:])


def test_temperatures_are_in_every_log_prob() -> None:
    """Those of tokens that the loss leaves out too."""
    client, data = client_of(), supervised((6,))
    temperature = torch.linspace(0.5, 2, 6).double()
    data[0].loss_fn_inputs["weights"][:3] = 0
    data[0].loss_fn_inputs["temperature"] = temperature
    (out,) = client.forward(data, "cross_entropy").result().loss_fn_outputs
    n = torch.arange(6)
    hidden = client.model(data[0].model_input[None], n[None], torch.tensor([0, 6]))[0]
    dense = (hidden @ client.model.head.weight.T / temperature[:, None]).log_softmax(-1)
    same(out["logprobs"], dense[n, data[0].loss_fn_inputs["target_tokens"]].detach())


def _with(tokens: Any = None, **inputs: Any) -> list[Datum]:
    """A good rollout of 3 tokens with some inputs replaced; ``None`` takes one out."""
    (datum,) = rollouts((3,))
    found = {name: value for name, value in (datum.loss_fn_inputs | inputs).items() if value is not None}
    return [Datum(datum.model_input if tokens is None else tokens, found)]


@pytest.mark.parametrize(
    ("data", "loss_fn", "config", "error", "says"),
    [
        ([], "ppo", None, OptionError, "data is empty"),
        ("text", "ppo", None, OptionError, "list of Datum"),
        ([3], "ppo", None, OptionError, "data\\[0\\] must be a Datum"),
        (_with(tokens=[]), "ppo", None, ShapeError, "at least one"),
        (_with(tokens=[0.5, 1, 2]), "ppo", None, DtypeError, "integer"),
        (_with(tokens=SimpleNamespace(chunks=[SimpleNamespace()])), "ppo", None, UnsupportedError, "only text"),
        (_with(tokens=[1, -1, 2]), "ppo", None, LabelError, "-1"),
        (
            _with(logprobs=None, advantages=None, target_tokens=ints(3, 2), weights=[1.0] * 3),
            "cross_entropy",
            None,
            ShapeError,
            r"weights must be \(3, 2\)",
        ),
        (_with(target_tokens=None), "ppo", None, MissingFieldError, "no target_tokens"),
        (_with(target_tokens=[1, 2]), "ppo", None, ShapeError, "N = 3"),
        (_with(target_tokens=[1.0, 2.5, 3.0]), "ppo", None, DtypeError, "target_tokens must be integer"),
        (_with(advantages=[1.0, float("nan"), 0.0]), "ppo", None, NonFiniteError, "advantages"),
        (
            _with(logprobs=None, advantages=None, weights=[1.0, float("nan"), 0.0]),
            "cross_entropy",
            None,
            NonFiniteError,
            "weights",
        ),
        (_with(target_tokens=[1, 2, VOCAB]), "ppo", None, LabelError, str(VOCAB)),
        (_with(target_tokens=ints(3, 2)), "ppo", None, ShapeError, "cross_entropy"),
        (_with(logprobs=[1.0]), "ppo", None, ShapeError, "logprobs must be"),
        (_with(logprobs="x"), "ppo", None, DtypeError, "logprobs"),
        (_with(logprobs=None), "ppo", None, MissingFieldError, "needs logprobs"),
        (_with(advantages=None), "ppo", None, MissingFieldError, "needs advantages"),
        (_with(advantage=[1.0] * 3), "ppo", None, OptionError, "Did you mean 'advantages'"),
        (_with(weights=[1.0] * 3), "ppo", None, OptionError, "multiply its advantage"),
        (_with(clip_low_threshold=[1.0] * 3), "ppo", None, OptionError, "loss_fn_config"),
        (_with(mask=[0.5] * 3), "ppo", None, OptionError, "0 and 1"),
        (_with() + _with(ref_logprobs=[0.0] * 3), "ppo", None, MissingFieldError, "others have it"),
        (_with(), "kimi", {"kl": 0.0}, OptionError, "no use for kl"),
        (_with(), "pppo", None, OptionError, "Did you mean 'ppo'"),
        (_with(), len, None, OptionError, "forward_backward_custom"),
        (_with(), "stable_reinforce", None, UnsupportedError, "not public"),
        (_with(), "custom", None, UnsupportedError, "forward_backward_custom"),
        (_with(), "trl/ppo", None, OptionError, "unknown loss_fn"),
        (_with(), "ppo", {"clip_low": 0.8}, OptionError, "Did you mean 'clip_low_threshold'"),
        (_with(), "ppo", {"cliprange_low": 0.2}, OptionError, "clip_low_threshold.* 'tinker/ppo'"),
        (_with(), "dro", {"bets": 0.2}, OptionError, "Did you mean 'beta'"),
        (_with(), "importance_sampling", {"beta": 0.2}, OptionError, "takes no numbers"),
        (_with(), "tinker/ppo", {"cliprange_low": 0.2}, pydantic.ValidationError, "not both"),
        (_with(), "vanilla", None, pydantic.ValidationError, "cliprange_low"),
        (_with(), "ppo", {"clip_high_threshold": 0.5}, pydantic.ValidationError, "above"),
        (_with(), "ppo", {"softcap": 3.0}, OptionError, "the client sets it"),
        (_with(), "tinker/ppo", {"kl_loss_type": "full", "use_kl_loss": True}, UnsupportedError, "reference"),
    ],
)
def test_bad_input_raises(data: Any, loss_fn: Any, config: Any, error: type[Exception], says: str) -> None:
    """And leaves no gradient behind."""
    client = client_of()
    with pytest.raises(error, match=says):
        client.forward_backward(data, loss_fn, config)
    assert all(p.grad is None for p in client.model.parameters())


def test_an_input_is_in_all_sequences_or_in_none() -> None:
    """In whatever pack they are; a mask may be in some."""
    client, data = client_of(max_pack_tokens=3), rollouts((3, 3, 3))
    data[0].loss_fn_inputs["mask"] = torch.tensor([0, 1, 1])
    client.forward(data, "ppo")
    data[2].loss_fn_inputs["old_logprobs"] = torch.zeros(3)
    with pytest.raises(MissingFieldError, match=r"data\[0\] has no old_logprobs"):
        client.forward(data, "ppo")


def test_losses_of_several_sequences_want_one_pack() -> None:
    client, data = client_of(max_pack_tokens=8), supervised()
    for datum in data:
        datum.loss_fn_inputs["weights"] = torch.ones_like(datum.loss_fn_inputs["weights"])
    with pytest.raises(UnsupportedError, match="max_pack_tokens=None"):
        client.forward(data, "cpo")


@pytest.mark.parametrize(
    ("arguments", "error", "says"),
    [
        ({"model": nn.Linear(2, 2)}, OptionError, "LanguageModel\\(backbone, head\\)"),
        ({"max_pack_tokens": 0}, OptionError, "max_pack_tokens"),
        ({"returns": "numpy"}, OptionError, "returns"),
        ({"model": attention_model().requires_grad_(False)}, OptionError, "no parameter"),
    ],
)
def test_bad_clients_raise(arguments: dict[str, Any], error: type[Exception], says: str) -> None:
    with pytest.raises(error, match=says):
        TrainingClient(**{"model": attention_model()} | arguments)


def test_several_processes_raise(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("xloss.distributed.world_size", lambda: 2)
    with pytest.raises(UnsupportedError, match="one process"):
        client_of()


def test_a_head_that_is_not_its_weight_raises() -> None:
    with pytest.raises(UnsupportedError, match=r"must be an nn\.Linear; got Sequential"):
        LanguageModel(nn.Identity(), nn.Sequential(nn.Linear(2, 3)))
    head = nn.Linear(2, 3)
    head.register_forward_hook(lambda *_: None)
    with pytest.raises(UnsupportedError, match="hooks"):
        LanguageModel(nn.Identity(), head)


def test_hidden_states_of_another_shape_raise() -> None:
    client = client_of(LanguageModel(nn.Embedding(VOCAB, 5).double(), nn.Linear(4, VOCAB).double()))
    client.model.hidden_states = lambda tokens, positions, bounds: client.model.backbone(tokens)  # type: ignore[method-assign]
    with pytest.raises(ShapeError, match=r"\(1, 3, 4\); got \(1, 3, 5\)"):
        client.forward(supervised((3,)), "cross_entropy")
