"""Whether a gradient given to a head's weight arrives: reads of a sharded or replicated head that train on nothing.

Each of these gives a right loss and a wrong gradient, or none, without a word from torch. They are refused.
"""

from __future__ import annotations

import gc
import sys
import weakref
from collections.abc import Iterator
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn import Module
from torch.nn.parallel import DistributedDataParallel
from torch.utils.weak import WeakIdKeyDictionary

from xloss.errors import UnsupportedError

INSIDE = "run the loss inside the model's forward, within `with xloss.head_weight(self.lm_head) as head`"
_MOST_NODES = 64  # of the graph between a parameter and the weight made of it
_unit_of: Any = WeakIdKeyDictionary()  # gathered parameter -> unit of ``fully_shard`` that can gather it again
# Parameters that no DistributedDataParallel holds, and that are no shards: looking takes a while. A shard is a
# parameter that fully_shard made, so one that is none never becomes one.
_frozen: dict[str, Any] = {"count": 0, "modules": []}
_no_ddp: Any = WeakIdKeyDictionary()
_no_shard: Any = WeakIdKeyDictionary()


def check_gradient_route(tensor: Tensor | None, name: str, *, part: bool = False) -> None:
    """Raise ``UnsupportedError`` where a gradient of ``tensor`` would be lost, or be this rank's alone.

    Refused: a shard of FSDP; a tensor gathered by ``DTensor.full_tensor()`` or cut by ``to_local()`` whose backward
    would keep this rank's part; a parameter of ``DistributedDataParallel`` whose ``forward`` is not running. ``part``:
    ``tensor`` is said to be this rank's rows.
    """
    if not isinstance(tensor, Tensor):
        return
    if is_dtensor(tensor) and is_fsdp_shard(tensor):
        raise UnsupportedError(f"{name} is a shard of fully_shard's (a DTensor on its mesh); {INSIDE}")
    if not (torch.is_grad_enabled() and tensor.requires_grad):
        return
    for node in _nodes(tensor.grad_fn):
        _check_localised(node, name, part)
    if dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1 and not in_backward():
        for leaf in _leaves(tensor):
            _check_ddp(leaf, name)


def is_dtensor(tensor: Tensor) -> bool:
    """Whether ``tensor`` is a ``DTensor``, without importing them."""
    return hasattr(tensor, "device_mesh")


def is_fsdp2(module: Module) -> bool:
    """Whether ``fully_shard`` was applied to ``module`` itself."""
    fsdp = sys.modules.get("torch.distributed.fsdp")
    return fsdp is not None and isinstance(module, fsdp.FSDPModule)


def is_fsdp_shard(tensor: Tensor) -> bool:
    """Whether ``tensor`` is what ``fully_shard`` left of a parameter, and not a tensor-parallel one it gathered."""
    fsdp = sys.modules.get("torch.distributed.fsdp")
    if fsdp is None or tensor in _no_shard or not fsdp.FSDPModule.__subclasses__():
        return False
    for module in _modules_of(fsdp.FSDPModule):
        for group in fsdp_groups(module):
            for param in group.fsdp_params:
                if tensor is param.sharded_param or tensor is getattr(param, "_sharded_post_forward_param", None):
                    return True
    _no_shard[tensor] = True
    return False


def fsdp_groups(module: Module) -> list[Any]:
    """Parameter groups of a module that ``fully_shard`` was applied to."""
    state = module._get_fsdp_state()  # type: ignore[operator]
    if hasattr(state, "_fsdp_param_groups"):
        return list(state._fsdp_param_groups)
    return [] if state._fsdp_param_group is None else [state._fsdp_param_group]  # torch < 2.11


def gather(unit: Module) -> None:
    """All-gather the parameters of a unit of ``fully_shard``, and remember how for a backward that comes late."""
    unit.unshard()  # type: ignore[operator]
    for param in unit.parameters():
        _unit_of[param] = weakref.ref(unit)


def gather_again(tensor: Tensor) -> None:
    """Before a backward reads ``tensor``: gather it if an earlier backward let go of it.

    ``fully_shard`` does so at the end of each backward, also where the backward of a second loss is still to come.
    """
    unit = _unit_of.get(tensor)
    if unit is not None and tensor.untyped_storage().size() == 0:
        unit().unshard()


def in_backward() -> bool:
    """Whether autograd is running a backward now: activation checkpointing runs a forward again there."""
    return bool(torch._C._current_graph_task_id() != -1)


def _check_localised(node: Any, name: str, part: bool) -> None:
    """Refuse the backward of ``DTensor.to_local`` (a part of ``full_tensor``) that keeps this rank's gradient."""
    if not hasattr(node, "dtensor_spec"):
        return
    spec, given = node.dtensor_spec, node.grad_placements
    if spec.device_mesh.size() == 1:
        return
    sharded = any(is_fsdp_shard(leaf) for leaf in _leaves_of(node))
    if any(p.is_shard() for p in spec.placements):
        if part and not sharded:
            return
        raise UnsupportedError(
            f"{name} is one rank's part of a DTensor {tuple(spec.placements)}, made by to_local(); {INSIDE}, "
            "or give a vocabulary-parallel head as the DTensor it is"
        )
    if given is None or (sharded and not all(p.is_partial("avg") for p in given)):
        summed = given is not None and any(p.is_partial("sum") for p in given)
        wrong = "adds what fully_shard averages" if summed else "keeps the gradient of this rank's tokens alone"
        raise UnsupportedError(
            f"{name} was gathered by full_tensor(grad_placements={given}), whose backward {wrong}; {INSIDE}, or say "
            "what the ranks hold: full_tensor(grad_placements=[Partial('avg')]) for ranks of fully_shard, "
            "[Replicate()] for tensor-parallel ranks, which hold the same tokens"
        )


def _check_ddp(leaf: Tensor, name: str) -> None:
    if DistributedDataParallel._active_ddp_module is not None or leaf in _no_ddp:
        return
    holding = [m for m in _modules_of(DistributedDataParallel) if any(p is leaf for p in m.parameters())]
    if not holding:
        _no_ddp[leaf] = True
    for ddp in holding:
        own_hooks = ddp._use_python_reducer or ddp._delay_all_reduce_all_params  # these need no forward
        if ddp.require_backward_grad_sync and not own_hooks:
            raise UnsupportedError(
                f"{name} is a parameter of DistributedDataParallel, whose forward is not running: gradients would not "
                f"be reduced over the ranks, without an error; {INSIDE}, and call the DistributedDataParallel module"
            )


def _modules_of(kind: type) -> list[Any]:
    """Every module of a class that is alive."""
    kinds = _with_subclasses(kind)
    frozen = [x for x in _frozen_modules() if type(x) in kinds]
    return frozen + [x for x in _instances(kinds) if all(x is not other for other in frozen)]


def _with_subclasses(*kinds: type) -> list[type]:
    found = list(kinds)
    for each in found:
        found += each.__subclasses__()
    return found


def _instances(kinds: list[type]) -> list[Any]:
    """Each object refers to its class, and C finds who does; but for those that ``gc.freeze`` set aside."""
    return [x for x in gc.get_referrers(*kinds) if type(x) in kinds]


def _frozen_modules() -> list[Any]:
    """Modules that ``gc.freeze`` set aside, looked for where more is frozen than when last asked."""
    count = gc.get_freeze_count()
    if count > _frozen["count"]:
        fsdp = sys.modules.get("torch.distributed.fsdp")
        gc.unfreeze()
        kinds = _with_subclasses(DistributedDataParallel, *([] if fsdp is None else [fsdp.FSDPModule]))
        _frozen["modules"] = [weakref.ref(x) for x in _instances(kinds)]
        gc.freeze()
        count = gc.get_freeze_count()
    _frozen["count"] = count
    return [x for ref in _frozen["modules"] if (x := ref()) is not None]


def _nodes(first: Any) -> Iterator[Any]:
    """``first`` and the nodes of the graph before it, up to parameters, nearest first."""
    queue, seen = [first], set[Any]()
    while queue and len(seen) < _MOST_NODES:
        node = queue.pop(0)
        if node is None or node in seen:
            continue
        seen.add(node)
        yield node
        queue += [parent for parent, _ in node.next_functions]


def _leaves(tensor: Tensor) -> list[Tensor]:
    """Parameters that ``tensor`` was made from; itself if it is one."""
    return [tensor] if tensor.is_leaf else _leaves_of(tensor.grad_fn)


def _leaves_of(first: Any) -> list[Tensor]:
    return [node.variable for node in _nodes(first) if hasattr(node, "variable")]
