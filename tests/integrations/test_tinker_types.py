"""Contract: tinker's types go in and come out, as its own code reads them, and what its SDK computes itself is ours.

The SDK's path for a custom loss is run on our client as its service: forward, its function of the log-probs, and a
cross-entropy weighted by its gradient. The gradients must be those of our one forward and one backward.
"""

from __future__ import annotations

import inspect
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from tests import budgets
from tests.integrations.comparisons import Comparison, worst
from tests.integrations.packages import need

need("tinker", "tinker_cookbook", "transformers")

import tinker  # noqa: E402
from tinker.lib.chunked_fwdbwd_helpers import combine_fwd_bwd_output_results  # noqa: E402
from tinker.lib.public_interfaces import SamplingClient as TheirSamplingClient  # noqa: E402
from tinker.lib.public_interfaces import TrainingClient as TheirTrainingClient  # noqa: E402
from tinker_cookbook.preference.train_dpo import compute_dpo_loss  # noqa: E402

from tests.integrations.tinker_models import LENGTHS, NAME, make_model, rollouts, tokenizer  # noqa: E402
from xloss.errors import OptionError, UnsupportedError  # noqa: E402
from xloss.tinker import AdamParams, SamplingClient, TrainingClient  # noqa: E402


def client(**options: Any) -> TrainingClient:
    return TrainingClient(make_model(NAME, None), **options)


def gradients(of: TrainingClient) -> dict[str, Tensor]:
    return {name: p.grad for name, p in of.model.named_parameters() if p.grad is not None}


# -- the SDK's own code ------------------------------------------------------------------------------------------------


def variance(data: list[Any], logprobs: list[Tensor]) -> tuple[Tensor, dict[str, float]]:
    return torch.cat(logprobs).var(), {"sequences": float(len(data))}


def dpo(data: list[Any], logprobs: list[Tensor]) -> tuple[Tensor, dict[str, float]]:
    sums = [lp.sum() for lp in logprobs]
    return compute_dpo_loss(sums[::2], sums[1::2], [torch.tensor(-9.0)] * 2, [torch.tensor(-8.0)] * 2, dpo_beta=0.1)


def _custom(fn: Any) -> tuple[Any, Any, float]:
    """Outputs of ours and of the SDK's code on our service, and the largest difference of a gradient."""
    one, two, data = client(), client(), rollouts()
    ours = one.forward_backward_custom(data, fn).result()
    targets = [tinker.Datum(d.model_input, _targets(d)) for d in data]  # a request each, as the SDK cuts large data
    seen = combine_fwd_bwd_output_results([two.forward([d], "cross_entropy").result() for d in targets])
    linear = TheirTrainingClient._compute_custom_loss(data, fn, seen)
    for datum in linear.data:
        two.forward_backward([datum], "cross_entropy").result()
    return ours, linear, worst(gradients(one), gradients(two))


def _targets(datum: Any) -> dict[str, Any]:
    """As the SDK sends them to its service: weights of 0."""
    targets = datum.loss_fn_inputs["target_tokens"]
    return {"target_tokens": targets, "weights": [0.0] * len(targets.data)}


COMPARISONS = [
    Comparison("xloss.tinker", "tinker", "custom loss in the SDK's two passes, variance", lambda: _custom(variance)[2]),
    Comparison(
        "xloss.tinker", "tinker", "custom loss in the SDK's two passes, the cookbook's DPO", lambda: _custom(dpo)[2]
    ),
]


@pytest.mark.parametrize("fn", [variance, dpo])
def test_custom_loss_as_the_sdk_computes_it(fn: Any) -> None:
    ours, theirs, difference = _custom(fn)
    assert difference < budgets.TINKER_DOOR
    assert ours.metrics["loss:sum"] == pytest.approx(theirs.loss_sum, rel=budgets.TINKER_DOOR)
    assert {name: ours.metrics[name] for name in theirs.metrics} == pytest.approx(
        theirs.metrics, rel=budgets.TINKER_DOOR
    )


def test_results_of_parts_join_by_the_sdks_rules() -> None:
    of, data = client(), rollouts()
    whole = of.forward(data, "ppo").result()
    parts = combine_fwd_bwd_output_results([of.forward(d, "ppo").result() for d in (data[:1], data[1:])])
    assert parts.metrics["loss:sum"] == pytest.approx(whole.metrics["loss:sum"], rel=budgets.TINKER_DOOR)
    for a, b in zip(parts.loss_fn_outputs, whole.loss_fn_outputs, strict=True):
        np.testing.assert_allclose(a["logprobs"].to_numpy(), b["logprobs"].to_numpy(), rtol=budgets.TINKER_DOOR)


@pytest.mark.parametrize("name", ["forward", "forward_backward", "optim_step", "save_state", "get_tokenizer"])
def test_calls_have_the_sdks_parameters(name: str) -> None:
    ours, theirs = (inspect.signature(getattr(c, name)).parameters for c in (TrainingClient, TheirTrainingClient))
    assert list(ours) == list(theirs)
    assert [(p.kind, p.default) for p in ours.values()] == [(p.kind, p.default) for p in theirs.values()]


def test_asynchronous_calls_are_there() -> None:
    for ours, theirs in ((TrainingClient, TheirTrainingClient), (SamplingClient, TheirSamplingClient)):
        for name in dir(ours):
            if name.endswith("_async") and name != "result_async":
                assert hasattr(theirs, name), name
    assert {"forward_backward_async", "optim_step_async"} <= set(dir(TrainingClient))


def test_adam_has_the_sdks_defaults() -> None:
    assert AdamParams().__dict__ == tinker.AdamParams().model_dump()


# -- types -------------------------------------------------------------------------------------------------------------


def test_results_are_the_sdks_types(tmp_path: Any) -> None:
    of = client(checkpoint_dir=tmp_path)
    out = of.forward_backward(rollouts(), "importance_sampling").result()
    assert isinstance(out, tinker.ForwardBackwardOutput)
    assert [x["logprobs"].shape for x in out.loss_fn_outputs] == [[n] for n in LENGTHS]
    assert all(isinstance(x["logprobs"], tinker.TensorData) for x in out.loss_fn_outputs)
    assert isinstance(of.optim_step(tinker.AdamParams(learning_rate=1e-3)).result(), tinker.OptimStepResponse)
    assert isinstance(of.save_state("x").result(), tinker.types.SaveWeightsResponse)
    assert isinstance(of.save_weights_for_sampler("x").result(), tinker.types.SaveWeightsForSamplerResponse)
    assert isinstance(of.get_info(), tinker.types.GetInfoResponse)
    assert of.get_tokenizer().encode("ab", add_special_tokens=False) == tokenizer().encode(
        "ab", add_special_tokens=False
    )
    sampling = of.save_weights_and_get_sampling_client()
    params = tinker.SamplingParams(max_tokens=3, stop=["zz"])
    response = sampling.sample(tinker.ModelInput.from_ints([5, 6]), 2, params, include_prompt_logprobs=True).result()
    assert isinstance(response, tinker.SampleResponse)
    assert [len(s.tokens) for s in response.sequences] == [len(s.logprobs or []) for s in response.sequences]
    assert response.prompt_logprobs is not None and response.prompt_logprobs[0] is None
    assert isinstance(
        client(returns="torch").forward(rollouts(), "ppo").result().loss_fn_outputs[0]["logprobs"], Tensor
    )


def test_sparse_targets_are_those_they_stand_for() -> None:
    """``[N, K]`` that are mostly 0 travel as CSR."""
    targets, weights = torch.zeros(6, 8, dtype=torch.int64), torch.zeros(6, 8)
    targets[1, :2], weights[1, :2] = torch.tensor([4, 9]), torch.tensor([0.3, 0.7])
    made = tinker.ModelInput.from_ints([5, 6, 7, 8, 9, 10])
    sparse = tinker.Datum(made, {"target_tokens": targets, "weights": weights})
    assert sparse.loss_fn_inputs["weights"].sparse_crow_indices is not None
    dense = tinker.Datum(made, {"target_tokens": targets.numpy(), "weights": weights.numpy()})
    one, two = client(), client()
    a, b = (c.forward_backward([d], "cross_entropy").result() for c, d in ((one, sparse), (two, dense)))
    assert a.metrics["loss:sum"] == b.metrics["loss:sum"] != 0
    assert a.loss_fn_outputs[0]["logprobs"].shape == [6, 8]
    assert worst(gradients(one), gradients(two)) == 0


def test_what_is_not_text_or_adam_raises() -> None:
    of, (datum, *_) = client(), rollouts()
    image = tinker.types.ImageChunk(data=b"x", format="png", expected_tokens=1)
    seen = tinker.Datum(tinker.ModelInput(chunks=[image, *datum.model_input.chunks]), datum.loss_fn_inputs)
    with pytest.raises(UnsupportedError, match="ImageChunk"):
        of.forward([seen], "ppo")
    of.forward_backward([datum], "ppo")
    with pytest.raises(OptionError, match="DimuonParams"):
        of.optim_step(tinker.types.DimuonParams(learning_rate=0.1))
