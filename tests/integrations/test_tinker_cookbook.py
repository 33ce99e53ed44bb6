"""Contract: training loops of tinker-cookbook run on a local model when ``tinker.ServiceClient`` is ours.

That name and what would be fetched (a data set, a tokenizer) are all that is replaced. A supervised recipe, the
supervised loop, the RL loop on the arithmetic of its maths recipe, the DPO loop with its custom loss.
"""

from __future__ import annotations

import asyncio
import json
import logging
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from tests import budgets
from tests.integrations.packages import need

need("tinker", "tinker_cookbook", "transformers", "datasets")

import chz  # noqa: E402
import datasets  # noqa: E402
import tinker  # noqa: E402
from tinker_cookbook import checkpoint_utils, model_info, renderers, tokenizer_utils  # noqa: E402
from tinker_cookbook.preference import train_dpo  # noqa: E402
from tinker_cookbook.recipes import sl_loop  # noqa: E402
from tinker_cookbook.recipes.math_rl.arithmetic_env import ArithmeticDatasetBuilder  # noqa: E402
from tinker_cookbook.rl import train as rl_train  # noqa: E402
from tinker_cookbook.supervised import train as sl_train  # noqa: E402
from tinker_cookbook.supervised.data import conversation_to_datum  # noqa: E402
from tinker_cookbook.supervised.types import SupervisedDataset, SupervisedDatasetBuilder  # noqa: E402

from tests.integrations.tinker_models import NAME, service, tokenizer  # noqa: E402

RENDERER = "role_colon"
QUESTIONS = [f"What is {a} + {b}?" for a in range(4) for b in range(4)]


@pytest.fixture(autouse=True)
def _local(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """No service, no hub."""
    tokenizer_utils.register_tokenizer(NAME, tokenizer)
    monkeypatch.setattr(tinker, "ServiceClient", lambda **_: service(tmp_path / "checkpoints"))
    monkeypatch.setattr(model_info, "get_recommended_renderer_name", lambda name: RENDERER)
    handlers = list(logging.getLogger().handlers)
    yield
    logging.getLogger().handlers[:] = handlers


def messages(question: str) -> list[Any]:
    a, b = (int(x) for x in question.removeprefix("What is ").removesuffix("?").split(" + "))
    return [{"role": "user", "content": question}, {"role": "assistant", "content": str(a + b)}]


def logged(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


class Sums(SupervisedDataset):
    """The same batch every time: its likelihood must rise."""

    def __init__(self) -> None:
        self.renderer = renderers.get_renderer(RENDERER, tokenizer())

    def get_batch(self, index: int) -> list[tinker.Datum]:
        train_on = renderers.TrainOnWhat.ALL_ASSISTANT_MESSAGES
        return [conversation_to_datum(messages(q), self.renderer, 64, train_on) for q in QUESTIONS[:4]]

    def __len__(self) -> int:
        return 6


@chz.chz
class SumsBuilder(SupervisedDatasetBuilder):
    def __call__(self) -> tuple[Sums, None]:
        return Sums(), None


def test_supervised_recipe(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """``recipes/sl_loop.py``, the whole file."""
    rows = datasets.Dataset.from_list([{"messages": messages(q)} for q in QUESTIONS])
    monkeypatch.setattr(datasets, "load_dataset", lambda name: datasets.DatasetDict(train=rows))
    sl_loop.main(
        sl_loop.Config(
            log_path=str(tmp_path), model_name=NAME, batch_size=4, learning_rate=1e-2, save_every=2, max_length=64
        )
    )
    found = logged(tmp_path)
    assert [row["num_sequences"] for row in found] == [4] * 4
    assert found[-1]["train_mean_nll"] < found[0]["train_mean_nll"]
    assert all(row["grad_norm"] > 0 for row in found)
    last = checkpoint_utils.get_last_checkpoint(str(tmp_path))
    assert last is not None and last.sampler_path is not None and Path(last.sampler_path).is_file()


def test_supervised_loop_and_its_resumption(tmp_path: Path) -> None:
    """Batches are submitted ahead; a second run continues from the checkpoint of the first."""
    config = partial(
        sl_train.Config,
        log_path=str(tmp_path),
        model_name=NAME,
        recipe_name="test",
        renderer_name=RENDERER,
        dataset_builder=SumsBuilder(),
        learning_rate=3e-2,
        lr_schedule="constant",
        save_every=2,
        eval_every=0,
    )
    asyncio.run(sl_train.main(config(max_steps=3)))
    asyncio.run(sl_train.main(config(num_epochs=2, submit_ahead=2)))
    losses = [row["train_mean_nll"] for row in logged(tmp_path) if "train_mean_nll" in row]
    assert len(losses) == 3 + 6  # of the second run, its second epoch
    assert losses[-1] < 0.8 * losses[0]


@pytest.mark.parametrize(
    ("loss_fn", "config", "substeps", "mode"),
    [
        ("importance_sampling", None, 1, {}),
        ("ppo", {"clip_low_threshold": 0.5}, 2, {}),
        (
            "cispo",
            None,
            1,
            {"stream_minibatch_config": rl_train.StreamMinibatchConfig(groups_per_batch=3, num_minibatches=3)},
        ),
        ("dro", {"beta": 0.1}, 1, {"async_config": rl_train.AsyncConfig(max_steps_off_policy=1, groups_per_batch=3)}),
    ],
)
def test_rl_loop(tmp_path: Path, loss_fn: Any, config: Any, substeps: int, mode: dict[str, Any]) -> None:
    """Sampler and trainer agree: their log-probs differ by rounding, as the loop itself measures."""
    builder = ArithmeticDatasetBuilder(
        batch_size=3, model_name_for_tokenizer=NAME, renderer_name=RENDERER, n_batches=2, group_size=3
    )
    run = rl_train.Config(
        learning_rate=1e-2,
        dataset_builder=builder,
        model_name=NAME,
        recipe_name="test",
        max_tokens=4,
        log_path=str(tmp_path),
        eval_every=0,
        save_every=1,
        loss_fn=loss_fn,
        loss_fn_config=config,
        num_substeps=substeps,
        compute_post_kl=True,
        kl_penalty_coef=0.1,  # no answer is ever right: it makes the advantages
        kl_reference_config=rl_train.KLReferenceConfig(base_model=NAME),
        num_groups_to_log=0,
        **mode,
    )
    asyncio.run(rl_train.main(run))
    found = logged(tmp_path)
    assert len(found) == 2
    assert abs(found[0]["kl_policy_base"]) < budgets.FIGURE_F32_CHAIN
    assert found[1]["kl_policy_base"] != 0
    drift = found[0]["optim/kl_sample_train_v2"]
    assert (
        drift < budgets.FIGURE_MOVED if substeps == 1 else drift > budgets.FIGURE_MOVED
    )  # the second half is trained after a step


def test_dpo_loop(tmp_path: Path) -> None:
    """``forward_backward_custom`` with the loop's own loss."""
    renderer = renderers.get_renderer(RENDERER, tokenizer())

    class Pairs(SupervisedDataset):
        def get_batch(self, index: int) -> list[tinker.Datum]:
            found = []
            for question in QUESTIONS[:3]:
                good = messages(question)
                for answer in (good, [good[0], {"role": "assistant", "content": "no"}]):
                    found.append(conversation_to_datum(answer, renderer, 64, "last_assistant_message"))
            return found

        def __len__(self) -> int:
            return 4

    @chz.chz
    class PairsBuilder(SupervisedDatasetBuilder):
        def __call__(self) -> tuple[Pairs, None]:
            return Pairs(), None

    config = train_dpo.Config(
        log_path=str(tmp_path),
        model_name=NAME,
        recipe_name="test",
        dataset_builder=PairsBuilder(),
        learning_rate=1e-2,
        dpo_beta=0.5,
        lr_schedule="constant",
        eval_every=0,
        renderer_name=RENDERER,
    )
    train_dpo.main(config)
    found = logged(tmp_path)
    assert found[0]["dpo_loss"] == pytest.approx(0.6931, abs=budgets.FIGURE_LIMIT)
    assert found[-1]["dpo_loss"] < found[0]["dpo_loss"]
    assert found[-1]["margin"] > 0
