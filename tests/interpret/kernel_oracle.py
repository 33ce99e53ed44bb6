"""What the kernels must compute, in plain torch at any precision, with gradients from autograd."""

from __future__ import annotations

from dataclasses import replace

import torch

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
    """The built-in losses per token, from their papers, by autograd."""
    if spec.loss == "ce":
        return -lp
    ratio_log = lp - (lp.detach() if old is None else old)
    if spec.loss == "reinforce":
        return -advantages * lp
    if spec.loss == "importance_sampling":
        return -ratio_log.exp() * advantages
    if spec.loss == "dro":
        return -(advantages * lp - 0.5 * spec.beta * ratio_log**2)
    if spec.loss == "cispo":
        return -ratio_log.exp().clamp(spec.ratio_min, spec.ratio_max).detach() * advantages * lp
    assert spec.loss == "ppo"
    ratio = ratio_log.clamp(spec.log_ratio_min, spec.log_ratio_max).exp()
    value = torch.maximum(-ratio * advantages, -ratio.clamp(spec.ratio_min, spec.ratio_max) * advantages)
    if spec.dual_clip is not None:
        value = torch.where(advantages < 0, torch.minimum(-spec.dual_clip * advantages, value), value)
    return value


def kl_term(lp, ref, kind: str):
    x = lp - ref
    if kind == "k1":
        return x
    if kind == "abs":
        return x.abs()
    if kind == "k2":
        return 0.5 * x**2
    assert kind == "k3"
    c = (-x).clamp(-20.0, 20.0)
    return (torch.expm1(c) - c).clamp(-10.0, 10.0)


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
        loss = loss + kl_term(lp, given["ref_logprobs"], spec.kl) * given.get("kl_weight", one)
    aux = given.get("aux_weight", weight)
    loss = loss + aux * (spec.z_loss_coef * values["lse"] ** 2 - spec.entropy_coef * values["entropy"])
    return torch.where(labels != ignore, loss, torch.zeros_like(loss)), values


def assert_close(
    ours: torch.Tensor, gold: torch.Tensor, eager: torch.Tensor | None = None, *, floor: float = 2e-6
) -> None:
    """Within 4 x the error that eager torch makes in the working precision, or `floor` of gold's largest magnitude."""
    assert ours.shape == gold.shape
    error = (ours.double() - gold.double()).abs().max().item() if gold.numel() else 0.0
    own = (eager.double() - gold.double()).abs().max().item() if eager is not None and gold.numel() else 0.0
    scale = gold.abs().max().item() if gold.numel() else 1.0
    assert error <= max(4 * own, floor * max(scale, 1e-3)), f"error {error:.3e}, eager {own:.3e}, scale {scale:.3e}"
