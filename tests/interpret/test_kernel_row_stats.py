"""row_stats: every statistic, at every transform, temper, tail, dtype and stride, against float64."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from tests import budgets
from tests.interpret import kernel_inputs as inputs
from tests.interpret.kernel_oracle import assert_close, gradient, stats
from xloss_kernels.dlogits import dlogits
from xloss_kernels.row_stats import row_stats
from xloss_kernels.tiles import RowTile
from xloss_kernels.transform import Transform

ALL = {"entropy": True, "mean_logit": True, "sum_p2": True, "top1": True}
ROWS = 5


def check(raw, labels, transform, tile=inputs.ROW, ignore=inputs.IGNORE):
    ours = row_stats(raw, labels, transform, tile=tile, ignore_index=ignore, **ALL)._asdict()
    gold = stats(raw.double(), labels, transform, ignore)
    eager = stats(raw.float(), labels, transform, ignore)
    assert torch.equal(ours.pop("top1"), gold.pop("top1"))
    for name, value in ours.items():
        assert value.dtype == torch.float32
        assert_close(value, gold[name], eager[name])
    return ours


@pytest.mark.parametrize("vocab", inputs.VOCABS)
@pytest.mark.parametrize("temper", inputs.TEMPERS)
def test_every_temper_and_tail(temper, vocab):
    check(inputs.logits(temper, ROWS, vocab), inputs.labels(ROWS, vocab), Transform())


@pytest.mark.parametrize("name", inputs.TRANSFORMS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_every_transform_on_strided_rows(name, dtype):
    raw = inputs.strided(inputs.logits("plain", ROWS, 77, dtype))
    check(raw, inputs.labels(ROWS, 77), inputs.transforms(ROWS, 77)[name])


@pytest.mark.parametrize("num_labels", [1, 2, 3, 8])
def test_several_labels_per_row(num_labels):
    labels = inputs.labels(ROWS, 50, num_labels)
    labels[3, 0] = inputs.IGNORE  # one ignored label does not make the row dead, unless it is the only one
    ours = check(inputs.logits("plain", ROWS, 50), labels, Transform(softcap=4.0))
    assert ours["logprobs"].shape == (ROWS, num_labels)
    assert ours["logprobs"][3, 0] == 0


@pytest.mark.parametrize("fold,lanes", [(1, 16), (4, 8), (2, 256)])
def test_any_block_shape(fold, lanes):
    check(inputs.logits("plain", 3, 100), inputs.labels(3, 100), Transform(), RowTile(fold, lanes, 1))


def test_default_tile():
    raw, labels = inputs.logits("plain", 3, 9000), inputs.labels(3, 9000)
    check(raw, labels, Transform(), tile=None)


def test_only_what_is_asked_for():
    out = row_stats(inputs.logits("plain", 2, 8), torch.tensor([1, 2]), tile=inputs.ROW)
    assert (out.entropy, out.mean_logit, out.sum_p2, out.top1) == (None, None, None, None)


def test_ties_take_the_lowest_id():
    raw = torch.zeros(1, 100)
    raw[0, [40, 41, 99]] = 2.0
    assert row_stats(raw, torch.tensor([0]), top1=True, tile=inputs.ROW).top1.item() == 40


def test_masked_vocabulary_entries():
    raw = inputs.logits("plain", 4, 70)
    raw[:, 10:60] = float("-inf")
    labels = torch.tensor([0, 69, 5, 20])
    out = row_stats(raw, labels, entropy=True, sum_p2=True, top1=True, tile=inputs.ROW)
    gold = stats(raw.double(), labels, Transform())
    assert_close(out.lse, gold["lse"])
    assert_close(out.entropy, gold["entropy"])
    assert_close(out.logprobs[:3], gold["logprobs"][:3])
    assert out.logprobs[3] == float("-inf")


@pytest.mark.parametrize("column", [0, 35, 69])
def test_nan_is_not_hidden(column):
    raw = inputs.logits("plain", 1, 70)
    raw[0, column] = float("nan")
    out = row_stats(raw, torch.tensor([1]), entropy=True, tile=inputs.ROW)
    assert out.lse.isnan().all() and out.entropy.isnan().all()


def test_ignore_index_may_be_a_vocabulary_id():
    check(inputs.logits("plain", 4, 40), torch.tensor([0, 3, 0, 39]), Transform(), ignore=0)


def test_label_outside_the_vocabulary_has_probability_zero():
    out = row_stats(inputs.logits("plain", 3, 40), torch.tensor([40, -1, 39]), tile=inputs.ROW)
    assert out.logprobs[:2].tolist() == [float("-inf")] * 2 and out.logprobs[2].isfinite()


def test_all_ignored_and_no_rows():
    out = row_stats(inputs.logits("plain", 3, 40), torch.full((3,), -100), tile=inputs.ROW, **ALL)
    assert all((value == (-1 if name == "top1" else 0)).all() for name, value in out._asdict().items())
    empty = row_stats(torch.zeros(0, 40), torch.zeros(0, dtype=torch.int64), tile=inputs.ROW, **ALL)
    assert empty.lse.shape == (0,)


def test_a_row_does_not_depend_on_its_neighbours():
    raw, labels = inputs.logits("plain", 6, 100), inputs.labels(6, 100)
    whole = row_stats(raw, labels, tile=inputs.ROW, **ALL)
    alone = row_stats(raw[4:5].clone(), labels[4:5].clone(), tile=inputs.ROW, **ALL)
    assert all(torch.equal(a[4:5], b) for a, b in zip(whole, alone, strict=True))


@pytest.mark.parametrize("bad", [torch.zeros(2, 8).t(), torch.zeros(2, 8, dtype=torch.float64), torch.zeros(8)])
def test_launcher_refuses(bad):
    with pytest.raises(AssertionError):
        row_stats(bad, torch.zeros(bad.shape[0], dtype=torch.int64))


def test_row_offsets_pass_two_to_the_31():
    """Two rows 2^31 + 16 elements apart; the pages between are never touched."""
    stride = 2**31 + 16
    memory = torch.from_numpy(np.empty(stride + 64, dtype=np.float16))
    raw = torch.as_strided(memory, (2, 64), (stride, 1))
    raw.copy_(inputs.logits("plain", 2, 64))
    labels = torch.tensor([0, 63])
    check(raw, labels, Transform())
    before = raw.double()
    dlogits(raw, labels, torch.logsumexp(before, 1).float(), d_logprobs=torch.ones(2), tile=inputs.ROW)
    assert_close(raw, gradient(before, labels, Transform(), {"logprobs": torch.ones(2)}), floor=budgets.KERNEL_HALF)
