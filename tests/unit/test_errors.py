"""Bad input.

Contract: every misuse listed here raises before any work, with the class that `except` would look for, a stable code,
and a message that names the argument, what was given and what is accepted; and it changes nothing: no tensor, no
`.grad`, no field of the kwargs. A misspelt option suggests the right one.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from xloss import (
    BaseLossContextInputItem,
    CELossConfig,
    CELossContext,
    CELossContextInputItem,
    GRPOLossConfig,
    GRPOLossContext,
    LogProbConfig,
    RLLossContextInputItem,
    XlossError,
    linear_logprobs,
)
from xloss.errors import (
    CODES,
    DeviceError,
    DtypeError,
    LabelError,
    MissingFieldError,
    OptionError,
    ShapeError,
    UnsupportedError,
)

T, H, V = 5, 3, 7
VANILLA = {"loss_type": "vanilla", "cliprange_low": 0.2, "cliprange_high": 0.2}


def hidden(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.ones(*(shape or (T, H)), dtype=dtype, requires_grad=dtype.is_floating_point)


def weight(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.ones(*(shape or (V, H)), dtype=dtype, requires_grad=dtype.is_floating_point)


def labels(*values: int) -> Tensor:
    return torch.tensor(values or (0, 1, -100, V - 1, 2))


def head(**options: Any) -> Callable[[], Any]:
    """A call of linear_logprobs with some arguments replaced."""
    tensors = {"hidden_states": hidden(), "head_weight": weight(), "labels": labels()}
    return lambda: linear_logprobs(**(tensors | options))


def rl_item(**fields: Any) -> RLLossContextInputItem:
    return RLLossContextInputItem(**({"shifted_labels": labels(), "advantages": torch.ones(T)} | fields))


def grpo(item: RLLossContextInputItem, *, h: Tensor | None = None, **cfg: Any) -> Callable[[], Any]:
    """One step of GRPO on one item."""

    def run() -> Any:
        loss_cfg = GRPOLossConfig(policy_loss_cfg=VANILLA, **cfg)
        (kwargs,) = GRPOLossContext.build_batches_loss_kwargs([item], loss_cfg)
        return GRPOLossContext(loss_cfg, kwargs).forward(hidden() if h is None else h, weight())

    return run


def ce(*cu: list[int] | Tensor, item: Any = None, **cfg: Any) -> Callable[[], Any]:
    """Calibration of one micro-batch of cross-entropy with these bounds."""
    bounds = [c if isinstance(c, Tensor) else torch.tensor(c) for c in cu]
    item = item or CELossContextInputItem(shifted_labels=labels())
    return lambda: CELossContext.build_batches_loss_kwargs([item], CELossConfig(**cfg), bounds or None)


CASES: dict[str, tuple[Callable[[], Any], type[Exception], tuple[str, ...]]] = {
    # shapes
    "hidden-size": (head(hidden_states=hidden(T, 4)), ShapeError, ("hidden_states", "(5, 4)", "H = 3")),
    "hidden-1d": (head(hidden_states=hidden(T)), ShapeError, ("hidden_states", "(5,)", "[T, H]")),
    "hidden-4d": (head(hidden_states=hidden(1, 1, T, H)), ShapeError, ("hidden_states", "(1, 1, 5, 3)")),
    "weight-1d": (head(head_weight=weight(H)), ShapeError, ("head_weight", "(3,)", "[V, H]")),
    "weight-empty": (head(head_weight=weight(0, H)), ShapeError, ("head_weight", "(0, 3)")),
    "bias-size": (head(head_bias=torch.ones(V + 1)), ShapeError, ("head_bias", "(8,)", "(7,)")),
    "labels-length": (head(labels=labels(1, 2)), ShapeError, ("labels", "(2,)", "(5,)")),
    "labels-transposed": (head(labels=labels()[None]), ShapeError, ("labels", "(1, 5)", "(5,)")),
    "labels-K0": (head(labels=torch.empty(T, 0, dtype=torch.int64)), ShapeError, ("labels", "(5, 0)")),
    "temperature-shape": (head(temperature=torch.ones(T + 1)), ShapeError, ("temperature", "(6,)", "(5,)")),
    "temperature-0d": (head(temperature=torch.tensor(1.0)), ShapeError, ("temperature", "()", "(5,)")),
    "advantages-shape": (grpo(rl_item(advantages=torch.ones(1))), ShapeError, ("advantages", "(1,)", "(5,)")),
    "advantages-row": (grpo(rl_item(advantages=torch.ones(1, T))), ShapeError, ("advantages", "(1, 5)", "(5,)")),
    "old-shape": (grpo(rl_item(old_logprobs=torch.ones(4))), ShapeError, ("old_logprobs", "(4,)", "(5,)")),
    "context-hidden": (grpo(rl_item(), h=hidden(4, H)), ShapeError, ("shifted_labels", "(5,)", "(4,)")),
    "labels-3d": (grpo(rl_item(shifted_labels=labels()[None, None], advantages=torch.ones(1, 1, T))),
                  ShapeError, ("shifted_labels", "(1, 1, 5)")),
    # dtypes and devices
    "int-hidden": (head(hidden_states=hidden(dtype=torch.int64)), DtypeError, ("hidden_states", "int64", "float32")),
    "mixed-dtypes": (head(head_weight=weight(dtype=torch.bfloat16)), DtypeError,
                     ("hidden_states", "float32", "bfloat16")),
    "bias-dtype": (head(head_bias=torch.ones(V).double()), DtypeError, ("head_bias", "float64", "float32")),
    "float-labels": (head(labels=labels().float()), DtypeError, ("labels", "float32", "int64")),
    "bool-labels": (head(labels=labels() > 0), DtypeError, ("labels", "bool", "int64")),
    "list-labels": (head(labels=[0, 1, 2, 3, 4]), DtypeError, ("labels", "list", "int64")),
    "int-advantages": (grpo(rl_item(advantages=torch.ones(T, dtype=torch.int64))), DtypeError, ("advantages", "int64")),
    "float-context-labels": (grpo(rl_item(shifted_labels=labels().float())), DtypeError, ("shifted_labels", "float32")),
    "weight-device": (head(head_weight=weight().to("meta")), DeviceError, ("hidden_states", "cpu", "meta")),
    "labels-device": (head(labels=labels().to("meta")), DeviceError, ("labels", "meta", "cpu")),
    "bias-device": (head(head_bias=torch.ones(V, device="meta")), DeviceError, ("head_bias", "meta", "cpu")),
    "temperature-device": (head(temperature=torch.ones(T, device="meta")), DeviceError, ("temperature", "meta", "cpu")),
    "advantages-device": (grpo(rl_item(advantages=torch.ones(T, device="meta"))), DeviceError, ("advantages", "meta")),
    # labels
    "label-V": (head(labels=labels(0, 1, 2, 3, V)), LabelError, ("labels", "7", "0 to 6", "-100")),
    "label-negative": (head(labels=labels(0, 1, 2, 3, -1)), LabelError, ("labels", "-1", "0 to 6")),
    "label-default-ignore": (head(ignore_index=-1), LabelError, ("labels", "-100", "-1 to ignore")),
    "label-K": (head(labels=torch.full((T, 2), V)), LabelError, ("labels", "7", "10 such")),
    "context-label": (grpo(rl_item(shifted_labels=labels(0, 1, 2, 3, V))), LabelError,
                      ("shifted_labels", "7", "0 to 6")),
    # cu_seq_lens
    "cu-short": (ce([0, 3]), ShapeError, ("cu_seq_lens", "[0, 3]", "5")),
    "cu-long": (ce([0, 3, 6]), ShapeError, ("cu_seq_lens", "[0, 3, 6]", "5")),
    "cu-start": (ce([1, 5]), ShapeError, ("cu_seq_lens", "[1, 5]")),
    "cu-falls": (ce([0, 4, 3, 5]), ShapeError, ("cu_seq_lens", "[0, 4, 3, 5]")),
    "cu-2d": (ce([[0, 5]]), ShapeError, ("cu_seq_lens", "(1, 2)")),
    "cu-float": (ce([0.0, 5.0]), DtypeError, ("cu_seq_lens", "float32", "int32")),
    "cu-count": (ce([0, 5], [0, 5]), ShapeError, ("cu_seq_lens_list", "2", "1")),
    "cu-padded": (ce([0, 6], item=CELossContextInputItem(shifted_labels=torch.zeros(2, 3, dtype=torch.int64))),
                  ShapeError, ("cu_seq_lens", "(2, 3)")),
    "cu-missing": (ce(loss_reduction="sample"), MissingFieldError, ("cu_seq_lens_list", "sample", "(5,)")),
    # options
    "chunk-0": (head(chunk_size=0), OptionError, ("chunk_size", "0")),
    "chunk-negative": (head(chunk_size=-4), OptionError, ("chunk_size", "-4")),
    "chunk-float": (head(chunk_size=2.5), OptionError, ("chunk_size", "2.5")),
    "budget-negative": (head(logits_budget=-1), OptionError, ("logits_budget", "-1")),
    "budget-0": (head(logits_budget=0), UnsupportedError, ("logits_budget=0", "mode='chunk'", "mode='fused'")),
    "budget-0-eager": (head(logits_budget=0, mode="eager"), UnsupportedError, ("logits_budget=0", "eager", "fused")),
    "context-budget-0": (grpo(rl_item(), logits_budget=0), UnsupportedError, ("logits_budget=0", "mode='fused'")),
    "kernels": (head(kernels="no-logits"), OptionError, ("kernels", "no-logits", "no_logits")),
    "kernels-chunk": (head(kernels="no_logits"), UnsupportedError, ("kernels='no_logits'", "mode='fused'")),
    "kernels-eager": (head(kernels="chunked_logits", mode="eager"), UnsupportedError, ("chunked_logits", "eager")),
    "budget-tiny": (head(logits_budget=V, mode="chunk"), UnsupportedError,
                    ("logits_budget=7", "28 bytes", "chunk_size=1")),
    "mode": (head(mode="chunked"), OptionError, ("mode", "chunked", "eager")),
    "temperature-0": (head(temperature=0.0), OptionError, ("temperature", "0.0", "> 0")),
    "temperature-negative": (head(temperature=-1.0), OptionError, ("temperature", "-1.0")),
    "temperature-nan": (head(temperature=float("nan")), OptionError, ("temperature", "nan")),
    "temperature-one-0": (head(temperature=torch.tensor([0.0, 1, 1, 1, 1])), OptionError, ("temperature", "0.0")),
    "temperature-one-nan": (head(temperature=torch.tensor([torch.nan, 1, 1, 1, 1])), OptionError,
                            ("temperature", "nan")),
    "temperature-grad": (head(temperature=torch.ones(T, requires_grad=True)), OptionError, ("temperature", "detach")),
    "softcap-0": (head(softcap=0.0), OptionError, ("softcap", "0.0")),
    "scale-inf": (head(logit_scale=float("inf")), OptionError, ("logit_scale", "inf")),
    "two-temperatures": (grpo(rl_item(temperature=torch.ones(T)), temperature=0.7), OptionError,
                         ("temperature", "0.7")),
    "item-temperature-0": (grpo(rl_item(temperature=torch.zeros(T))), OptionError, ("temperature", "0.0")),
    "fused": (head(mode="fused"), UnsupportedError, ("fused", "chunk")),
    "context-fused": (grpo(rl_item(), mode="fused"), UnsupportedError, ("fused", "chunk")),
    "plan-of-eager": (grpo(rl_item(), mode="eager", plan="one_pass"), UnsupportedError,
                      ("plan='one_pass'", "eager", "chunk")),
    # fields
    "ref-missing": (grpo(rl_item(), use_kl_loss=True, kl_loss_type="k3"), MissingFieldError,
                    ("ref_logprobs", "use_kl_loss", "no_grad")),
}  # fmt: skip


@pytest.mark.parametrize(("run", "error", "words"), CASES.values(), ids=CASES)
def test_call(run: Callable[[], Any], error: type[XlossError], words: tuple[str, ...]) -> None:
    with pytest.raises(error) as caught:
        run()
    message = str(caught.value)
    assert message.startswith(f"[{error.code}] ")
    assert error.code in CODES
    assert [w for w in words if w not in message] == [], message


def test_every_class_is_a_standard_one() -> None:
    """`except ValueError` and the like keep working."""
    bases = {ShapeError: ValueError, DtypeError: TypeError, DeviceError: ValueError, LabelError: ValueError,
             MissingFieldError: ValueError, OptionError: ValueError, UnsupportedError: NotImplementedError}  # fmt: skip
    assert all(issubclass(error, base) and issubclass(error, XlossError) for error, base in bases.items())
    assert len(set(CODES)) == len(CODES)


@pytest.mark.parametrize("mode", ["eager", "chunk"])
def test_a_refused_call_changes_nothing(mode: str) -> None:
    """A bad label at the very end: nothing was computed, written or accumulated before it was found."""
    h, w, y = hidden(), weight(), labels(0, 1, 2, 3, V)
    item = rl_item(shifted_labels=y, advantages=torch.ones(T))
    cfg = GRPOLossConfig(policy_loss_cfg=VANILLA, mode=mode)
    (kwargs,) = GRPOLossContext.build_batches_loss_kwargs([item], cfg)
    tensors = [h, w, *(v for v in vars(kwargs).values() if isinstance(v, Tensor))]
    before = [(t.detach().clone(), t._version, t.grad) for t in tensors]
    with pytest.raises(LabelError):
        GRPOLossContext(cfg, kwargs).forward(h, w)
    for t, (value, version, grad) in zip(tensors, before, strict=True):
        assert torch.equal(t.detach(), value)
        assert (t._version, t.grad) == (version, grad)


def test_a_refused_calibration_changes_nothing() -> None:
    """The second micro-batch lacks ref_logprobs, or its bounds are wrong: the first is not calibrated either."""
    cfg = GRPOLossConfig(policy_loss_cfg=VANILLA, use_kl_loss=True, kl_loss_type="k3")
    data = {"shifted_labels": labels(), "advantages": torch.ones(T)}
    with_ref = [cfg.build(data | {"ref_logprobs": torch.ones(T)}) for _ in range(2)]
    without = [with_ref[0], cfg.build(data)]
    for contexts, bounds, error in (
        (without, None, MissingFieldError),
        (with_ref, [torch.tensor([0, T]), torch.tensor([0, 2])], ShapeError),
        (with_ref, [torch.tensor([0, T])], ShapeError),
    ):
        before = [dict(vars(c.loss_kwargs)) for c in contexts]
        with pytest.raises(error):
            GRPOLossContext.build_batches(contexts, cu_seq_lens_list=bounds)
        for ctx, fields in zip(contexts, before, strict=True):
            changed = [n for n, v in vars(ctx.loss_kwargs).items() if v is not fields[n]]
            assert changed == []


def test_uncalibrated_context() -> None:
    """forward before build_batches says which call is missing."""
    for cfg, data in (
        (CELossConfig(), {"shifted_labels": labels()}),
        (GRPOLossConfig(policy_loss_cfg=VANILLA), {"shifted_labels": labels(), "advantages": torch.ones(T)}),
    ):
        ctx = cfg.build(data)
        with pytest.raises(MissingFieldError, match="build_batches"):
            ctx.forward(hidden(), weight())


def test_contexts_of_different_configs() -> None:
    a, b = (CELossConfig(chunk_size=n).build({"shifted_labels": labels()}) for n in (1, 2))
    with pytest.raises(OptionError, match="configs"):
        CELossContext.build_batches([a, b])
    with pytest.raises(OptionError, match="empty"):
        CELossContext.build_batches([])


def test_labels_are_checked_by_option() -> None:
    """check_labels=False reads no values: whatever an out-of-range label gives, it is not an exception."""
    bad = labels(0, 1, 2, 3, V + 50)
    for mode in ("eager", "chunk"):
        stats = linear_logprobs(hidden(), weight(), bad, mode=mode, check_labels=False)
        assert bool(torch.isfinite(stats.logprobs[:4]).all())


def test_one_pass_of_a_coupled_loss() -> None:
    """LogProbContext has no sum over tokens to differentiate in forward."""
    cfg = LogProbConfig(plan="one_pass", mode="chunk")
    (kwargs,) = cfg.loss_ctx_cls.build_batches_loss_kwargs([BaseLossContextInputItem(shifted_labels=labels())], cfg)
    with pytest.raises(UnsupportedError, match=r"one_pass.*two_pass"):
        cfg.loss_ctx_cls(cfg, kwargs).forward(hidden(), weight())
