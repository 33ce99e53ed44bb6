"""Labels moved inside sequences, and what the supervised losses refuse.

Contract: nothing moves over a sequence's bounds, whatever the lengths, the layout and the distance; what cannot be
meant raises with the argument's name and its value.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from tests.oracle import ce
from tests.strategies import packs
from xloss import (
    CELossConfig,
    CELossContextInputItem,
    MTPLossConfig,
    MTPLossContextInputItem,
    SoftCELossConfig,
    SoftCELossContextInputItem,
    roll_labels,
    shift_labels,
)
from xloss.errors import DtypeError, LabelError, MissingFieldError, OptionError, ShapeError, UnsupportedError
from xloss.packing import Segments, broadcast_segments, roll_segments, segment_sum


@given(lengths=packs(), shift=st.integers(0, 8), row=st.booleans(), ignore_idx=st.sampled_from((-100, -1)))
def test_roll(lengths: list[int], shift: int, row: bool, ignore_idx: int) -> None:
    bounds = torch.tensor([0, *lengths]).cumsum(0).to(torch.int32)
    labels = torch.arange(sum(lengths))
    want = torch.tensor(ce.rolled(labels.tolist(), bounds.tolist(), shift, ignore_idx), dtype=torch.int64)
    labels, want = (labels[None], want[None]) if row else (labels, want)
    assert torch.equal(roll_labels(labels, bounds, shift, ignore_idx), want)
    floats = roll_segments(labels.double(), bounds, shift, 0.5)
    assert torch.equal(floats, want.double().masked_fill(want == ignore_idx, 0.5))


def test_rows_are_sequences() -> None:
    labels = torch.arange(8).reshape(2, 4)
    assert shift_labels(labels).tolist() == [[1, 2, 3, -100], [5, 6, 7, -100]]
    assert shift_labels(labels[0], ignore_idx=-1).tolist() == [1, 2, 3, -1]
    assert shift_labels(labels[:, :0]).shape == (2, 0)
    assert shift_labels(labels.reshape(1, 8), torch.tensor([0, 3, 8])).tolist() == [[1, 2, -100, 4, 5, 6, 7, -100]]


@given(lengths=packs(), seed=st.integers(0, 99))
def test_sums_per_sequence(lengths: list[int], seed: int) -> None:
    """Against a loop; empty sequences have 0, and NaN at tokens left out changes nothing, in the gradient neither."""
    g = torch.Generator().manual_seed(seed)
    values = torch.randn(sum(lengths), generator=g, dtype=torch.float64)
    valid = torch.rand(sum(lengths), generator=g) < 0.7
    bounds = torch.tensor([0, *lengths]).cumsum(0)
    torch.testing.assert_close(segment_sum(values, bounds), _looped(values, lengths))
    poisoned = values.masked_fill(~valid, torch.nan).requires_grad_()
    sequences = Segments.of(bounds, valid)
    sums = sequences.sum(poisoned)
    torch.testing.assert_close(sums, _looped(values * valid, lengths))
    upstream = torch.randn(len(lengths), generator=g, dtype=torch.float64)
    (sums * upstream).sum().backward()
    each = torch.cat([u.expand(n) for u, n in zip(upstream, lengths, strict=True)] or [upstream])
    torch.testing.assert_close(poisoned.grad, each * valid)
    assert torch.equal(sequences.spread(upstream), each)
    assert torch.equal(sequences.bounds, bounds)


def _looped(values: Tensor, lengths: list[int]) -> Tensor:
    return torch.stack([part.sum() for part in values.split(lengths)]) if lengths else values.new_zeros(0)


@pytest.mark.parametrize("lengths", [[3, 0, 4], [0, 0], [1]])
def test_sums_differentiate_twice(lengths: list[int]) -> None:
    bounds = torch.tensor([0, *lengths], dtype=torch.int32).cumsum(0, dtype=torch.int32)
    values = torch.randn(sum(lengths), dtype=torch.float64, requires_grad=True)
    per_sequence = torch.randn(len(lengths), dtype=torch.float64, requires_grad=True)

    def summed(x: Tensor) -> Tensor:
        return segment_sum(x, bounds).square()

    def spread(x: Tensor) -> Tensor:
        return broadcast_segments(x, bounds, sum(lengths)).square()

    for fn, x in ((summed, values), (spread, per_sequence)):
        assert torch.autograd.gradcheck(fn, x)
        assert torch.autograd.gradgradcheck(fn, x)


def test_sums_are_the_same_bits_with_threads() -> None:
    """The backward of plain indexing adds in the order in which threads come, where tensors are this large."""
    sizes = [40000, 3, 30000]
    bounds = torch.tensor([0, *sizes]).cumsum(0)
    g = torch.Generator().manual_seed(0)
    upstream = torch.randn(sum(sizes), generator=g) * 10.0 ** torch.randint(-4, 5, (sum(sizes),), generator=g)
    threads = torch.get_num_threads()
    found = []
    try:
        for count in (1, 4, 4, 4):
            torch.set_num_threads(count)
            per_sequence = torch.zeros(len(sizes), requires_grad=True)
            loss = (broadcast_segments(per_sequence, bounds, sum(sizes)) * upstream).sum()
            found.append(torch.autograd.grad(loss, per_sequence)[0])
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(grad, found[0]) for grad in found)


LABELS = torch.tensor([[1, 2, -100, 0]])
HIDDEN, WEIGHT = torch.randn(1, 4, 3), torch.randn(5, 3)


def _run(cfg: Any, item: Any, bounds: Any = None) -> None:
    cls = cfg.loss_ctx_cls
    (kwargs,) = cls.build_batches_loss_kwargs([item], cfg, bounds)
    cls(cfg, kwargs).forward(HIDDEN, WEIGHT)


def _soft(targets: Any = None, weights: Any = None) -> SoftCELossContextInputItem:
    targets = torch.zeros(1, 4, 2, dtype=torch.int64) if targets is None else targets
    weights = torch.ones(1, 4, 2) if weights is None else weights
    return SoftCELossContextInputItem(shifted_labels=LABELS, target_tokens=targets, target_weights=weights)


def _ce(**fields: Any) -> CELossContextInputItem:
    return CELossContextInputItem(shifted_labels=LABELS, **fields)


ERRORS: dict[str, tuple[Callable[[], Any], type[Exception], tuple[str, ...]]] = {
    "shift": (lambda: roll_labels(LABELS, None, -1), OptionError, ("shift", "-1")),
    "bounds": (lambda: shift_labels(LABELS, torch.tensor([0, 3])), ShapeError, ("cu_seq_lens", "4 tokens", "[0, 3]")),
    "rows": (
        lambda: shift_labels(LABELS.expand(2, 4), torch.tensor([0, 8])),
        ShapeError,
        ("cu_seq_lens", "one packed row", "(2, 4)"),
    ),
    "axes": (lambda: shift_labels(LABELS[None]), ShapeError, ("[B, S]", "(1, 1, 4)")),
    "class-short": (lambda: _run(CELossConfig(), _ce(class_weight=torch.ones(2))), LabelError, ("2", "0 to 1")),
    "class-long": (
        lambda: _run(CELossConfig(), _ce(class_weight=torch.ones(6))),
        ShapeError,
        ("class_weight", "(5,)", "(6,)"),
    ),
    "class-axes": (
        lambda: _run(CELossConfig(), _ce(class_weight=torch.ones(1, 5))),
        ShapeError,
        ("class_weight", "[V]", "(1, 5)"),
    ),
    "class-smoothing": (
        lambda: _run(CELossConfig(label_smoothing=0.1), _ce(class_weight=torch.ones(5))),
        UnsupportedError,
        ("class_weight", "label_smoothing=0.1"),
    ),
    "targets-shape": (
        lambda: _run(SoftCELossConfig(), _soft(weights=torch.ones(1, 4, 3))),
        ShapeError,
        ("target_weights", "(1, 4, 2)", "(1, 4, 3)"),
    ),
    "targets-axis": (
        lambda: _run(SoftCELossConfig(), _soft(weights=torch.ones(1, 4))),
        ShapeError,
        ("target_weights", "axis K", "(1, 4)"),
    ),
    "targets-range": (
        lambda: _run(SoftCELossConfig(), _soft(targets=torch.full((1, 4, 2), 5))),
        LabelError,
        ("target_tokens holds 5", "0 to 4"),
    ),
    "targets-dtype": (
        lambda: _run(SoftCELossConfig(), _soft(weights=torch.ones(1, 4, 2, dtype=torch.int64))),
        DtypeError,
        ("target_weights", "int64"),
    ),
    "mtp-bounds": (
        lambda: _run(MTPLossConfig(), MTPLossContextInputItem(shifted_labels=LABELS)),
        MissingFieldError,
        ("cu_seq_lens_list", "(1, 4)"),
    ),
    "mtp-rollout": (
        lambda: _run(
            MTPLossConfig(kl_loss_type="k3"), MTPLossContextInputItem(shifted_labels=LABELS), [torch.tensor([0, 4])]
        ),
        MissingFieldError,
        ("rollout_logprobs", "kl_loss_type"),
    ),
}


@pytest.mark.parametrize(("run", "error", "words"), ERRORS.values(), ids=ERRORS)
def test_errors(run: Callable[[], Any], error: type[Exception], words: tuple[str, ...]) -> None:
    with pytest.raises(error) as caught:
        run()
    assert type(caught.value) is error
    assert [w for w in words if w not in str(caught.value)] == [], caught.value


def test_one_token_has_no_others() -> None:
    cfg = CELossConfig(label_smoothing=0.1, label_smoothing_kind="megatron")
    (kwargs,) = cfg.loss_ctx_cls.build_batches_loss_kwargs([_ce()], cfg)
    kwargs.shifted_labels = torch.zeros_like(LABELS)
    with pytest.raises(OptionError, match="at least 2 tokens; got 1"):
        cfg.loss_ctx_cls(cfg, kwargs).forward(HIDDEN, WEIGHT[:1])
