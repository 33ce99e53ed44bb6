"""head_forward and finalize: the statistics of hidden x weight against float64, and the split, shard and merge laws."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from tests import budgets
from tests.interpret import kernel_inputs as inputs
from tests.interpret.kernel_oracle import assert_close, stats
from xloss_kernels.finalize import finalize
from xloss_kernels.head_forward import head_forward
from xloss_kernels.transform import Transform

ALL = {"entropy": True, "mean_logit": True, "sum_p2": True, "top1": True}


def operands(tokens, size, vocab, dtype=torch.float32, spread=1.0):
    hidden = torch.randn(tokens, size, generator=inputs.generator(1)) * spread
    weight = torch.randn(vocab, size, generator=inputs.generator(2)) / size**0.5
    return hidden.to(dtype), weight.to(dtype)


def run(hidden, weight, labels, transform=None, tile=inputs.HEAD, programs=3, ignore=inputs.IGNORE, **flags):
    flags = flags or ALL
    partials, label_logits = head_forward(hidden, weight, labels, transform, tile=tile, num_programs=programs, **flags)
    return finalize(partials, label_logits, labels, weight.shape[0], ignore_index=ignore, **flags)


def check(
    hidden, weight, labels, transform=None, tile=inputs.HEAD, ignore=inputs.IGNORE, floor=budgets.KERNEL_HEAD, **kwargs
):
    ours = run(hidden, weight, labels, transform, tile, ignore=ignore, **kwargs)._asdict()
    transform = transform or Transform()
    gold = stats(hidden.double() @ weight.double().t(), labels, transform, ignore)
    eager = stats(hidden.float() @ weight.float().t(), labels, transform, ignore)
    assert torch.equal(ours.pop("top1"), gold.pop("top1"))
    for name, value in ours.items():
        assert_close(value, gold[name], eager[name], floor=floor)


@pytest.mark.parametrize(
    "tokens,size,vocab", [(1, 16, 32), (7, 5, 1), (16, 16, 64), (17, 33, 65), (35, 40, 100), (3, 1, 300)]
)
@pytest.mark.parametrize("use_tma", [False, True])
def test_every_tail(tokens, size, vocab, use_tma):
    hidden, weight = operands(tokens, size, vocab)
    check(hidden, weight, inputs.labels(tokens, vocab), tile=replace(inputs.HEAD, use_tma=use_tma))


@pytest.mark.parametrize("name", inputs.TRANSFORMS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_every_transform(name, dtype):
    hidden, weight = operands(20, 24, 77, dtype, spread=3.0)
    check(hidden, weight, inputs.labels(20, 77), inputs.transforms(20, 77)[name], floor=budgets.KERNEL_HEAD_TRANSFORMED)


@pytest.mark.parametrize("sign,spread", [(-1, 40.0), (1, 40.0), (1, 1000.0)])
def test_far_from_zero(sign, spread):
    hidden, weight = operands(10, 16, 70, spread=spread)
    hidden, weight = hidden.abs(), sign * weight.abs()
    check(hidden, weight, inputs.labels(10, 70), floor=budgets.kernel_logits(budgets.KERNEL_HEAD, 4 * spread))


@pytest.mark.parametrize("pieces", [1, 2, 4])
@pytest.mark.parametrize("tiles_per_split,programs", [(1, 1), (2, 5), (8, 64)])
def test_any_partition_of_the_work(pieces, tiles_per_split, programs):
    hidden, weight = operands(35, 16, 150)
    tile = replace(inputs.HEAD, pieces=pieces, tiles_per_split=tiles_per_split)
    check(hidden, weight, inputs.labels(35, 150), tile=tile, programs=programs)


def test_the_number_of_programs_changes_no_bit():
    hidden, weight = operands(35, 16, 150)
    labels = inputs.labels(35, 150)
    one, many = (run(hidden, weight, labels, programs=n) for n in (1, 64))
    assert all(torch.equal(a, b) for a, b in zip(one, many, strict=True))


def test_a_token_does_not_depend_on_its_neighbours():
    hidden, weight = operands(35, 16, 150)
    labels = inputs.labels(35, 150)
    whole, part = run(hidden, weight, labels), run(hidden[16:19], weight, labels[16:19].clone())
    assert all(torch.equal(a[16:19], b) for a, b in zip(whole, part, strict=True))


@pytest.mark.parametrize("num_labels", [1, 3])
def test_several_labels(num_labels):
    hidden, weight = operands(20, 16, 77)
    labels = inputs.labels(20, 77, num_labels)
    labels[5, 0] = inputs.IGNORE
    check(hidden, weight, labels)


def test_strided_operands():
    hidden, weight = operands(20, 24, 77)
    check(inputs.strided(hidden), inputs.strided(weight, 8), inputs.labels(20, 77))
    check(
        inputs.strided(hidden, 8),
        inputs.strided(weight, 8),
        inputs.labels(20, 77),
        tile=replace(inputs.HEAD, use_tma=True),
    )


def test_only_what_is_asked_for():
    hidden, weight = operands(5, 16, 40)
    out = run(hidden, weight, inputs.labels(5, 40), entropy=False)
    assert (out.entropy, out.mean_logit, out.sum_p2, out.top1) == (None, None, None, None)
    assert out.lse.isfinite().all() and out.logprobs.isfinite().all()


@pytest.mark.parametrize("cut", [1, 33, 64, 99])
def test_vocabulary_shards_merge_to_the_whole(cut):
    hidden, weight = operands(20, 16, 100)
    labels = inputs.labels(20, 100)
    transform = inputs.transforms(20, 100)["all"]
    payloads, picked = [], []
    for first, last in ((0, cut), (cut, 100)):
        shard = replace(transform, bias=transform.bias[first:last])
        partials, label_logits = head_forward(
            hidden, weight[first:last], labels, shard, first_column=first, tile=inputs.HEAD, **ALL)  # fmt: skip
        payloads.append(partials)
        picked.append(label_logits)
    merged = finalize(torch.cat(payloads), torch.maximum(*picked), labels, 100, **ALL)
    whole = run(hidden, weight, labels, transform)
    for name, a, b in zip(whole._fields, whole, merged, strict=True):
        torch.testing.assert_close(a, b, **budgets.KERNEL_SHIFT, msg=name)


def test_ignored_labels_and_no_tokens():
    hidden, weight = operands(5, 16, 40)
    check(hidden, weight, torch.tensor([0, 3, 0, 39, 5]), ignore=0)
    out = run(hidden[:0], weight, torch.zeros(0, dtype=torch.int64))
    assert out.lse.shape == (0,)
    out = run(hidden, weight, torch.full((5,), -100))
    assert all((value == (-1 if name == "top1" else 0)).all() for name, value in out._asdict().items())
