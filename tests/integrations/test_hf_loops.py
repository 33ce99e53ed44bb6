"""Contract: the loops of ``docs/integrations.md`` for accelerate and Lightning take the step of a plain loop, over
uneven micro-batches; so does Lightning's automatic optimization with its division multiplied away.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pytest
import torch
from torch import Tensor

from tests import budgets
from tests.integrations.comparisons import Comparison, worst
from tests.integrations.models import batch, build
from tests.integrations.packages import need
from tests.integrations.trainers import parameters

need("transformers", "accelerate", "lightning")

import lightning  # noqa: E402
from accelerate import Accelerator  # noqa: E402
from accelerate.state import AcceleratorState  # noqa: E402

from xloss import CELossConfig, CELossContext, CELossContextInputItem, shift_labels  # noqa: E402
from xloss.hf import attach  # noqa: E402

Batch = dict[str, Tensor]
Pair = tuple[Batch, CELossContext]


def steps() -> list[list[Batch]]:
    """Two optimizer steps of two micro-batches with different numbers of tokens."""
    return [[batch(rows=1 + i, length=6 + 3 * i, seed=10 * step + i) for i in range(2)] for step in range(2)]


def calibrated(step: list[Batch]) -> list[Pair]:
    cfg = CELossConfig()
    items = [CELossContextInputItem(shifted_labels=shift_labels(b["labels"])) for b in step]
    kwargs = CELossContext.build_batches_loss_kwargs(items, cfg)
    inputs = [{name: b[name] for name in ("input_ids", "attention_mask")} for b in step]
    return [(i, CELossContext(cfg, kw)) for i, kw in zip(inputs, kwargs, strict=True)]


def plain(model: Any) -> None:
    """The mean over all labels of the step, from the unattached model's logits."""
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for step in steps():
        total = sum(int((b["labels"][:, 1:] != -100).sum()) for b in step)
        for b in step:
            (model(**b, num_items_in_batch=total).loss).backward()
        optimizer.step()
        optimizer.zero_grad()


def with_accelerate(model: Any, **options: Any) -> None:
    accelerator = Accelerator(gradient_accumulation_steps=2, cpu=True, **options)
    model, optimizer = accelerator.prepare(attach(model), torch.optim.SGD(model.parameters(), lr=0.1))
    for step in steps():
        for inputs, ctx in calibrated(step):
            with accelerator.accumulate(model):
                loss = model(**inputs, loss_ctx=ctx).loss
                accelerator.backward(loss * accelerator.gradient_accumulation_steps)
                optimizer.step()
                optimizer.zero_grad()


class Manual(lightning.LightningModule):  # type: ignore[misc]
    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model, self.automatic_optimization = attach(model), False

    def training_step(self, step: list[Batch], index: int) -> None:
        for inputs, ctx in calibrated(step):
            self.manual_backward(self.model(**inputs, loss_ctx=ctx).loss)
        self.optimizers().step()
        self.optimizers().zero_grad()

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.1)


class Automatic(Manual):
    def __init__(self, model: Any) -> None:
        super().__init__(model)
        self.automatic_optimization = True

    def training_step(self, pair: Pair, index: int) -> Tensor:
        inputs, ctx = pair
        loss: Tensor = self.model(**inputs, loss_ctx=ctx).loss
        return loss * self.trainer.accumulate_grad_batches


def fit(module: Any, data: list[Any], accumulate: int) -> None:
    loader = torch.utils.data.DataLoader(data, batch_size=None, collate_fn=lambda x: x)
    with TemporaryDirectory() as folder, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        trainer = lightning.Trainer(
            max_epochs=1,
            accelerator="cpu",
            accumulate_grad_batches=accumulate,
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            default_root_dir=folder,
        )
        trainer.fit(module, loader)


def manual(model: Any) -> None:
    fit(Manual(model), steps(), 1)


def automatic(model: Any) -> None:
    fit(Automatic(model), [pair for step in steps() for pair in calibrated(step)], 2)


LOOPS: dict[str, tuple[str, Callable[[Any], None]]] = {
    "accelerate": ("accelerate", with_accelerate),
    "Lightning, manual optimization": ("lightning", manual),
    "Lightning, automatic optimization": ("lightning", automatic),
}


def moved(loop: Callable[[Any], None]) -> dict[str, Tensor]:
    model = build("llama").train()
    before = parameters(model)
    loop(model)
    after = parameters(model)
    return {name: after[name] - before[name] for name in before}


def compare(loop: Callable[[Any], None]) -> float:
    return worst(moved(loop), moved(plain))


COMPARISONS = [
    Comparison("xloss.hf.attach", package, f"2 steps of 2 uneven micro-batches, {name}", partial(compare, loop))
    for name, (package, loop) in LOOPS.items()
]


@pytest.mark.parametrize("name", LOOPS)
def test_takes_the_step_of_a_plain_loop(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert compare(LOOPS[name][1]) <= budgets.F32_GRADIENT


def test_a_forgotten_factor_shows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What the pages warn of: the division by the accumulation steps is really there."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(Automatic, "training_step", lambda self, pair, i: self.model(**pair[0], loss_ctx=pair[1]).loss)
    assert compare(automatic) > 0.3


@pytest.fixture
def fresh_state() -> Iterator[None]:
    """accelerate keeps the first options of a process for all that follow."""
    AcceleratorState._reset_state(reset_partial_state=True)
    yield
    AcceleratorState._reset_state(reset_partial_state=True)


@pytest.mark.usefixtures("fresh_state")
def test_mixed_precision_of_accelerate() -> None:
    """accelerate wraps the forward again; the head computes in bfloat16 as autocast asks."""
    model = build("llama", torch.float32).train()
    accelerator = Accelerator(cpu=True, mixed_precision="bf16")
    prepared = accelerator.prepare(attach(model))
    data = batch()
    loss = prepared(**data).loss
    assert loss.dtype == torch.float32 and prepared(**data).logits is None
    with torch.autocast("cpu", torch.bfloat16):
        assert loss.item() == pytest.approx(attach(build("llama", torch.float32)).train()(**data).loss.item())
