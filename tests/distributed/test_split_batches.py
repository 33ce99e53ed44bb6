"""Batches split over two processes (gloo): how they are split, changed, joined and refused.

Contract: parts come back in order, torch's context-parallel order included; labels are shifted once; what is set on a
part is part of the whole; split batches move and join; a loss of one's own that couples tokens, or has a `loss_fn`,
is that of one process; what would be wrong raises and says what to do.
"""

from __future__ import annotations

import traceback
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor.experimental import context_parallel

from tests import budgets
from tests.distributed.ranks import spawn
from xloss import (
    BaseLossConfig,
    BaseLossContext,
    CELossConfig,
    CELossContextInputItem,
    GRPOLossConfig,
    GRPOLossContext,
    MTPLossConfig,
    PreferenceLossConfig,
    PreferenceLossContextInputItem,
    RLLossContextInputItem,
    finalize_metrics,
    roll_labels,
    shift_labels,
)
from xloss.distributed import sp_gather, sp_places, sp_split
from xloss.errors import OptionError, ShapeError, UnsupportedError
from xloss.losses.ce import CELossKwargs
from xloss.losses.model import BaseLossKwargs

pytestmark = pytest.mark.distributed
WORLD, H, V, T = 2, 4, 11, 13
BOUNDS = torch.tensor([0, 6, 9, 13])
GSPO = {"policy_loss_cfg": {"loss_type": "gspo", "cliprange_low": 0.5, "cliprange_high": 0.5}, "mode": "chunk"}
CHECKS: dict[str, Callable[[DeviceMesh, int], None]] = {}


def check(function: Callable[[DeviceMesh, int], None]) -> Callable[[DeviceMesh, int], None]:
    CHECKS[function.__name__] = function
    return function


def tensors(seed: int = 0) -> dict[str, Tensor]:
    g = torch.Generator().manual_seed(seed)
    labels = torch.randint(0, V, (1, T), generator=g)
    labels[0, [2, 7]] = -100
    fields = {n: torch.randn(1, T, generator=g, dtype=torch.float64) for n in ("advantages", "old_logprobs")}
    fields["old_logprobs"] -= 2
    hidden = torch.randn(1, T, H, generator=g, dtype=torch.float64)
    return {"hidden": hidden, "shifted_labels": labels, **fields}


def weight() -> Tensor:
    w = torch.randn(V, H, dtype=torch.float64, generator=torch.Generator().manual_seed(9))
    return w.requires_grad_()


def item(seed: int = 0, **more: Any) -> RLLossContextInputItem:
    return RLLossContextInputItem(**{n: x for n, x in tensors(seed).items() if n != "hidden"} | more)


def step(
    cfg: BaseLossConfig, items: list[Any], mesh: DeviceMesh | None, bounds: Tensor = BOUNDS
) -> tuple[Tensor, dict[str, float]]:
    """Gradient of the weight, over all ranks, and the metrics."""
    built = cfg.loss_ctx_cls.build_batches_loss_kwargs(items, cfg, [bounds] * len(items), mesh)
    return backward([cfg.loss_ctx_cls(cfg, kwargs) for kwargs in built], mesh)


def backward(contexts: list[Any], mesh: DeviceMesh | None) -> tuple[Tensor, dict[str, float]]:
    w, infos = weight(), []
    for seed, ctx in enumerate(contexts):
        hidden = tensors(seed)["hidden"]
        loss, info = ctx.forward(hidden if mesh is None else sp_split(hidden, mesh, 0.0, 1), w)
        loss.backward()
        infos.append(info.metrics)
    assert w.grad is not None
    grad = w.grad if mesh is None else sp_gather(w.grad.unsqueeze(-1), mesh).mean(-1)
    figures = finalize_metrics(infos) if mesh is not None else {n: m.result() for n, m in infos[0].items()}
    return grad, {n: float(x) for n, x in figures.items()}


def alone(cfg: BaseLossConfig, items: list[Any]) -> Tensor:
    """The gradient of one process; `grad_reduce='sum'`, as there are two in this world, and both hold everything."""
    from xloss.distributed import alone as by_itself

    with by_itself():
        return step(cfg, items, None)[0]


def same(got: Tensor, want: Tensor) -> None:
    torch.testing.assert_close(got, want, rtol=budgets.FIGURE_F32, atol=budgets.FIGURE_F64)


# -- places ------------------------------------------------------------------------------------------------------------


@check
def split_and_gather(mesh: DeviceMesh, rank: int) -> None:
    for length in (0, 1, 3, 4, 7, 12):
        for order in ("contiguous", "head_tail"):
            x = torch.arange(2 * length).reshape(2, length)
            part = sp_split(x, mesh, -5, order=order)
            assert torch.equal(sp_gather(part, mesh, order=order, length=length), x)
            padded = sp_gather(part, mesh, order=order)
            assert torch.equal(padded[:, :length], x) and bool((padded[:, length:] == -5).all())
            along_first = sp_split(x.T, mesh, -5, axis=0, order=order)
            assert torch.equal(sp_gather(along_first, mesh, 0, order, length), x.T)
    with pytest.raises(ShapeError, match=r"parts of 4 tokens on 2 ranks; got \(3,\)"):
        sp_gather(torch.zeros(3), mesh, length=8)
    with pytest.raises(OptionError, match="order must be one of"):
        sp_split(torch.zeros(3), mesh, 0, order="zigzag")


@check
def torchs_context_parallel(mesh: DeviceMesh, rank: int) -> None:
    """Its buffers are our head-tail parts, and items made of them know the whole."""
    whole = {n: x[:, :12].clone() for n, x in tensors().items() if n != "hidden"}
    buffers = {n: x.clone() for n, x in whole.items()}
    with context_parallel(mesh, buffers=list(buffers.values()), buffer_seq_dims=[1] * len(buffers)):
        parts = RLLossContextInputItem(**{n: x.clone() for n, x in buffers.items()})
    ours = RLLossContextInputItem(**{n: x.clone() for n, x in whole.items()}).sp_split(mesh, "head_tail")
    parts.sp_parts(mesh, "head_tail")
    for name, x in whole.items():
        assert torch.equal(getattr(parts, name), getattr(ours, name))
        assert parts.split is not None and torch.equal(getattr(parts.split.whole, name), x)


# -- labels ------------------------------------------------------------------------------------------------------------


@check
def labels_are_shifted_once(mesh: DeviceMesh, rank: int) -> None:
    ids = torch.arange(1, T + 1).unsqueeze(0)
    shifted = shift_labels(ids, BOUNDS)
    for order in ("contiguous", "head_tail"):
        cfg = MTPLossConfig(mtp_depth=2)
        (kwargs,) = cfg.loss_ctx_cls.build_batches_loss_kwargs(
            [CELossContextInputItem(shifted_labels=shifted).sp_split(mesh, order)], cfg, [BOUNDS], mesh
        )
        assert torch.equal(sp_gather(kwargs.shifted_labels, mesh, order=order, length=T), shifted)
        rolled = sp_gather(kwargs.mtp_labels, mesh, order=order, length=T)
        assert torch.equal(rolled, roll_labels(shifted, BOUNDS, 2)) and torch.equal(rolled, roll_labels(ids, BOUNDS, 3))


# -- changes -----------------------------------------------------------------------------------------------------------


@check
def fields_set_on_parts(mesh: DeviceMesh, rank: int) -> None:
    """As a trainer does that computes old log-probs from what it has."""
    cfg, old = GRPOLossConfig(**GSPO), tensors()["old_logprobs"]
    want = alone(cfg, [item()])
    mine = item(old_logprobs=None).sp_split(mesh)
    mine.old_logprobs = sp_split(old, mesh, 0.0)
    same(step(cfg, [mine], mesh)[0], want)
    written = item(old_logprobs=torch.zeros(1, T, dtype=torch.float64)).sp_split(mesh)
    assert written.old_logprobs is not None
    written.old_logprobs.copy_(sp_split(old, mesh, 0.0))
    same(step(cfg, [written], mesh)[0], want)
    ctx = cfg.build({n: x for n, x in tensors().items() if n not in ("hidden", "old_logprobs")}, mesh)
    assert isinstance(ctx, GRPOLossContext)
    ctx.loss_kwargs.old_logprobs = sp_split(old, mesh, 0.0)
    same(backward(type(ctx).build_batches([ctx], [BOUNDS], mesh), mesh)[0], want)
    ctx.loss_kwargs.old_logprobs = None
    same(backward(type(ctx).build_batches([ctx], [BOUNDS], mesh), mesh)[0], alone(cfg, [item(old_logprobs=None)]))


@check
def fields_set_too_late(mesh: DeviceMesh, rank: int) -> None:
    cfg = GRPOLossConfig(**GSPO)
    (kwargs,) = cfg.loss_ctx_cls.build_batches_loss_kwargs([item().sp_split(mesh)], cfg, [BOUNDS], mesh)
    kwargs.advantages = kwargs.advantages * 2
    hidden = sp_split(tensors()["hidden"], mesh, 0.0, 1)
    with pytest.raises(OptionError, match=r"\['advantages'\] of a batch split .*set them before build_batches"):
        cfg.loss_ctx_cls(cfg, kwargs).forward(hidden, weight())


@check
def moved(mesh: DeviceMesh, rank: int) -> None:
    cfg = GRPOLossConfig(**GSPO)
    mine = item().sp_split(mesh)
    mine.advantages = mine.advantages * 2
    mine.to("cpu")
    assert mine.split is not None and mine.split.changed(mine) == ["advantages"]
    (kwargs,) = cfg.loss_ctx_cls.build_batches_loss_kwargs([mine], cfg, [BOUNDS], mesh)
    assert kwargs.to("cpu").split.changed(kwargs) == []
    kwargs.to("meta")
    assert all(x.is_meta for x in (kwargs.shifted_labels, kwargs.whole.advantages, kwargs.split.places))


@check
def joined(mesh: DeviceMesh, rank: int) -> None:
    labels = [tensors(seed)["shifted_labels"] for seed in (0, 1)]
    preferences = [PreferenceLossContextInputItem(shifted_labels=x) for x in labels]
    two, bounds = PreferenceLossConfig(loss_type="cpo", mode="chunk"), torch.tensor([0, 6, 13])
    for cfg, items, cu in (
        (GRPOLossConfig(**GSPO), [item(0), item(1)], BOUNDS),
        (two, preferences, bounds),
        (CELossConfig(mode="chunk"), [CELossContextInputItem(shifted_labels=x) for x in labels], BOUNDS),
    ):
        built = cfg.loss_ctx_cls.build_batches_loss_kwargs([x.sp_split(mesh) for x in items], cfg, [cu, cu], mesh)
        want, figures = backward([cfg.loss_ctx_cls(cfg, kwargs) for kwargs in built], mesh)
        whole = cfg.loss_ctx_cls(cfg, type(built[0]).cat(built))
        w = weight()
        hidden = torch.cat([sp_split(tensors(s)["hidden"], mesh, 0.0, 1) for s in (0, 1)], 1)
        loss, info = whole.forward(hidden, w)
        loss.backward()
        assert w.grad is not None
        same(sp_gather(w.grad.unsqueeze(-1), mesh).mean(-1), want)
        assert {n: float(x) for n, x in finalize_metrics([info.metrics]).items()} == pytest.approx(figures)
    with pytest.raises(OptionError, match="are split over sequence-parallel ranks and others are not"):
        CELossKwargs.cat([built[0], CELossKwargs(shifted_labels=torch.ones(1, 3).long(), loss_weight=torch.ones(1, 3))])


@check
def chunks(mesh: DeviceMesh, rank: int) -> None:
    """Pieces of a part do not know the whole."""
    cfg = GRPOLossConfig(**GSPO)
    (kwargs,) = cfg.loss_ctx_cls.build_batches_loss_kwargs([item().sp_split(mesh)], cfg, [BOUNDS], mesh)
    for piece in (kwargs.chunk(3)[0], kwargs.chunk(99)[0]):
        hidden = torch.zeros(1, piece.shifted_labels.shape[1], H, dtype=torch.float64)
        with pytest.raises(UnsupportedError, match="hold parts of them"):
            cfg.loss_ctx_cls(cfg, piece).forward(hidden, weight())
    (own,) = OwnContext.build_batches_loss_kwargs([item().sp_split(mesh)], OwnConfig(), [BOUNDS], mesh)
    pieces = own.chunk(3)
    for piece in (pieces[0], OwnKwargs.cat(pieces[:2])):
        hidden = torch.zeros(1, piece.shifted_labels.shape[1], H, dtype=torch.float64)
        with pytest.raises(UnsupportedError, match="so the whole is lost"):
            OwnContext(OwnConfig(), piece).forward(hidden, weight())
    again = OwnContext(OwnConfig(grad_reduce="mean"), OwnKwargs.cat(pieces))
    same(WORLD * backward(OwnContext.build_batches([again], [BOUNDS], mesh), mesh)[0], alone(OwnConfig(), [item()]))


# -- bounds and numbers ------------------------------------------------------------------------------------------------


@check
def bounds_with_the_padding(mesh: DeviceMesh, rank: int) -> None:
    """XTuner's take the padding of a split in, as a sequence or as part of the last."""
    cfg = GRPOLossConfig(**GSPO, loss_reduction="sample", count_empty_sequences=True)
    want = alone(cfg, [item()])
    for bounds in ([0, 6, 9, 14], [0, 6, 9, 13, 14], [0, 6, 9, 13]):
        same(step(cfg, [item().sp_split(mesh)], mesh, torch.tensor(bounds))[0], want)
    with pytest.raises(ShapeError, match="end at the 13 tokens of the pack"):
        step(cfg, [item().sp_split(mesh)], mesh, torch.tensor([0, 15]))


@check
def not_finite(mesh: DeviceMesh, rank: int) -> None:
    """Of a field that the head alone reads, the whole keeps whether it is finite."""
    ref = torch.randn(1, T, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    ref[0, [1, 11], 2] = torch.tensor([torch.nan, torch.inf], dtype=torch.float64)
    fields = {"use_kl_loss": True, "kl_loss_coef": 0.1, "kl_loss_type": "full", "nonfinite": "drop"}
    cfg = GRPOLossConfig(policy_loss_cfg={"loss_type": "ppo"}, **fields)
    mine = item(ref_hidden_states=ref).sp_split(mesh)
    assert mine.split is not None and mine.split.whole.ref_hidden_states.shape == (1, T, 1)
    (kwargs,) = cfg.loss_ctx_cls.build_batches_loss_kwargs([mine], cfg, [BOUNDS], mesh)
    assert torch.equal(kwargs.ref_hidden_states.nan_to_num(), sp_split(ref, mesh, 0.0, 1).nan_to_num())
    assert finalize_metrics([kwargs.built_metrics])["num_nonfinite"] == 2


# -- losses of one's own -----------------------------------------------------------------------------------------------


class OwnConfig(BaseLossConfig):
    scalar: bool = False

    @property
    def loss_ctx_cls(self) -> type[BaseLossContext[Any]]:
        return OwnContext


class OwnKwargs(BaseLossKwargs):
    advantages: Tensor


class OwnContext(BaseLossContext[RLLossContextInputItem]):
    """Couples every token with every other."""

    loss_cfg: OwnConfig
    loss_kwargs: OwnKwargs

    @classmethod
    def calibrate(cls, kwargs_list: list[Any], loss_cfg: Any, cu_seq_lens_list: Any, ranks: Any) -> None:
        for kwargs, bounds in zip(kwargs_list, cu_seq_lens_list, strict=True):
            kwargs.cu_seq_lens = bounds
            assert kwargs.shifted_labels.shape == (1, T)

    def token_loss(self, stats: Any, loss_kwargs: Any) -> Any:
        assert loss_kwargs.cu_seq_lens[-1] == len(stats.logprobs)
        x = stats.logprobs.cumsum(0).sin() * loss_kwargs.advantages
        return x.square().mean().sqrt() if self.loss_cfg.scalar else x


class FunctionContext(OwnContext):
    def loss_fn(self, hidden_states: Tensor, head_weight: Tensor, head_bias: Any, loss_kwargs: Any) -> Any:
        return (hidden_states @ head_weight.T).logsumexp(-1).sum()


class FunctionConfig(OwnConfig):
    @property
    def loss_ctx_cls(self) -> type[BaseLossContext[Any]]:
        return FunctionContext


@check
def own_losses(mesh: DeviceMesh, rank: int) -> None:
    for mode in ("chunk", "eager"):
        for scalar in (False, True):
            cfg = OwnConfig(scalar=scalar, mode=mode)
            same(WORLD * step(cfg, [item().sp_split(mesh)], mesh)[0], alone(cfg, [item()]))
    w, hidden = weight(), tensors()["hidden"]
    (w_grad,) = torch.autograd.grad((hidden @ w.T).logsumexp(-1).sum(), w)
    padding = torch.autograd.grad((torch.zeros(1, 1, H, dtype=torch.float64) @ w.T).logsumexp(-1).sum(), w)[0]
    got = step(FunctionConfig(mode="chunk", chunk_size=2), [item().sp_split(mesh)], mesh)[0]
    same(WORLD * got, w_grad + padding)


@check
def shares_of_the_loss(mesh: DeviceMesh, rank: int) -> None:
    for scalar in (False, True):
        cfg = OwnConfig(scalar=scalar, mode="chunk")
        (kwargs,) = OwnContext.build_batches_loss_kwargs([item().sp_split(mesh)], cfg, [BOUNDS], mesh)
        loss, info = OwnContext(cfg, kwargs).forward(sp_split(tensors()["hidden"], mesh, 0.0, 1), weight())
        (whole,) = OwnContext.build_batches_loss_kwargs([item()], cfg, [BOUNDS])
        want, wanted = OwnContext(cfg, whole).forward(tensors()["hidden"], weight())
        same(sp_gather(loss.detach().reshape(1), mesh).sum(), want.detach())
        assert "statistics of 2 sequence-parallel ranks are gathered" in info.plan.reasons
        assert (info.token_loss is None) == scalar
        if info.token_loss is not None and wanted.token_loss is not None:
            same(sp_gather(info.token_loss, mesh, length=T), wanted.token_loss)


# -- refused -----------------------------------------------------------------------------------------------------------


@check
def refused(mesh: DeviceMesh, rank: int) -> None:
    cfg, ctx_cls = CELossConfig(), CELossConfig().loss_ctx_cls
    labels = tensors()["shifted_labels"]

    def ce() -> CELossContextInputItem:
        return CELossContextInputItem(shifted_labels=labels)

    with pytest.raises(OptionError, match=r"micro-batch 0 is not split over the 2 ranks.*sp_split\(sp_mesh\)"):
        ctx_cls.build_batches_loss_kwargs([ce()], cfg, [BOUNDS], mesh)
    with pytest.raises(OptionError, match="micro-batch 1 is not split"):
        ctx_cls.build_batches_loss_kwargs([ce().sp_split(mesh), ce()], cfg, [BOUNDS] * 2)
    with pytest.raises(OptionError, match="split over sequence-parallel ranks already"):
        ce().sp_split(mesh).sp_split(mesh)
    with pytest.raises(ShapeError, match="parts of 4 tokens on 2 ranks in order='head_tail'; shifted_labels has 13"):
        ce().sp_parts(mesh, "head_tail", length=7)
    with pytest.raises(OptionError, match=r"sp_mesh must hold its ranks in ascending order; got \[1, 0\]"):
        ce().sp_split(DeviceMesh("cpu", [1, 0]))
    grid = init_device_mesh("cpu", (2, 1), mesh_dim_names=("sp", "dp"))
    with pytest.raises(OptionError, match=r"data_mesh must hold the ranks of sp_mesh, \[0, 1\]"):
        ctx_cls.build_batches_loss_kwargs([ce().sp_split(grid["sp"])], cfg, [BOUNDS], grid["sp"], grid["dp"])


def job(rank: int) -> dict[str, str]:
    mesh, found = init_device_mesh("cpu", (WORLD,)), {}
    for name, function in CHECKS.items():
        try:
            function(mesh, rank)
        except Exception:
            found[name] = traceback.format_exc()
    return found


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, str]]:
    return spawn(WORLD, job, tmp_path_factory.mktemp("ranks"), seconds=20)


@pytest.mark.parametrize("name", CHECKS)
def test_on_both_ranks(ranks: list[dict[str, str]], name: str) -> None:
    for seen in ranks:
        assert name not in seen, seen[name]


@pytest.mark.parametrize("order", ["contiguous", "head_tail"])
@pytest.mark.parametrize("size", [1, 2, 3, 4])
def test_places(size: int, order: Any) -> None:
    """Every token once, parts of one size, padding at the end of the whole."""
    for length in range(20):
        places = sp_places(length, size, order)
        assert places.shape[0] == size
        assert sorted(p for p in places.flatten().tolist() if p >= 0) == list(range(length))
        assert places.shape[1] * size - length < size * (1 if order == "contiguous" else 2)
    want = {"contiguous": [[0, 1, 2, 3], [4, 5, 6, 7]], "head_tail": [[0, 1, 6, 7], [2, 3, 4, 5]]}
    assert sp_places(8, 2, order).tolist() == want[order]
