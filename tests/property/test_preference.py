"""Preference losses against the oracle.

Contract: for packs and padded rows, any layout of pairs, any cut into micro-batches, ignored tokens and sequences, the
loss and its gradients with respect to hidden states and weight are the oracle's in float64 to rounding, in every mode;
options likewise; what stands at ignored tokens changes nothing.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from tests import budgets
from tests.oracle.preference import UNPAIRED, Objective
from tests.property.preferences import ALL, PAIRED, Case, assert_same, case, gold_step, run_step
from xloss import finalize_metrics

RUNS: dict[str, dict[str, Any]] = {
    "eager": {"mode": "eager"},
    "chunk": {"mode": "chunk", "chunk_size": 3},
    "recompute": {"mode": "chunk", "chunk_size": 2, "logits_budget": 1},
    "auto": {},
}
every_run = pytest.mark.parametrize("run", RUNS.values(), ids=RUNS)
seeds = st.integers(0, 10**6)
few = settings(max_examples=4)


def term(name: str, **fields: Any) -> dict[str, Any]:
    """A term with every parameter off its default."""
    own: dict[str, dict[str, Any]] = {
        "discopop": {"tau": 0.4},
        "simpo": {"gamma": 0.7, "nll_coef": 0.2},
        "alphapo": {"alpha": 0.4, "gamma": 0.3},
        "cpo": {"nll_coef": 0.6},
        "orpo": {"beta": 0.4},
        "kto": {"undesirable_weight": 1.33},
        "bco": {"desirable_weight": 0.7},
    }
    return {"loss_type": name} | own.get(name, {}) | fields


def objective(*terms: dict[str, Any], **fields: Any) -> Objective:
    return Objective([*terms], kl=0.3, shift=-0.2, **fields)


def check(problem: Case, o: Objective, run: dict[str, Any], upstream: float = 1.0) -> None:
    want, _ = gold_step(problem, o, upstream)
    assert_same(run_step(problem, o, upstream, **run), want, problem, upstream)


@every_run
@pytest.mark.parametrize("name", ALL)
@few
@given(seed=seeds, upstream=st.sampled_from((1.0, -3.5)))
def test_every_loss(run: dict[str, Any], name: str, seed: int, upstream: float) -> None:
    check(case(seed), objective(term(name)), run, upstream)


@pytest.mark.parametrize("name", ALL)
def test_defaults(name: str) -> None:
    check(case(11), objective({"loss_type": name}), {})


@pytest.mark.parametrize(
    "name", ["sigmoid", "cpo", "robust", "exo_pair", "aot", "aot_unpaired", "simpo", "sigmoid_norm"]
)
@few
@given(seed=seeds, smoothing=st.sampled_from((0.01, 0.2, 0.4)))
def test_label_smoothing(name: str, seed: int, smoothing: float) -> None:
    check(case(seed), objective(term(name), label_smoothing=smoothing), {"chunk_size": 3})
    check(case(seed), objective(term(name, label_smoothing=smoothing), label_smoothing=0.3), {})


@pytest.mark.parametrize("name", ALL)
@few
@given(seed=seeds, beta=st.sampled_from((0.05, 0.5, 1.5)), average=st.booleans(), count_empty=st.booleans())
def test_beta_averages_and_empty_sequences(name: str, seed: int, beta: float, average: bool, count_empty: bool) -> None:
    if name == "orpo":
        count_empty = False  # the odds of a probability of 1 are infinite
    average = average or name == "alphapo"  # powers of a whole sequence's probability overflow the oracle
    o = objective(term(name) | {"beta": None}, beta=beta, average=average, count_empty=count_empty)
    check(case(seed), o, {"chunk_size": 4})


@pytest.mark.parametrize(
    "name", ["sigmoid", "hinge", "ipo", "exo_pair", "nca_pair", "bco_pair", "apo_down", "discopop"]
)
@pytest.mark.parametrize("divergence", ["forward_kl", "js", "alpha"])
@few
@given(seed=seeds, alpha=st.sampled_from((0.3, 0.5, 1.0, 1.2)), average=st.sampled_from((None, True)))
def test_f_divergence(name: str, divergence: str, seed: int, alpha: float, average: bool | None) -> None:
    f_alpha = alpha if divergence == "alpha" else 0.5
    problem = case(seed)
    for b in problem.batches:
        b.hidden = 0.2 * b.hidden
        b.ref = b.hidden[..., 0] - 3.2  # close to the policy's: the oracle's exp is bare
    check(problem, objective(term(name), f_divergence=divergence, f_alpha=f_alpha, average=average), {"chunk_size": 5})


@pytest.mark.parametrize("name", PAIRED)
@few
@given(seed=seeds, ld_alpha=st.sampled_from((0.0, 0.4, 1.0)))
def test_length_desensitised(name: str, seed: int, ld_alpha: float) -> None:
    check(case(seed), objective(term(name), ld_alpha=ld_alpha), {"chunk_size": 5})


@every_run
@few
@given(seed=seeds, name=st.sampled_from(("sigmoid", "simpo", "cpo", "ipo")), limit=st.sampled_from((None, 1.0, 0.002)))
def test_weighting(run: dict[str, Any], seed: int, name: str, limit: float | None) -> None:
    check(case(seed), objective(term(name), use_weighting=True, max_weighting=limit), run)


@few
@given(seed=seeds, name=st.sampled_from(("sigmoid", "ipo", "hinge", "nca_pair", "aot", "apo_zero", "kto")))
def test_reference_free(seed: int, name: str) -> None:
    check(case(seed), objective(term(name), reference_free=True), {"chunk_size": 5})


@few
@given(
    seed=seeds,
    reduction=st.sampled_from(("token", "sample", "sample_sum")),
    name=st.sampled_from(("cpo", "orpo", "sft")),
)
def test_likelihood_reductions(seed: int, reduction: str, name: str) -> None:
    check(case(seed), objective(term(name), nll_reduction=reduction), {"chunk_size": 5})


@every_run
@few
@given(seed=seeds)
def test_weighted_terms(run: dict[str, Any], seed: int) -> None:
    """MPO, with averages in one term and sums in others; and a list of unpaired terms."""
    mpo = [term("sigmoid", weight=0.8), term("bco_pair", weight=0.2), term("ipo", weight=-0.1, beta=0.7), term("sft")]
    check(case(seed), objective(*mpo, beta=0.2, label_smoothing=0.05), run)
    check(case(seed), objective(term("kto", weight=0.5), term("bco", weight=2.0)), run)


@every_run
@few
@given(seed=seeds, name=st.sampled_from(ALL))
def test_what_is_ignored_does_not_matter(run: dict[str, Any], seed: int, name: str) -> None:
    paired = name in PAIRED
    o = objective(term(name), use_weighting=paired, ld_alpha=0.5 if paired else None)
    clean, bad = case(seed), case(seed)
    for b in bad.batches:
        dead = b.labels == -100
        b.hidden, b.ref = b.hidden.masked_fill(dead[..., None], torch.nan), b.ref.masked_fill(dead, torch.inf)
    x, y = run_step(clean, o, **run), run_step(bad, o, **run)
    assert torch.equal(x.loss, y.loss)
    for ours, theirs in zip([*x.hidden, x.weight], [*y.hidden, y.weight], strict=True):
        assert torch.equal(ours, theirs)
    for a, b_ in zip(x.infos, y.infos, strict=True):
        assert all(torch.equal(m.result(), b_.metrics[n].result()) for n, m in a.metrics.items())


@pytest.mark.parametrize("name", ALL)
@few
@given(seed=seeds)
def test_float32(name: str, seed: int) -> None:
    problem, o = case(seed).to(torch.float32), objective(term(name))
    want, _ = gold_step(problem, o)
    assert_same(run_step(problem, o, mode="chunk", chunk_size=4), want, problem)


@every_run
@pytest.mark.parametrize("name", ALL)
def test_nothing_to_compare(run: dict[str, Any], name: str) -> None:
    """Every token ignored: a loss of 0 and gradients of 0, finite metrics."""
    problem = case(5, micro_batches=2)
    for b in problem.batches:
        b.labels = torch.full_like(b.labels, -100)
    got = run_step(problem, objective(term(name)), **run)
    assert float(got.loss) == 0 and not any(bool(g.any()) for g in [*got.hidden, got.weight])
    assert all(bool(m.result().isfinite()) for info in got.infos for m in info.metrics.values())


def _merged(problem: Case) -> Case:
    """All micro-batches as one pack."""
    joined = [replace(b, pairs=[p + 1000 * i if p >= 0 else p for p in b.pairs]) for i, b in enumerate(problem.batches)]
    ends = torch.cat([torch.tensor(b.bounds()).diff() for b in joined]).cumsum(0)
    whole = replace(
        joined[0],
        hidden=torch.cat([b.hidden for b in joined], 1),
        labels=torch.cat([b.labels for b in joined], 1),
        ref=torch.cat([b.ref for b in joined], 1),
        cu_seq_lens=torch.cat([torch.zeros(1, dtype=torch.int64), ends]),
        pairs=[p for b in joined for p in b.pairs],
        chosen=[c for b in joined for c in b.chosen],
    )
    return replace(problem, batches=[whole], layout="ids")


def _reordered(problem: Case, order: list[int]) -> Case:
    """The sequences of a one-batch case in another order."""
    (b,) = problem.batches
    spans = list(zip(b.bounds()[:-1], b.bounds()[1:], strict=True))
    index = torch.cat([torch.arange(*spans[i]) for i in order])
    lengths = torch.tensor([spans[i][1] - spans[i][0] for i in order])
    moved = replace(
        b,
        hidden=b.hidden[:, index],
        labels=b.labels[:, index],
        ref=b.ref[:, index],
        cu_seq_lens=torch.cat([torch.zeros(1, dtype=torch.int64), lengths.cumsum(0)]),
        pairs=[b.pairs[i] for i in order],
        chosen=[b.chosen[i] for i in order],
    )
    return replace(problem, batches=[moved], layout="ids")


@pytest.mark.parametrize("name", [n for n in ALL if not n.startswith("aot")])
@few
@given(seed=seeds, data=st.data())
def test_cut_and_order(name: str, seed: int, data: st.DataObject) -> None:
    """Micro-batches joined to one pack, and its sequences shuffled: the same loss and gradients."""
    o = objective(term(name), ld_alpha=0.5 if name in PAIRED else None)
    problem = case(seed, packed=True)
    one = _merged(problem)
    order = data.draw(st.permutations(range(len(one.batches[0].pairs))))
    mixed = _reordered(one, order)
    cut, whole, shuffled = (run_step(x, o) for x in (problem, one, mixed))
    hidden = torch.cat(cut.hidden, 1)
    assert_same(replace(cut, hidden=[hidden]), whole, one)
    spans = list(zip(one.batches[0].bounds()[:-1], one.batches[0].bounds()[1:], strict=True))
    index = torch.cat([torch.arange(*spans[i]) for i in order])
    assert_same(shuffled, replace(whole, hidden=[whole.hidden[0][:, index]]), one)


@every_run
@few
@given(seed=seeds, name=st.sampled_from(ALL))
def test_metrics(run: dict[str, Any], seed: int, name: str) -> None:
    problem, o = case(seed), objective(term(name))
    _, gold = gold_step(problem, o)
    results = finalize_metrics([info.metrics for info in run_step(problem, o, **run).infos])

    def same(metric: str, values: list[float]) -> None:
        want = torch.tensor(values, dtype=torch.float64).mean() if values else torch.zeros((), dtype=torch.float64)
        budgets.assert_rounding(metric, results[metric], want, 30.0, 1.0)

    sides = gold.rewards
    for side, rewards in sides.items():
        same(f"reward_{side}", rewards)
        assert int(results[f"num_{side}"]) == len(rewards)
    if name in UNPAIRED:
        assert ("kl" in results) == (name == "kto") and "reward_margin" not in results
        return
    margins = [w - lo for w, lo in zip(sides["chosen"], sides["rejected"], strict=True)]
    same("reward_margin", margins)
    same("reward_accuracy", [float(x > 0) for x in margins])


def test_metrics_of_terms() -> None:
    problem = case(3)
    o = objective(term("sigmoid"), term("sft", weight=2.0), use_weighting=True)
    infos = run_step(problem, o).infos
    results: dict[str, Tensor] = finalize_metrics([info.metrics for info in infos])
    alone, _ = gold_step(problem, objective(term("sft")))
    weighted, _ = gold_step(problem, objective(term("sigmoid"), use_weighting=True))
    assert float(results["nll"]) == pytest.approx(float(alone.loss), rel=budgets.FIGURE_F64)
    assert float(results["loss/sigmoid"]) == pytest.approx(float(weighted.loss), rel=budgets.FIGURE_F64)
    assert float(results["wpo_weight"]) > 0
