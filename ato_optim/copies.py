"""Copies of a network: whole, without data, or with the same parameters."""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import partial
from types import CellType, FunctionType, MethodType
from typing import Any, TypeVar
from unittest import mock

from torch import Tensor, nn

from .sharding import is_sharded, unsharded
from .threads import one_at_a_time

Model = TypeVar("Model", bound=nn.Module)


@one_at_a_time
def copy_model(model: Model, convert: Callable[[Tensor], Tensor] | None = None) -> Model:
    """A deepcopy of `model`, whole where fully_shard has split it.

    Every parameter and buffer is what `convert` makes of it, default: a clone.

    Activations, which torch refuses to copy, are detached, wherever a module or one of its hooks keeps them.

    Raises ValueError if something that the model holds refuses.
    """
    if convert is not None and is_sharded(model):
        return copy_model(copy_model(model), convert)
    memo: dict[int, Any] = {}
    if convert is not None:
        for parameter in model.parameters():
            converted = convert(parameter)
            same = converted is parameter
            memo[id(parameter)] = parameter if same else nn.Parameter(converted.detach(), parameter.requires_grad)
        memo |= {id(buffer): convert(buffer) for buffer in model.buffers()}
    deepcopy = Tensor.__deepcopy__

    def detached(tensor: Tensor, memo: dict[int, Any]) -> Any:
        return deepcopy(tensor, memo) if tensor.is_leaf else tensor.detach()

    memo = unsharded(model, memo)
    try:
        with mock.patch.object(Tensor, "__deepcopy__", detached):
            copied = copy.deepcopy(model, memo)
    except Exception as error:
        raise ValueError(
            f"model ({type(model).__name__}) cannot be copied ({type(error).__name__}: {error}): ATO tries its cuts on "
            "copies. Keep locks, files and generators outside of modules, or give what holds them a __deepcopy__"
        ) from error
    _follow(copied, memo)
    return copied


def skeleton(model: Model) -> Model:
    """A copy of `model` without data, on the meta device."""
    return copy_model(model, lambda tensor: tensor.to("meta"))


def sharing_copy(model: Model) -> Model:
    """A copy of `model` that shares its parameters and has buffers of its own."""
    return copy_model(model, lambda tensor: tensor if isinstance(tensor, nn.Parameter) else tensor.clone())


def _follow(model: nn.Module, memo: dict[int, Any]) -> None:
    """Let functions that the copy `model` holds, its hooks above all, refer to what was copied with it.

    deepcopy takes functions for constants: a hook that keeps a feature in a dict of the model, which it knows by its
    closure, would write into the original's, and the copy would read what is old, or nothing.

    Args:
        memo: deepcopy's, id of an original -> its copy.
    """
    for module in model.modules():
        own = vars(module)
        hooks = [table for name, table in own.items() if name.endswith("_hooks") and isinstance(table, dict)]
        for table in (own, *hooks):
            for key, value in table.items():
                if isinstance(value, (FunctionType, partial)):
                    table[key] = _rebound(value, memo)


def _rebound(value: Any, memo: dict[int, Any]) -> Any:
    """What stands for `value` in a copy: itself, if it refers to nothing that was copied."""
    if id(value) in memo:
        return memo[id(value)]
    if isinstance(value, MethodType):
        owner = _rebound(value.__self__, memo)
        return value if owner is value.__self__ else MethodType(value.__func__, owner)
    if isinstance(value, partial):
        function = _rebound(value.func, memo)
        return value if function is value.func else partial(function, *value.args, **value.keywords)
    return _rebound_function(value, memo) if isinstance(value, FunctionType) else value


def _rebound_function(function: FunctionType, memo: dict[int, Any]) -> FunctionType:
    """One with the same code, whose closure, defaults and globals are the copy's."""
    memo[id(function)] = function  # while its closure is looked at, which may hold itself
    old = (*(function.__closure__ or ()), *(function.__defaults__ or ()))
    new = tuple(_rebound_cell(one, memo) if isinstance(one, CellType) else _rebound(one, memo) for one in old)
    used = {name: function.__globals__[name] for name in function.__code__.co_names if name in function.__globals__}
    other = {name: memo[id(value)] for name, value in used.items() if id(value) in memo}
    if other or any(one is not before for one, before in zip(new, old, strict=True)):
        variables = {**function.__globals__, **other} if other else function.__globals__
        cells = len(function.__closure__ or ())
        made = FunctionType(function.__code__, variables, function.__name__, new[cells:], new[:cells])
        made.__kwdefaults__ = function.__kwdefaults__
        made.__dict__.update(function.__dict__)
        memo[id(function)] = made
    found: FunctionType = memo[id(function)]
    return found


def _rebound_cell(cell: CellType, memo: dict[int, Any]) -> CellType:
    """A variable of a closure: one for all functions that share it."""
    if id(cell) not in memo:
        try:
            content = cell.cell_contents
        except ValueError:  # there is nothing in it yet
            return cell
        new = _rebound(content, memo)
        memo[id(cell)] = cell if new is content else CellType(new)
    found: CellType = memo[id(cell)]
    return found
