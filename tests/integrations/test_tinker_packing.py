"""Contract: a model of transformers trains on packed sequences as on one after another, adapters included, and one that
cannot is refused.
"""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch

from tests import budgets
from tests.integrations.comparisons import Comparison, worst
from tests.integrations.models import ARCHITECTURES, build
from tests.integrations.packages import need

need("tinker", "transformers", "peft")

from tests.integrations.tinker_models import llama, supervised  # noqa: E402
from xloss.errors import OptionError, UnsupportedError  # noqa: E402
from xloss.tinker import AdamParams, TrainingClient, from_transformers  # noqa: E402


def _by_itself(model: Any, data: list[Any]) -> float:
    """The summed loss of a model's own forward on one sequence after another, with its gradients."""
    total = torch.zeros((), dtype=torch.float64)
    for datum in data:
        tokens = torch.tensor([datum.model_input.to_ints()])
        rows = model(input_ids=tokens, use_cache=False).logits[0].log_softmax(-1)
        targets = datum.loss_fn_inputs["target_tokens"].to_torch()[:, None]
        total = total - (rows.gather(1, targets)[:, 0] * datum.loss_fn_inputs["weights"].to_torch()).sum()
    total.backward()
    return float(total.detach())


def _packed(model: Any) -> tuple[float, float, float]:
    """Our loss, theirs, and the largest difference of a gradient."""
    theirs, of = copy.deepcopy(model), TrainingClient(from_transformers(model))
    data = supervised()
    got = of.forward_backward(data, "cross_entropy").result().metrics["loss:sum"]
    want = _by_itself(theirs, data)
    found = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    return got, want, worst(found, {name: p.grad for name, p in theirs.named_parameters() if p.grad is not None})


PACKS = [name for name in ARCHITECTURES if "falcon" not in name]
COMPARISONS = [
    Comparison(
        "xloss.tinker", "transformers", f"packed against one by one, {name}", lambda n=name: _packed(build(n))[2]
    )
    for name in PACKS
]


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("options", [{}, {"tie_word_embeddings": True}], ids=["untied", "tied"])
def test_packed_is_one_by_one(options: dict[str, Any], attention: str) -> None:
    got, want, difference = _packed(llama(torch.float64, attn_implementation=attention, **options))
    assert got == pytest.approx(want, rel=budgets.TINKER_PACKED)
    assert difference < budgets.TINKER_PACKED


@pytest.mark.parametrize("name", PACKS)
def test_architectures(name: str) -> None:
    """What they do to their logits is in the log-probs."""
    got, want, difference = _packed(build(name))
    assert got == pytest.approx(want, rel=budgets.TINKER_PACKED)
    assert difference < budgets.TINKER_PACKED


def _with_lora(*modules: str) -> Any:
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(1)
    return get_peft_model(llama(torch.float64), LoraConfig(target_modules=list(modules), init_lora_weights=False))


def test_adapters_are_trained_and_the_rest_is_not() -> None:
    got, want, difference = _packed(_with_lora("q_proj", "v_proj"))
    assert got == pytest.approx(want, rel=budgets.TINKER_PACKED)
    assert difference < budgets.TINKER_PACKED
    model = _with_lora("q_proj")
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    of = TrainingClient(from_transformers(model))
    of.forward_backward(supervised(), "cross_entropy")
    of.optim_step(AdamParams(learning_rate=0.1))
    changed = {name for name, p in model.named_parameters() if not torch.equal(p, before[name])}
    assert changed == {name for name in before if "lora" in name}


def test_models_that_would_be_wrong_raise() -> None:
    """An adapter on the head; logits that something unknown makes; sequences that see each other."""
    with pytest.raises(UnsupportedError, match="head"):
        from_transformers(_with_lora("lm_head"))
    with pytest.raises(OptionError, match="from_transformers"):
        TrainingClient(llama())
    with pytest.raises(OptionError, match="causal LM"):
        from_transformers(torch.nn.Linear(2, 2))
    doubled = llama()
    doubled.lm_head.register_forward_hook(lambda module, args, logits: 2 * logits)
    with pytest.raises(UnsupportedError, match="hook"):
        from_transformers(doubled)
    with pytest.raises(UnsupportedError, match="see each other"):  # its state-space layers
        from_transformers(build("falcon-h1 (logits multiplied)"))
    scaled, own = llama(), type(llama()).forward

    def twice(*args: Any, **kwargs: Any) -> Any:
        found = own(scaled, *args, **kwargs)
        found.logits = 2 * found.logits
        return found

    scaled.forward = twice
    with pytest.raises(UnsupportedError, match="something unknown"):
        from_transformers(scaled)
    leaking = llama()
    inner = leaking.model.forward
    leaking.model.forward = lambda **kwargs: inner(**{k: v for k, v in kwargs.items() if k != "position_ids"})
    with pytest.raises(UnsupportedError, match="see each other"):
        from_transformers(leaking)
