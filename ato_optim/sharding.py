"""Models under fully_shard (FSDP2), of whose parameters each process holds a part: torch's DTensor does the arithmetic.

A masking and a pull multiply whole parameters by a vector over gates, gate gradients and norms are sums over entries.
With the vector the same on every rank, DTensor takes each rank's part of it and reduces the sums.
"""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule, FullyShardedDataParallel
from torch.distributed.tensor import DTensor, Replicate
from torch.utils import _pytree


def is_sharded(model: nn.Module) -> bool:
    """Whether fully_shard has split the parameters of `model`."""
    return isinstance(model, FSDPModule)


def check(model: nn.Module) -> None:
    """Raise ValueError unless the parameters of `model` are whole, or all split by fully_shard."""
    if any(isinstance(module, FullyShardedDataParallel) for module in model.modules()):
        raise ValueError(
            f"model ({type(model).__name__}) is split over processes by FullyShardedDataParallel, which keeps its "
            "parameters as one flat vector: use torch.distributed.fsdp.fully_shard"
        )
    split = {name for name, p in model.named_parameters() if isinstance(p, DTensor)}
    if not split and not any(isinstance(module, FSDPModule) for module in model.modules()):
        return
    whole = next((name for name, _ in model.named_parameters() if name not in split), None)
    if whole is not None or not is_sharded(model):
        raise ValueError(
            f"model ({type(model).__name__}) is split over processes in part, or by other means than fully_shard"
            f"{'' if whole is None else f': {whole} is whole'}; apply fully_shard to the model itself too, without "
            "ignored_params, and pass that"
        )


def mesh_groups(model: nn.Module) -> list[Any]:
    """The groups of processes that hold the shards of `model`, one a dimension of their mesh."""
    meshes = dict.fromkeys(p.device_mesh for p in model.parameters() if isinstance(p, DTensor))
    return [mesh.get_group(dim) for mesh in meshes for dim in range(mesh.ndim)]


def whole(tensor: Tensor) -> Tensor:
    """`tensor` itself, or what its shards on all ranks make up: a collective call."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def local(tensor: Tensor) -> Tensor:
    """`tensor` itself, or this rank's shard of it."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def like(tensor: Tensor, other: Tensor) -> Tensor:
    """`tensor`, which is the same on every rank, fit for arithmetic with `other`."""
    if not isinstance(other, DTensor):
        return tensor
    placements = [Replicate()] * other.device_mesh.ndim
    return DTensor.from_local(tensor, other.device_mesh, placements, run_check=False)


def reshard(model: nn.Module) -> None:
    """Drop the whole parameters that fully_shard keeps of `model` from forward to backward."""
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()


def cloned(output: Any) -> Any:
    """`output` with clones for its tensors: hooks on their gradients run before those that fully_shard put on it."""
    return _pytree.tree_map_only(Tensor, torch.clone, output)


def unsharded(model: nn.Module, memo: dict[int, Any]) -> dict[int, Any]:
    """`memo` for a deepcopy of `model` in which whole parameters and plain modules replace what fully_shard made.

    A collective call. The hooks of modules that fully_shard was applied to, which are its own, stay behind.
    """
    if not is_sharded(model):
        return memo
    reshard(model)
    for parameter in model.parameters():
        memo[id(parameter)] = nn.Parameter(whole(parameter.detach()).clone(), parameter.requires_grad)
    for module in reversed(list(model.modules())):  # children before those that hold them
        if isinstance(module, FSDPModule):
            plain = nn.Module()
            hooks = {key for key in vars(plain) if "hook" in key}
            kept = {k: v for k, v in vars(module).items() if k not in hooks and not k.startswith("__composable_api")}
            plain.__class__ = type(module).__mro__[2]  # after FSDP<class> and FSDPModule: the class itself
            memo[id(module)] = plain
            vars(plain).update(copy.deepcopy(kept, memo))
    return memo
