"""Contract: PEFT around an attached model, and ``attach`` around PEFT, have the gradients of PEFT alone: of adapters in
the backbone, of adapters on the head, of a head trained whole. A variant of LoRA on the head is refused, at attach or
when it trains.
"""

from __future__ import annotations

from collections.abc import Callable
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


ORDERS: dict[str, Callable[..., Any]] = {
    "before": lambda **options: wrapped(attach(build("llama")), **options),
    "after": lambda **options: attach(wrapped(build("llama"), **options)),
}
WHERE: dict[str, dict[str, Any]] = {
    "backbone": {},
    "head": {"target_modules": ["lm_head", "q_proj"]},
    "head, rank-stabilised": {"target_modules": ["lm_head"], "use_rslora": True, "lora_alpha": 5},
    "head trained whole": {"modules_to_save": ["lm_head"]},
}


def run(model: Any) -> Gradients:
    model.train()(**batch()).loss.backward()
    return gradients(model)


def compare(order: str, where: str) -> float:
    return worst(run(ORDERS[order](**WHERE[where])), run(wrapped(build("llama"), **WHERE[where])))


COMPARISONS = [
    Comparison("xloss.hf.attach", "peft", f"LoRA attached {order} it, {where}", partial(compare, order, where))
    for order in ORDERS
    for where in WHERE
]


@pytest.mark.parametrize("where", WHERE)
@pytest.mark.parametrize("order", ORDERS)
def test_adapters_have_their_gradients(order: str, where: str) -> None:
    assert compare(order, where) <= budgets.F32_GRADIENT
    model = ORDERS[order](**WHERE[where])
    assert is_attached(model) and model.train()(**batch()).logits is None
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


def test_switching_the_adapter_off_switches_its_head_off() -> None:
    model, data = ORDERS["before"](modules_to_save=["lm_head"]), batch()
    with torch.no_grad():
        model.base_model.model.lm_head.modules_to_save["default"].weight.mul_(0.5)
    with torch.no_grad(), model.disable_adapter():
        without = model.train()(**data).loss
    assert without != model(**data).loss


def test_a_variant_of_lora_on_the_head_raises() -> None:
    where = {"target_modules": ["lm_head"], "use_dora": True}
    with pytest.raises(UnsupportedError, match="not W"):
        attach(wrapped(build("llama"), **where))
    model = wrapped(attach(build("llama")), **where)
    with pytest.raises(UnsupportedError, match="not W"):
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
