"""head_dlogits and head_backward against float64 autograd through the whole head."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from tests.interpret import kernel_inputs as inputs
from tests.interpret.kernel_oracle import assert_close, gradient, stats
from tests.interpret.test_kernel_dlogits import NAMES, adjoints_for
from tests.interpret.test_kernel_head_forward import operands
from xloss_kernels.head_backward import head_backward, head_dlogits
from xloss_kernels.row_stats import row_stats
from xloss_kernels.transform import Transform


def known_for(hidden, weight, labels, transform):
    values = row_stats(hidden.float() @ weight.float().t(), labels, transform, entropy=True, sum_p2=True)
    lse = values.lse.clone()
    lse[labels.reshape(len(labels), -1).eq(inputs.IGNORE).all(1)] = -1e4  # dead rows use nothing
    return lse, {"entropy": values.entropy, "sum_p2": values.sum_p2}


def check(hidden, weight, labels, transform=None, tile=inputs.HEAD, names=tuple(NAMES), floor=1e-5):
    transform = transform or Transform()
    adjoints = adjoints_for(labels, names)
    gold = gradient(hidden.double() @ weight.double().t(), labels, transform, adjoints)
    lse, known = known_for(hidden, weight, labels, transform)
    out = torch.full((len(hidden), len(weight)), float("nan"))
    given = {NAMES[name]: value for name, value in adjoints.items()}
    head_dlogits(hidden, weight, labels, lse, transform, **known, **given, out=out, tile=tile, num_programs=3)
    assert_close(out, gold, floor=floor)


@pytest.mark.parametrize("tokens,size,vocab", [(1, 16, 32), (7, 5, 1), (17, 33, 65), (35, 40, 100)])
@pytest.mark.parametrize("use_tma", [False, True])
def test_every_tail(tokens, size, vocab, use_tma):
    hidden, weight = operands(tokens, size, vocab)
    check(hidden, weight, inputs.labels(tokens, vocab), tile=replace(inputs.HEAD, use_tma=use_tma))


@pytest.mark.parametrize("name", NAMES)
def test_each_adjoint_alone(name):
    hidden, weight = operands(20, 16, 77)
    check(hidden, weight, inputs.labels(20, 77), names=(name,))


@pytest.mark.parametrize("name", inputs.TRANSFORMS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_every_transform(name, dtype):
    hidden, weight = operands(20, 24, 77, dtype)
    check(hidden, weight, inputs.labels(20, 77), inputs.transforms(20, 77)[name], floor=3e-5)


def test_several_labels_some_twice_and_ignored():
    hidden, weight = operands(20, 16, 77)
    labels = inputs.labels(20, 77, 3)
    labels[3] = labels[3, 0]
    labels[5, 0] = inputs.IGNORE
    check(hidden, weight, labels)


def test_ignore_index_may_be_a_vocabulary_id():
    hidden, weight = operands(4, 16, 40)
    labels = torch.tensor([[0, 0], [3, 0], [0, 5], [39, 1]])  # a live row may hold an ignored label
    adjoint = adjoints_for(labels, ("logprobs",))
    lse = torch.logsumexp(hidden @ weight.t(), 1)
    out = head_dlogits(
        hidden, weight, labels, lse, d_logprobs=adjoint["logprobs"], ignore_index=0, tile=inputs.HEAD)  # fmt: skip
    gold = gradient(hidden.double() @ weight.double().t(), labels, Transform(), adjoint, ignore=0)
    assert_close(out, gold, floor=1e-5)


@pytest.mark.parametrize("strip", [32, 64, 1000])
def test_backward_through_a_strip_buffer(strip):
    hidden, weight = operands(20, 16, 100)
    labels = inputs.labels(20, 100)
    transform = inputs.transforms(20, 100)["all"]
    adjoints = adjoints_for(labels)
    leaves = [x.double().requires_grad_() for x in (hidden, weight, transform.bias)]
    values = stats(leaves[0] @ leaves[1].t(), labels, replace(transform, bias=leaves[2]))
    total = sum((values[name] * adjoint.double()).sum() for name, adjoint in adjoints.items())
    gold = torch.autograd.grad(total, leaves)
    lse, known = known_for(hidden, weight, labels, transform)
    given = {NAMES[name]: value for name, value in adjoints.items()}
    ours = head_backward(
        hidden, weight, labels, lse, transform, strip=strip, need_bias=True, tile=inputs.HEAD, **known, **given
    )
    for mine, wanted in zip(ours, gold, strict=True):
        assert mine.dtype == torch.float32
        assert_close(mine, wanted, floor=3e-5)


def test_only_the_gradients_needed():
    hidden, weight = operands(5, 16, 40)
    labels, lse = inputs.labels(5, 40), torch.zeros(5)
    d_hidden, d_weight, d_bias = head_backward(
        hidden, weight, labels, lse, strip=32, need_weight=False, tile=inputs.HEAD, d_lse=torch.ones(5))  # fmt: skip
    assert d_hidden is not None and d_weight is None and d_bias is None
