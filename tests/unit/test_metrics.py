"""Metrics: what adds up, and names of other frameworks.

Contract: vectors summed as one give what each alone gives, with NaN at masked tokens or not; parts merged in any
grouping give the whole; results get another framework's names, and what it has no name for keeps ours.
"""

from __future__ import annotations

from typing import Any, get_args

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from xloss import GRPOLossConfig, Metric, RLLossContextInputItem, finalize_metrics, merge_metrics, rename_metrics
from xloss.errors import OptionError
from xloss.losses.metric_names import PEERS, Framework


def vectors(count: int, seed: int) -> tuple[dict[str, Tensor], Tensor]:
    g = torch.Generator().manual_seed(seed)
    x = {name: torch.randn(count, generator=g, dtype=torch.float64) for name in "abc"}
    return x, torch.rand(count, generator=g) < 0.6


@given(count=st.integers(0, 9), seed=st.integers(0, 99), masked=st.booleans())
def test_several_as_one(count: int, seed: int, masked: bool) -> None:
    x, mask = vectors(count, seed)
    valid = mask if masked else None
    means = Metric.means({n: v.masked_fill(~mask, torch.nan) for n, v in x.items()} if masked else x, valid)
    totals = Metric.totals(x, 0.5)
    for name, values in x.items():
        alone = Metric.mean(values, valid)
        torch.testing.assert_close(means[name].value, alone.value)
        torch.testing.assert_close(means[name].result(), alone.result())
        torch.testing.assert_close(totals[name].result(), values.sum() / 2)
        assert totals[name].reducer == "sum" and means[name].reducer == "mean"


@given(counts=st.lists(st.integers(0, 5), min_size=1, max_size=4), seed=st.integers(0, 99))
def test_parts_are_the_whole(counts: list[int], seed: int) -> None:
    x, _ = vectors(sum(counts), seed)
    values = x["a"].exp()

    def figures(v: Tensor) -> dict[str, Metric]:
        return Metric.means({"mean": v}) | {
            "sum": Metric.total(v),
            "max": Metric.extreme(v, "max"),
            "min": Metric.extreme(v, "min"),
            "ess": Metric.moments(v, "ess"),
            "std": Metric.moments(v, "std"),
        }

    whole, parts = finalize_metrics([figures(values)]), [figures(v) for v in values.split(counts)]
    for found in (finalize_metrics(parts), finalize_metrics([merge_metrics(parts[:1]), merge_metrics(parts[1:])])):
        for name, value in whole.items():
            torch.testing.assert_close(found[name], value, msg=name)
    if values.numel():
        torch.testing.assert_close(whole["ess"], values.sum() ** 2 / (values.numel() * values.square().sum()))


@pytest.mark.parametrize("policy", ["ppo", "gspo"])
@pytest.mark.parametrize("run", [{"mode": "eager"}, {"mode": "chunk", "chunk_size": 3}, {"plan": "two_pass"}], ids=str)
def test_token_accuracy_of_a_policy(policy: str, run: dict[str, Any]) -> None:
    g = torch.Generator().manual_seed(1)
    hidden, weight = torch.randn(2, 6, 4, generator=g), torch.randn(5, 4, generator=g)
    best = (hidden @ weight.T).argmax(-1)
    labels = torch.where(torch.rand(2, 6, generator=g) < 0.5, best, (best + 1) % 5)
    labels[0, :2] = -100
    item = RLLossContextInputItem(shifted_labels=labels, advantages=torch.ones(2, 6))
    for wanted in (True, False):
        cfg = GRPOLossConfig(policy_loss_cfg={"loss_type": policy}, return_token_accuracy=wanted, **run)
        (kwargs,) = cfg.loss_ctx_cls.build_batches_loss_kwargs([item], cfg)
        _, info = cfg.loss_ctx_cls(cfg, kwargs).forward(hidden.requires_grad_(), weight)
        assert ("token_accuracy" in info.metrics) == wanted
        if wanted:
            share = (labels == best)[labels != -100].float().mean()
            torch.testing.assert_close(info.metrics["token_accuracy"].result(), share)
            assert 0 < share < 1


def test_mismatch_without_a_correction() -> None:
    """The figures are those that a correction reports; without both log-probs there are none."""
    g = torch.Generator().manual_seed(2)
    fields = {n: torch.randn(2, 5, generator=g) for n in ("advantages", "old_logprobs", "rollout_logprobs")}
    item = RLLossContextInputItem(shifted_labels=torch.tensor([[1, 2, 3, -100, 4], [0, -100, 1, 2, 3]]), **fields)

    def built(given: RLLossContextInputItem, **options: Any) -> dict[str, float]:
        cfg = GRPOLossConfig(policy_loss_cfg={"loss_type": "ppo"}, **options)
        (kwargs,) = cfg.loss_ctx_cls.build_batches_loss_kwargs([given], cfg)
        return floats(finalize_metrics([kwargs.built_metrics]))

    bare, corrected = built(item), built(item, rollout_correction={"level": "token", "high": 2.0})
    names = {
        "mismatch_k1",
        "mismatch_k3",
        "mismatch_abs",
        "mismatch_chi2",
        "mismatch_ppl_ratio",
        "mismatch_log_ppl_diff",
    }
    assert bare.keys() == names | {"num_sequences"}
    assert bare == {name: corrected[name] for name in bare}
    assert built(item.model_copy(update={"rollout_logprobs": None})).keys() == {"num_sequences"}


def results(*names: str) -> dict[str, Tensor]:
    return {name: torch.tensor(float(i + 1)) for i, name in enumerate(names)}


def floats(found: dict[str, Tensor]) -> dict[str, float]:
    return {name: float(value) for name, value in found.items()}


def test_renamed() -> None:
    mine = results("clip_frac_low", "clip_frac_high", "entropy", "my_own")
    assert floats(rename_metrics(mine, "trl")) == {
        "clip_ratio/low_mean": 1.0,
        "clip_ratio/high_mean": 2.0,
        "clip_ratio/region_mean": 3.0,
        "entropy": 3.0,
        "my_own": 4.0,
    }
    assert floats(rename_metrics(mine, "verl")) == {
        "actor/pg_clipfrac": 3.0,
        "clip_frac_low": 1.0,
        "clip_frac_high": 2.0,
        "actor/entropy_loss": 3.0,
        "my_own": 4.0,
    }
    assert floats(rename_metrics(mine, "prime-rl")) == floats(mine)


def test_one_of_ours_has_two_names() -> None:
    assert floats(rename_metrics(results("ratio_max"), "xtuner")) == {
        "max_ratio": 1.0,
        "reduced_train_policy_ratio_max": 1.0,
    }


def test_first_that_is_there_has_the_name() -> None:
    """TRL: figures of sequences where the loss is of sequences; the pair's margin, else the difference of rewards."""
    leveled = results("clip_frac_low", "seq_clip_frac_low")
    assert floats(rename_metrics(leveled, "trl")) == {"clip_ratio/low_mean": 2.0, "clip_frac_low": 1.0}
    rewards = floats(rename_metrics(results("reward_chosen", "reward_rejected"), "trl"))
    assert rewards == {"rewards/chosen": 1.0, "rewards/rejected": 2.0, "rewards/margins": -1.0}
    paired = rename_metrics(results("reward_chosen", "reward_rejected", "reward_margin"), "trl")
    assert floats(paired)["rewards/margins"] == 3.0


@pytest.mark.parametrize("to", PEERS)
def test_no_figure_is_lost(to: Framework) -> None:
    """Every figure of ours comes out once at least, under a name of theirs or its own."""
    mine = results(*{name for peer in PEERS[to] for name in peer.ours}, "my_own")
    found = floats(rename_metrics(mine, to))
    assert {peer.name for peer in PEERS[to]} <= found.keys()
    assert set(floats(mine).values()) <= set(found.values())


def test_unknown_framework() -> None:
    unknown: Any = "prime_rl"
    with pytest.raises(OptionError, match=r"unknown framework 'prime_rl'. Did you mean 'prime-rl'\?"):
        rename_metrics({}, unknown)
    assert set(get_args(Framework)) == PEERS.keys()
