"""Contract: PEFT around an attached model, and ``attach`` around PEFT, have the adapters' gradients of PEFT alone; an
adapter on the head is refused, at attach or when it trains.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch

from tests import budgets
from tests.integrations.comparisons import Comparison, Gradients, worst
from tests.integrations.models import batch, build, gradients
from tests.integrations.packages import need

need("transformers", "peft")

from peft import LoraConfig, PromptTuningConfig, TaskType, get_peft_model  # noqa: E402

from xloss import CELossConfig, CELossContext, CELossContextInputItem, shift_labels  # noqa: E402
from xloss.errors import ShapeError, UnsupportedError  # noqa: E402
from xloss.hf import attach, detach, is_attached  # noqa: E402


def wrapped(model: Any, **options: Any) -> Any:
    torch.manual_seed(3)
    targets = {"target_modules": ["q_proj", "v_proj", "up_proj"], **options}
    return get_peft_model(model, LoraConfig(r=2, init_lora_weights=False, **targets), autocast_adapter_dtype=False)


ORDERS = {
    "before": lambda: wrapped(attach(build("llama"))),
    "after": lambda: attach(wrapped(build("llama"))),
}


def run(model: Any) -> Gradients:
    model.train()(**batch()).loss.backward()
    return gradients(model)


def compare(order: str) -> float:
    return worst(run(ORDERS[order]()), run(wrapped(build("llama"))))


COMPARISONS = [
    Comparison("xloss.hf.attach", "peft", f"LoRA, attached {order} it", partial(compare, order)) for order in ORDERS
]


@pytest.mark.parametrize("order", ORDERS)
def test_adapters_have_their_gradients(order: str) -> None:
    assert compare(order) <= budgets.F32_GRADIENT
    model = ORDERS[order]()
    assert is_attached(model) and all("lora" in name for name in run(model))
    assert detach(model) is model and not is_attached(model)


@pytest.mark.parametrize("order", ORDERS)
def test_a_context_goes_through_peft(order: str) -> None:
    model, data = ORDERS[order]().train(), batch()
    want = run(model)
    cfg = CELossConfig()
    items = [CELossContextInputItem(shifted_labels=shift_labels(data.pop("labels")))]
    (kwargs,) = CELossContext.build_batches_loss_kwargs(items, cfg)
    output = model(**data, loss_ctx=CELossContext(cfg, kwargs))
    output.loss.backward()
    assert output.logits is None and worst(gradients(model), want) <= budgets.F64_STEP


def test_names_merging_and_switching_off_are_those_of_peft() -> None:
    model, plain = ORDERS["after"]().eval(), wrapped(build("llama")).eval()
    assert list(model.state_dict()) == list(plain.state_dict())
    data = batch()
    with torch.no_grad(), model.disable_adapter(), plain.disable_adapter():
        assert torch.equal(model(**data).logits, plain(**data).logits)
    merged = model.merge_and_unload()
    assert is_attached(merged) and merged.train()(**data).loss.isfinite()


@pytest.mark.parametrize("where", [{"target_modules": ["lm_head", "q_proj"]}, {"modules_to_save": ["lm_head"]}])
def test_an_adapter_on_the_head_raises(where: dict[str, Any]) -> None:
    with pytest.raises(UnsupportedError, match="PEFT adapter"):
        attach(wrapped(build("llama"), **where))
    model = wrapped(attach(build("llama")), **where)
    with pytest.raises(UnsupportedError, match="PEFT adapter"):
        model.train()(**batch())


def test_prompt_tuning() -> None:
    """PEFT lengthens the labels with the sequence; a context's labels cannot follow, and that raises."""

    def tuned(model: Any) -> Any:
        torch.manual_seed(3)
        return get_peft_model(model, PromptTuningConfig(task_type=TaskType.CAUSAL_LM, num_virtual_tokens=3)).double()

    assert worst(run(tuned(attach(build("llama")))), run(tuned(build("llama")))) <= budgets.F32_GRADIENT
    model, data = tuned(attach(build("llama"))).train(), batch()
    cfg = CELossConfig()
    items = [CELossContextInputItem(shifted_labels=shift_labels(data.pop("labels")))]
    (kwargs,) = CELossContext.build_batches_loss_kwargs(items, cfg)
    with pytest.raises(ShapeError):
        model(**data, loss_ctx=CELossContext(cfg, kwargs))
