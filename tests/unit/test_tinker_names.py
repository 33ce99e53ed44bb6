"""Contract of ``loss_fn``: every loss of the catalog that needs no second head or critic runs by its name."""

from __future__ import annotations

import pytest
import torch

from tests import budgets
from tests.unit.tinker_data import LENGTHS, TINKER, VOCAB, client_of, grads, ints, rollouts, same, supervised, want
from xloss import PreferenceLossConfig
from xloss.losses.catalog import catalog
from xloss.tinker import Datum, TrainingClient, loss_names

HERE = {name: entry for name, entry in catalog().items() if entry.family != "value" and name != "mtp"}
REQUIRED = {
    "vanilla": {"cliprange_low": 0.2, "cliprange_high": 0.2},
    "kto": {"kl": 0.0},
    "bco": {"reward_shift": 0.0},
}


def inputs_for(name: str, client: TrainingClient) -> list[Datum]:
    """Four sequences with all that a loss reads, the sampler a little way from the model."""
    family = HERE[name].family
    preference = PreferenceLossConfig(loss_type=name) if family == "preference" else None
    data = rollouts() if family == "policy" else supervised()
    plain = [Datum(d.model_input, {"target_tokens": d.loss_fn_inputs["target_tokens"]}) for d in data]
    near = client.forward(plain, "cross_entropy").result().loss_fn_outputs
    for i, (datum, out) in enumerate(zip(data, near, strict=True)):
        inputs, logprobs = datum.loss_fn_inputs, out["logprobs"] + 0.1 * torch.randn(LENGTHS[i])
        if family == "policy":
            inputs |= {"logprobs": logprobs, "old_logprobs": logprobs + 0.05, "ref_logprobs": logprobs - 0.1}
            inputs |= {"group_ids": i // 2, "rewards": float(i % 2)}
        elif family == "distillation":
            inputs |= {"teacher_logits": torch.randn(LENGTHS[i], VOCAB)}
        elif preference is not None:
            inputs["weights"] = torch.ones(LENGTHS[i])
            inputs |= {"ref_logprobs": logprobs} if preference.needs_reference else {}
            inputs |= {} if preference.paired else {"preferred": bool(i % 2)}
    return data


@pytest.mark.parametrize("name", HERE)
def test_every_loss_of_the_catalog_runs(name: str) -> None:
    """By its own name. A small step along the gradient changes what ``forward`` reports by its slope, but where the
    formula holds a part constant."""
    client = client_of()
    data, config = inputs_for(name, client), REQUIRED.get(name)
    client.forward_backward(data, name, config)
    gradient = grads(client.model)
    size = sum(float((g * g).sum()) for g in gradient) ** 0.5
    assert size > 0
    seen = []
    for side in (1, -2):
        with torch.no_grad():
            for p, g in zip(client.model.parameters(), gradient, strict=True):
                p += side * 1e-6 / size * g
        seen.append(client.forward(data, name, config).result().metrics["loss:sum"])
    if "sg(" not in HERE[name].formula and name != "gspo":  # Tinker's gspo is gspo_token
        assert (seen[0] - seen[1]) / 2e-6 == pytest.approx(size, rel=budgets.FIGURE_LIMIT)


def test_names() -> None:
    names = loss_names()
    assert {*TINKER, "cross_entropy", "gspo", *HERE, "dapo", "trl/dr_grpo"} <= set(names)
    assert not {"custom", "stable_reinforce", "mtp", "trl/ppo"} & set(names)


def test_a_preset_keeps_its_reduction() -> None:
    client, data = client_of(), rollouts()
    total = client.forward(data, "ppo").result().metrics["loss:sum"]
    config = {"policy_loss_cfg": {"cliprange_high": 0.2}}
    mean = client.forward(data, "dapo", config).result().metrics["loss:sum"]
    assert mean == pytest.approx(total / sum(LENGTHS), rel=budgets.FIGURE_F64)
    summed = client.forward(data, "dapo", config | {"loss_reduction": "sum"}).result().metrics["loss:sum"]
    assert summed == pytest.approx(total, rel=budgets.FIGURE_F64)


@pytest.mark.parametrize("name", ["topk_kd", "topk_kd_tail", "topk_kd_renormalized"])
def test_log_probs_beside_a_teachers(name: str) -> None:
    """The head looks up a teacher's tokens too; those of the targets come out, also at weight 0."""
    client, data = client_of(), supervised()
    for datum, length in zip(data, LENGTHS, strict=True):
        teacher = torch.randn(length, 4).double().log_softmax(-1)
        datum.loss_fn_inputs.update(teacher_topk_ids=ints(length, 4), teacher_topk_logprobs=teacher)
        datum.loss_fn_inputs["weights"][:1] = 0
    out = client.forward_backward(data, name).result()
    assert out.metrics["loss:sum"] != 0
    same([x["logprobs"] for x in out.loss_fn_outputs], want(client.model, data, lambda lp, d: lp)[0])
