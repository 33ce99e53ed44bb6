"""Contract: on two processes, Transformers' ``Trainer`` with an attached model and the trainers of ``xloss.hf.trl``
take the steps of those packages' own: their denominators are those of all ranks, whose data are uneven.
"""

from __future__ import annotations

import os
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pytest
import torch

from tests import budgets
from tests.integrations.comparisons import Comparison, worst
from tests.integrations.packages import need
from tests.integrations.trainers import parameters

need("transformers", "trl", "peft", "datasets")

import trl  # noqa: E402

from tests.integrations import test_hf_trainer, test_trl_grpo, test_trl_sft  # noqa: E402
from xloss.cli.spawn import Rank, World, run_ranks  # noqa: E402
from xloss.hf.trl import GRPOTrainer, SFTTrainer  # noqa: E402

pytestmark = pytest.mark.distributed

POLICY: dict[str, Any] = {
    "max_steps": 4,
    "num_iterations": 2,
    "learning_rate": 0.1,
    "max_grad_norm": 0.0,
    "optim": "sgd",
    "seed": 3,
    "save_strategy": "no",
}
GRPO: dict[str, dict[str, Any]] = {
    "dapo": {},
    "gspo": {"loss_type": "grpo", "importance_sampling_level": "sequence", "epsilon": 0.01},
    "entropy bonus": {"loss_type": "bnpo", "entropy_coef": 0.1},
}
SFT: dict[str, dict[str, Any]] = {
    "accumulation 2": {"gradient_accumulation_steps": 2},
    "MoE": {"gradient_accumulation_steps": 2, "architecture": "qwen3-moe (aux loss)"},
    "tokens of each rank": {"gradient_accumulation_steps": 2, "average_tokens_across_devices": False},
}
TRAINER: dict[str, dict[str, Any]] = {
    "accumulation 2": {},
    "tokens of each rank": {"average_tokens_across_devices": False},
}


def on_rank(rank: Rank, folder: str) -> dict[str, float]:
    """The largest difference of each case from the package's own steps."""
    launched = {"RANK": rank.rank, "LOCAL_RANK": rank.rank, "WORLD_SIZE": rank.world}
    launched |= {"MASTER_ADDR": "localhost", "MASTER_PORT": 0}  # unused, the process group stands; accelerate asks
    os.environ |= {name: str(value) for name, value in launched.items()}
    found = {
        f"GRPO, {n}": worst(*(_grpo(cls, folder, o) for cls in (GRPOTrainer, trl.GRPOTrainer))) for n, o in GRPO.items()
    }
    for name, options in SFT.items():
        ours, theirs = (test_trl_sft.run(cls, folder, options)[0] for cls in (SFTTrainer, trl.SFTTrainer))
        found[f"SFT, {name}"] = worst(ours, theirs)
    for name, options in TRAINER.items():
        found[f"Trainer, {name}"] = test_hf_trainer.compare(folder, rows_at_once=1, accumulation=2, **options)
    return found


def _grpo(cls: Any, folder: str, options: dict[str, Any]) -> dict[str, torch.Tensor]:
    torch.manual_seed(0)
    made = test_trl_grpo.trainer(cls, Path(folder), **POLICY, **options)
    assert made.accelerator.num_processes == 2
    before = parameters(made.model)
    made.train()
    return {name: after - before[name] for name, after in parameters(made.model).items()}


@cache
def differences() -> dict[str, float]:
    """Of each case, the larger one of the ranks."""
    with TemporaryDirectory() as folder:
        by_rank = run_ranks(on_rank, folder, world=World(2, timeout=240.0))
    return {name: max(found[name] for found in by_rank) for name in by_rank[0]}


COMPARISONS = [
    Comparison(adapter, package, f"2 ranks, {name}", lambda key=f"{kind}, {name}": differences()[key])
    for kind, adapter, package, cases in (
        ("GRPO", "xloss.hf.trl.GRPOTrainer", "trl", GRPO),
        ("SFT", "xloss.hf.trl.SFTTrainer", "trl", SFT),
        ("Trainer", "xloss.hf.attach", "transformers", TRAINER),
    )
    for name in cases
]


@pytest.mark.parametrize("comparison", COMPARISONS, ids=lambda c: f"{c.name}, {c.what}")
def test_takes_the_packages_own_steps(comparison: Comparison) -> None:
    assert comparison.run() <= budgets.TRAINER_STEPS
