"""The state of the base optimizer, cut along with the model that it trains."""

from __future__ import annotations

import warnings
from typing import Any

import torch
from torch import Tensor, nn

from .base import with_inner
from .compress import Cut, apply_cut, select


def obstacle(optimizer: torch.optim.Optimizer, names: dict[Tensor, str], dense: dict[str, list[int]]) -> str:
    """Why `optimizer` cannot follow a cut of what it trains, with the way out; empty if it can.

    What cannot be cut is an optimizer with lists of parameters of its own, and state that is no parameter's: a vector
    over all of them, as LBFGS has, or rows and columns of them, as factored second moments.

    Args:
        names: of the model's parameters.
        dense: shape of each parameter before the cut, by its name.
    """
    way_out = "use compress(inplace=False), and a new optimizer to train on"
    for inner in with_inner(optimizer):
        if inner.param_groups is not optimizer.param_groups:
            return (
                f"base_optimizer ({type(optimizer).__name__}) holds another optimizer ({type(inner).__name__}), whose "
                f"lists cannot follow the cut: {way_out}"
            )
        # parameters of a group that was added, not the model's, stay as they are
        states = [(dense[names[p]], state) for p, state in inner.state.items() if p in names]
        stuck = [key for shape, state in states for key, value in state.items() if not _follows(value, shape)]
        if stuck:
            return (
                f"the state '{stuck[0]}' of base_optimizer ({type(inner).__name__}) does not belong to one "
                f"parameter each and cannot follow the cut: {way_out}"
            )
    return ""


def warn_of_obstacle(optimizer: torch.optim.Optimizer, model: nn.Module) -> None:
    """Say after the first step, when there is a state, what compress() would raise when it comes to cut it."""
    names: dict[Tensor, str] = {p: name for name, p in model.named_parameters()}
    found = obstacle(optimizer, names, {name: list(p.shape) for p, name in names.items()})
    if found:
        warnings.warn(f"compress() in place will fail: {found}", stacklevel=5)


def _follows(value: Any, dense: list[int]) -> bool:
    """Whether an entry of the state of a parameter of shape `dense` belongs to its positions, or to none of them."""
    if isinstance(value, Tensor) and value.ndim:
        return value.ndim == len(dense) and all(n in (1, size) for n, size in zip(value.shape, dense, strict=True))
    return not isinstance(value, (list, tuple))


def carry_state(
    optimizer: torch.optim.Optimizer,
    cut: Cut,
    names: dict[Tensor, str],
    replaced: dict[nn.Parameter, nn.Parameter],
) -> None:
    """Put the new parameters into `optimizer` and index its state over, in place.

    Args:
        names: names of the old parameters in the model.
        replaced: old parameter -> new parameter, from apply_cut.
    """
    for group in optimizer.param_groups:
        group["params"][:] = [replaced.get(p, p) for p in group["params"]]
    for state_of in [one.state for one in with_inner(optimizer)]:
        for old, new in replaced.items():
            state = state_of.pop(old, None)
            if state is not None:
                kept, dense = cut.kept[names[old]], cut.dense[names[old]]
                state_of[new] = {
                    key: select(value, kept, dense) if isinstance(value, Tensor) and value.ndim else value
                    for key, value in state.items()
                }


def apply_cut_in_training(cut: Cut, model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    """Cut `model` in place and carry the state of the `optimizer` that trains it over."""
    names: dict[Tensor, str] = {p: name for name, p in model.named_parameters()}
    if found := obstacle(optimizer, names, cut.dense):
        raise ValueError(found)
    carry_state(optimizer, cut, names, apply_cut(cut, model))
