"""What the kernels must compute, in plain torch at any precision, with gradients from autograd."""

from __future__ import annotations

from dataclasses import replace

import torch

from tests import budgets
from xloss.policy import surrogate
from xloss.policy.kl import kl_penalty
from xloss_kernels.policy_rows import PolicySpec
from xloss_kernels.transform import Transform

IGNORE = -100


def at_precision(transform: Transform, dtype: torch.dtype) -> Transform:
    def cast(x):
        return x.to(dtype) if isinstance(x, torch.Tensor) else x

    return replace(transform, temperature=cast(transform.temperature), bias=cast(transform.bias))


def effective(raw: torch.Tensor, transform: Transform) -> torch.Tensor:
    transform = at_precision(transform, raw.dtype)
    z = raw if transform.bias is None else raw + transform.bias
    z = z * transform.logit_scale
    if transform.softcap is not None:
        z = transform.softcap * torch.tanh(z / transform.softcap)
    temperature = transform.temperature
    return z / (temperature[:, None] if isinstance(temperature, torch.Tensor) else temperature)


def stats(
    raw: torch.Tensor, labels: torch.Tensor, transform: Transform, ignore: int = IGNORE
) -> dict[str, torch.Tensor]:
    """Every statistic of row_stats, differentiable in `raw`, in raw's precision."""
    z = effective(raw, transform)
    lse = torch.logsumexp(z, 1)
    logp = z - lse[:, None]
    p = logp.exp()
    ids = labels.reshape(len(labels), -1)
    counted = ids != ignore
    live = counted.any(1)
    picked = logp.gather(1, ids.clamp(0, raw.shape[1] - 1))
    zero = torch.zeros((), dtype=raw.dtype)
    floor = torch.where(p > 0, logp, zero)
    return {
        "lse": torch.where(live, lse, zero),
        "logprobs": torch.where(counted, picked, zero).reshape(labels.shape),
        "entropy": torch.where(live, -(p * floor).sum(1), zero),
        "mean_logit": torch.where(live, z.mean(1), zero),
        "sum_p2": torch.where(live, (p * p).sum(1), zero),
        "top1": torch.where(live, z.detach().argmax(1), -1),
    }


def gradient(raw, labels, transform, adjoints: dict[str, torch.Tensor], dtype=torch.float64, ignore: int = IGNORE):
    """d(sum of adjoint * statistic)/d raw."""
    leaf = raw.detach().to(dtype).requires_grad_()
    values = stats(leaf, labels, transform, ignore)
    total = sum((values[name] * adjoint.to(dtype)).sum() for name, adjoint in adjoints.items())
    return torch.autograd.grad(total, leaf)[0]


def policy_term(lp, spec: PolicySpec, advantages, old):
    """The torch formula that the kernel's is the twin of, from ``xloss.policy``."""
    if spec.loss == "ce":
        return -lp
    old = lp.detach() if old is None else old
    if spec.loss == "reinforce":
        return surrogate.reinforce(lp, advantages)
    if spec.loss == "importance_sampling":
        return surrogate.importance_sampling(lp, old, advantages, log_ratio_clamp=spec.log_ratio_max)
    if spec.loss == "dro":
        return surrogate.dro(lp, old, advantages, beta=spec.beta)
    if spec.loss == "cispo":
        low, high = spec.ratio_min, spec.ratio_max
        return surrogate.cispo(
            lp,
            old,
            advantages,
            clip_low_threshold=low,
            clip_high_threshold=high,
            log_ratio_clamp=spec.log_ratio_max,
        )
    assert spec.loss == "ppo"
    return surrogate.ppo_clip(
        lp,
        old,
        advantages,
        cliprange_low=1 - spec.ratio_min,
        cliprange_high=spec.ratio_max - 1,
        clip_ratio_c=spec.dual_clip,
        delta=spec.delta,
        log_prob_diff_min=spec.log_ratio_min,
        log_prob_diff_max=spec.log_ratio_max,
    )


def kl_term(lp, ref, old, spec: PolicySpec):
    """The torch penalty that the kernel's is the twin of."""
    return kl_penalty(
        lp,
        ref,
        spec.kl,
        grad=spec.kl_grad,
        log_ratio=lp - (lp.detach() if old is None else old),
        clamp_in=spec.kl_clamp_in,
        clamp_out=spec.kl_clamp_out,
    )


def policy_loss(
    raw, labels, spec: PolicySpec, transform: Transform, vectors: dict[str, torch.Tensor], ignore: int = IGNORE
):
    """Weighted loss per row (0 on ignored rows), differentiable in raw, and the statistics."""
    given = {name: value.to(raw.dtype) for name, value in vectors.items()}
    values = stats(raw, labels, transform, ignore)
    lp = values["logprobs"]
    one = torch.ones_like(lp)
    weight = given.get("weight", one)
    loss = policy_term(lp, spec, given.get("advantages", one), given.get("old_logprobs"))
    if spec.label_smoothing:
        loss = (1 - spec.label_smoothing) * loss + spec.label_smoothing * (values["lse"] - values["mean_logit"])
    loss = loss * weight
    if spec.kl is not None:
        loss = loss + kl_term(lp, given["ref_logprobs"], given.get("old_logprobs"), spec) * given.get("kl_weight", one)
    aux = given.get("aux_weight", weight)
    loss = loss + aux * (spec.z_loss_coef * values["lse"] ** 2 - spec.entropy_coef * values["entropy"])
    return torch.where(labels != ignore, loss, torch.zeros_like(loss)), values


def assert_close(
    ours: torch.Tensor, gold: torch.Tensor, eager: torch.Tensor | None = None, *, floor: float = budgets.KERNEL_ROWS
) -> None:
    """Within a few times the error of eager torch in the working precision, or `floor` of gold's largest magnitude."""
    assert ours.shape == gold.shape
    error = (ours.double() - gold.double()).abs().max().item() if gold.numel() else 0.0
    own = (eager.double() - gold.double()).abs().max().item() if eager is not None and gold.numel() else 0.0
    scale = gold.abs().max().item() if gold.numel() else 1.0
    allowed = max(budgets.KERNEL_EAGER_FACTOR * own, floor * max(scale, budgets.KERNEL_LEAST_SCALE))
    assert error <= allowed, f"error {error:.3e}, eager {own:.3e}, scale {scale:.3e}"
