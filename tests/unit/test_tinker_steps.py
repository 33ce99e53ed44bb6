"""Contract of the client around its losses: gradients add up until AdamW's step, every way to wait for a future,
checkpoints that continue a run to the bit, clients made by name.
"""

from __future__ import annotations

import asyncio
import copy
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from tests import budgets
from tests.packed_models import attention_model
from tests.unit.tinker_data import VOCAB, alone, client_of, same, supervised, want
from xloss.errors import (
    GraphError,
    NonFiniteError,
    OptionError,
    XlossError,
)
from xloss.tinker import AdamParams, Datum, Future, LanguageModel, ServiceClient, TrainingClient


@pytest.mark.parametrize("clip", [0.0, 0.01])
def test_steps_are_those_of_adamw(clip: float) -> None:
    """Gradients of several calls add up; numbers may change between steps; the norm is that before clipping."""
    client, plain = client_of(), None
    model = copy.deepcopy(client.model)
    plain = torch.optim.AdamW(model.parameters())
    for step in range(3):
        numbers = {"learning_rate": 0.1 / (step + 1), "beta1": 0.8, "beta2": 0.9 + step / 100, "eps": 1e-8}
        data = [supervised(), supervised((2, 3))]
        for part in data:
            client.forward_backward(part, "cross_entropy")
            expected = want(model, part, lambda lp, d: -lp * d.loss_fn_inputs["weights"])
            for p, g in zip(model.parameters(), expected[2], strict=True):
                p.grad = g if p.grad is None else p.grad + g
        params = AdamParams(**numbers, weight_decay=0.1, grad_clip_norm=clip)
        response = client.optim_step(params).result()
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), clip or float("inf"))
        assert response.metrics["grad_norm"] == pytest.approx(float(norm), rel=budgets.FIGURE_F64)
        plain.param_groups[0].update(
            lr=numbers["learning_rate"], betas=(0.8, numbers["beta2"]), eps=1e-8, weight_decay=0.1
        )
        plain.step()
        plain.zero_grad()
        ours, theirs = list(client.model.parameters()), list(model.parameters())
        torch.testing.assert_close(
            ours, theirs, rtol=budgets.FIGURE_F32, atol=budgets.FIGURE_STEP
        )  # a gradient of 0 is rounding, over eps


def test_frozen_parameters_stay() -> None:
    model = attention_model()
    model.backbone.requires_grad_(False)
    before = copy.deepcopy(model.state_dict())
    client = client_of(model)
    client.forward_backward(supervised(), "cross_entropy")
    client.optim_step(AdamParams(learning_rate=0.1))
    changed = [name for name, value in model.state_dict().items() if not torch.equal(value, before[name])]
    assert changed == ["head.weight"]


def test_steps_that_cannot_be() -> None:
    client = client_of()
    with pytest.raises(GraphError, match="forward_backward first"):
        client.optim_step(AdamParams())
    client.forward(supervised(), "cross_entropy")
    with pytest.raises(GraphError):
        client.optim_step(AdamParams())
    for given in ({}, {"optim_params": AdamParams(), "adam_params": AdamParams()}):
        with pytest.raises(OptionError, match="AdamParams"):
            client.optim_step(**given)
    with pytest.raises(OptionError, match="SimpleNamespace"):
        client.optim_step(SimpleNamespace(type="dimuon", learning_rate=0.1))
    with pytest.raises(OptionError, match="Did you mean 'learning_rate'"):
        client.optim_step({"learningrate": 0.1})
    for wrong in ({"learning_rate": -1.0}, {"learning_rate": float("nan")}, {"beta2": 1.0}, {"grad_clip_norm": -1.0}):
        with pytest.raises(OptionError, match=next(iter(wrong))):
            client.optim_step(wrong)


@pytest.mark.parametrize("clip", [0.0, 1.0])
def test_a_gradient_that_is_not_finite_is_no_step(clip: float) -> None:
    """A ratio overflows: the weights stay as they were."""
    client = client_of()
    before = copy.deepcopy(client.model.state_dict())
    inputs = {"target_tokens": [1, 2], "logprobs": [-2000.0, -1.0], "advantages": [1.0, 1.0]}
    client.forward_backward([Datum([3, 4], inputs)], "importance_sampling")
    with pytest.raises(NonFiniteError, match="zero_grad"):
        client.optim_step(AdamParams(grad_clip_norm=clip))
    assert all(torch.equal(value, before[name]) for name, value in client.model.state_dict().items())
    client.zero_grad()
    client.forward_backward(supervised(), "cross_entropy")
    client.optim_step(AdamParams(grad_clip_norm=clip))


def test_a_failure_among_packs_stops_the_next_step() -> None:
    """Some packs have left their gradients: half a batch must not become a step."""
    client, data = client_of(max_pack_tokens=4), supervised((4, 4))
    calls, forward = iter([False, True]), client.model.backbone.forward

    def failing(*args: Any) -> Any:
        if next(calls, False):
            raise MemoryError("the second pack")
        return forward(*args)

    client.model.backbone.forward = failing  # type: ignore[method-assign]
    with pytest.raises(MemoryError):
        client.forward_backward(data, "cross_entropy")
    with pytest.raises(GraphError, match="zero_grad"):
        client.optim_step(AdamParams())
    client.zero_grad()
    client.forward_backward(data, "cross_entropy")
    client.optim_step(AdamParams())


def test_futures_can_be_waited_for_in_every_way() -> None:
    client, data = client_of(), supervised()

    async def steps() -> None:
        first = await client.forward_backward_async(data, "cross_entropy")
        step = await client.optim_step_async(adam_params=AdamParams())
        assert isinstance(first, Future) and isinstance(step, Future)
        found = [await first, await first.result_async(timeout=1), first.result(), first.future().result(timeout=0)]
        found.append(await asyncio.create_task(first.coroutine()))
        assert all(x is found[0] for x in found)
        await client.forward_async(data, "cross_entropy")
        custom = await client.forward_backward_custom_async(data, lambda d, lps: (torch.cat(lps).sum(), {}))
        assert "loss:sum" in (await custom).metrics
        assert "grad_norm" in (await step).metrics
        assert await client is client is client.result()

    asyncio.run(steps())


# -- checkpoints -------------------------------------------------------------------------------------------------------


def _train(client: TrainingClient, steps: int) -> None:
    for step in range(steps):
        torch.manual_seed(step)
        client.forward_backward(supervised(), "cross_entropy")
        client.optim_step(AdamParams(learning_rate=0.1))


def test_a_saved_run_continues_to_the_bit(tmp_path: Path) -> None:
    client = client_of(checkpoint_dir=tmp_path)
    _train(client, 2)
    path = client.save_state("two", user_metadata={"renderer_name": "plain"}).result().path
    assert Path(path).is_file()
    _train(client, 2)
    again = client_of(checkpoint_dir=tmp_path)
    again.load_state_with_optimizer(path).result()
    _train(again, 2)
    for a, b in zip(client.model.parameters(), again.model.parameters(), strict=True):
        assert torch.equal(a, b)
    fresh = client_of()
    fresh.load_state(path)
    _train(fresh, 2)
    assert not torch.equal(fresh.model.head.weight, client.model.head.weight)
    client.load_state(path)  # forgets the moments that its four steps left
    _train(client, 2)
    assert torch.equal(fresh.model.head.weight, client.model.head.weight)


def test_checkpoints_that_cannot_be(tmp_path: Path) -> None:
    with pytest.raises(OptionError, match="checkpoint_dir"):
        client_of().save_state("x")
    client = client_of(checkpoint_dir=tmp_path)
    client.save_state("x")
    with pytest.raises(OptionError, match="overwrite"):
        client.save_state("x")
    client.save_state("x", overwrite=True)
    for name in ("../x", "a/b"):
        with pytest.raises(OptionError, match="name"):
            client.save_state(name)
    with pytest.raises(OptionError, match="no checkpoint"):
        client.load_state(str(tmp_path / "y.pt"))
    path = client.save_weights_for_sampler("x").result().path
    with pytest.raises(OptionError, match="no optimizer"):
        client.load_state_with_optimizer(path)


def test_service_makes_clients_by_name_and_from_checkpoints(tmp_path: Path) -> None:
    asked = []

    def make(base_model: str, rank: int | None) -> LanguageModel:
        asked.append((base_model, rank))
        return attention_model()

    service = ServiceClient(make, checkpoint_dir=tmp_path, returns="torch")
    client = service.create_lora_training_client("tiny", rank=4, user_metadata={"a": "b"}).result()
    info = client.get_info()
    assert (info.model_name, info.model_data.model_name, info.lora_rank) == ("tiny", "tiny", 4)
    _train(client, 1)
    path = client.save_state("one", user_metadata={"c": "d"}).result().path
    rest = service.create_rest_client()
    assert rest.get_training_run_by_tinker_path(path).result().user_metadata == {"a": "b", "c": "d"}
    again = service.create_training_client_from_state_with_optimizer(path)
    _train(client, 1)
    _train(again, 1)
    assert torch.equal(client.model.head.weight, again.model.head.weight)
    service.create_training_client_from_state(path)
    sampler = service.create_sampling_client(model_path=client.save_weights_for_sampler("one").result().path)
    assert torch.equal(sampler.model.head.weight, client.model.head.weight)
    service.create_sampling_client(base_model="other")
    assert asked == [("tiny", 4)] * 4 + [("other", None)]
    rest.delete_checkpoint_from_tinker_path(path)
    with pytest.raises(XlossError):
        service.create_training_client_from_state(path)
    with pytest.raises(OptionError):
        service.create_sampling_client()


# -- about the model ---------------------------------------------------------------------------------------------------


def test_softcap_and_scale_are_in_every_log_prob() -> None:
    inner = attention_model()
    model = LanguageModel(inner.backbone, inner.head, softcap=2.0, logit_scale=0.5)
    data = supervised()
    hidden = [alone_hidden(model, d) for d in data]
    dense = [(2 * torch.tanh(h @ model.head.weight.T * 0.5 / 2)).log_softmax(-1) for h in hidden]
    targets = [d.loss_fn_inputs["target_tokens"][:, None] for d in data]
    expected = [x.gather(1, t)[:, 0].detach() for x, t in zip(dense, targets, strict=True)]
    data[0].loss_fn_inputs["weights"].zero_()
    client = client_of(model)
    out = client.forward(data, "cross_entropy").result()
    custom = client.forward_backward_custom(data, lambda d, lps: (torch.cat(lps).sum(), {})).result()
    for found in (out, custom):
        same([x["logprobs"] for x in found.loss_fn_outputs], expected)
    tokens, sampling = data[2].model_input, client.save_weights_and_get_sampling_client()
    (drawn,) = sampling.sample(tokens, 1, SimpleNamespace(max_tokens=3)).result().sequences
    of_drawn = sampling.compute_logprobs(torch.cat([tokens, torch.tensor(drawn.tokens)])).result()[-3:]
    assert drawn.logprobs == pytest.approx(of_drawn)
    seen = sampling.compute_logprobs(tokens).result()
    same(torch.tensor(seen[1:], dtype=torch.float64), dense[2][:-1].gather(1, tokens[1:, None])[:, 0].detach())


def alone_hidden(model: LanguageModel, datum: Datum) -> torch.Tensor:
    n = len(datum.model_input)
    hidden: torch.Tensor = model(datum.model_input[None], torch.arange(n)[None], torch.tensor([0, n]))[0]
    return hidden


def test_no_tokenizer_says_so() -> None:
    with pytest.raises(OptionError, match="tokenizer"):
        client_of().get_tokenizer()
    assert alone(attention_model(), supervised((2,))[0]).shape == (2, VOCAB)
