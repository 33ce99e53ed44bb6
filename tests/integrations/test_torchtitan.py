"""Contract: ``XlossLoss`` in the place of torchtitan's ``ChunkedLossWrapper`` gives its loss, the gradients of hidden
states and head, and figures whose keys torchtitan can add up: on a decoder of torchtitan's own, in training and in
validation, and where ``lm_head`` is a unit of FSDP. What cannot be honoured raises.
"""

from __future__ import annotations

import importlib.util
import sys
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tests import budgets
from tests.integrations.comparisons import Comparison, worst
from tests.integrations.packages import need

need("torchtitan")

import torchtitan  # noqa: E402
from torchtitan.components.loss import ChunkedLossWrapper, CrossEntropyLoss  # noqa: E402

from xloss import CELossConfig, GRPOLossConfig, Metric, preset  # noqa: E402
from xloss.adapters.torchtitan import XlossLoss, _bounds, _metrics  # noqa: E402
from xloss.errors import MissingFieldError, OptionError, UnsupportedError  # noqa: E402
from xloss.losses.config import BaseLossConfig  # noqa: E402


def dapo_loss() -> Any:
    """torchtitan's DAPOLoss out of its file: the package around it wants vLLM."""
    root = Path(torchtitan.__file__).parent
    spec = importlib.util.spec_from_file_location("titan_dapo", root / "experiments" / "rl" / "losses" / "dapo.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["titan_dapo"] = module  # its dataclasses look themselves up
    spec.loader.exec_module(module)
    return module.DAPOLoss


B, L, D, V = 3, 16, 12, 53
TOTAL = torch.tensor(71)  # tokens of a global batch that this is a part of


class Decoder(nn.Module):
    """Hidden states of a decoder that torchtitan has told to skip its ``lm_head``."""

    def __init__(self, bias: bool = False) -> None:
        super().__init__()
        torch.manual_seed(3)
        self.body = nn.Linear(D, D)
        self.lm_head = nn.Linear(D, V, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        return torch.tanh(self.body(x))


def data() -> tuple[Tensor, Tensor]:
    gen = torch.Generator().manual_seed(7)
    labels = torch.randint(V, (B, L), generator=gen).masked_fill(torch.rand(B, L, generator=gen) < 0.3, -100)
    labels[1] = -100
    return torch.randn(B, L, D, generator=gen), labels


def rollouts() -> dict[str, Tensor]:
    """As torchtitan's RL trainer gives them, one log-prob of the generator not finite."""
    gen = torch.Generator().manual_seed(8)
    logprobs = -torch.rand(B, L, generator=gen) - 3.4
    logprobs[0, 3] = -torch.inf
    return {
        "generator_logprobs": logprobs,
        "advantages": torch.randn(B, L, generator=gen),
        "loss_mask": (torch.rand(B, L, generator=gen) > 0.4) & (data()[1] != -100),
        "positions": torch.arange(L).remainder(6).expand(B, L),
    }


def ours(config: BaseLossConfig, **fields: Any) -> XlossLoss:
    return XlossLoss.Config(loss_cfg=config, **fields).build()


def step(loss_fn: Any, bias: bool = False, dtype: torch.dtype = torch.float32, **inputs: Tensor) -> dict[str, Tensor]:
    """Loss and every gradient of a step as torchtitan's trainer makes it."""
    model = Decoder(bias).to(dtype)
    x, labels = data()
    loss_fn.set_lm_head(model.lm_head)
    loss, metrics = loss_fn(model(x.to(dtype)), labels, TOTAL, **inputs)
    loss.backward()
    assert not [key for key in metrics if not key.endswith(("/mean", "/frac", "/max", "/min", "_mean", "_frac"))]
    return {"loss": loss.detach()} | {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def chunked(inner: Any = None) -> Any:
    return ChunkedLossWrapper.Config(num_chunks=4, **({} if inner is None else {"loss_fn": inner})).build()


def ce_difference(mode: str) -> float:
    return worst(step(ours(CELossConfig(mode=mode)), bias=True), step(chunked(), bias=True))  # type: ignore[arg-type]


def dapo() -> GRPOLossConfig:
    clip = {"cliprange_low": 0.2, "cliprange_high": 0.28, "log_ratio_clamp": 10.0}
    return GRPOLossConfig(policy_loss_cfg={"loss_type": "ppo", **clip}, nonfinite="drop")


def dapo_difference() -> float:
    given = rollouts()
    theirs = {name: value for name, value in given.items() if name != "positions"}
    want = step(chunked(dapo_loss().Config(ratio_clip_low=0.2, ratio_clip_high=0.28)), **theirs)
    return worst(step(ours(dapo()), **given), want)


CHUNKED_CE = "ChunkedLossWrapper(CrossEntropyLoss)"
ADAPTER = "xloss.adapters.torchtitan"
COMPARISONS = [
    *(
        Comparison(
            ADAPTER,
            "torchtitan",
            f"ChunkedLossWrapper(CrossEntropyLoss), mode={mode}",
            partial(ce_difference, mode),
        )
        for mode in ("chunk", "eager")
    ),
    Comparison(ADAPTER, "torchtitan", "ChunkedLossWrapper(DAPOLoss)", dapo_difference),
]


@pytest.mark.parametrize("comparison", COMPARISONS, ids=lambda c: c.what)
def test_table(comparison: Comparison) -> None:
    assert comparison.run() <= budgets.FLOAT32_FLOOR


def test_is_what_torchtitan_gives_hidden_states_to() -> None:
    assert isinstance(ours(CELossConfig()), ChunkedLossWrapper)
    assert XlossLoss.Config().build().loss_cfg.loss_reduction == "sum"


def test_without_a_count_it_is_the_sum() -> None:
    (x, labels), model = data(), Decoder()
    losses = []
    for loss_fn in (ours(CELossConfig()), chunked()):
        loss_fn.set_lm_head(model.lm_head)
        losses.append(loss_fn(model(x), labels)[0].detach())
    budgets.assert_relative("sum", losses[0], losses[1], budgets.FLOAT32_FLOOR)


def test_validation_has_no_graph() -> None:
    model, loss_fn = Decoder(), ours(CELossConfig())
    loss_fn.set_lm_head(model.lm_head)
    x, labels = data()
    with torch.no_grad():
        loss, _ = loss_fn(model(x), labels, TOTAL)
    assert not loss.requires_grad and loss.isfinite()


def test_all_ignored_is_zero_and_reaches_every_parameter() -> None:
    model, loss_fn = Decoder(), ours(CELossConfig())
    loss_fn.set_lm_head(model.lm_head)
    loss, _ = loss_fn(model(data()[0]), torch.full((B, L), -100), TOTAL)
    loss.backward()
    assert float(loss.detach()) == 0
    assert all(p.grad is not None and not p.grad.any() for p in model.parameters())


def test_lm_head_is_left_as_it_was() -> None:
    model, loss_fn = Decoder(), ours(CELossConfig())
    loss_fn.set_lm_head(model.lm_head)
    x, labels = data()
    loss_fn(model(x), labels, TOTAL)
    assert "forward" not in vars(model.lm_head) and model.lm_head(model(x)).shape == (B, L, V)
    model.lm_head.forward = wrapped = partial(nn.Linear.forward, model.lm_head)  # as torchtitan's parallelize does
    loss_fn(model(x), labels, TOTAL)
    assert model.lm_head.forward is wrapped
    with pytest.raises(OptionError, match="advantagse"):
        loss_fn(model(x), labels, TOTAL, advantagse=torch.zeros(B, L))


def test_sequences_start_where_positions_do() -> None:
    labels = torch.zeros(2, 5, dtype=torch.int64)
    assert _bounds(labels, None).tolist() == [0, 5, 10]
    assert _bounds(labels, torch.tensor([[0, 1, 0, 1, 2], [3, 0, 1, 2, 0]])).tolist() == [0, 2, 5, 6, 9, 10]


def test_a_loss_of_whole_sequences_runs_on_packs() -> None:
    config = preset("gspo", loss_reduction="token")
    loss_fn, model = ours(config), Decoder()
    loss_fn.set_lm_head(model.lm_head)
    given = rollouts()
    given["generator_logprobs"][0, 3] = -3.5
    x, labels = data()
    whole, _ = loss_fn(model(x), labels, TOTAL, **given)
    parts = []
    for row in range(B):
        one = {name: value[row : row + 1] for name, value in given.items()}
        parts.append(loss_fn(model(x[row : row + 1]), labels[row : row + 1], TOTAL, **one)[0])
    budgets.assert_relative("gspo", torch.stack(parts).sum().detach(), whole.detach(), budgets.FLOAT32_FLOOR)


def test_figures_of_micro_batches_add_up() -> None:
    """torchtitan sums means and fractions that hold the global count already."""
    model, loss_fn = Decoder(), ours(dapo())
    loss_fn.set_lm_head(model.lm_head)
    x, labels = data()
    given = rollouts()
    total = (given["loss_mask"] & given["generator_logprobs"].isfinite()).sum()
    whole = loss_fn(model(x), labels, total, **given)[1]
    parts = [
        loss_fn(model(x[i : i + 1]), labels[i : i + 1], total, **{k: v[i : i + 1] for k, v in given.items()})[1]
        for i in range(B)
    ]
    summed: dict[str, Tensor] = {}
    for part in parts:
        summed = ChunkedLossWrapper._combine_chunk_metrics(summed, part)
    for name in ("pg_loss/mean", "approx_kl_k1/mean"):
        budgets.assert_relative(name, summed[name], whole[name], budgets.FLOAT32_FLOOR)


def test_keys_say_how_figures_add_up() -> None:
    x = torch.tensor([1.0, 3.0])
    given = {
        "nll": Metric.mean(x),
        "clip_frac": Metric.mean(x),
        "ratio_max": Metric.extreme(x, "max"),
        "pg_loss": Metric.total(x),
        "num_tokens": Metric.count_of(x),
    }
    found = _metrics(given, 2, 8)
    assert {k: float(v) for k, v in found.items()} == {
        "nll/mean": 0.5,
        "clip/frac": 0.5,
        "ratio_max/max": 3.0,
        "pg_loss/mean": 0.5,
    }


@pytest.mark.parametrize(
    "make, error, says",
    [
        (lambda: ours(CELossConfig(), num_chunks=4), OptionError, "num_chunks=4"),
        (lambda: ours(CELossConfig(loss_reduction="sample")), OptionError, "'token'"),
        (lambda: ours(preset("dpo")), UnsupportedError, "PreferenceLossConfig"),
        (lambda: ours(CELossConfig())(torch.zeros(1, 2, D), torch.zeros(1, 2)), MissingFieldError, "set_lm_head"),
    ],
)
def test_what_cannot_be_honoured_raises(make: Any, error: type[Exception], says: str) -> None:
    with pytest.raises(error, match=says):
        make()


def test_an_inner_loss_cannot_be_given_too() -> None:
    with pytest.raises(OptionError, match="loss_fn="):
        ours(CELossConfig(), loss_fn=CrossEntropyLoss.Config(global_vocab_size=V))


def test_policy_losses_name_the_input_that_lacks() -> None:
    model, loss_fn = Decoder(), ours(dapo())
    loss_fn.set_lm_head(model.lm_head)
    x, labels = data()
    with pytest.raises(MissingFieldError, match="advantages"):
        loss_fn(model(x), labels, TOTAL)
