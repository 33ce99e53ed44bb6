"""The head of a model laid over two processes (gloo), with the loss inside its forward.

Contract: for every layout of DDP and FSDP2, gradients of every parameter (head and backbone) at every step of AdamW,
two accumulated micro-batches a step, one rank's first one without a live token, are those of one process with the
whole batch, by the float64 oracle; for a one-pass loss and for one of whole sequences, which reads the head again. Ways
to read a head that would train on something else are refused, each with a message that names the remedy.
"""

from __future__ import annotations

import warnings
from contextlib import nullcontext
from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.distributed.tensor import DTensor, Partial, Replicate

import xloss
from tests import budgets
from tests.distributed import head_layouts as layouts
from tests.distributed.head_layouts import BOUNDS, GSPO, LAYOUTS, LOSSES, STEPS, WORLD, H, Layout, Model, T
from tests.distributed.ranks import spawn
from tests.oracle import ce, head, policies

pytestmark = pytest.mark.distributed
TWICE = ("root-reshard", "norm-reshard", "own-reshard", "own-keep", "own-lora")
AVERAGED, REPLICATED = [Partial("avg")], [Replicate()]


def two_forwards(name: str, loss: str, rank: int) -> dict[str, Tensor | None]:
    """Both forwards before both backwards: the first backward reshards the head."""
    inner = LAYOUTS[name].model()
    model = LAYOUTS[name].wrap(inner)
    data = layouts.batches(rank, 0)
    for x in [model(d.ids, ctx) for d, ctx in zip(data, layouts.contexts(loss, data), strict=True)]:
        x.backward()
    return {n: layouts.whole(p.grad) for n, p in inner.named_parameters()}


def evaluation(name: str, rank: int) -> tuple[float, bool]:
    """Loss without gradients, and whether the head is sharded afterwards."""
    inner = LAYOUTS[name].model()
    model = LAYOUTS[name].wrap(inner)
    data = layouts.batches(rank, 0)
    with torch.no_grad():
        loss = sum(float(model(d.ids, ctx)) for d, ctx in zip(data, layouts.contexts("ce", data), strict=True))
    return loss, isinstance(inner.lm_head.weight, DTensor)


def half_precision_head(dtype: torch.dtype, rank: int) -> Any:
    """A head that its unit gathers in another dtype than the hidden states are in; then cast by the model."""
    layout = Layout(("lm_head",), reshard=True, head_dtype=dtype)
    found: list[Any] = []
    for cast in (False, True):
        inner = layout.model()
        model = layout.wrap(inner)
        if cast:
            norm = inner.norm.forward
            inner.norm.forward = lambda x, norm=norm: norm(x).to(dtype)  # type: ignore[method-assign]
        data = layouts.batches(rank, 0)
        try:
            for d, ctx in zip(data, layouts.contexts("ce", data), strict=True):
                model(d.ids, ctx).backward()
            found.append(layouts.whole(inner.lm_head.weight.grad))
        except xloss.XlossError as error:
            found.append(str(error))
    return found


def read(model: Model, how: str) -> Any:
    """The head's weight without `head_weight`."""
    weight = model.lm_head.weight
    if how == "to_local":
        weight = weight.to_local()  # type: ignore[operator]
    elif how.startswith("full_tensor"):
        given = {"full_tensor": None, "full_tensor-avg": AVERAGED, "full_tensor-same": REPLICATED}[how]
        weight = weight.full_tensor(grad_placements=given)  # type: ignore[operator]
    elif how == "cast":
        weight = weight.double().float()
    return nullcontext((weight, None))


def attempt(name: str, where: str, how: str, rank: int) -> Any:
    """Gradient of the head, or the message of the refusal. `where` the loss runs, `how` it reads the head."""
    layout = Layout(("lm_head",), fsdp1=True) if name == "fsdp1-own" else LAYOUTS[name]
    inner = layout.model()
    model = layout.wrap(inner)
    data = layouts.batches(rank, 0)
    if how != "head_weight":
        inner.head_of = lambda m: read(m, how)
    try:
        for d, ctx in zip(data, layouts.contexts("ce", data), strict=True):
            match where:
                case "inside":
                    loss = model(d.ids, ctx)
                case "bypass":  # the module inside the wrapper is called
                    ddp = name.startswith("ddp")
                    loss = inner.loss(inner.hidden(d.ids) if ddp else inner.blocks[0](torch.ones(1, T, H)), ctx)
                case _:  # after the forward
                    loss = inner.loss(model(d.ids), ctx)
            loss.backward()
    except xloss.XlossError as error:
        return str(error)
    return layouts.whole(inner.lm_head.weight.grad)


ATTEMPTS = [
    ("ddp", "bypass", "head_weight"),
    ("ddp", "bypass", "weight"),
    ("ddp", "bypass", "cast"),
    ("ddp-lora", "bypass", "head_weight"),
    ("fsdp1", "after", "head_weight"),
    ("fsdp1-own", "inside", "head_weight"),
    ("root", "bypass", "head_weight"),
    ("own-keep", "bypass", "head_weight"),
    ("own-keep", "after", "head_weight"),
    ("root-reshard", "after", "head_weight"),
    ("own-keep", "inside", "weight"),
    ("own-keep", "inside", "to_local"),
    ("own-keep", "inside", "full_tensor"),
    ("own-keep", "inside", "full_tensor-same"),
    ("own-keep", "inside", "full_tensor-avg"),
]


def job(rank: int) -> dict[Any, Any]:
    warnings.simplefilter("ignore")
    found: dict[Any, Any] = {}
    for name, layout in LAYOUTS.items():
        for loss in LOSSES:
            found[name, loss] = layouts.train(layout, loss, rank)
    for name in TWICE:
        for loss in LOSSES:
            found["twice", name, loss] = two_forwards(name, loss, rank)
    for name in ("own-reshard", "own-keep", "norm-reshard", "root"):
        found["eval", name] = evaluation(name, rank)
    for dtype in (torch.bfloat16, torch.float64):
        found[dtype] = half_precision_head(dtype, rank)
    for case in ATTEMPTS:
        found[case] = attempt(*case, rank)
    return found


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> list[dict[Any, Any]]:
    """What both ranks saw."""
    return spawn(WORLD, job, tmp_path_factory.mktemp("ranks"))


def oracle_loss(model: Model, loss: str, step: int) -> Tensor:
    """The step's loss on one process that holds every micro-batch of every rank."""
    data = [d for rank in range(WORLD) for d in layouts.batches(rank, step)]
    weight, bias = model.dense_head()
    if loss != "gspo":
        weights = ce.step_weights([d.labels for d in data], [BOUNDS] * len(data))
        losses = [ce.loss(model.hidden(d.ids), weight, d.labels, w, bias) for d, w in zip(data, weights, strict=True)]
        return torch.stack(losses).sum()
    live = [d.labels[0] != -100 for d in data]
    total: Tensor = torch.zeros((), dtype=torch.float64)
    for d, valid in zip(data, live, strict=True):
        lp = head.token_stats(model.hidden(d.ids)[0], weight, d.labels[0], bias).logprobs
        tokens = policies.Tokens(
            lp, d.old[0].double(), d.advantages[0].double(), valid, list(pairwise(BOUNDS.tolist()))
        )
        total = total + (policies.per_token("gspo", tokens, GSPO) * valid).sum()
    return total / sum(int(v.sum()) for v in live)


def oracle_gradients(layout: Layout, loss: str, lr: float = 1e-2) -> list[dict[str, Tensor | None]]:
    """Gradients at every step of the same optimizer in float64."""
    model = layout.model(torch.float64)
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr)
    seen = []
    for step in range(STEPS):
        oracle_loss(model, loss, step).backward()
        seen.append({n: None if p.grad is None else p.grad.clone() for n, p in model.named_parameters()})
        optimizer.step()
        optimizer.zero_grad()
    return seen


def assert_same(got: dict[str, Tensor | None], want: dict[str, Tensor | None], what: str) -> None:
    assert got.keys() == want.keys()
    for name, expected in want.items():
        found = got[name]
        assert (found is None) == (expected is None), f"{what} {name}"
        if found is not None and expected is not None:
            budgets.assert_relative(f"{what} {name}", found, expected, budgets.F32_GRADIENT)


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("name", LAYOUTS)
def test_layout_is_one_process(ranks: list[dict[Any, Any]], name: str, loss: str) -> None:
    want = oracle_gradients(LAYOUTS[name], loss)
    for seen in ranks:
        for step in range(STEPS):
            assert_same(seen[name, loss][step], want[step], f"step {step}")


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("name", TWICE)
def test_two_forwards_before_two_backwards(ranks: list[dict[Any, Any]], name: str, loss: str) -> None:
    """The second backward reads a head that the first one let go of."""
    want = oracle_gradients(LAYOUTS[name], loss)[0]
    for seen in ranks:
        assert_same(seen["twice", name, loss], want, name)


@pytest.mark.parametrize("name", ["own-reshard", "own-keep", "norm-reshard", "root"])
def test_evaluation(ranks: list[dict[Any, Any]], name: str) -> None:
    """Without gradients the loss is the same, and a unit of its own is sharded again at once."""
    with torch.no_grad():
        want = float(oracle_loss(LAYOUTS[name].model(torch.float64), "ce", 0))
    found = [seen["eval", name] for seen in ranks]
    assert sum(loss for loss, _ in found) / WORLD == pytest.approx(want, rel=budgets.F32_LOSS)
    assert all(sharded for _, sharded in found) or not name.startswith("own")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_mixed_precision_unit(ranks: list[dict[Any, Any]], dtype: torch.dtype) -> None:
    """A head gathered in a dtype of its own wants hidden states in it; the gradient is then the parameter's."""
    want = oracle_gradients(LAYOUTS["own-keep"], "ce")[0]["lm_head.weight"]
    for seen in ranks:
        refused, grad = seen[dtype]
        assert f"hidden_states is torch.float32 but head_weight is {dtype}" in refused
        assert grad.dtype == torch.float32
        relative = budgets.F32_GRADIENT if dtype == torch.float64 else 4 * budgets.eps(torch.bfloat16)
        budgets.assert_relative("dW", grad, want, relative)


REFUSED = {
    ("ddp", "bypass", "head_weight"): "DistributedDataParallel, whose forward is not running",
    ("ddp", "bypass", "weight"): "DistributedDataParallel, whose forward is not running",
    ("ddp", "bypass", "cast"): "DistributedDataParallel, whose forward is not running",
    ("ddp-lora", "bypass", "head_weight"): "an adapter's matrix is a parameter of DistributedDataParallel",
    ("fsdp1", "after", "head_weight"): "not [V, H]: it is sharded",
    ("root", "bypass", "head_weight"): "forward of the module that owns it is not running",
    ("own-keep", "bypass", "head_weight"): "no forward of the sharded model is running",
    ("own-keep", "after", "head_weight"): "no forward of the sharded model is running",
    ("root-reshard", "after", "head_weight"): "forward of the module that owns it is not running",
    ("own-keep", "inside", "weight"): "shard of fully_shard",
    ("own-keep", "inside", "to_local"): "one rank's part of a DTensor",
    ("own-keep", "inside", "full_tensor"): "the gradient of this rank's tokens alone",
    ("own-keep", "inside", "full_tensor-same"): "the gradient of this rank's tokens alone",
}


@pytest.mark.parametrize("case", REFUSED, ids="-".join)
def test_refused(ranks: list[dict[Any, Any]], case: tuple[str, str, str]) -> None:
    for seen in ranks:
        assert isinstance(seen[case], str), "a gradient came, and it is wrong"
        assert REFUSED[case] in seen[case]
        assert "run the loss inside the model's forward, within `with xloss.head_weight(self.lm_head)" in seen[case]


def test_fsdp1_unit_of_its_own(ranks: list[dict[Any, Any]]) -> None:
    for seen in ranks:
        assert "leave the head out of the wrapping policy" in seen["fsdp1-own", "inside", "head_weight"]


def test_full_tensor_with_averaged_gradients(ranks: list[dict[Any, Any]]) -> None:
    """Told what the ranks hold, torch's own way is right and is let through."""
    want = oracle_gradients(LAYOUTS["own-keep"], "ce")[0]["lm_head.weight"]
    for seen in ranks:
        budgets.assert_relative("dW", seen["own-keep", "inside", "full_tensor-avg"], want, budgets.F32_GRADIENT)
