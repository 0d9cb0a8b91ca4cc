"""Copies of a network: whole, without data, or with the same parameters."""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import WRAPPER_ASSIGNMENTS, partial
from types import BuiltinMethodType, CellType, FunctionType, MethodType
from typing import Any, TypeVar
from unittest import mock
from weakref import ref

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
    _follow(copied, model, memo)
    return copied


def skeleton(model: Model) -> Model:
    """A copy of `model` without data, on the meta device."""
    return copy_model(model, lambda tensor: tensor.to("meta"))


def sharing_copy(model: Model) -> Model:
    """A copy of `model` that shares its parameters and has buffers of its own."""
    return copy_model(model, lambda tensor: tensor if isinstance(tensor, nn.Parameter) else tensor.clone())


def _follow(copied: nn.Module, original: nn.Module, memo: dict[int, Any]) -> None:
    """Let functions that `copied` holds, its hooks above all, refer to what was copied with it.

    deepcopy takes functions for constants: a hook that keeps a feature in a dict of the model, which it knows by its
    closure, would write into the original's, and the copy would read what is old, or nothing. Functions that share a
    variable share it in the copy; those that can be imported by name stay, for pickle knows them by it.

    Args:
        memo: deepcopy's, id of an original -> its copy; it gets the functions, too.
    """
    shared = set(original.modules())
    tables = [
        table
        for module in copied.modules()
        if module not in shared
        for name, table in (("", vars(module)), *vars(module).items())
        if not name or (name.endswith("_hooks") and isinstance(table, dict))
    ]
    places = [(table, key) for table in tables for key in table if isinstance(table[key], (FunctionType, partial))]
    waiting: dict[int, FunctionType] = {}
    for table, key in places:
        _collect(table[key], waiting)
    cells: dict[int, tuple[CellType, CellType]] = {}
    made: list[tuple[FunctionType, FunctionType]] = []
    while moved := [one for one in waiting.values() if _refers(one, memo, cells)]:
        for function in moved:
            for cell in function.__closure__ or ():
                cells.setdefault(id(cell), (cell, CellType()))
            memo[id(function)] = _remade(waiting.pop(id(function)), memo, cells)
            made.append((function, memo[id(function)]))
    for cell, variable in cells.values():
        for content in _contents(cell):
            variable.cell_contents = _stand_in(content, memo)
    for function, new in made:
        new.__defaults__ = function.__defaults__ and tuple(_stand_in(one, memo) for one in function.__defaults__)
        options = (function.__kwdefaults__ or {}).items()
        new.__kwdefaults__ = {name: _stand_in(one, memo) for name, one in options} or None
    for table, key in places:
        table[key] = _stand_in(table[key], memo)


def _collect(value: Any, found: dict[int, FunctionType]) -> None:
    """Put functions that cannot be imported by name into `found`: `value`, and what it calls by closure."""
    if isinstance(value, partial):
        _collect(value.func, found)
    elif isinstance(value, FunctionType) and "<" in value.__qualname__ and id(value) not in found:
        found[id(value)] = value
        for one in _known_to(value):
            _collect(one, found)


def _contents(cell: CellType) -> list[Any]:
    """What is in a variable of a closure: nothing, as long as it is not assigned."""
    try:
        return [cell.cell_contents]
    except ValueError:
        return []


def _globals_of(function: FunctionType) -> dict[str, Any]:
    """The globals that `function` names."""
    known = function.__globals__
    return {name: known[name] for name in function.__code__.co_names if name in known}


def _known_to(function: FunctionType) -> list[Any]:
    """What `function` refers to: in its closure, as defaults, and among globals."""
    closed = [content for cell in function.__closure__ or () for content in _contents(cell)]
    defaults = [*(function.__defaults__ or ()), *(function.__kwdefaults__ or {}).values()]
    return [*closed, *defaults, *_globals_of(function).values()]


def _refers(function: FunctionType, memo: dict[int, Any], cells: dict[int, Any]) -> bool:
    """Whether `function` refers to anything in `memo`, or shares a variable with another that does."""
    shares = any(id(cell) in cells for cell in function.__closure__ or ())
    return shares or any(_stand_in(one, memo) is not one for one in _known_to(function))


def _remade(function: FunctionType, memo: dict[int, Any], cells: dict[int, tuple[CellType, CellType]]) -> FunctionType:
    """A function with the same code and other variables, which are still empty."""
    other = {name: memo[id(one)] for name, one in _globals_of(function).items() if id(one) in memo}
    variables = {**function.__globals__, **other} if other else function.__globals__
    closure = tuple(cells[id(cell)][1] for cell in function.__closure__ or ())
    new = FunctionType(function.__code__, variables, function.__name__, None, closure)
    for name in WRAPPER_ASSIGNMENTS:
        setattr(new, name, getattr(function, name))
    vars(new).update(vars(function))
    return new


def _stand_in(value: Any, memo: dict[int, Any]) -> Any:
    """What stands for `value` in a copy: itself, if it refers to nothing in `memo`."""
    if id(value) in memo:
        return memo[id(value)]
    if isinstance(value, (MethodType, BuiltinMethodType)):
        owner = _stand_in(value.__self__, memo)
        if owner is value.__self__:
            return value
        return MethodType(value.__func__, owner) if isinstance(value, MethodType) else getattr(owner, value.__name__)
    if type(value) is ref:
        referent = value()
        other = _stand_in(referent, memo)
        return value if other is referent else ref(other)
    if isinstance(value, partial):
        parts = [value.func, *value.args, *value.keywords.values()]
        function, *others = [_stand_in(one, memo) for one in parts]
        if all(one is before for one, before in zip((function, *others), parts, strict=True)):
            return value
        number = len(value.args)
        new = type(value)(function, *others[:number], **dict(zip(value.keywords, others[number:], strict=True)))
        vars(new).update(vars(value))
        return new
    return value
