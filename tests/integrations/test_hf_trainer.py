"""Contract: ``transformers.Trainer`` on an attached model, with labels alone, takes the steps of the unattached one on
the same uneven data, whatever the accumulation, and the steps of one large batch.
"""

from __future__ import annotations

from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pytest
import torch
from torch import Tensor

from tests import budgets
from tests.integrations.comparisons import Comparison, worst
from tests.integrations.models import VOCAB, build
from tests.integrations.packages import need
from tests.integrations.trainers import PLAIN_STEPS, parameters, token_rows, tokenizer

need("transformers", "accelerate", "datasets")

from transformers import (  # noqa: E402
    DataCollatorForLanguageModeling,
    DataCollatorWithFlattening,
    Trainer,
    TrainingArguments,
)

from xloss import CELossConfig  # noqa: E402
from xloss.hf import attach  # noqa: E402


def rows() -> list[dict[str, list[int]]]:
    return [{"input_ids": ids, "labels": [-100, *ids[1:]]} for ids in token_rows(16)]


def collate(examples: list[dict[str, list[int]]]) -> dict[str, Tensor]:
    longest = max(len(e["input_ids"]) for e in examples)
    full = {"input_ids": 0, "labels": -100}
    return {
        name: torch.tensor([e[name] + [fill] * (longest - len(e[name])) for e in examples])
        for name, fill in full.items()
    } | {
        "attention_mask": torch.tensor(
            [[1] * len(e["input_ids"]) + [0] * (longest - len(e["input_ids"])) for e in examples]
        )
    }


def train(model: Any, folder: str, rows_at_once: int, accumulation: int, flat: bool = False, **options: Any) -> Any:
    """Four optimizer steps of four sequences each, however they are cut."""
    args = TrainingArguments(
        output_dir=folder,
        per_device_train_batch_size=rows_at_once,
        gradient_accumulation_steps=accumulation,
        max_steps=4,
        **{**PLAIN_STEPS, **options},
    )
    collator = DataCollatorWithFlattening() if flat else collate
    trainer = Trainer(model=model, args=args, train_dataset=rows(), data_collator=collator)
    trainer.train()
    return trainer


def moved(model: Any, folder: str, **options: Any) -> tuple[dict[str, Tensor], list[float]]:
    """How far the weights went, and the losses that were logged."""
    before = parameters(model)
    trainer = train(model, folder, **options)
    after = parameters(model)
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    return {name: after[name] - before[name] for name in before}, losses


def compare(folder: str | None = None, architecture: str = "llama", **options: Any) -> float:
    if folder is None:
        with TemporaryDirectory() as made:
            return compare(made, architecture, **options)
    model = build(architecture, torch.float32)
    ours, losses = moved(attach(model), folder, **options)
    theirs, want = moved(build(architecture, torch.float32), folder, **options)
    assert len(losses) == 4
    assert losses == pytest.approx(want, **budgets.LOGGED)
    return worst(ours, theirs)


CUTS = {"4 x 1": (4, 1), "2 x 2": (2, 2), "1 x 4": (1, 4)}
RUNS: dict[str, dict[str, Any]] = {
    **{f"accumulation {n}": {"rows_at_once": r, "accumulation": n} for r, n in CUTS.values()},
    "accumulation 2, packed": {"rows_at_once": 2, "accumulation": 2, "flat": True},
    "accumulation 2, MoE": {"rows_at_once": 2, "accumulation": 2, "architecture": "qwen3-moe (aux loss)"},
    "accumulation 2, softcap, tied": {"rows_at_once": 2, "accumulation": 2, "architecture": "gemma 3 (tied)"},
    "accumulation 2, label smoothing": {"rows_at_once": 2, "accumulation": 2, "label_smoothing_factor": 0.1},
    "accumulation 2, checkpointing": {"rows_at_once": 2, "accumulation": 2, "gradient_checkpointing": True},
}
COMPARISONS = [
    Comparison("xloss.hf.attach", "transformers", f"4 steps of Trainer, {name}", partial(compare, **options))
    for name, options in RUNS.items()
]


@pytest.mark.parametrize("name", RUNS)
def test_takes_the_steps_of_the_trainer_without_it(name: str, tmp_path: Path) -> None:
    assert compare(str(tmp_path), **RUNS[name]) <= budgets.TRAINER_STEPS


def test_the_cut_does_not_matter(tmp_path: Path) -> None:
    found = [
        moved(attach(build("llama", torch.float32)), str(tmp_path), rows_at_once=r, accumulation=n)
        for r, n in CUTS.values()
    ]
    for ours, losses in found[1:]:
        assert worst(ours, found[0][0]) <= budgets.TRAINER_STEPS
        assert losses == pytest.approx(found[0][1], **budgets.LOGGED)


def test_label_smoothing_of_the_config_makes_no_logits(tmp_path: Path) -> None:
    """The Trainer's own option takes logits; the same number in attach's config does without."""
    cut: dict[str, Any] = {"rows_at_once": 2, "accumulation": 2}
    model = attach(build("llama", torch.float32), CELossConfig(label_smoothing=0.1))
    ours, _ = moved(model, str(tmp_path), **cut)
    theirs, _ = moved(build("llama", torch.float32), str(tmp_path), **cut, label_smoothing_factor=0.1)
    assert worst(ours, theirs) <= budgets.TRAINER_STEPS


def test_no_step_makes_logits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = attach(build("llama", torch.float32))
    sizes: list[int] = []
    forward = torch.nn.Linear.forward

    def seen(self: torch.nn.Linear, x: Tensor) -> Tensor:
        out = forward(self, x)
        sizes.append(out.shape[-1])
        return out

    train(model, str(tmp_path), 4, 1)
    assert model.lm_head.out_features == VOCAB
    monkeypatch.setattr(torch.nn.Linear, "forward", seen)
    model.train()(**collate(rows()[:2]))
    assert VOCAB not in sizes
    model.eval()(**collate(rows()[:2]))
    assert VOCAB in sizes


def test_evaluation_has_logits_and_a_loss(tmp_path: Path) -> None:
    shapes: list[tuple[int, ...]] = []

    def metrics(prediction: Any) -> dict[str, float]:
        shapes.append(prediction.predictions.shape)
        return {"seen": 1.0}

    def evaluated(model: Any) -> dict[str, float]:
        args = TrainingArguments(output_dir=str(tmp_path), per_device_eval_batch_size=2, report_to="none", use_cpu=True)
        data = [row for row in rows() if len(row["input_ids"]) > 4][:4]
        trainer = Trainer(model=model, args=args, eval_dataset=data, data_collator=collate, compute_metrics=metrics)
        found: dict[str, float] = trainer.evaluate()
        return found

    ours, theirs = evaluated(attach(build("llama", torch.float32))), evaluated(build("llama", torch.float32))
    assert ours["eval_seen"] == 1.0 and ours["eval_loss"] == theirs["eval_loss"]
    assert shapes[0] == shapes[1] and shapes[0][-1] == VOCAB


def test_the_language_modelling_collator_and_checkpoints(tmp_path: Path) -> None:
    """Columns that the forward takes are found through its signature; a checkpoint loads into an unattached model."""
    from datasets import Dataset
    from transformers import AutoModelForCausalLM

    model = attach(build("llama", torch.float32))
    args = TrainingArguments(output_dir=str(tmp_path), max_steps=1, report_to="none", use_cpu=True, save_steps=1)
    data = Dataset.from_list([{"input_ids": ids, "other": 1} for ids in token_rows(8)])
    collator = DataCollatorForLanguageModeling(tokenizer(), mlm=False)
    Trainer(model=model, args=args, train_dataset=data, data_collator=collator).train()
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "checkpoint-1")
    for name, value in model.state_dict().items():
        assert torch.equal(again.state_dict()[name], value), name
