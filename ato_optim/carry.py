"""The state of the base optimizer, cut along with the model that it trains."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from .base import held, with_inner
from .compress import Cut, apply_cut, select
from .nests import tensors_in
from .sharding import is_sharded
from .warn import warn

_WAY_OUT = "use compress(inplace=False), and a new optimizer to train on"


def cut_states(
    optimizer: torch.optim.Optimizer,
    names: dict[Tensor, str],
    kept: dict[str, dict[int, list[int]]],
    dense: dict[str, list[int]],
) -> Iterator[tuple[dict[Any, Any], Tensor, Any]]:
    """For each parameter in `kept`: what holds its state, the parameter, and its state cut. Nothing is changed.

    What cannot be cut is an optimizer with lists of parameters of its own, and state that is no parameter's: a vector
    over all of them, as LBFGS has, rows and columns of them, as factored second moments, or tensors inside of objects.

    Args:
        names: of the model's parameters.
        kept: parameter name -> dimension -> positions that stay.
        dense: shape of each parameter before the cut, by its name.

    Raises:
        ValueError: saying why `optimizer` cannot follow, with the way out.
    """
    seen: list[Any] = []
    for inner in with_inner(optimizer):
        kind = f"base_optimizer ({type(inner).__name__})"
        if inner.param_groups is not optimizer.param_groups:
            raise ValueError(
                f"base_optimizer ({type(optimizer).__name__}) holds another optimizer ({type(inner).__name__}), whose "
                f"lists cannot follow the cut: {_WAY_OUT}"
            )
        for attribute, leaf in held(inner):
            if isinstance(leaf, Tensor) and leaf in names:
                raise ValueError(
                    f"{kind} keeps parameters in its attribute '{attribute}', which cannot follow the cut: {_WAY_OUT}"
                )
        if any(inner.state is one for one in seen):  # a wrapper may share its base's
            continue
        seen.append(inner.state)
        for owner, state in inner.state.items():
            if isinstance(owner, Tensor) and owner not in names:
                continue  # of a group that was added, not the model's: it stays as it is
            name = names.get(owner, "")
            entries = state if isinstance(state, dict) and name else {name or owner: state}
            smaller = {}
            for key, value in entries.items():
                try:
                    smaller[key] = _selected(value, kept.get(name, {}), dense.get(name, []))
                except Exception as error:  # tensors of other classes may refuse to be indexed
                    why = f"{type(error).__name__}: {error}"
                    raise ValueError(
                        f"the state '{key}' of {kind} cannot follow the cut ({why}): {_WAY_OUT}"
                    ) from error
            if name in kept:
                yield inner.state, owner, smaller if entries is state else smaller[name]


def _selected(value: Any, kept: dict[int, list[int]], dense: list[int]) -> Any:
    """The `kept` positions of an entry of the state of a parameter of shape `dense`."""
    if isinstance(value, Tensor) and value.ndim:
        if value.ndim != len(dense) or any(n not in (1, size) for n, size in zip(value.shape, dense, strict=True)):
            raise ValueError(f"its shape {list(value.shape)} is not that of one parameter")
        return select(value, kept, dense)
    if any(tensor.ndim for tensor in tensors_in(value)):
        raise ValueError(f"it is a {type(value).__name__} that holds tensors")
    return value


def warn_of_obstacle(optimizer: torch.optim.Optimizer, model: nn.Module) -> None:
    """Say after the first step, when there is a state, what compress() would raise when it comes to cut it."""
    if is_sharded(model):  # refused in place anyway
        return
    names: dict[Tensor, str] = {p: name for name, p in model.named_parameters()}
    dense = {name: list(p.shape) for p, name in names.items()}
    firsts = {name: {dim: list(range(size)[:1]) for dim, size in enumerate(shape)} for name, shape in dense.items()}
    try:
        for _ in cut_states(optimizer, names, firsts, dense):
            pass
    except ValueError as error:
        warn(f"compress() in place will fail: {error}")


def apply_cut_in_training(cut: Cut, model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    """Cut `model` in place, and the state of the `optimizer` that trains it; neither, if either is refused."""
    names: dict[Tensor, str] = {p: name for name, p in model.named_parameters()}
    states = list(cut_states(optimizer, names, cut.kept, cut.dense))
    replaced: dict[Any, nn.Parameter] = apply_cut(cut, model)
    for group in optimizer.param_groups:
        group["params"][:] = [replaced.get(p, p) for p in group["params"]]
    for holder, old, smaller in states:
        del holder[old]
        holder[replaced[old]] = smaller
