"""dlogits: each adjoint alone and all together, in place, elsewhere and overlaid, against float64 autograd."""

from __future__ import annotations

import pytest
import torch

from tests import budgets
from tests.interpret import kernel_inputs as inputs
from tests.interpret.kernel_oracle import assert_close, gradient, stats
from xloss_kernels.dlogits import dlogits
from xloss_kernels.row_stats import row_stats
from xloss_kernels.transform import Transform

ROWS = 5
NAMES = {
    "logprobs": "d_logprobs",
    "entropy": "d_entropy",
    "lse": "d_lse",
    "mean_logit": "d_mean_logit",
    "sum_p2": "d_sum_p2",
}


def adjoints_for(labels, names=tuple(NAMES)):
    shapes = {name: tuple(labels.shape) if name == "logprobs" else (len(labels),) for name in names}
    return {name: torch.randn(shape, generator=inputs.generator(i)) for i, (name, shape) in enumerate(shapes.items())}


def run(raw, labels, transform, adjoints, out=None, tile=inputs.ROW, ignore=inputs.IGNORE):
    known = row_stats(raw, labels, transform, entropy=True, sum_p2=True, ignore_index=ignore, tile=tile)._asdict()
    known = {name: known[name] for name in ("lse", "entropy", "sum_p2")}
    known["lse"][labels.reshape(len(labels), -1).eq(ignore).all(1)] = float("nan")  # dead rows use nothing
    return dlogits(
        raw, labels, known.pop("lse"), transform, **known, out=out, tile=tile, ignore_index=ignore,
        **{NAMES[name]: value for name, value in adjoints.items()})  # fmt: skip


def check(raw, labels, transform, adjoints, tile=inputs.ROW, ignore=inputs.IGNORE):
    gold = gradient(raw, labels, transform, adjoints, ignore=ignore)
    eager = gradient(raw, labels, transform, adjoints, torch.float32, ignore=ignore)
    out = torch.full(raw.shape, float("nan"))
    before = raw.clone()
    run(raw, labels, transform, adjoints, out, tile, ignore)
    assert torch.equal(raw, before)
    lse = stats(raw.double(), labels, transform, ignore)["lse"].abs().max().item()
    assert_close(out, gold, eager, floor=budgets.kernel_logits(budgets.KERNEL_ROWS, lse / 2))  # half an ulp of lse


@pytest.mark.parametrize("vocab", inputs.VOCABS)
@pytest.mark.parametrize("temper", inputs.TEMPERS)
def test_every_temper_and_tail(temper, vocab):
    labels = inputs.labels(ROWS, vocab)
    check(inputs.logits(temper, ROWS, vocab), labels, Transform(), adjoints_for(labels))


@pytest.mark.parametrize("name", NAMES)
def test_each_adjoint_alone(name):
    labels = inputs.labels(ROWS, 77)
    check(inputs.logits("plain", ROWS, 77), labels, Transform(), adjoints_for(labels, (name,)))


@pytest.mark.parametrize("name", inputs.TRANSFORMS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_every_transform_on_strided_rows(name, dtype):
    labels = inputs.labels(ROWS, 77)
    raw = inputs.strided(inputs.logits("plain", ROWS, 77, dtype))
    check(raw, labels, inputs.transforms(ROWS, 77)[name], adjoints_for(labels))


@pytest.mark.parametrize("num_labels", [2, 3, 5])
def test_several_labels_some_twice(num_labels):
    labels = inputs.labels(ROWS, 40, num_labels)
    labels[3] = labels[3, 0]  # the same label in every place: adjoints add up
    labels[4, 0] = inputs.IGNORE
    check(inputs.logits("plain", ROWS, 40), labels, Transform(softcap=6.0), adjoints_for(labels))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_in_place(dtype):
    labels = inputs.labels(ROWS, 77)
    raw = inputs.strided(inputs.logits("plain", ROWS, 77, dtype))
    adjoints = adjoints_for(labels)
    gold = gradient(raw, labels, Transform(), adjoints)
    assert run(raw, labels, Transform(), adjoints) is raw
    assert_close(raw, gold, floor=budgets.KERNEL_ROWS if dtype == torch.float32 else budgets.KERNEL_HALF)


@pytest.mark.parametrize("vocab", [7, 32, 64, 77, 96, 300])
@pytest.mark.parametrize("extra", [0, 6])
def test_half_size_overlay_equals_a_separate_buffer(vocab, extra):
    labels = inputs.labels(ROWS, vocab)
    raw = inputs.logits("plain", ROWS, vocab)
    raw = inputs.strided(raw, extra) if extra else raw.clone()
    adjoints = adjoints_for(labels)
    separate = run(raw, labels, Transform(), adjoints, torch.full(raw.shape, float("nan"), dtype=torch.float16))
    whole = torch.as_strided(raw, (ROWS, raw.stride(0)), (raw.stride(0), 1)) if not extra else raw._base
    overlay = whole.view(torch.float16)[:, :vocab]
    assert overlay.data_ptr() == raw.data_ptr()
    run(raw, labels, Transform(), adjoints, overlay)
    assert torch.equal(overlay, separate)


def test_overlaps_that_would_race_are_refused():
    raw, labels = torch.zeros(4, 32), torch.zeros(4, dtype=torch.int64)
    lse = torch.zeros(4)
    packed = raw.view(torch.float16).reshape(-1)[: 4 * 32].view(4, 32)  # rows of out lie on other rows of the logits
    with pytest.raises(AssertionError, match="row on row"):
        dlogits(raw, labels, lse, d_lse=lse, out=packed)
    half = torch.zeros(4, 32, dtype=torch.float16)
    shifted = torch.zeros(4, 33)
    with pytest.raises(AssertionError, match="row on row"):
        dlogits(shifted[:, :32], labels, lse, d_lse=lse, out=shifted[:, 1:])
    with pytest.raises(AssertionError, match="larger"):
        dlogits(half.view(4, 32)[:, :16], labels, lse, d_lse=lse, out=half.view(torch.float32))


def test_rows_without_adjoints_are_zero_and_unread():
    raw = inputs.logits("plain", 4, 77)
    raw[1] = float("nan")
    labels = torch.tensor([1, 2, 3, 4])
    g = torch.tensor([1.0, 0.0, 2.0, 3.0])
    out = dlogits(
        raw, labels, torch.logsumexp(raw, 1), d_logprobs=g, out=torch.full_like(raw, float("nan")), tile=inputs.ROW
    )
    assert (out[1] == 0).all() and out[[0, 2, 3]].isfinite().all() and (out[[0, 2, 3]] != 0).any(1).all()


def test_nan_adjoint_is_not_hidden():
    raw, labels = inputs.logits("plain", 1, 40), torch.tensor([3])
    out = dlogits(raw, labels, torch.logsumexp(raw, 1), d_logprobs=torch.tensor([float("nan")]), tile=inputs.ROW)
    assert out.isnan().all()


def test_masked_vocabulary_entries_get_zero():
    raw = inputs.logits("plain", 3, 70)
    raw[:, 10:60] = float("-inf")
    labels = torch.tensor([0, 69, 5])
    values = stats(raw.double(), labels, Transform())
    entropy, lse = values["entropy"].float(), values["lse"].float()
    out = dlogits(
        raw.clone(), labels, lse, entropy=entropy, d_entropy=torch.ones(3), d_logprobs=torch.ones(3), tile=inputs.ROW
    )
    assert (out[:, 10:60] == 0).all() and out.isfinite().all()


def test_ignore_index_may_be_a_vocabulary_id():
    labels = torch.tensor([0, 3, 0, 39])
    check(inputs.logits("plain", 4, 40), labels, Transform(), adjoints_for(labels), ignore=0)


def test_no_rows():
    assert dlogits(torch.zeros(0, 9), torch.zeros(0, dtype=torch.int64), torch.zeros(0)).shape == (0, 9)
