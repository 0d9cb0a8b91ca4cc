"""The network inside the wrappers that training puts around it."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import nn
from torch._dynamo.eval_frame import OptimizedModule
from torch.nn.parallel import DataParallel, DistributedDataParallel
from torch.optim.swa_utils import AveragedModel

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
