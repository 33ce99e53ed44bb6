"""policy_rows: loss, statistics and dlogits of every loss and option against float64 autograd."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from tests import budgets
from tests.interpret import kernel_inputs as inputs
from tests.interpret.kernel_oracle import assert_close, policy_loss
from xloss_kernels.policy_rows import PolicySpec, policy_rows
from xloss_kernels.row_stats import row_stats
from xloss_kernels.transform import Transform

ROWS = 8
LOSSES = ("ce", "reinforce", "importance_sampling", "dro", "cispo", "ppo")


def vectors_for(raw, labels, transform, loss, rows=ROWS):
    """Random weights, advantages, and old and reference log-probs around the current ones, some far enough to clip."""
    lp = row_stats(raw, labels, transform, tile=inputs.ROW).logprobs
    vectors = {
        "weight": inputs.vector(rows, 1, positive=True),
        "advantages": inputs.vector(rows, 2),
        "old_logprobs": lp + 0.4 * inputs.vector(rows, 3),
        "ref_logprobs": lp + inputs.vector(rows, 4),
        "kl_weight": inputs.vector(rows, 5, positive=True),
    }
    if loss == "ce":
        del vectors["advantages"], vectors["old_logprobs"]
    return vectors


def check(raw, labels, spec, transform=None, drop=(), extra=None, out=None, tile=inputs.ROW, floor=budgets.KERNEL_LOSS):
    transform = transform or Transform()
    vectors = vectors_for(raw, labels, transform, spec.loss, len(labels))
    vectors = {name: value for name, value in {**vectors, **(extra or {})}.items() if name not in drop}
    results = []
    for dtype in (torch.float64, torch.float32):
        leaf = raw.detach().to(dtype).requires_grad_()
        loss, values = policy_loss(leaf, labels, spec, transform, vectors)
        results.append((torch.autograd.grad(loss.sum(), leaf)[0], loss.detach(), values))
    (gold_grad, gold_loss, gold), (eager_grad, eager_loss, eager) = results
    target = torch.full(raw.shape, float("nan")) if out is None else out
    ours = policy_rows(raw, labels, spec, transform, **vectors, out=target, entropy=True, tile=tile)
    assert_close(ours.loss, gold_loss, eager_loss, floor=floor)
    for name in ("logprobs", "lse", "entropy"):
        assert_close(getattr(ours, name), gold[name].detach(), eager[name].detach(), floor=floor)
    if out is None:
        assert_close(target, gold_grad, eager_grad, floor=floor)
    return ours, target, gold_grad, vectors


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("vocab", [1, 33, 100])
def test_every_loss(loss, vocab):
    check(inputs.logits("plain", ROWS, vocab), inputs.labels(ROWS, vocab), PolicySpec(loss))


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("kl", ["k1", "abs", "k2", "k3"])
def test_kl_entropy_and_z(loss, kl):
    spec = PolicySpec(loss, kl=kl, entropy_coef=0.3, z_loss_coef=0.01)
    check(inputs.logits("plain", ROWS, 77), inputs.labels(ROWS, 77), spec)


@pytest.mark.parametrize("temper", inputs.TEMPERS)
def test_every_temper(temper):
    raw = inputs.logits(temper, ROWS, 77)
    size = 0.0 if temper in ("plain", "equal") else float(raw.abs().max())
    floor = budgets.kernel_logits(budgets.KERNEL_LOSS, size)
    check(raw, inputs.labels(ROWS, 77), PolicySpec("ppo", entropy_coef=0.1), floor=floor)


@pytest.mark.parametrize("name", inputs.TRANSFORMS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_every_transform_on_strided_rows(name, dtype):
    raw = inputs.strided(inputs.logits("plain", ROWS, 77, dtype))
    spec = PolicySpec("ppo", kl="k3", entropy_coef=0.1, z_loss_coef=1e-3)
    floor = budgets.KERNEL_SHARP if name in ("all", "row temperature") else budgets.KERNEL_LOSS
    check(raw, inputs.labels(ROWS, 77), spec, inputs.transforms(ROWS, 77)[name], floor=floor)


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize(
    "drop", [("weight",), ("old_logprobs",), ("kl_weight",), ("weight", "old_logprobs", "kl_weight")]
)
def test_absent_vectors(loss, drop):
    ours, _, _, _ = check(
        inputs.logits("plain", ROWS, 50), inputs.labels(ROWS, 50), PolicySpec(loss, kl="k3"), drop=drop
    )
    if "old_logprobs" in drop:
        assert (ours.log_ratio == 0).all()


def test_aux_weight_is_its_own():
    extra = {"aux_weight": inputs.vector(ROWS, 6, positive=True)}
    spec = PolicySpec("reinforce", entropy_coef=0.3, z_loss_coef=0.01)
    check(inputs.logits("plain", ROWS, 50), inputs.labels(ROWS, 50), spec, extra=extra)


def test_label_smoothing():
    spec = PolicySpec("ce", label_smoothing=0.1, z_loss_coef=0.01)
    raw, labels = inputs.logits("plain", ROWS, 50), inputs.labels(ROWS, 50)
    check(raw, labels, spec)
    ours = policy_rows(raw, labels, PolicySpec("ce", label_smoothing=0.1), with_grad=False, tile=inputs.ROW)
    wanted = torch.nn.functional.cross_entropy(raw, labels, reduction="none", label_smoothing=0.1)
    torch.testing.assert_close(ours.loss, wanted, **budgets.KERNEL_FORMULA)


@pytest.mark.parametrize("wanted", ["entropy", "mean_logit", "sum_p2", "top1"])
@pytest.mark.parametrize("vocab", [1, 33, 100])
def test_statistics_on_request(vocab, wanted):
    """Bit for bit what row_stats makes of the same rows, each alone and with no change to the rest."""
    raw, labels = inputs.logits("plain", ROWS, vocab), inputs.labels(ROWS, vocab)
    labels[2] = -100
    transform = inputs.transforms(ROWS, vocab)["all"]
    known = row_stats(raw, labels, transform, **{wanted: True}, tile=inputs.ROW)
    spec = PolicySpec("ce", label_smoothing=0.1)
    plain = policy_rows(raw, labels, spec, transform, with_grad=False, tile=inputs.ROW)
    ours = policy_rows(raw, labels, spec, transform, with_grad=False, **{wanted: True}, tile=inputs.ROW)
    for name in ("entropy", "mean_logit", "sum_p2", "top1"):
        assert getattr(plain, name) is None
        if name != wanted:
            assert getattr(ours, name) is None
    found = getattr(ours, wanted)
    assert found.dtype == getattr(known, wanted).dtype and torch.equal(found, getattr(known, wanted))
    assert torch.equal(ours.loss, plain.loss) and torch.equal(ours.lse, known.lse)
    assert found[2] == (-1 if wanted == "top1" else 0)


@pytest.mark.parametrize("dual", [None, 1.5])
@pytest.mark.parametrize("limits", [(-20.0, 20.0), (-0.3, 0.3)])
def test_dual_clip_and_log_ratio_limits(dual, limits):
    spec = PolicySpec("ppo", 0.9, 1.1, dual, *limits)
    advantages = torch.tensor([2.0, -2.0, 1.0, -1.0, 1.0, -1.0, -1.0, -0.5])
    raw, labels = inputs.logits("plain", ROWS, 50), torch.arange(ROWS)
    lp = row_stats(raw, labels, tile=inputs.ROW).logprobs
    shift = torch.tensor([0.2, 0.2, -0.2, -0.2, 0.6, 0.6, -0.6, 1.5])
    ours, grad, _, _ = check(raw, labels, spec, extra={"advantages": advantages, "old_logprobs": lp - shift})
    torch.testing.assert_close(ours.log_ratio, shift, **budgets.KERNEL_SHIFT)
    assert ours.clipped_high.tolist() == [True, False, False, False, True, False, False, False]
    assert ours.clipped_low.tolist() == [False, False, False, True, False, False, True, False]
    assert (grad[0] == 0).all() and (grad[3] == 0).all()  # clipped rows


@pytest.mark.parametrize("grad", ["straight_through", "unbiased", "score_function"])
def test_kl_gradients(grad):
    spec = PolicySpec("ppo", delta=1.4, kl="k3", kl_grad=grad, kl_clamp_in=1.5, kl_clamp_out=2.0)
    check(inputs.logits("plain", ROWS, 50), inputs.labels(ROWS, 50), spec)


def test_in_place_equals_out_of_place():
    raw, labels = inputs.strided(inputs.logits("plain", ROWS, 77)), inputs.labels(ROWS, 77)
    _, target, _, vectors = check(raw, labels, PolicySpec("cispo"))
    again = policy_rows(raw, labels, PolicySpec("cispo"), **vectors, tile=inputs.ROW)
    assert torch.equal(raw, target) and again.entropy is None


@pytest.mark.parametrize("vocab", [20, 32, 77, 128])
def test_overlay_equals_out_of_place(vocab):
    raw, labels = inputs.logits("plain", ROWS, vocab), inputs.labels(ROWS, vocab)
    separate = torch.full(raw.shape, float("nan"), dtype=torch.float16)
    spec = PolicySpec("ppo", entropy_coef=0.1)
    _, _, gold, vectors = check(raw, labels, spec, out=separate)
    assert_close(separate, gold, floor=budgets.KERNEL_HALF)
    overlay = raw.view(torch.float16)[:, :vocab]
    policy_rows(raw, labels, spec, **vectors, out=overlay, tile=inputs.ROW)
    assert torch.equal(overlay, separate)


def test_grad_scale_scales_dlogits_alone():
    raw, labels = inputs.logits("plain", ROWS, 50), inputs.labels(ROWS, 50)
    spec = PolicySpec("ppo", kl="k2", entropy_coef=0.1, z_loss_coef=0.1)
    ours, target, _, vectors = check(raw, labels, spec)
    scaled = torch.empty_like(target)
    again = policy_rows(raw, labels, spec, **vectors, grad_scale=torch.tensor(4.0), out=scaled, tile=inputs.ROW)
    assert torch.equal(ours.loss, again.loss) and torch.equal(scaled, 4.0 * target)


def test_without_gradient_the_logits_stay():
    raw, labels = inputs.logits("plain", ROWS, 50), inputs.labels(ROWS, 50)
    before = raw.clone()
    ours = policy_rows(raw, labels, PolicySpec("ce"), with_grad=False, tile=inputs.ROW)
    assert torch.equal(raw, before)
    with_grad = policy_rows(raw, labels, PolicySpec("ce"), tile=inputs.ROW)
    assert torch.equal(ours.loss, with_grad.loss) and not torch.equal(raw, before)


def test_all_ignored_zero_weight_and_no_rows():
    raw = inputs.logits("plain", 3, 50)
    labels = torch.tensor([-100, 4, -100])
    ours = policy_rows(raw, labels, PolicySpec("ce"), weight=torch.zeros(3), entropy=True, tile=inputs.ROW)
    assert (raw == 0).all() and (ours.loss == 0).all()
    assert (ours.lse[[0, 2]] == 0).all() and ours.lse[1] != 0 and ours.entropy[1] != 0
    assert ours.clipped_low.dtype == torch.bool
    empty = policy_rows(torch.zeros(0, 5), torch.zeros(0, dtype=torch.int64), PolicySpec("ce"))
    assert empty.loss.shape == (0,)


def test_same_as_statistics_then_dlogits():
    """One pass and two passes agree: the kernels share one softmax and one gradient."""
    from xloss_kernels.dlogits import dlogits

    raw, labels = inputs.logits("plain", ROWS, 77), inputs.labels(ROWS, 77)
    _, target, _, vectors = check(raw, labels, PolicySpec("reinforce", entropy_coef=0.2))
    known = row_stats(raw, labels, entropy=True, tile=inputs.ROW)
    weight = vectors["weight"]
    two = dlogits(raw, labels, known.lse, entropy=known.entropy, d_logprobs=-weight * vectors["advantages"],
                  d_entropy=-0.2 * weight, tile=inputs.ROW)  # fmt: skip
    torch.testing.assert_close(two, target, **budgets.KERNEL_SAME)


@pytest.mark.parametrize(
    "spec,message",
    [(PolicySpec("ppo"), "advantages"), (PolicySpec("ce", kl="k1"), "ref_logprobs"),
     (replace(PolicySpec("ppo"), label_smoothing=0.1), "needs|smoothing")],
)  # fmt: skip
def test_launcher_refuses(spec, message):
    with pytest.raises(AssertionError, match=message):
        policy_rows(torch.zeros(2, 4), torch.tensor([0, 1]), spec)
