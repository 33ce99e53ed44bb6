"""Contract of the sampling client: samples follow the model's distribution under their parameters, and come with the
log-probs that training computes for the same weights.
"""

from __future__ import annotations

import asyncio
from dataclasses import dataclass
from typing import Any

import pytest
import torch

from tests.packed_models import attention_model, lookup_model
from tests.unit.tinker_data import VOCAB, alone, client_of, ints, same, supervised
from xloss.errors import OptionError, UnsupportedError
from xloss.tinker import AdamParams, Datum, SamplingClient


@dataclass
class Params:
    max_tokens: int | None = 4
    seed: int | None = None
    stop: Any = None
    temperature: float = 1.0
    top_k: int = -1
    top_p: float = 1.0


def sampler(**of_model: Any) -> SamplingClient:
    model = attention_model()
    for name, value in of_model.items():
        setattr(model, name, value)
    return client_of(model).save_weights_and_get_sampling_client()


def test_log_probs_are_those_of_training() -> None:
    client = client_of()
    sampling, prompt = client.save_weights_and_get_sampling_client(), ints(3)
    response = sampling.sample(prompt, 3, Params(temperature=0.7, top_k=5), include_prompt_logprobs=True).result()
    assert len(response.sequences) == 3
    for sequence in response.sequences:
        whole = torch.cat([prompt, torch.tensor(sequence.tokens)])
        (out,) = (
            client.forward([Datum(whole[:-1], {"target_tokens": whole[1:]})], "cross_entropy").result().loss_fn_outputs
        )
        same(torch.tensor(sequence.logprobs, dtype=torch.float64), out["logprobs"][2:])
        seen = sampling.compute_logprobs(whole).result()
        assert seen[0] is None
        same(torch.tensor(seen[1:], dtype=torch.float64), out["logprobs"])
        assert response.prompt_logprobs == pytest.approx(seen[:3])
    assert sampling.compute_logprobs([4]).result() == [None]


def _frequencies(params: Params, draws: int = 4000) -> tuple[torch.Tensor, torch.Tensor]:
    """Of the first token, and the model's probabilities."""
    model = lookup_model(torch.randn(VOCAB, 8), torch.randn(VOCAB, 8))
    sampling = client_of(model).save_weights_and_get_sampling_client()
    params.max_tokens, params.stop = 1, []
    found = sampling.sample([2], draws, params).result().sequences
    counts = torch.bincount(torch.tensor([s.tokens[0] for s in found]), minlength=VOCAB)
    return counts / draws, alone(model, Datum(torch.tensor([2]), {}))[0].detach().exp()


@pytest.mark.parametrize("temperature", [1.0, 0.5])
def test_frequencies_follow_the_temperature(temperature: float) -> None:
    found, probs = _frequencies(Params(seed=5, temperature=temperature))
    probs = probs ** (1 / temperature)
    assert float((found - probs / probs.sum()).abs().max()) < 4 * 0.5 / 4000**0.5


def test_top_k_and_top_p_cut_the_tail() -> None:
    found, probs = _frequencies(Params(seed=5, top_k=3))
    assert set(found.nonzero().flatten().tolist()) == set(probs.topk(3).indices.tolist())
    found, probs = _frequencies(Params(seed=5, top_p=0.5))
    sorted_probs, order = probs.sort(descending=True)
    kept = order[: int((sorted_probs.cumsum(0) < 0.5).sum()) + 1]
    assert set(found.nonzero().flatten().tolist()) == set(kept.tolist())


def test_temperature_0_takes_the_likeliest_and_seeds_repeat() -> None:
    sampling = sampler()
    greedy = [sampling.sample([1], 1, Params(temperature=0)).result().sequences[0].tokens for _ in range(2)]
    assert greedy[0] == greedy[1]
    whole = torch.tensor([1, *greedy[0]])
    rows = alone(sampling.model, Datum(whole[:-1], {}))
    assert rows.argmax(-1).tolist() == greedy[0]
    drawn = [sampling.sample([1], 2, Params(seed=s)).result().sequences for s in (1, 1, 2)]
    tokens = [[s.tokens for s in found] for found in drawn]
    assert tokens[0] == tokens[1] != tokens[2]


class _Tokenizer:
    def decode(self, tokens: list[int]) -> str:
        return "".join(chr(97 + t) for t in tokens)


def test_stops() -> None:
    """At a token, a string over several tokens, the model's own end; ``[]`` never stops."""
    sampling = sampler(tokenizer=_Tokenizer())
    (free,) = sampling.sample([1], 1, Params(max_tokens=8, temperature=0, stop=[])).result().sequences
    assert (len(free.tokens), free.stop_reason) == (8, "length")
    third = free.tokens[:3]
    until = third.index(third[-1]) + 1
    (token,) = sampling.sample([1], 1, Params(max_tokens=8, temperature=0, stop=[third[-1]])).result().sequences
    assert (token.tokens, token.stop_reason) == (third[:until], "stop")
    text = _Tokenizer().decode(free.tokens[1:4])
    (string,) = sampling.sample([1], 1, Params(max_tokens=8, temperature=0, stop=[text])).result().sequences
    assert string.stop_reason == "stop"
    assert _Tokenizer().decode(string.tokens).endswith(text)
    sampling.model.eos_token_ids = (third[-1],)
    (ended,) = sampling.sample([1], 1, Params(max_tokens=8, temperature=0)).result().sequences
    assert ended.tokens == third[:until]
    ids = {s.sequence_id for s in sampling.sample([1], 3, Params()).result().sequences}
    assert len(ids) == 3


def test_a_snapshot_stays_and_an_inflight_sampler_follows() -> None:
    client, prompt = client_of(), ints(4)
    client.forward_backward(supervised(), "cross_entropy")  # a snapshot takes no gradients along
    snapshot = client.save_weights_and_get_sampling_client()
    live = client.save_weights_and_get_sampling_client(kind="inflight")
    assert all(p.grad is None and not p.requires_grad for p in snapshot.model.parameters())
    assert not snapshot.model.training and client.model.training
    before = snapshot.compute_logprobs(prompt).result()
    assert live.compute_logprobs(prompt).result() == before
    client.optim_step(AdamParams(learning_rate=0.1))
    assert snapshot.compute_logprobs(prompt).result() == before
    assert live.compute_logprobs(prompt).result() != before
    live.sample(prompt, 1, Params())
    assert client.model.training


def test_calls_can_be_awaited() -> None:
    async def calls() -> None:
        client = client_of()
        sampling = await client.save_weights_and_get_sampling_client_async()
        assert await sampling is sampling.result() is sampling
        assert len((await sampling.sample_async([1, 2], 2, Params())).sequences) == 2
        assert len(await sampling.compute_logprobs_async([1, 2])) == 2
        assert sampling.get_base_model() == "local"

    asyncio.run(calls())


@pytest.mark.parametrize(
    ("params", "says"),
    [
        (Params(max_tokens=None), "max_tokens"),
        (Params(max_tokens=0), "max_tokens"),
        (Params(temperature=-1), "temperature=-1"),
        (Params(top_p=0), "top_p=0"),
        (Params(top_k=0), "top_k=0"),
    ],
)
def test_bad_parameters_raise(params: Params, says: str) -> None:
    with pytest.raises(OptionError, match=says):
        sampler().sample([1], 1, params)


def test_what_cannot_be_sampled() -> None:
    with pytest.raises(UnsupportedError, match="tokenizer"):
        sampler().sample([1], 1, Params(stop="end"))
    with pytest.raises(OptionError, match="num_samples"):
        sampler().sample([1], 0, Params())
    with pytest.raises(OptionError, match="kind"):
        client_of().save_weights_and_get_sampling_client(kind="other")  # type: ignore[arg-type]
    with pytest.warns(DeprecationWarning, match="name"):
        client_of().save_weights_and_get_sampling_client("name")
