"""Contract: ``xloss.hf.trl.SFTTrainer`` takes the steps of ``trl.SFTTrainer`` and logs its figures; a plain
``trl.SFTTrainer`` on an attached model trains as before, through TRL's own head.
"""

from __future__ import annotations

from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pytest
import torch

from tests import budgets
from tests.integrations.comparisons import Comparison, worst
from tests.integrations.models import VOCAB, build
from tests.integrations.packages import need
from tests.integrations.trainers import PLAIN_STEPS, parameters, token_rows, tokenizer

need("transformers", "trl", "peft", "datasets")

import trl  # noqa: E402
from datasets import Dataset  # noqa: E402
from peft import LoraConfig  # noqa: E402

from xloss.hf import attach, is_attached  # noqa: E402
from xloss.hf.trl import SFTTrainer  # noqa: E402

CASES: dict[str, dict[str, Any]] = {
    "accumulation 1": {"per_device_train_batch_size": 4},
    "accumulation 2": {},
    "accumulation 4": {"per_device_train_batch_size": 1, "gradient_accumulation_steps": 4},
    "padding-free": {"padding_free": True, "max_length": None},
    "packing": {"packing": True, "max_length": 24},
    "dft": {"loss_type": "dft"},
    "label smoothing": {"label_smoothing_factor": 0.2},
    "MoE": {"architecture": "qwen3-moe (aux loss)"},
    "softcap": {"architecture": "gemma 2 (softcap, tied)"},
    "lora": {"lora": True},
    "checkpointing": {"gradient_checkpointing": True},
}


def trainer(cls: Any, folder: str, architecture: str = "llama", lora: bool = False, **options: Any) -> Any:
    defaults = {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 2, "gradient_checkpointing": False}
    if options.get("per_device_train_batch_size") == 4:
        defaults["gradient_accumulation_steps"] = 1
    args = trl.SFTConfig(
        output_dir=folder,
        max_steps=3,
        bf16=False,
        **{**PLAIN_STEPS, **defaults, **options},
    )
    rows = token_rows(24)
    data = Dataset.from_list([{"input_ids": ids, "labels": [-100, -100, *ids[2:]]} for ids in rows])
    return cls(
        model=build(architecture, torch.float32),
        args=args,
        train_dataset=data,
        processing_class=tokenizer(),
        peft_config=LoraConfig(r=2, target_modules=["q_proj", "v_proj"], init_lora_weights=False) if lora else None,
    )


def run(cls: Any, folder: str, options: dict[str, Any]) -> tuple[dict[str, torch.Tensor], list[dict[str, float]]]:
    torch.manual_seed(0)
    made = trainer(cls, folder, **options)
    before = parameters(made.model)
    made.train()
    after = parameters(made.model)
    trained = {n: p.requires_grad for n, p in made.model.named_parameters()}
    return {n: after[n] - before[n] for n in before if trained[n]}, made.state.log_history


def compare(options: dict[str, Any]) -> float:
    with TemporaryDirectory() as folder:
        return worst(run(SFTTrainer, folder, options)[0], run(trl.SFTTrainer, folder, options)[0])


COMPARISONS = [
    Comparison("xloss.hf.trl.SFTTrainer", "trl", f"3 steps, {name}", partial(compare, options))
    for name, options in CASES.items()
]


@pytest.mark.parametrize("name", CASES)
def test_equals_trl(name: str, tmp_path: Path) -> None:
    got, got_log = run(SFTTrainer, str(tmp_path), CASES[name])
    want, want_log = run(trl.SFTTrainer, str(tmp_path), CASES[name])
    assert worst(got, want) <= budgets.TRAINER_STEPS
    figures = {"loss", "grad_norm", "entropy", "mean_token_accuracy", "num_tokens"}
    assert figures | ({"aux_loss"} if name == "MoE" else set()) <= got_log[0].keys() == want_log[0].keys()
    for mine, theirs in zip(got_log[:3], want_log[:3], strict=True):
        for figure in figures | (mine.keys() & {"aux_loss"}):
            assert mine[figure] == pytest.approx(theirs[figure], **budgets.LOGGED), figure


def test_trls_own_trainer_takes_an_attached_model(tmp_path: Path) -> None:
    """TRL lays its own head over the forward; that keeps working, and so does attaching over it."""
    made = trainer(trl.SFTTrainer, str(tmp_path))
    attach(made.model)
    before = parameters(made.model)
    made.train()
    want, _ = run(trl.SFTTrainer, str(tmp_path), {})
    after = parameters(made.model)
    assert worst({n: after[n] - before[n] for n in before}, want) <= budgets.TRAINER_STEPS


def test_evaluation_and_metrics_from_logits(tmp_path: Path) -> None:
    shapes: list[tuple[int, ...]] = []

    def metrics(prediction: Any) -> dict[str, float]:
        shapes.append(prediction.predictions.shape)
        return {"seen": 1.0}

    data = Dataset.from_list([{"input_ids": ids[:4]} for ids in token_rows(8) if len(ids) >= 4])
    for with_metrics in (False, True):
        found = []
        for cls in (SFTTrainer, trl.SFTTrainer):
            made = trainer(cls, str(tmp_path), per_device_eval_batch_size=2)
            made.compute_metrics = metrics if with_metrics else None
            found.append(made.evaluate(made._prepare_dataset(data, tokenizer(), made.args, False, None, "eval")))
        ours, theirs = found
        assert ours["eval_loss"] == pytest.approx(theirs["eval_loss"], **budgets.LOGGED)
        assert ours["eval_entropy"] == pytest.approx(theirs["eval_entropy"], **budgets.LOGGED)
    assert len(shapes) == 2 and shapes[0] == shapes[1] and shapes[0][-1] == VOCAB


def test_it_is_attached_and_generates(tmp_path: Path) -> None:
    made = trainer(SFTTrainer, str(tmp_path))
    assert is_attached(made.model)
    assert made.model.eval().generate(torch.tensor([[5, 6]]), max_new_tokens=3, do_sample=False).shape == (1, 5)
