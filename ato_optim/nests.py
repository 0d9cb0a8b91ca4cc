"""Nests of tensors, what a model takes and what it returns: containers, and objects by their attributes."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from torch import Tensor, nn
from torch.utils import _pytree


def tensors_in(nest: Any, _seen: set[int] | None = None) -> Iterator[Tensor]:
    """The tensors in `nest`."""
    seen: set[int] = set() if _seen is None else _seen
    for leaf in _pytree.tree_leaves(nest):
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


def with_tensors(nest: Any, convert: Callable[[Tensor], Tensor]) -> Any:
    """A deepcopy of `nest` with what `convert` makes of each of its tensors.

    What refuses to be copied, a file say, stays as it is, and so do the tensors that it holds.
    """
    memo = {id(tensor): convert(tensor) for tensor in {id(tensor): tensor for tensor in tensors_in(nest)}.values()}
    try:
        return copy.deepcopy(nest, dict(memo))
    except Exception:
        return _pytree.tree_map(lambda leaf: memo.get(id(leaf), leaf), nest)


def fresh(nest: Any) -> Any:
    """A copy of `nest` that shares no memory with it. Its tensors are leaves, which want gradients if they did."""
    return with_tensors(nest, lambda tensor: tensor.detach().clone().requires_grad_(tensor.requires_grad))
