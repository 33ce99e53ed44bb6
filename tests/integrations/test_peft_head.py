"""PEFT's layers on a head, through ``head_weight``, against PEFT's own forward.

Contract: loss and gradients of every trained tensor are those of cross-entropy on the logits of PEFT's forward, for
LoRA of several kinds, several adapters at once, with a bias, on a frozen or trained base, disabled, merged, and for a
head trained by ``modules_to_save``; dropout is drawn once, in training alone. What is not ``W + s B A`` is refused.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tests import budgets
from tests.integrations.packages import need

need("peft")

from peft import LoraConfig, get_peft_model  # noqa: E402

import xloss  # noqa: E402
from xloss import CELossConfig, CELossContextInputItem, LoraWeight  # noqa: E402
from xloss.errors import OptionError, UnsupportedError  # noqa: E402

V, H, T = 37, 16, 12


class Model(nn.Module):
    def __init__(self, bias: bool = False) -> None:
        super().__init__()
        self.embed = nn.Embedding(V, H)
        self.block = nn.Linear(H, H)
        self.lm_head = nn.Linear(H, V, bias=bias)

    def forward(self, ids: Tensor, ctx: Any = None) -> Tensor:
        hidden = torch.tanh(self.block(self.embed(ids)))
        if ctx is None:
            logits: Tensor = self.lm_head(hidden)
            return logits
        with xloss.head_weight(self.lm_head) as head:
            loss: Tensor = ctx.forward(hidden, *head)[0]
        return loss


def adapted(dtype: torch.dtype = torch.float64, **options: Any) -> Any:
    """A model with LoRA on block and head, its B matrices not 0."""
    torch.manual_seed(3)
    options = {"target_modules": ["block", "lm_head"], "r": 3, "lora_alpha": 5} | options
    model = get_peft_model(Model("bias" in options).to(dtype), LoraConfig(**options))
    return filled(model)


def filled(model: Any) -> Any:
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.normal_(std=0.3)
    return model


def inner(model: Any) -> Model:
    found: Model = model.base_model.model
    return found


def check(model: Any, dtype: torch.dtype = torch.float64, **fields: Any) -> None:
    """One step through PEFT's forward, one through ours."""
    g = torch.Generator().manual_seed(1)
    ids, labels = (torch.randint(0, V, (1, T), generator=g) for _ in range(2))
    labels[0, :3] = -100
    cfg = CELossConfig(mode="chunk", chunk_size=5, **fields)
    (kwargs,) = cfg.loss_ctx_cls.build_batches_loss_kwargs([CELossContextInputItem(shifted_labels=labels)], cfg)
    found = []
    for ours in (False, True):
        torch.manual_seed(5)  # of dropout
        model.zero_grad()
        if ours:
            loss = model(ids, ctx=cfg.loss_ctx_cls(cfg, kwargs))
        else:
            loss = F.cross_entropy(model(ids).flatten(0, 1), labels.flatten())
        loss.backward()
        found.append((loss.detach(), {n: p.grad for n, p in model.named_parameters() if p.grad is not None}))
    (want, theirs), (got, grads) = found
    budgets.assert_relative("loss", got, want, budgets.F32_LOSS)
    assert grads.keys() == theirs.keys()
    for name, grad in grads.items():
        budgets.assert_relative(name, grad, theirs[name], budgets.F32_GRADIENT)


@pytest.mark.parametrize("plan", ["auto", "two_pass"])
@pytest.mark.parametrize(
    "options",
    [{}, {"use_rslora": True}, {"bias": "all"}, {"lora_bias": True}, {"lora_bias": True, "bias": "lora_only"}],
    ids=str,
)
def test_lora(options: dict[str, Any], plan: str) -> None:
    model = adapted(**options)
    check(model, plan=plan)
    assert any("lm_head.lora_A" in n for n, p in model.named_parameters() if p.grad is not None)


def test_the_base_may_train_too() -> None:
    model = adapted()
    inner(model).lm_head.base_layer.weight.requires_grad_()  # type: ignore[union-attr]
    check(model)


def test_several_adapters() -> None:
    model = adapted()
    model.add_adapter("other", LoraConfig(target_modules=["lm_head"], r=2, lora_alpha=1))
    model.base_model.set_adapter(["default", "other"])
    check(filled(model))
    with xloss.head_weight(inner(model).lm_head) as head:
        assert isinstance(head.weight, LoraWeight) and head.weight.rank == 5
    model.base_model.set_adapter("other")
    check(model)


@pytest.mark.parametrize("how", ["disabled", "merged"])
def test_without_its_adapters(how: str) -> None:
    model = adapted()
    if how == "merged":
        inner(model).embed.weight.requires_grad_()
        model.merge_adapter()
        check(model)
        return
    with model.disable_adapter():
        inner(model).lm_head.base_layer.weight.requires_grad_()  # type: ignore[union-attr]
        check(model)
        with xloss.head_weight(inner(model).lm_head) as head:
            assert head.weight is inner(model).lm_head.base_layer.weight


def test_modules_to_save() -> None:
    model = adapted(target_modules=["block"], modules_to_save=["lm_head"])
    check(model)
    with model.disable_adapter(), xloss.head_weight(inner(model).lm_head) as head:
        assert head.weight is inner(model).lm_head.original_module.weight


def test_dropout_of_the_adapter() -> None:
    """Every live token is drawn for: with no token ignored the numbers are those PEFT's forward draws."""
    model = adapted(target_modules=["lm_head"], lora_dropout=0.5)
    ids = torch.arange(T).unsqueeze(0)
    cfg = CELossConfig(mode="chunk", chunk_size=5)
    (kwargs,) = cfg.loss_ctx_cls.build_batches_loss_kwargs([CELossContextInputItem(shifted_labels=ids)], cfg)
    losses = {}
    for training in (True, False):
        model.train(training)
        torch.manual_seed(5)
        want = F.cross_entropy(model(ids).flatten(0, 1), ids.flatten())
        torch.manual_seed(5)
        losses[training] = model(ids, ctx=cfg.loss_ctx_cls(cfg, kwargs))
        budgets.assert_relative("loss", losses[training], want, budgets.F32_LOSS)
    assert losses[True] != losses[False]


def test_float32_adapters_of_a_low_precision_model() -> None:
    model = adapted(torch.bfloat16)
    for name, parameter in model.named_parameters():
        assert ("lora_" in name) == (parameter.dtype == torch.float32)  # PEFT's own choice
    ids = torch.arange(T).unsqueeze(0)
    cfg = CELossConfig(mode="chunk")
    (kwargs,) = cfg.loss_ctx_cls.build_batches_loss_kwargs([CELossContextInputItem(shifted_labels=ids)], cfg)
    model(ids, ctx=cfg.loss_ctx_cls(cfg, kwargs)).backward()
    grads = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None and "lm_head" in n}
    model.double().zero_grad()
    F.cross_entropy(model(ids).flatten(0, 1), ids.flatten()).backward()
    for name, parameter in model.named_parameters():
        if name in grads:
            assert grads[name].dtype == torch.float32
            assert parameter.grad is not None
            relative = 4 * budgets.gradient_floor(torch.bfloat16)  # the block before it is in bf16 too
            budgets.assert_relative(name, grads[name], parameter.grad, relative)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"use_dora": True}, "DoRA|Dora"),
        ({"target_modules": ["embed"]}, "of PEFT around a Embedding"),
        ({"trainable_token_indices": {"embed": [1]}}, "TrainableTokens"),
    ],
    ids=["dora", "embedding", "tokens"],
)
def test_refused(options: dict[str, Any], message: str) -> None:
    model = inner(adapted(**options))
    head = model.lm_head if "use_dora" in options else model.embed
    with pytest.raises(UnsupportedError, match=message), xloss.head_weight(head):
        pass


def test_disabled_and_merged_at_once() -> None:
    model = adapted()
    model.merge_adapter()
    refused = pytest.raises(UnsupportedError, match="unmerge")
    with model.disable_adapter(), refused, xloss.head_weight(inner(model).lm_head):
        pass


def test_a_head_that_is_more_than_a_product() -> None:
    class Scaled(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            return 2 * super().forward(x)

    for module, message in ((Scaled(H, V), "a forward of its own"), (nn.Sequential(nn.Linear(H, V)), "takes the head")):
        with pytest.raises(OptionError, match=message), xloss.head_weight(module):
            pass
