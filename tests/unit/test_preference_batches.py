"""Contract: batches of preferences are checked where they are built, and each error names the argument; packs join and
do not split; the config round-trips and refuses what would have no effect.
"""

from __future__ import annotations

from typing import Any, Literal

import pytest
import torch
from pydantic import ValidationError
from torch import Tensor

from xloss import (
    PreferenceLossConfig,
    PreferenceLossContext,
    PreferenceLossContextInputItem,
    PreferenceLossKwargs,
    PreferenceTerm,
    register_preference_loss,
)
from xloss.errors import MissingFieldError, OptionError, ShapeError, UnsupportedError
from xloss.losses.preferences import PreferenceBatch, preference_losses

CU = torch.tensor([0, 3, 5, 8, 12])


def item(**fields: Any) -> PreferenceLossContextInputItem:
    g = torch.Generator().manual_seed(0)
    labels = torch.randint(0, 19, (1, 12), generator=g)
    return PreferenceLossContextInputItem(
        **{"shifted_labels": labels, "ref_logprobs": torch.randn(1, 12, generator=g)} | fields
    )


def build(
    cfg: PreferenceLossConfig, *items: PreferenceLossContextInputItem, cu: Tensor = CU
) -> list[PreferenceLossKwargs]:
    found: list[PreferenceLossKwargs] = PreferenceLossContext.build_batches_loss_kwargs(
        list(items), cfg, cu_seq_lens_list=[cu] * len(items)
    )
    return found


def loss_of(cfg: PreferenceLossConfig, kwargs: PreferenceLossKwargs, hidden: Tensor, weight: Tensor) -> Tensor:
    loss: Tensor = PreferenceLossContext(cfg, kwargs).forward(hidden, weight)[0]
    return loss


DPO = PreferenceLossConfig(loss_type="sigmoid")
KTO = PreferenceLossConfig(loss_type="kto")


def test_sides_by_layout_and_by_ids() -> None:
    (kwargs,) = build(DPO, item())
    assert kwargs.chosen.tolist() == [0, 2] and kwargs.rejected.tolist() == [1, 3]
    (kwargs,) = build(PreferenceLossConfig(loss_type="sigmoid", layout="halves"), item())
    assert kwargs.chosen.tolist() == [0, 1] and kwargs.rejected.tolist() == [2, 3]
    ids = item(pair_ids=torch.tensor([4, 2, 2, 4]), preferred=torch.tensor([False, True, False, True]))
    (kwargs,) = build(DPO, ids)
    assert kwargs.chosen.tolist() == [3, 1] and kwargs.rejected.tolist() == [0, 2]
    (kwargs,) = build(KTO, item(preferred=torch.tensor([True, False, True, True]), kl=torch.zeros(())))
    assert kwargs.chosen.tolist() == [0, 2, 3] and kwargs.rejected.tolist() == [1]


def test_a_pair_without_tokens_is_left_out() -> None:
    labels = item().shifted_labels.clone()
    labels[0, 3:5] = -100
    (kwargs,) = build(DPO, item(shifted_labels=labels))
    assert kwargs.chosen.tolist() == [2] and float(kwargs.loss_divisor) == 1
    (kwargs,) = build(
        PreferenceLossConfig(loss_type="sigmoid", count_empty_sequences=True), item(shifted_labels=labels)
    )
    assert kwargs.chosen.tolist() == [0, 2] and float(kwargs.loss_divisor) == 2


@pytest.mark.parametrize("mode", ["eager", "chunk"])
def test_sequences_in_no_pair_do_not_enter(mode: Any) -> None:
    """Neither their hidden states nor their reference, NaN or not; the head does not see them."""
    cfg = PreferenceLossConfig(loss_type="ipo", f_divergence="forward_kl", use_weighting=True, mode=mode)
    given = item(pair_ids=torch.tensor([0, -1, 0, -1]), preferred=torch.tensor([True, True, False, True]))
    ref = given.ref_logprobs.clone()
    ref[0, 3:5], ref[0, 8:] = torch.nan, torch.inf
    clean, bad = build(cfg, given)[0], build(cfg, item(**dict(given) | {"ref_logprobs": ref}))[0]
    hidden, weight = torch.randn(1, 12, 4), torch.randn(19, 4, requires_grad=True)
    dirty = hidden.clone()
    dirty[0, 3:5] = torch.nan
    hidden.requires_grad_(True), dirty.requires_grad_(True)
    x, y = (loss_of(cfg, k, h, weight) for k, h in ((clean, hidden), (bad, dirty)))
    assert torch.equal(x, y)
    for a, b in zip(torch.autograd.grad(x, (hidden, weight)), torch.autograd.grad(y, (dirty, weight)), strict=True):
        assert torch.equal(a, b)
    assert PreferenceLossContext(cfg, bad).explain(dirty, weight).num_live == 6


def test_kl_is_the_global_mean_at_least_0() -> None:
    flags = torch.tensor([True, False, True, True])
    a, b = build(
        KTO, item(preferred=flags, kl=torch.tensor([1.0, 2.0, 3.0])), item(preferred=flags, kl=torch.tensor(-2.0))
    )
    assert float(a.kl_point) == float(b.kl_point) == 1.0
    (low,) = build(KTO, item(preferred=flags, kl=torch.tensor(-2.0)))
    assert float(low.kl_point) == 0.0


WRONG: list[tuple[dict[str, Any], dict[str, Any], type[Exception], str]] = [
    ({}, {"ref_logprobs": None}, MissingFieldError, "ref_logprobs"),
    ({}, {"ref_sequence_logprobs": torch.zeros(4)}, OptionError, "both given"),
    ({}, {"ref_logprobs": None, "ref_sequence_logprobs": torch.zeros(3)}, ShapeError, r"must be \[N\] = \(4,\)"),
    ({}, {"preferred": torch.tensor([True, False, True, False])}, OptionError, "pair_ids"),
    ({}, {"pair_ids": torch.tensor([0, 0, 1, 1])}, MissingFieldError, "preferred"),
    ({}, {"pair_ids": torch.tensor([0, 0, 1]), "preferred": torch.ones(4).bool()}, ShapeError, "pair_ids"),
    ({}, {"pair_ids": torch.zeros(4), "preferred": torch.ones(4).bool()}, ShapeError, "pair_ids"),
    ({}, {"pair_ids": torch.tensor([0, 0, 1, 2]), "preferred": torch.tensor([1, 0, 1, 0])}, OptionError, "pair 1"),
    ({}, {"pair_ids": torch.tensor([0, 0, 1, 1]), "preferred": torch.tensor([1, 1, 1, 0])}, OptionError, "2 preferred"),
    ({}, {"kl": torch.zeros(())}, OptionError, "kl is given"),
    ({}, {"reward_shift": torch.zeros(())}, OptionError, "reward_shift is given"),
    ({"loss_type": "bco_pair"}, {"reward_shift": torch.zeros(1)}, ShapeError, "reward_shift must be 0-d"),
    ({"loss_type": "simpo"}, {}, OptionError, "ref_logprobs is given"),
    ({"reference_free": True}, {}, OptionError, "ref_logprobs is given"),
    ({"ld_alpha": 0.5}, {"ref_logprobs": None, "ref_sequence_logprobs": torch.zeros(4)}, OptionError, "ld_alpha"),
    ({"loss_type": "kto"}, {"kl": torch.zeros(())}, MissingFieldError, "preferred"),
    ({"loss_type": "kto"}, {"preferred": torch.ones(4).bool()}, MissingFieldError, "kl"),
    ({"loss_type": "bco"}, {"preferred": torch.ones(4).bool()}, MissingFieldError, "reward_shift"),
    (
        {"loss_type": "apo_zero_unpaired"},
        {"preferred": torch.ones(4).bool(), "pair_ids": torch.zeros(4).long()},
        OptionError,
        "pair_ids",
    ),
]  # fmt: skip


@pytest.mark.parametrize(("config", "fields", "error", "message"), WRONG)
def test_wrong_batches(config: dict[str, Any], fields: dict[str, Any], error: type[Exception], message: str) -> None:
    cfg = PreferenceLossConfig(**{"loss_type": "sigmoid"} | config)
    with pytest.raises(error, match=message):
        build(cfg, item(**fields))


def test_odd_sequences_and_missing_bounds() -> None:
    with pytest.raises(OptionError, match="even number"):
        build(DPO, item(), cu=torch.tensor([0, 3, 5, 12]))
    with pytest.raises(MissingFieldError, match="cu_seq_lens"):
        PreferenceLossContext.build_batches_loss_kwargs([item()], DPO)
    with pytest.raises(MissingFieldError, match="loss_divisor"):
        PreferenceLossContext(DPO, PreferenceLossKwargs(**dict(item()), cu_seq_lens=CU)).forward(
            torch.zeros(1, 12, 4), torch.zeros(19, 4)
        )


REFUSED: list[tuple[dict[str, Any], str]] = [
    ({"loss_type": []}, "at least 1"),
    ({"loss_type": "sigmod"}, "Did you mean 'sigmoid'"),
    ({"loss_type": {"loss_type": "hinge", "tau": 1.0}}, "tau"),
    ({"loss_type": ["sigmoid", "kto"]}, "mixes"),
    ({"loss_type": "hinge", "label_smoothing": 0.1}, "label_smoothing"),
    ({"loss_type": "robust", "label_smoothing": 0.5}, "less than 0.5"),
    ({"loss_type": "exo_pair", "label_smoothing": 0.0}, "greater than 0"),
    ({"loss_type": "aot", "f_divergence": "js"}, "f_divergence"),
    ({"loss_type": "sigmoid", "f_alpha": 0.3}, "f_alpha"),
    ({"loss_type": "sigmoid", "max_weighting": 1.0}, "max_weighting"),
    ({"loss_type": "sigmoid", "nll_reduction": "sample"}, "nll_reduction"),
    ({"loss_type": "kto", "layout": "halves"}, "layout"),
    ({"loss_type": "kto", "ld_alpha": 0.5}, "ld_alpha"),
    ({"loss_type": "kto", "use_weighting": True}, "use_weighting"),
    ({"loss_type": "sigmoid", "beta": 0.0}, "greater than 0"),
    ({"loss_type": "sigmoid", "bta": 0.1}, "Did you mean 'beta'"),
]


@pytest.mark.parametrize(("fields", "message"), REFUSED)
def test_refused_configs(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        PreferenceLossConfig(**fields)


def test_what_is_open_is_filled_in() -> None:
    cfg = PreferenceLossConfig(loss_type=["sigmoid", {"loss_type": "simpo", "beta": 3.0}, "ipo", "exo_pair"])
    assert [t.beta for t in cfg.terms] == [0.1, 3.0, 0.1, 0.1]
    assert [t.average_log_prob for t in cfg.terms] == [False, True, True, False]
    assert [getattr(t, "label_smoothing", None) for t in cfg.terms] == [0.0, 0.0, None, 1e-3]
    shared = PreferenceLossConfig(
        loss_type=["simpo", "exo_pair"], beta=0.5, average_log_prob=False, label_smoothing=0.2
    )
    assert [(t.beta, t.average_log_prob) for t in shared.terms] == [(0.5, False)] * 2
    assert PreferenceLossConfig(loss_type="simpo").terms[0].beta == 2.0


@pytest.mark.parametrize("name", sorted(preference_losses()))
def test_round_trip(name: str) -> None:
    cfg = PreferenceLossConfig(loss_type=[{"loss_type": name, "weight": 0.5}], beta=0.3)
    assert PreferenceLossConfig.model_validate_json(cfg.model_dump_json()) == cfg
    assert PreferenceLossConfig(**cfg.model_dump()) == cfg


def test_cat_joins_packs_and_nothing_splits() -> None:
    g = torch.Generator().manual_seed(1)
    hidden = [torch.randn(1, 12, 4, generator=g) for _ in range(2)]
    weight = torch.randn(19, 4, generator=g)
    ids = {"pair_ids": torch.tensor([4, 2, 2, 4]), "preferred": torch.tensor([False, True, False, True])}
    sums = {"ref_logprobs": None, "ref_sequence_logprobs": torch.randn(4, generator=g)}
    kto = {"preferred": torch.tensor([True, False, False, True]), "kl": torch.tensor(0.2)}
    for cfg, fields in ((DPO, {}), (DPO, ids), (DPO, sums), (KTO, kto)):
        parts = build(cfg, item(**fields), item(**fields))
        whole = PreferenceLossKwargs.cat(parts)
        apart = torch.stack([loss_of(cfg, k, h, weight) for k, h in zip(parts, hidden, strict=True)]).sum()
        torch.testing.assert_close(loss_of(cfg, whole, torch.cat(hidden, 1), weight), apart)
        again = PreferenceLossContext.build_batches([PreferenceLossContext(cfg, whole)])[0]  # calibrated anew
        torch.testing.assert_close(again.forward(torch.cat(hidden, 1), weight)[0], apart)
    with pytest.raises(UnsupportedError, match="whole sequences"):
        parts[0].chunk(4)
    padded = PreferenceLossContextInputItem(shifted_labels=torch.zeros(2, 3).long(), ref_logprobs=torch.zeros(2, 3))
    (rows,) = PreferenceLossContext.build_batches_loss_kwargs([padded], DPO)
    with pytest.raises(UnsupportedError, match="padded rows"):
        PreferenceLossKwargs.cat([rows, rows])
    shifts = build(
        PreferenceLossConfig(loss_type="bco_pair"),
        item(reward_shift=torch.tensor(0.1)),
        item(reward_shift=torch.tensor(0.2)),
    )
    with pytest.raises(OptionError, match="reward_shift differs"):
        PreferenceLossKwargs.cat(shifts)


def test_contexts_from_a_dict() -> None:
    given = item()
    contexts = [
        DPO.build({"shifted_labels": given.shifted_labels, "ref_logprobs": given.ref_logprobs}) for _ in range(2)
    ]
    ready = PreferenceLossContext.build_batches([c for c in contexts if c], cu_seq_lens_list=[CU, CU])
    assert [float(c.loss_kwargs.loss_divisor) for c in ready] == [4, 4]


def test_one_pass_is_refused() -> None:
    cfg = PreferenceLossConfig(loss_type="sigmoid", plan="one_pass", mode="chunk")
    (kwargs,) = build(cfg, item())
    with pytest.raises(UnsupportedError, match="couples tokens"):
        loss_of(cfg, kwargs, torch.zeros(1, 12, 4), torch.zeros(19, 4))


def test_a_loss_of_ones_own() -> None:
    class Margin(PreferenceTerm):
        """-x."""

        loss_type: Literal["my_margin"] = "my_margin"

        def losses(self, batch: PreferenceBatch) -> Tensor:
            return -self.margin(batch)

    register_preference_loss(Margin)
    try:
        cfg = PreferenceLossConfig(loss_type="my_margin")
        (kwargs,) = build(cfg, item())
        loss, info = PreferenceLossContext(cfg, kwargs).forward(torch.randn(1, 12, 4), torch.randn(19, 4))
        torch.testing.assert_close(loss, -info.metrics["reward_margin"].result())
        with pytest.raises(OptionError, match="taken"):
            register_preference_loss(type("Other", (Margin,), {"__qualname__": "Other"}))
        with pytest.raises(OptionError, match="tag"):
            register_preference_loss(PreferenceTerm)
    finally:
        from xloss.losses.preferences import base

        del base._BY_TYPE["my_margin"]
