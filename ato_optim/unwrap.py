"""The network inside the wrappers that training puts around it, and the tensors that it returns."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch._dynamo.eval_frame import OptimizedModule
from torch.nn.parallel import DataParallel, DistributedDataParallel
from torch.optim.swa_utils import AveragedModel
from torch.utils import _pytree

from .sharding import mesh_groups


def wrappers(model: nn.Module) -> Iterator[nn.Module]:
    """`model` and what it wraps (DDP, DataParallel, AveragedModel, torch.compile), the bare module last."""
    while True:
        yield model
        if isinstance(model, (DistributedDataParallel, DataParallel, AveragedModel)):
            model = model.module
        elif isinstance(model, OptimizedModule):
            model = model._orig_mod
        else:
            return


def process_groups(model: nn.Module) -> list[Any]:
    """The groups of processes that train `model` together, as far as its wrappers and shards say."""
    wrapped = [wrapper.process_group for wrapper in wrappers(model) if isinstance(wrapper, DistributedDataParallel)]
    return wrapped + mesh_groups(model)


def unwrap(model: nn.Module) -> nn.Module:
    """The bare module of `model`."""
    *_, bare = wrappers(model)
    return bare


def uncompiled_call(model: nn.Module) -> nn.Module:
    """Where hooks that run Python go: the torch.compile wrapper in `model`, if any, whose graph they would break."""
    chain = list(wrappers(model))
    return next((module for module in chain if isinstance(module, OptimizedModule)), chain[-1])


def watch_wrapper(model: nn.Module) -> None:
    """Let training forwards of `model`, some parameters of which were replaced, raise in a wrapper that has the old."""
    unwatch_wrapper(model)
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        model.register_forward_pre_hook(_refuse_stale_wrapper)


def unwatch_wrapper(model: nn.Module) -> None:
    """Take back what watch_wrapper put on `model`, or on a model of which it is a copy."""
    for key, hook in list(model._forward_pre_hooks.items()):
        if hook is _refuse_stale_wrapper:
            del model._forward_pre_hooks[key]


@torch.compiler.disable
def _refuse_stale_wrapper(module: nn.Module, _: Any) -> None:
    if not module.training or not torch.is_grad_enabled():
        return
    for wrapper in (DistributedDataParallel._active_ddp_module, *wrappers(module)):
        if isinstance(wrapper, DistributedDataParallel) and not (
            set(wrapper._module_parameters) <= set(wrapper.module.parameters())
        ):
            raise RuntimeError(
                "model is wrapped in a DistributedDataParallel from before compress(), which would not average the "
                "gradients of the smaller parameters: wrap it again, model = DistributedDataParallel(model.module)"
            )


def tensors_in(output: Any, _seen: set[int] | None = None) -> Iterator[Tensor]:
    """The tensors in what a model returns: nests of containers, and objects by their attributes."""
    seen: set[int] = set() if _seen is None else _seen
    for leaf in _pytree.tree_leaves(output):
        if isinstance(leaf, Tensor):
            yield leaf
        elif id(leaf) not in seen:
            seen.add(id(leaf))
            yield from tensors_in(_parts(leaf), seen)


def _parts(leaf: Any) -> list[Any]:
    """What an object holds that pytree does not open: a dict's or list's subclass by its items, others by attribute."""
    if isinstance(leaf, Mapping):
        return list(leaf.values())
    if isinstance(leaf, (list, tuple)):
        return list(leaf)
    if isinstance(leaf, (type, nn.Module)):
        return []
    declared = [vars(cls).get("__slots__", ()) for cls in type(leaf).__mro__]
    slots = [slot for found in declared for slot in ([found] if isinstance(found, str) else found)]
    named = [getattr(leaf, slot) for slot in slots if not slot.startswith("__") and hasattr(leaf, slot)]
    return [*getattr(leaf, "__dict__", {}).values(), *named]
