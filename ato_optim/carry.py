"""The state of the base optimizer, cut along with the model that it trains."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from .base import with_inner
from .compress import Cut, apply_cut, select


def check_state(optimizer: torch.optim.Optimizer, names: dict[Tensor, str], cut: Cut) -> None:
    """Raise ValueError if `optimizer` holds what cannot be cut.

    That is an optimizer with lists of parameters of its own, and state that is a vector over all parameters, as LBFGS
    has.
    """
    for inner in with_inner(optimizer):
        if inner.param_groups is not optimizer.param_groups:
            raise ValueError(
                f"base_optimizer ({type(optimizer).__name__}) holds another optimizer ({type(inner).__name__}), whose "
                "lists cannot follow the cut: use compress(inplace=False), and a new optimizer to train on"
            )
        _check_state(inner, names, cut)


def _check_state(optimizer: torch.optim.Optimizer, names: dict[Tensor, str], cut: Cut) -> None:
    for parameter, state in optimizer.state.items():
        if parameter not in names:  # of a group that was added, not the model's: it stays as it is
            continue
        dense = cut.dense[names[parameter]]
        for key, value in state.items():
            if not _follows(value, dense):
                raise ValueError(
                    f"the state '{key}' of base_optimizer ({type(optimizer).__name__}) does not belong to one "
                    "parameter each and cannot follow the cut: use compress(inplace=False), and a new optimizer "
                    "to train on"
                )


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
    check_state(optimizer, names, cut)
    carry_state(optimizer, cut, names, apply_cut(cut, model))
