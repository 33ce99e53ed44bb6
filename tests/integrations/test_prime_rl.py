"""Contract: the custom loss for prime-rl gives what prime-rl's own loss functions were recorded to give, sequence by
sequence, with and without token weights. The interface alone: the package is not installable, so its two dataclasses
are restated here from its documentation, and its numbers come from ``tests/golden``.
"""

from __future__ import annotations

import re
import sys
import tomllib
from dataclasses import dataclass
from itertools import pairwise
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor

from tests import budgets
from tests.golden import records
from tests.golden.test_prime import PLAIN, policy_of
from tests.integrations.page import sections
from xloss.adapters import prime_rl as adapter
from xloss.errors import MissingFieldError, OptionError, UnsupportedError


@dataclass
class LossInputs:
    trainer_logprobs: Tensor
    inference_logprobs: Tensor
    ref_logprobs: Tensor | None
    advantages: Tensor
    loss_mask: Tensor
    loss_weights: Tensor | None = None


@dataclass
class LossOutputs:
    loss: Tensor
    metrics: dict[str, Tensor]


@pytest.fixture(autouse=True)
def _prime_rl(monkeypatch: pytest.MonkeyPatch) -> None:
    parts = ["prime_rl", "trainer", "rl", "loss"]
    for end in range(1, len(parts) + 1):
        monkeypatch.setitem(sys.modules, ".".join(parts[:end]), ModuleType(".".join(parts[:end])))
    monkeypatch.setattr(sys.modules["prime_rl.trainer.rl.loss"], "LossOutputs", LossOutputs, raising=False)


def sequences(entry: records.Entry, batch: int, logprobs: Tensor) -> list[LossInputs]:
    """A packed micro-batch of the case, one ``LossInputs`` a sequence."""
    cfg, data = entry["config"], records.tensors(entry["inputs"])
    bounds = data[f"cu_seq_lens_{batch}"].tolist()
    scale = cfg.get("loss", {}).get("adv_tau", 1.0)
    fields = {
        "trainer_logprobs": logprobs,
        "inference_logprobs": data[f"old_logps_{batch}"].double(),
        "ref_logprobs": data[f"ref_logps_{batch}"].double(),
        "advantages": data[f"{cfg.get('adv', 'adv_seq_tok')}_{batch}"].double() * scale,
        "loss_mask": data[f"labels_{batch}"] != -100,
    }
    return [
        LossInputs(**{name: value[0, start:stop] for name, value in fields.items()}) for start, stop in pairwise(bounds)
    ]


@pytest.mark.parametrize("entry", PLAIN, ids=records.case_id)
def test_as_recorded(entry: records.Entry) -> None:
    data, want = records.tensors(entry["inputs"]), records.tensors(entry["file"])
    temperature = entry["config"].get("temperature", 1.0)
    weight = data["weight"].double().requires_grad_()
    total = torch.zeros((), dtype=torch.float64)
    for b in range(int(data["n_batches"])):
        logp = torch.log_softmax(data[f"hidden_{b}"].double() @ weight.T / temperature, -1)
        logprobs = logp.gather(-1, data[f"targets_{b}"].unsqueeze(-1)).squeeze(-1)
        outs = [adapter.loss(x, policy_loss_cfg=policy_of(entry["config"])) for x in sequences(entry, b, logprobs)]
        part = torch.stack([out.loss for out in outs]).sum() / entry["config"]["rl_scale"]
        budgets.assert_relative("loss", part.detach(), want["loss"][b], budgets.F64_STEP)
        total = total + part
    if "grad_weight" in want:
        (grad,) = torch.autograd.grad(total, weight)
        budgets.assert_relative("d loss / d weight", grad, want["grad_weight"], budgets.F64_STEP)


def one(weights: Tensor | None = None) -> LossInputs:
    gen = torch.Generator().manual_seed(4)
    old = -torch.rand(9, dtype=torch.float64, generator=gen) - 1
    new = (old + 0.3 * torch.randn(9, dtype=torch.float64, generator=gen)).requires_grad_()
    advantages = torch.randn(9, dtype=torch.float64, generator=gen)
    return LossInputs(new, old, None, advantages, torch.arange(9) > 2, weights)


def test_presets_by_name_and_token_weights() -> None:
    """Weight w on a token is that token w times."""
    plain, doubled = one(), one(torch.full((9,), 2.0, dtype=torch.float64))
    for name, more in (("prime/default", {}), ("prime/ipo", {"delta_low": 0.3}), ("dapo", {"cliprange_high": 0.3})):
        a, b = (adapter.loss(x, preset=name, **more) for x in (plain, doubled))
        budgets.assert_relative(name, b.loss.detach(), 2 * a.loss.detach(), budgets.F64_STEP)
        assert a.metrics and all(x.ndim == 0 for x in a.metrics.values())
    assert {"is_masked", "unmasked_mismatch_kl"} <= adapter.loss(plain, preset="prime/default").metrics.keys()
    weights = torch.rand(9, dtype=torch.float64)
    inputs = one(weights)
    (grad,) = torch.autograd.grad(adapter.loss(inputs, preset="prime/default").loss, inputs.trainer_logprobs)
    (bare,) = torch.autograd.grad(adapter.loss(plain, preset="prime/default").loss, plain.trainer_logprobs)
    budgets.assert_relative("gradient", grad, bare * weights, budgets.F64_STEP)


def test_a_sequence_without_tokens_is_zero() -> None:
    inputs = one()
    inputs.loss_mask = torch.zeros(9, dtype=torch.bool)
    out = adapter.loss(inputs, preset="gspo", loss_reduction="token")
    (grad,) = torch.autograd.grad(out.loss, inputs.trainer_logprobs)
    assert float(out.loss.detach()) == 0 and not grad.any()


@pytest.mark.parametrize(
    "fields, error, says",
    [
        ({"preset": "prime/ce", "z_loss_coef": 0.1}, MissingFieldError, "z_loss_coef"),
        ({"preset": "dapo", "entropy_coef": 0.1}, OptionError, "entropies"),
        ({"preset": "grpo"}, OptionError, "loss_reduction='sample'"),
        ({"preset": "dapo", "use_kl_loss": True, "kl_loss_type": "k3"}, MissingFieldError, "ref_logprobs"),
        ({"preset": "dpo"}, UnsupportedError, "PreferenceLossConfig"),
        ({"preset": "dappo"}, OptionError, "dapo"),
    ],
)
def test_what_is_not_there_raises(fields: dict[str, Any], error: type[Exception], says: str) -> None:
    with pytest.raises(error, match=says):
        adapter.loss(one(), **fields)


def test_the_toml_of_the_page_is_read() -> None:
    (section,) = (s for s in sections() if s.title == "prime-rl")
    (text,) = re.findall(r"```toml\n(.*?)```", section.text, re.DOTALL)
    given = tomllib.loads(text)["trainer"]["loss"]
    module, _, name = given["import_path"].rpartition(".")
    assert getattr(sys.modules[module], name) is adapter.loss
    out = adapter.loss(one(), **given["kwargs"])
    assert out.loss.isfinite()
