"""The head under ZeRO-3, two processes (gloo): DeepSpeed itself, on its CPU accelerator. Runs where it is installed.

Contract: inside the engine's forward ``head_weight`` gives the gathered weight, and gradients of every parameter, head
and backbone, are those of one process with the whole batch by the float64 oracle, for a one-pass loss and one that
reads the weight again in backward, tied, frozen, with LoRA; step after step, with accumulation. Outside a forward it
refuses.
"""

from __future__ import annotations

import importlib.util
import os
import socket
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.multiprocessing as mp

import xloss
from tests import budgets
from tests.distributed import head_layouts as layouts
from tests.distributed.head_layouts import LOSSES, MICRO, STEPS, WORLD, Layout
from tests.distributed.test_head_access import oracle_gradients

if importlib.util.find_spec("deepspeed") is None:
    pytest.skip("needs deepspeed", allow_module_level=True)

pytestmark = pytest.mark.distributed
CASES = {"plain": Layout(), "tied": Layout(tied=True), "frozen": Layout(frozen=True), "lora": Layout(lora=True)}


def engine_of(model: Any) -> Any:
    import deepspeed

    config = {
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": MICRO,
        "optimizer": {"type": "SGD", "params": {"lr": 0.0}},
        "zero_optimization": {"stage": 3, "stage3_param_persistence_threshold": 0},
        "zero_allow_untested_optimizer": True,
    }
    trained = [p for p in model.parameters() if p.requires_grad]
    return deepspeed.initialize(model=model, model_parameters=trained, config=config)[0]


def train(layout: Layout, loss: str, rank: int) -> list[dict[str, Any]]:
    """Gradients of every step; the parameters stay, so that each step has the oracle's."""
    from deepspeed.utils import safe_get_full_grad

    model = layout.model()
    engine = engine_of(model)
    seen = []
    for step in range(STEPS):
        data = layouts.batches(rank, step)
        for i, (d, ctx) in enumerate(zip(data, layouts.contexts(loss, data), strict=True)):
            # the engine divides by the number of micro-batches; calibrated losses are to be added
            engine.backward(MICRO * engine(d.ids, ctx))
            if i == MICRO - 1:
                seen.append({n: safe_get_full_grad(p) for n, p in model.named_parameters() if p.requires_grad})
            engine.step()
    return seen


def outside() -> str:
    """The head read where no forward runs."""
    model = Layout().model()
    engine_of(model)
    try:
        with xloss.head_weight(model.lm_head):
            return "read"
    except xloss.XlossError as error:
        return str(error)


def worker(rank: int, folder: str, port: int) -> None:
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    where = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": WORLD, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    os.environ.update({name: str(value) for name, value in where.items()}, DS_ACCELERATOR="cpu")
    import deepspeed

    deepspeed.init_distributed("gloo")
    found: dict[Any, Any] = {"outside": outside()}
    for name, layout in CASES.items():
        for loss in LOSSES:
            found[name, loss] = train(layout, loss, rank)
    torch.save(found, f"{folder}/{rank}.pt")


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> list[dict[Any, Any]]:
    """What both ranks saw."""
    folder: Path = tmp_path_factory.mktemp("ranks")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    mp.spawn(worker, args=(str(folder), port), nprocs=WORLD)
    return [torch.load(folder / f"{rank}.pt") for rank in range(WORLD)]


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("name", CASES)
def test_zero_3_is_one_process(ranks: list[dict[Any, Any]], name: str, loss: str) -> None:
    want = oracle_gradients(CASES[name], loss, lr=0.0)
    for seen in ranks:
        for step in range(STEPS):
            got = seen[name, loss][step]
            assert got.keys() == {n for n, g in want[step].items() if g is not None}
            for parameter, grad in got.items():
                expected = want[step][parameter]
                assert expected is not None
                budgets.assert_relative(f"step {step} {parameter}", grad, expected, budgets.F32_GRADIENT)


def test_outside_a_forward(ranks: list[dict[Any, Any]]) -> None:
    for seen in ranks:
        assert "the head's weight is (0,), not [V, H]: it is sharded" in seen["outside"]
        assert "run the loss inside the model's forward" in seen["outside"]
