"""Contract: an attached model of each architecture has the loss and all gradients of its own forward: with labels alone
and with a ``loss_ctx``, in float64 against its logits, and against its own loss, which Transformers takes in float32.
"""

from __future__ import annotations

from functools import partial

import pytest
import torch
from torch.nn import functional as F

from tests import budgets
from tests.integrations.comparisons import Comparison, Gradients, worst
from tests.integrations.models import ARCHITECTURES, UNPACKED, batch, build, gradients
from tests.integrations.packages import need

need("transformers")

from xloss import CELossConfig, CELossContext, CELossContextInputItem, shift_labels  # noqa: E402
from xloss.hf import attach  # noqa: E402

Run = tuple[float, Gradients]
ALL = [*ARCHITECTURES, *UNPACKED]


def own(name: str) -> Run:
    """The model's own loss."""
    model = build(name).train()
    loss = model(**batch()).loss
    loss.backward()
    return loss.item(), gradients(model)


def from_logits(name: str) -> Run:
    """Cross-entropy of the model's logits in float64, and its auxiliary loss as it weighs it."""
    model, data = build(name).train(), batch()
    labels = data.pop("labels")
    output = model(**data)
    loss = F.cross_entropy(output.logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())
    if getattr(output, "aux_loss", None) is not None:
        loss = loss + model.config.router_aux_loss_coef * output.aux_loss
    loss.backward()
    return loss.item(), gradients(model)


def attached(name: str, by_context: bool) -> Run:
    model, data = attach(build(name)).train(), batch()
    if by_context:
        items = [CELossContextInputItem(shifted_labels=shift_labels(data.pop("labels")))]
        cfg = CELossConfig()
        (kwargs,) = CELossContext.build_batches_loss_kwargs(items, cfg)
        output = model(**data, loss_ctx=CELossContext(cfg, kwargs))
    else:
        output = model(**data)
    assert output.logits is None and output.logprobs.shape == data["input_ids"].shape
    output.loss.backward()
    return output.loss.item(), gradients(model)


def compare(name: str) -> float:
    return worst(attached(name, by_context=False)[1], own(name)[1])


COMPARISONS = [
    Comparison("xloss.hf.attach", "transformers", f"forward and backward, {name}", partial(compare, name))
    for name in ALL
]


@pytest.mark.parametrize("by_context", [False, True], ids=["labels", "loss_ctx"])
@pytest.mark.parametrize("name", ALL)
def test_equals_the_models_own_logits_in_float64(name: str, by_context: bool) -> None:
    (got, got_grads), (want, want_grads) = attached(name, by_context), from_logits(name)
    assert got == pytest.approx(want, rel=budgets.F64_STEP)
    assert worst(got_grads, want_grads) <= budgets.F64_STEP


@pytest.mark.parametrize("name", ALL)
def test_equals_the_models_own_loss(name: str) -> None:
    (got, got_grads), (want, want_grads) = attached(name, by_context=False), own(name)
    assert got == pytest.approx(want, rel=budgets.F32_LOSS)
    assert worst(got_grads, want_grads) <= budgets.F32_GRADIENT


def test_auxiliary_losses_are_part_of_it() -> None:
    with_aux = attached("mixtral (aux loss)", by_context=True)[0]
    model, data = attach(build("mixtral (aux loss)", output_router_logits=False)).train(), batch()
    assert with_aux - model(**data).loss.item() > 0.05


def test_float32() -> None:
    """In the dtype that people train in."""
    model, data = build("qwen3", torch.float32).train(), batch()
    model(**data).loss.backward()
    want = gradients(model)
    attach(model)(**data).loss.backward()
    assert worst(gradients(model), want) <= budgets.FLOAT32_FLOOR


def test_autocast_keeps_bfloat16_products() -> None:
    """Under autocast the head's product is in bfloat16, as its own would be, and the gradients are float32's."""
    model, data = build("llama", torch.float32).train(), batch()
    gold = from_logits("llama")[1]
    with torch.autocast("cpu", torch.bfloat16):
        model(**data).loss.backward()
    theirs = gradients(model)
    attach(model)
    with torch.autocast("cpu", torch.bfloat16):
        model(**data).loss.backward()
    ours = gradients(model)
    assert worst(ours, gold) <= budgets.THREE_WAY_FACTOR * worst(theirs, gold)
