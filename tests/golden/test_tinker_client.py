"""Golden cases of Tinker, through the client that has its calls.

Contract: on a model whose hidden states are parameters, ``forward_backward`` of each micro-batch gives the recorded
loss as ``loss:sum`` and the recorded log-probs of every token, whatever its weight; after the last one the gradients
are the recorded ones; ``forward`` says the same and leaves no gradient. Custom losses too.
"""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor

from tests import budgets
from tests.golden import records
from tests.golden.records import Entry, case_id
from tests.packed_models import lookup_model
from xloss.tinker import Datum, LanguageModel, TrainingClient

NAMED = [e for e in records.entries("tinker") if e["config"].get("loss_fn")]
CUSTOM = records.entries("tinker", "tinker_custom")
(DPO,) = records.entries("tinker", "dpo_sigmoid")
PRECISIONS = {"f64": torch.float64, "f32": torch.float32}
both = pytest.mark.parametrize("precision", PRECISIONS)


def _config(entry: Entry) -> dict[str, float] | None:
    """As a user gives it: nothing where the case has the documented defaults."""
    theirs = entry["config"]
    given = {n: theirs[n] for n in ("clip_low_threshold", "clip_high_threshold", "beta") if n in theirs}
    if "eps" in theirs:
        given = {"clip_low_threshold": 1 - theirs["eps"], "clip_high_threshold": 1 + theirs["eps"]}
    documented = {"ppo": (0.8, 1.2), "cispo": (0.0, 4.0)}.get(theirs["loss_fn"])
    is_default = tuple(given.values()) == documented or given == {"beta": 0.05}
    return None if is_default else given


class _Step:
    """The micro-batches of a case as lists of ``Datum``, and a model that gives their hidden states."""

    def __init__(self, entry: Entry, dtype: torch.dtype) -> None:
        self.entry, data = entry, records.tensors(entry["inputs"])
        self.count = int(data["n_batches"])
        self.hidden = [data[f"hidden_{b}"][0] for b in range(self.count)]
        self.model = lookup_model(torch.cat(self.hidden).to(dtype), data["weight"].to(dtype))
        self.data = [self._datums(data, b, dtype) for b in range(self.count)]
        self.logprobs = [data[f"cur_logps_f64_{b}"][0] for b in range(self.count)]

    def _datums(self, data: dict[str, Tensor], b: int, dtype: torch.dtype) -> list[Datum]:
        cfg, mask = self.entry["config"], data[f"mask_{b}"][0]
        inputs = {"target_tokens": data[f"targets_{b}"][0]}
        if cfg.get("loss_fn") == "cross_entropy":
            inputs["weights"] = data[f"is_weights_{b}"][0].to(dtype) * mask if cfg.get("float_weights") else mask
        elif cfg.get("loss_fn"):
            inputs["logprobs"] = data[f"old_logps_{b}"][0].to(dtype)
            inputs["advantages"] = data[f"{cfg.get('adv', 'adv_seq_tok')}_{b}"][0].to(dtype) * mask
            if cfg.get("mask_quadratic"):
                inputs["mask"] = mask
        first = sum(len(h) for h in self.hidden[:b])
        bounds = data[f"cu_seq_lens_{b}"].tolist()
        return [
            Datum(torch.arange(start, stop) + first, {name: value[start:stop] for name, value in inputs.items()})
            for start, stop in pairwise(bounds)
        ]

    def grads(self) -> dict[str, Tensor]:
        assert self.model.backbone.hidden.grad is not None and self.model.head.weight.grad is not None
        parts = self.model.backbone.hidden.grad.split([len(h) for h in self.hidden])
        return {
            "grad_weight": self.model.head.weight.grad,
            **{f"grad_hidden_{b}": g[None] for b, g in enumerate(parts)},
        }


def _client(model: LanguageModel, **options: Any) -> TrainingClient:
    return TrainingClient(model, returns="torch", **options)


@both
@pytest.mark.parametrize("mode", ["eager", "chunk"])
@pytest.mark.parametrize("entry", NAMED, ids=case_id)
def test_losses_by_name(entry: Entry, mode: Any, precision: str) -> None:
    step = _Step(entry, PRECISIONS[precision])
    client = _client(step.model, mode=mode, chunk_size=None if mode == "eager" else 7)
    name, config = entry["config"]["loss_fn"], _config(entry)
    seen = [client.forward(data, name, config).result() for data in step.data]
    assert all(p.grad is None for p in step.model.parameters())
    out = [client.forward_backward(data, name, config).result() for data in step.data]
    losses = [x.metrics["loss:sum"] for x in out]
    assert not records.mismatches(entry, {"loss": losses, **step.grads()}, precision)
    assert [x.metrics["loss:sum"] for x in seen] == pytest.approx(losses, rel=budgets.FIGURE_F32)
    for b, want in enumerate(step.logprobs):
        for result in (out[b], seen[b]):
            got = torch.cat([x["logprobs"] for x in result.loss_fn_outputs]).double()
            assert records.differ("logprobs", got.numpy(), want.numpy(), records.tolerance(entry)[precision]) is None


def _custom_loss(data: list[Any], logprobs: list[Tensor]) -> tuple[Tensor, dict[str, float]]:
    return torch.stack([(x**2).sum() for x in logprobs]).sum(), {"sequences": float(len(logprobs))}


def _variance_loss(data: list[Any], logprobs: list[Tensor]) -> tuple[Tensor, dict[str, float]]:
    return torch.cat(logprobs).var(), {}


@both
@pytest.mark.parametrize("budget", [None, 4096], ids=["kept", "formed-again"])
@pytest.mark.parametrize("entry", CUSTOM, ids=case_id)
def test_custom_losses(entry: Entry, budget: int | None, precision: str) -> None:
    """One loss over the log-probs of all sequences of all micro-batches, with and without room for the logits."""
    step = _Step(entry, PRECISIONS[precision])
    fn = {"custom_loss": _custom_loss, "variance_loss": _variance_loss}[entry["config"]["fn"]]
    client = _client(step.model, mode="chunk", logits_budget=budget)
    data = [datum for part in step.data for datum in part]
    out = client.forward_backward_custom(data, fn).result()
    assert not records.mismatches(entry, {"loss": [out.metrics["loss:sum"]], **step.grads()}, precision)
    lp = torch.cat(step.logprobs)
    grad = 2 * lp if fn is _custom_loss else 2 * (lp - lp.mean()) / (len(lp) - 1)
    assert out.metrics["surrogate_loss:sum"] == pytest.approx(float((lp * grad).sum()), rel=budgets.FIGURE_F32_CHAIN)


@both
@pytest.mark.parametrize("way", ["by name", "custom"])
def test_dpo(way: str, precision: str) -> None:
    dtype, data = PRECISIONS[precision], records.tensors(DPO["inputs"])
    rows, length, width = data["hidden"].shape
    model = lookup_model(data["hidden"].reshape(-1, width).to(dtype), data["weight"].to(dtype))
    tokens = torch.arange(rows * length).reshape(rows, length)
    datums = [
        Datum(tokens[i], {"target_tokens": data["targets"][i], "weights": data["mask"][i], "ref_logprobs": ref})
        for i, ref in enumerate(data["ref_logps"].to(dtype))
    ]

    def dpo(given: list[Datum], logprobs: list[Tensor]) -> tuple[Tensor, dict[str, float]]:
        scores = torch.stack(
            [
                ((lp - d.loss_fn_inputs["ref_logprobs"]) * d.loss_fn_inputs["weights"]).sum()
                for d, lp in zip(given, logprobs, strict=True)
            ]
        )
        margin = scores[: rows // 2] - scores[rows // 2 :]
        return -torch.nn.functional.logsigmoid(0.1 * margin).mean(), {}

    client = _client(model, mode="chunk")
    if way == "custom":
        out = client.forward_backward_custom(datums, dpo).result()
    else:
        out = client.forward_backward(datums, "sigmoid", {"beta": 0.1, "layout": "halves"}).result()
    assert model.backbone.hidden.grad is not None and model.head.weight.grad is not None
    found = {"grad_hidden": model.backbone.hidden.grad.reshape(rows, length, width)}
    found |= {"grad_weight": model.head.weight.grad}
    assert not records.mismatches(DPO, {"loss": [out.metrics["loss:sum"]], **found}, precision)


def test_all_cases_are_here() -> None:
    assert len(NAMED) + len(CUSTOM) + 1 == len(records.entries("tinker")) == 22
    assert sum(_config(e) is None for e in NAMED) == 6
