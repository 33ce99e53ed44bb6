"""head_dlogits against float64 autograd through the whole head."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from tests import budgets
from tests.interpret import kernel_inputs as inputs
from tests.interpret.kernel_oracle import assert_close, gradient
from tests.interpret.test_kernel_dlogits import NAMES, adjoints_for
from tests.interpret.test_kernel_head_forward import operands
from xloss_kernels import head_backward
from xloss_kernels.head_backward import head_dlogits
from xloss_kernels.row_stats import row_stats
from xloss_kernels.transform import Transform


def known_for(hidden, weight, labels, transform):
    values = row_stats(hidden.float() @ weight.float().t(), labels, transform, entropy=True, sum_p2=True)
    lse = values.lse.clone()
    lse[labels.reshape(len(labels), -1).eq(inputs.IGNORE).all(1)] = -1e4  # dead rows use nothing
    return lse, {"entropy": values.entropy, "sum_p2": values.sum_p2}


def check(
    hidden, weight, labels, transform=None, tile=inputs.HEAD, names=tuple(NAMES), floor=budgets.KERNEL_HEAD_GRADIENT
):
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
    check(
        hidden,
        weight,
        inputs.labels(20, 77),
        inputs.transforms(20, 77)[name],
        floor=budgets.KERNEL_HEAD_GRADIENT_TRANSFORMED,
    )


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
    assert_close(out, gold, floor=budgets.KERNEL_HEAD_GRADIENT)


@pytest.mark.parametrize("strip", [32, 64, 1000])
def test_strips_put_together_are_the_whole(strip):
    hidden, weight = operands(20, 16, 100)
    labels = inputs.labels(20, 100)
    transform = inputs.transforms(20, 100)["all"]
    adjoints = adjoints_for(labels)
    gold = gradient(hidden.double() @ weight.double().t(), labels, transform, adjoints)
    lse, known = known_for(hidden, weight, labels, transform)
    given = {NAMES[name]: value for name, value in adjoints.items()}
    out = torch.full((20, 128), float("nan"))
    for first in range(0, 100, strip):
        part = slice(first, min(first + strip, 100))
        head_dlogits(
            hidden, weight[part], labels, lse, replace(transform, bias=transform.bias[part]), **known, **given,
            first_column=first, whole_vocab=100, out=out[:, part], tile=inputs.HEAD)  # fmt: skip
    assert_close(out[:, :100], gold, floor=budgets.KERNEL_HEAD_GRADIENT_TRANSFORMED)
    assert out[:, 100:].isnan().all()


def test_tiles_with_nothing_to_pass_back_are_zeros_without_a_product(monkeypatch):
    """40 rows in tiles of 16, the first 18 with an adjoint: two token tiles of three are computed, dead or not."""
    products = []
    product = head_backward.logits_tile

    def counted(*args):
        products.append(args)
        return product(*args)

    monkeypatch.setattr(head_backward, "logits_tile", counted)
    hidden, weight = operands(40, 16, 100)
    labels = inputs.labels(40, 100)
    hidden[18:] = float("nan")  # not even read into the result of a tile that is computed
    for name in NAMES:
        adjoints = {name: adjoints_for(labels, (name,))[name]}
        adjoints[name][18:] = 0
        lse, known = known_for(hidden, weight, labels, Transform())
        gold = gradient(hidden[:18].double() @ weight.double().t(), labels[:18], Transform(),
                        {name: adjoints[name][:18]})  # fmt: skip
        products.clear()
        given = {NAMES[name]: adjoints[name]}
        out = head_dlogits(hidden, weight, labels, lse, **known, **given, tile=inputs.HEAD, num_programs=3)
        assert len(products) == 2 * 7
        assert (out[18:] == 0).all()
        assert_close(out[:18], gold, floor=budgets.KERNEL_HEAD_GRADIENT)


def test_ignored_tiles_are_zeros_whatever_their_adjoints():
    hidden, weight = operands(20, 16, 40)
    labels = torch.full((20,), inputs.IGNORE)
    out = head_dlogits(hidden, weight, labels, torch.zeros(20), d_lse=torch.ones(20), tile=inputs.HEAD)
    assert (out == 0).all()


def test_a_nan_adjoint_is_not_taken_for_nothing():
    hidden, weight = operands(3, 16, 40)
    adjoint = torch.tensor([0.0, float("nan"), 0.0])
    out = head_dlogits(hidden, weight, torch.tensor([0, 1, 2]), torch.zeros(3), d_entropy=adjoint,
                       entropy=torch.zeros(3), tile=inputs.HEAD)  # fmt: skip
    assert out[1].isnan().all() and (out[0] == 0).all()
