"""Contract: what ``attach`` adds, what it leaves alone, how labels are read, and what it refuses."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tests import budgets
from tests.integrations.comparisons import worst
from tests.integrations.models import VOCAB, batch, build, gradients
from tests.integrations.packages import need

need("transformers")

from xloss import (  # noqa: E402
    CELossConfig,
    CELossContext,
    CELossContextInputItem,
    GRPOLossConfig,
    GRPOLossContext,
    RLLossContextInputItem,
    shift_labels,
)
from xloss.errors import OptionError, ShapeError, UnsupportedError  # noqa: E402
from xloss.hf import attach, detach, is_attached, logit_transform  # noqa: E402


def ce_context(labels: Tensor, cfg: CELossConfig | None = None) -> CELossContext:
    cfg = CELossConfig() if cfg is None else cfg
    items = [CELossContextInputItem(shifted_labels=shift_labels(labels))]
    return CELossContext(cfg, CELossContext.build_batches_loss_kwargs(items, cfg)[0])


def policy_context(data: dict[str, Tensor], **fields: Any) -> GRPOLossContext:
    labels = shift_labels(data["labels"])
    random = torch.Generator().manual_seed(1)
    cfg = GRPOLossConfig(policy_loss_cfg={"loss_type": "ppo"}, return_entropy=True, entropy_coef=0.01, **fields)
    item = RLLossContextInputItem(
        shifted_labels=labels,
        advantages=torch.randn(labels.shape, generator=random),
        old_logprobs=-5 + 0.1 * torch.randn(labels.shape, generator=random),
    )
    return GRPOLossContext(cfg, GRPOLossContext.build_batches_loss_kwargs([item], cfg)[0])


# -- what it adds


def test_any_loss_runs_inside_the_forward_with_the_models_own_transform() -> None:
    model, data = build("gemma 2 (softcap, tied)").train(), batch()
    inputs = {name: data[name] for name in ("input_ids", "attention_mask")}
    cap = model.config.final_logit_softcapping
    hidden = model.model(**inputs).last_hidden_state
    loss, info = policy_context(data, softcap=cap).forward(hidden, model.lm_head.weight)
    loss.backward()
    want = gradients(model)
    output = attach(model)(**inputs, loss_ctx=policy_context(data))
    output.loss.backward()
    assert worst(gradients(model), want) == 0
    assert output.loss.item() == loss.item() and output.info.plan.kind == info.plan.kind
    assert torch.equal(output.logprobs, info.logprobs) and torch.equal(output.entropy, info.entropy)
    assert output.metrics.keys() == info.metrics.keys() and output.logits is None


def test_eager_mode_returns_logits() -> None:
    model, data = build("granite (logits divided)").train(), batch()
    want = model(input_ids=data["input_ids"], attention_mask=data["attention_mask"]).logits
    context = ce_context(data.pop("labels"), CELossConfig(mode="eager"))
    got = attach(model)(**data, loss_ctx=context).logits
    live = context.loss_kwargs.shifted_labels != -100
    torch.testing.assert_close(got[live], want[live])


def test_a_context_serves_twice_and_stays_as_it_was() -> None:
    model, data = attach(build("cohere (logits scaled)")).train(), batch()
    context = ce_context(data.pop("labels"))
    first, second = (model(**data, loss_ctx=context).loss.item() for _ in range(2))
    assert first == second and context.loss_cfg.logit_scale == 1.0
    assert context.explain().kind == "one-pass"


def test_other_fields_of_the_output_stay() -> None:
    model, data = build("mixtral (aux loss)").train(), batch()
    want = model(**data, output_hidden_states=True)
    got = attach(model)(**data, output_hidden_states=True)
    assert isinstance(got, type(want)) and len(got.hidden_states) == len(want.hidden_states)
    assert got.aux_loss.item() == want.aux_loss.item()
    assert all(torch.equal(a, b) for a, b in zip(got.router_logits, want.router_logits, strict=True))


# -- what it leaves alone


def test_eval_generate_and_parameters_are_those_of_before(tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    model, data = build("llama, tied", torch.float32).eval(), batch()
    names, logits = list(model.state_dict()), model(**data).logits
    prompt = data["input_ids"][:1, :4]
    tokens = model.generate(prompt, max_new_tokens=5, do_sample=False)
    attach(model)
    assert list(model.state_dict()) == names
    output = model(**data)
    assert torch.equal(output.logits, logits) and output.loss is not None
    assert torch.equal(model.generate(prompt, max_new_tokens=5, do_sample=False), tokens)
    model.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert torch.equal(again(**data).logits, logits) and again.config.architectures == ["LlamaForCausalLM"]
    assert not is_attached(again)


def test_training_without_labels_gives_logits() -> None:
    model, data = attach(build("llama")).train(), batch()
    del data["labels"]
    assert model(**data).logits.shape == (3, 12, VOCAB)


def test_the_signature_names_what_it_took_and_loss_ctx() -> None:
    import inspect

    model = build("llama")
    before = list(inspect.signature(model.forward).parameters)
    after = inspect.signature(attach(model).forward).parameters
    assert [name for name in after if name != "loss_ctx"] == before and "loss_ctx" in after


def test_detach_undoes_it_and_attach_may_come_again() -> None:
    model = build("llama").train()
    assert not is_attached(model) and is_attached(attach(model))
    assert detach(model) is model and "forward" not in vars(model) and not is_attached(model)
    assert model(**batch()).logits is not None
    assert attach(model)(**batch()).logits is None
    with pytest.raises(OptionError, match="not attach's"):
        detach(detach(model))


def test_attach_again_takes_the_new_config() -> None:
    model, data = attach(build("llama")).train(), batch()
    plain = model(**data).loss.item()
    smooth = attach(model, CELossConfig(label_smoothing=0.5))(**data).loss.item()
    logits = detach(model)(**data).logits
    want = F.cross_entropy(logits[:, :-1].flatten(0, 1), data["labels"][:, 1:].flatten(), label_smoothing=0.5)
    assert smooth == pytest.approx(want.item(), rel=budgets.F64_STEP) and smooth != plain


def test_a_copy_trains_its_own_weights() -> None:
    model, data = attach(build("llama")).train(), batch()
    twin = copy.deepcopy(model)
    with torch.no_grad():
        twin.lm_head.weight.mul_(0.5)
    twin(**data).loss.backward()
    assert twin.lm_head.weight.grad is not None and model.lm_head.weight.grad is None


def test_a_pickled_model_comes_back_without_it(tmp_path: Path) -> None:
    model = attach(build("llama")).train()
    torch.save(model, tmp_path / "model.pt")
    found = torch.load(tmp_path / "model.pt", weights_only=False)
    assert not is_attached(found) and found(**batch()).logits is not None
    assert attach(found)(**batch()).logits is None


@pytest.mark.parametrize("reentrant", [False, True])
def test_gradient_checkpointing(reentrant: bool) -> None:
    model, data = build("llama").train(), batch()
    attach(model)(**data).loss.backward()
    want = gradients(model)
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    if reentrant:
        model.enable_input_require_grads()
    model(**data).loss.backward()
    assert worst(gradients(model), want) <= budgets.F64_STEP


@pytest.mark.slow
def test_torch_compile() -> None:
    model, data = attach(build("llama", torch.float32, num_hidden_layers=1)).train(), batch()
    model(**data).loss.backward()
    want = gradients(model)
    torch.compile(model, backend="eager")(**data).loss.backward()
    assert worst(gradients(model), want) <= budgets.FLOAT32_FLOOR


def test_nothing_is_left_on_the_model_after_an_error() -> None:
    model, data = attach(build("llama")).train(), batch()
    context = ce_context(data["labels"][:, :-1])
    with pytest.raises(ShapeError):
        model(input_ids=data["input_ids"], loss_ctx=context)
    assert "forward" not in vars(model.lm_head) and "_loss_function" not in vars(model)
    assert not model.lm_head._forward_hooks and model(**data).loss.isfinite()


# -- how labels are read


def loss_from_logits(model: nn.Module, inputs: dict[str, Tensor], labels: Tensor, total: float | None = None) -> float:
    with torch.no_grad():
        logits = model(**inputs).logits.flatten(0, 1)
    summed = F.cross_entropy(logits, labels.flatten(), reduction="sum")
    return float(summed / (total or int((labels != -100).sum())))


def test_num_items_in_batch_divides_the_sum() -> None:
    model, data = attach(build("llama")).train(), batch()
    shifted = shift_labels(data["labels"])
    inputs = {name: data[name] for name in ("input_ids", "attention_mask")}
    want = loss_from_logits(model, inputs, shifted, 123.0)
    for given in (123, torch.tensor(123)):
        assert model(**data, num_items_in_batch=given).loss.item() == pytest.approx(want, rel=budgets.F64_STEP)


def test_shift_labels_are_never_shifted_again() -> None:
    model, data = attach(build("llama")).train(), batch()
    shifted = torch.randint(0, VOCAB, (3, 12))
    inputs = {name: data[name] for name in ("input_ids", "attention_mask")}
    want = loss_from_logits(model, inputs, shifted)
    for labels in ({}, {"labels": data["labels"]}):
        got = model(**inputs, **labels, shift_labels=shifted).loss.item()
        assert got == pytest.approx(want, rel=budgets.F64_STEP)


@pytest.mark.parametrize("by", ["position_ids", "cu_seq_lens_q"])
def test_packed_sequences_do_not_predict_each_other(by: str) -> None:
    model = attach(build("llama")).train()
    ids, bounds = torch.randint(3, VOCAB, (1, 11)), torch.tensor([0, 4, 5, 11])
    positions = torch.cat([torch.arange(4), torch.arange(1), torch.arange(6)])[None]
    shifted = shift_labels(ids, bounds)
    assert (shifted == -100).sum() == 3
    inputs = {"input_ids": ids, "position_ids": positions}
    want = loss_from_logits(model, inputs, shifted)
    extra = {"cu_seq_lens_q": bounds.int()} if by == "cu_seq_lens_q" else {}
    assert model(**inputs, **extra, labels=ids).loss.item() == pytest.approx(want, rel=budgets.F64_STEP)


def test_positions_beside_an_attention_mask_are_not_packing() -> None:
    model, data = attach(build("llama")).train(), batch()
    inputs = {name: data[name] for name in ("input_ids", "attention_mask")}
    inputs["position_ids"] = 2 * torch.arange(12).expand(3, 12)
    want = loss_from_logits(model, inputs, shift_labels(data["labels"]))
    assert model(**inputs, labels=data["labels"]).loss.item() == pytest.approx(want, rel=budgets.F64_STEP)


def test_no_valid_label_gives_a_zero_that_can_be_differentiated() -> None:
    model, data = attach(build("llama")).train(), batch()
    loss = model(**{**data, "labels": torch.full_like(data["labels"], -100)}).loss
    loss.backward()
    assert loss.item() == 0 and all(not g.any() for g in gradients(model).values())


# -- what it refuses


def changed(model: nn.Module, after: Any) -> nn.Module:
    """The model with something done to its output in a subclass, as an unknown architecture would."""

    class Unknown(type(model)):  # type: ignore[misc]
        def forward(self, *args: Any, **kwargs: Any) -> Any:
            return after(super().forward(*args, **kwargs))

    model.__class__ = Unknown
    return model


def times(factor: float, field: str = "logits") -> Any:
    def after(output: Any) -> Any:
        output[field] = output[field] * factor
        return output

    return after


def banned(output: Any) -> Any:
    output.logits = output.logits.index_fill(-1, torch.tensor([5]), -1e4)
    return output


@pytest.mark.parametrize("after", [times(1.01), banned, times(0.5, "loss")], ids=["scaled", "banned token", "loss"])
def test_an_unknown_transform_raises(after: Any) -> None:
    model = changed(build("llama"), after)
    with pytest.raises(UnsupportedError, match="does not know"):
        attach(model)
    assert "forward" not in vars(model) and "forward" not in vars(model.model) and "forward" not in vars(model.lm_head)


@pytest.mark.parametrize(
    "name, field, value",
    [
        ("gemma 2 (softcap, tied)", "final_logit_softcapping", 2.0),
        ("cohere (logits scaled)", "logit_scale", 0.25),
        ("granite (logits divided)", "logits_scaling", 8.0),
    ],
)
def test_a_transform_that_the_config_hides_raises(name: str, field: str, value: float) -> None:
    """The model does it and the known field does not say so: what an architecture with a new name for it looks like."""
    model = build(name)
    assert getattr(model.config, field) == value

    class Hidden(type(model.config)):  # type: ignore[misc]
        def get_text_config(self, *args: Any, **kwargs: Any) -> Any:
            other = copy.copy(self)
            other.__class__ = Hidden.__mro__[1]
            vars(other)[field] = None  # past the validation
            return other

    model.config.__class__ = Hidden
    with pytest.raises(UnsupportedError, match="does not know"):
        attach(model)


def test_a_field_that_does_nothing_raises() -> None:
    """A known name in the config of a model that does not act on it."""
    model = build("llama")
    model.config.logit_scale = 0.5
    with pytest.raises(UnsupportedError, match="does not know"):
        attach(model)


def test_hidden_states_changed_before_the_head_raise() -> None:
    class Scaled(type(build("llama"))):  # type: ignore[misc]
        def forward(self, input_ids: Tensor, labels: Tensor | None = None, **kwargs: Any) -> Any:
            logits = self.lm_head(self.model(input_ids=input_ids).last_hidden_state / 2)
            from transformers.modeling_outputs import CausalLMOutputWithPast

            return CausalLMOutputWithPast(loss=self.loss_function(logits, labels, VOCAB), logits=logits)

    model = build("llama")
    model.__class__ = Scaled
    with pytest.raises(UnsupportedError, match="between its backbone and its head"):
        attach(model)


def test_the_check_reads_no_weight_and_no_random_number() -> None:
    with torch.device("meta"):
        model = build("gemma 2 (softcap, tied)", torch.bfloat16)
    state = torch.random.get_rng_state()
    assert logit_transform(attach(model)).softcap == 2.0
    assert torch.equal(torch.random.get_rng_state(), state)


def test_factors_that_are_no_factor_raise() -> None:
    model = build("cohere (logits scaled)")
    for value in (0.0, -1.0, "inv_sqrt_d_model"):
        vars(model.config)["logit_scale"] = value  # past the validation
        with pytest.raises(UnsupportedError, match="positive number"):
            attach(model)


def test_encoder_decoders_and_other_things_raise() -> None:
    from transformers import AutoModelForSeq2SeqLM, T5Config

    config = T5Config(vocab_size=VOCAB, d_model=16, d_kv=8, d_ff=16, num_layers=1, num_heads=2)
    with pytest.raises(UnsupportedError, match="encoder-decoder"):
        attach(AutoModelForSeq2SeqLM.from_config(config))
    with pytest.raises(UnsupportedError, match="causal language model"):
        attach(nn.Linear(2, 2))
    with pytest.raises(UnsupportedError, match="no head"):
        attach(build("llama").model)


def test_heads_that_are_more_than_a_product_raise() -> None:
    class Doubling(nn.Linear):
        def forward(self, input: Tensor) -> Tensor:
            return 2 * super().forward(input)

    model = build("llama")
    model.lm_head.__class__ = Doubling
    with pytest.raises(OptionError, match="forward of its own"):
        attach(model)
    model = build("llama")
    model.lm_head.forward = lambda x: 2 * x
    with pytest.raises(UnsupportedError, match="forward of its own"):
        attach(model)


def test_contradictions_raise() -> None:
    model, data = attach(build("gemma 2 (softcap, tied)")).train(), batch()
    with pytest.raises(OptionError, match="both given"):
        model(**data, loss_ctx=ce_context(data["labels"]))
    labels = data["labels"]
    inputs = {name: data[name] for name in ("input_ids", "attention_mask")}
    with pytest.raises(OptionError, match=r"softcap=3\.0 in the loss config, but the model's own is 2\.0"):
        model(**inputs, loss_ctx=ce_context(labels, CELossConfig(softcap=3.0)))
    with pytest.raises(OptionError, match="return_dict"):
        model(**data, return_dict=False)
    with pytest.raises(OptionError, match="ignore_index"):
        model(**data, ignore_index=0)
    with pytest.raises(OptionError, match="loss context"):
        model(**inputs, loss_ctx="cross_entropy")
    with pytest.raises(OptionError, match="loss_reduction"):
        attach(model, CELossConfig(loss_reduction="sum"))
    model.loss_function = lambda *args, **kwargs: torch.zeros(())
    with pytest.raises(UnsupportedError, match="loss_function"):
        model(**data)
