"""Contract: ``xloss.hf.trl.GRPOTrainer`` has the loss, gradients and logged figures of ``trl.GRPOTrainer`` on the same
batch, for every loss type, level and term, or says that it cannot.
"""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from tests import budgets
from tests.integrations.comparisons import Comparison, Gradients, worst
from tests.integrations.models import VOCAB, build, gradients
from tests.integrations.packages import need
from tests.integrations.trainers import parameters, tokenizer

need("transformers", "trl", "peft", "datasets")

import trl  # noqa: E402
from datasets import Dataset  # noqa: E402
from peft import LoraConfig  # noqa: E402

from xloss.errors import OptionError, UnsupportedError  # noqa: E402
from xloss.hf import is_attached  # noqa: E402
from xloss.hf.trl import GRPOTrainer  # noqa: E402

SEQUENCE = {"importance_sampling_level": "sequence"}
CASES: dict[str, dict[str, Any]] = {
    "dapo": {},
    "grpo": {"loss_type": "grpo"},
    "bnpo": {"loss_type": "bnpo"},
    "dr_grpo": {"loss_type": "dr_grpo"},
    "cispo": {"loss_type": "cispo", "epsilon_high": 1.3},
    "sapo": {"loss_type": "sapo"},
    "luspo": {"loss_type": "luspo", **SEQUENCE},
    "luspo, token": {"loss_type": "luspo"},
    "vespo": {"loss_type": "vespo"},
    "gspo": {"loss_type": "grpo", **SEQUENCE, "epsilon": 0.05, "epsilon_high": 0.1},
    "cispo, sequence": {"loss_type": "cispo", "epsilon_high": 1.05, **SEQUENCE},
    "sapo, sequence": {"loss_type": "sapo", **SEQUENCE},
    "clip higher, delta": {"epsilon": 0.1, "epsilon_high": 0.2, "delta": 1.4},
    "kl": {"beta": 0.3},
    "kl, luspo": {"beta": 0.3, "loss_type": "luspo", **SEQUENCE},
    "kl, bias corrected": {"beta": 0.3, "use_bias_correction_kl": True},
    "kl, bias corrected, sequence": {"beta": 0.3, "use_bias_correction_kl": True, "loss_type": "grpo", **SEQUENCE},
    "entropy bonus": {"entropy_coef": 0.2, "loss_type": "grpo"},
    "adaptive entropy": {"entropy_coef": 0.2, "use_adaptive_entropy": True, "entropy_target": 9.0},
    "entropy mask": {"top_entropy_quantile": 0.4},
    "off-policy mask": {"off_policy_mask_threshold": -0.2},
    "temperature": {"temperature": 0.7},
    "vllm weights": {"vllm": True},
    "vllm weights of sequences": {"vllm": "sequence", "loss_type": "grpo"},
    "vllm weights, vespo": {"vllm": True, "loss_type": "vespo"},
    "vllm weights, off-policy mask": {"vllm": True, "off_policy_mask_threshold": 0.2},
    "on-policy": {"old": False},
    "tool calls": {"tools": True},
    "evaluation": {"training": False, "loss_type": "grpo"},
    "aux loss": {"architecture": "qwen3-moe (aux loss)"},
    "softcap": {"architecture": "gemma 2 (softcap, tied)"},
    "lora": {"lora": True},
    "all at once": {
        "loss_type": "dr_grpo",
        "beta": 0.2,
        "entropy_coef": 0.1,
        "delta": 1.5,
        "off_policy_mask_threshold": 0.2,
        "vllm": True,
        "tools": True,
        "temperature": 0.8,
    },
}
OURS = ("vllm", "old", "tools", "training", "architecture", "lora")


def trainer(cls: Any, tmp_path: Path, architecture: str = "llama", lora: bool = False, **options: Any) -> Any:
    data = Dataset.from_dict({"prompt": ["w1 w2", "w3 w4 w5", "w6", "w7 w8"]})
    args = trl.GRPOConfig(
        output_dir=str(tmp_path),
        per_device_train_batch_size=4,
        num_generations=2,
        max_completion_length=6,
        report_to="none",
        use_cpu=True,
        bf16=False,
        **options,
    )
    model = build(architecture, torch.float32)
    if options.get("beta"):  # the reference is loaded from where the model came from
        model.save_pretrained(tmp_path / "model")
        model = type(model).from_pretrained(tmp_path / "model")
    made = cls(
        model=model,
        reward_funcs=lambda completions, **_: [float(len(c) % 3) for c in completions],
        args=args,
        train_dataset=data,
        processing_class=tokenizer(),
        peft_config=LoraConfig(r=2, target_modules=["q_proj", "v_proj"], init_lora_weights=False) if lora else None,
    )
    made.current_gradient_accumulation_steps = 2
    return made


def micro_batch(of: Any, vllm: bool | str = False, old: bool = True, tools: bool = False) -> dict[str, Any]:
    """What TRL hands to its loss: left-padded prompts, right-padded completions, log-probs near the model's own."""
    random = torch.Generator().manual_seed(11)
    rows, width, length = 4, 3, 6
    prompt_mask = (torch.arange(width).flip(0) < torch.tensor([3, 2, 1, 3])[:, None]).long()
    completion_mask = (torch.arange(length) < torch.tensor([6, 4, 1, 5])[:, None]).long()
    inputs: dict[str, Any] = {
        "prompt_ids": torch.randint(3, VOCAB, (rows, width), generator=random) * prompt_mask,
        "prompt_mask": prompt_mask,
        "completion_ids": torch.randint(3, VOCAB, (rows, length), generator=random) * completion_mask,
        "completion_mask": completion_mask,
        "advantages": torch.tensor([1.2, -0.7, 0.4, -1.1]),
        "num_items_in_batch": torch.tensor(37),
    }
    ids = torch.cat([inputs["prompt_ids"], inputs["completion_ids"]], 1)
    mask = torch.cat([prompt_mask, completion_mask], 1)
    with torch.no_grad():
        logprobs = of._get_per_token_logps_and_entropies(of.model, ids, mask, length)[0]

    def near(spread: float) -> Tensor:
        return logprobs + spread * torch.randn(rows, length, generator=random)

    if old:
        inputs["old_per_token_logps"] = near(0.3)
    if of.beta:
        inputs["ref_per_token_logps"] = near(0.5)
    if tools:
        inputs["tool_mask"] = torch.ones_like(completion_mask).index_fill_(1, torch.tensor([1]), 0)
    if vllm:
        of.use_vllm = True
        inputs["sampling_per_token_logps"] = near(0.4)
        ratio = torch.rand(rows, 1 if vllm == "sequence" else length, generator=random) * 2
        inputs["importance_sampling_ratio"] = ratio if vllm == "sequence" else ratio.where(completion_mask.bool(), 1.0)
        inputs["importance_sampling_ratio"][0, 0] = 0.0  # masked
    return inputs


def step(cls: Any, tmp_path: Path, options: dict[str, Any]) -> tuple[float, Gradients, dict[str, list[float]]]:
    """Loss, gradients and logged figures of one micro-batch."""
    built = {name: value for name, value in options.items() if name not in OURS or name in ("architecture", "lora")}
    made = trainer(cls, tmp_path, **built)
    made.model.train(options.get("training", True))
    inputs = micro_batch(made, **{n: options[n] for n in ("vllm", "old", "tools") if n in options})
    loss = made._compute_loss(made.model, inputs)
    loss.backward()
    return loss.item(), gradients(made.model), dict(made._metrics["train" if made.model.training else "eval"])


def compare(options: dict[str, Any], tmp_path: Path) -> float:
    return worst(step(GRPOTrainer, tmp_path, options)[1], step(trl.GRPOTrainer, tmp_path, options)[1])


def _in_a_folder(options: dict[str, Any]) -> float:
    from tempfile import TemporaryDirectory

    with TemporaryDirectory() as folder:
        return compare(options, Path(folder))


COMPARISONS = [
    Comparison("xloss.hf.trl.GRPOTrainer", "trl", f"micro-batch, {name}", partial(_in_a_folder, options))
    for name, options in CASES.items()
]


@pytest.mark.parametrize("name", CASES)
def test_equals_trl(name: str, tmp_path: Path) -> None:
    got, got_grads, got_metrics = step(GRPOTrainer, tmp_path, CASES[name])
    want, want_grads, want_metrics = step(trl.GRPOTrainer, tmp_path, CASES[name])
    assert got == pytest.approx(want, **budgets.LOGGED)
    assert worst(got_grads, want_grads) <= budgets.TRAINER_GRADIENT
    assert got_metrics.keys() == want_metrics.keys() and "entropy" in got_metrics
    for figure, values in want_metrics.items():
        assert got_metrics[figure] == pytest.approx(values, **budgets.LOGGED), figure


def test_the_cases_clip() -> None:
    """Otherwise every loss type would be a policy gradient, and equal."""
    losses = {name: _loss(name) for name in ("dapo", "cispo", "sapo", "clip higher, delta", "off-policy mask")}
    assert len({round(loss, 5) for loss in losses.values()}) == len(losses)


def _loss(name: str) -> float:
    from tempfile import TemporaryDirectory

    with TemporaryDirectory() as folder:
        return step(GRPOTrainer, Path(folder), CASES[name])[0]


def test_training_takes_the_steps_that_trl_takes(tmp_path: Path) -> None:
    """Generation, rewards, accumulation and the optimizer, on the same random numbers."""
    after = []
    for cls in (GRPOTrainer, trl.GRPOTrainer):
        options = {
            "max_steps": 2,
            "gradient_accumulation_steps": 2,
            "learning_rate": 0.1,
            "max_grad_norm": 0.0,
            "beta": 0.1,
            "seed": 3,
            "optim": "sgd",
        }
        made = trainer(cls, tmp_path, **options, logging_steps=1, save_strategy="no", num_iterations=2)
        before = parameters(made.model)
        made.train()
        after.append(parameters(made.model))
        names = set().union(*made.state.log_history)
        assert {"loss", "kl", "entropy", "clip_ratio/region_mean", "clip_ratio/low_min", "reward"} <= names
    moved = {name: after[1][name] - before[name] for name in before}
    assert worst({n: after[0][n] - before[n] for n in before}, moved) <= budgets.TRAINER_STEPS


def test_generation_needs_nothing_of_it(tmp_path: Path) -> None:
    made = trainer(GRPOTrainer, tmp_path)
    assert is_attached(made.model)
    assert made.model.generate(torch.tensor([[5, 6]]), max_new_tokens=3, do_sample=False).shape == (1, 5)


def test_an_option_that_nobody_translated_raises(tmp_path: Path) -> None:
    """A trainer whose loss has one more term: TRL's own code finds another loss from the same log-probs."""

    class Changed(trl.GRPOTrainer):  # type: ignore[misc]
        def _compute_loss(self, model: Any, inputs: dict[str, Any]) -> Tensor:
            return super()._compute_loss(model, inputs) * 1.01

    mixed = type("Mixed", (GRPOTrainer, Changed), {})
    made = trainer(mixed, tmp_path)
    made.model.train()
    with pytest.raises(OptionError, match="does not know"):
        made._compute_loss(made.model, micro_batch(made))


def test_what_it_cannot_do_raises(tmp_path: Path) -> None:
    with pytest.raises(UnsupportedError, match="top_entropy_quantile"):
        trainer(GRPOTrainer, tmp_path, entropy_coef=0.1, top_entropy_quantile=0.5)
    with pytest.raises(UnsupportedError, match="forward of its own"):
        trainer(GRPOTrainer, tmp_path, cast_lm_head_to_fp32=True)
    made = trainer(GRPOTrainer, tmp_path)
    with pytest.raises(UnsupportedError, match="pixel_values"):
        made._compute_loss(made.model, micro_batch(made) | {"pixel_values": torch.zeros(1)})
