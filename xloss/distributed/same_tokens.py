"""Whether ranks that share one vocabulary have the same tokens: if not, every number would be wrong, and none odd.

An FSDP-sharded parameter looks like a vocabulary shard (a DTensor with ``Shard(0)``), and its ranks hold different
tokens. What was meant cannot be seen, so what is the case is checked, in each forward, by one collective of fixed size.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
import torch.distributed as dist
from torch import Tensor

from xloss.distributed.agree import digest
from xloss.distributed.groups import all_gather, all_gather_object
from xloss.errors import UnsupportedError

_CLOSE = 0.02  # of the hidden states' norm: far above rounding in bf16, far below other tokens
_SEEN: set[str] = set()  # groups that were compared on the host once


def check_same_tokens(
    group: dist.ProcessGroup, hidden: Tensor | None, labels: Tensor, live: Tensor, facts: Mapping[str, object]
) -> None:
    """Raise ``UnsupportedError`` on every rank unless all have these ``labels``, hidden states and ``facts``.

    ``hidden [T, H]`` is compared by a projection, at tokens that are ``live [T]``; ``None``: it was gathered, so it is
    the same. On CUDA the first call of a group waits for the device, and later ones leave the comparison to it (a
    mismatch is then a failed device assertion).
    """
    device = labels.device
    mine = torch.stack(
        [
            torch.full((), digest(sorted(facts.items())), dtype=torch.float64, device=device),
            labels_hash(labels),
            *_projection(hidden, live),
        ]
    )
    found = all_gather(mine, group)
    same = _same(found)
    if device.type == "cuda" and group.group_name in _SEEN:
        torch._assert_async(same.all(), f"ranks that share head_weight differ ({MISUSE})")
        return
    _SEEN.add(group.group_name)
    if bool(same.all()):
        return
    every = all_gather_object(dict(facts), group)
    told = {k: [f[k] for f in every] for k in every[0] if any(f.get(k) != every[0][k] for f in every)}
    what = [w for w, ok in zip(("calls", "labels", "hidden states"), same.tolist(), strict=True) if not ok]
    details = "; ".join(f"{name} by rank: {', '.join(map(str, values))}" for name, values in told.items())
    raise UnsupportedError(
        f"head_weight is shared by {dist.get_world_size(group)} ranks, by its placement, but their {', '.join(what)} "
        f"differ{f' ({details})' if details else ''}: {MISUSE}"
    )


MISUSE = (
    "ranks among which a head is split by rows, or replicated, must have the same tokens and make the same call. If "
    "the weight is FSDP's, whose ranks have tokens of their own, take it inside xloss.head_weight(module)"
)


def labels_hash(labels: Tensor) -> Tensor:
    """A number for the labels and their order, exact in float64."""
    flat = labels.reshape(-1)
    place = torch.arange(1, flat.numel() + 1, device=flat.device)
    return ((flat + 7) * (place * 2654435761 % 4294967291)).sum().remainder(1 << 52).double()


def _projection(hidden: Tensor | None, live: Tensor) -> list[Tensor]:
    """The live hidden states on a fixed direction, and their norm; what is not finite counts as 0."""
    if hidden is None or not hidden.numel():
        return [torch.zeros((), dtype=torch.float64, device=live.device)] * 2
    seen = hidden.detach()
    step = torch.arange(1, seen.shape[1] + 1, device=seen.device, dtype=torch.float64)
    along = (seen @ torch.cos(2.4 * step).to(seen.dtype)).double()
    wide = torch.promote_types(seen.dtype, torch.float32)
    size = torch.linalg.vector_norm(seen, dim=1, dtype=wide).double()
    weight = torch.cos(1.7 * torch.arange(seen.shape[0], device=seen.device, dtype=torch.float64))
    keep = live & along.isfinite() & size.isfinite()
    return [torch.where(keep, along * weight, 0).sum(), torch.where(keep, size, 0).square().sum().sqrt()]


def _same(found: Tensor) -> Tensor:
    """Whether all ranks made the same call, have the same labels, and the same hidden states."""
    exact = (found[:, :2] == found[:1, :2]).all(0)
    close = ((found[:, 2:] - found[:1, 2:]).abs() <= _CLOSE * found[:1, 3:] + 1e-30).all()
    return torch.stack([*exact, close])
