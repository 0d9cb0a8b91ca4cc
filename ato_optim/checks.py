"""What a user can get wrong, said before training begins: the argument, its value and the way out."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from numbers import Real
from typing import Any, get_args

import torch
from torch import nn

from .plan import Plan
from .projection import Projection


def base_and_model(base: Any, model: Any) -> None:
    """A base optimizer and a module."""
    if not isinstance(base, torch.optim.Optimizer):
        raise TypeError(
            f"base_optimizer is a {type(base).__name__}: pass a torch.optim optimizer, such as "
            "torch.optim.SGD(model.parameters(), lr=0.1)"
        )
    if hasattr(base, "target_flops"):
        raise TypeError("base_optimizer is an ATO already: pass the optimizer that it wraps (its .base)")
    if not isinstance(model, nn.Module):
        raise TypeError(f"model is a {type(model).__name__}: pass the torch.nn.Module that is trained")


_RANGES: dict[str, tuple[Callable[[float], bool], str]] = {
    "target_flops": (lambda v: 0 < v <= 1, "in (0, 1]: it is the share of the dense MACs that is kept, 0.45 say"),
    "total_steps": (lambda v: v >= 1 and v == int(v), "a whole number from 1: pass epochs * len(loader)"),
    "min_width": (lambda v: 0 <= v <= 1, "in [0, 1]: it is the share of its channels that a layer keeps at least"),
    "round_to": (lambda v: v >= 1 and v == int(v), "a whole number from 1: widths are multiples of it, 8 say"),
    "pull_time": (lambda v: v > 0, "above 0: it is a share of the run, 0.1 say"),
    "epsilon": (lambda v: 0 <= v < 1, "in [0, 1): 0.1 say"),
    "gamma": (lambda v: v > 0, "above 0: it is the weight of the budget in the controller's loss, 8 say"),
}


def numbers(**values: Any) -> None:
    """Arguments of ATO by name, each a number within its range."""
    for name, value in values.items():
        fits, meaning = _RANGES[name]
        if not isinstance(value, Real) or isinstance(value, bool):
            raise TypeError(f"{name}={value!r} is a {type(value).__name__}, not a number {meaning}")
        if not fits(float(value)):
            raise ValueError(f"{name}={value} is not {meaning}")


def course(phases: Sequence[float], interval: int | None, projection: str, penalty: Sequence[float]) -> None:
    """The arguments that say what happens when in a run."""
    if len(phases) != 4 or not 0 <= phases[0] <= phases[1] <= phases[2] <= phases[3] <= 1:
        raise ValueError(
            f"phases={tuple(phases)}: pass four rising shares of the run at which search, pull, commit and the exact "
            "zeros begin, (0.1, 0.2, 0.5, 0.6) say"
        )
    if interval is not None and (interval < 1 or interval != int(interval)):
        raise ValueError(f"interval={interval}: pass a whole number of steps between controller turns, or None")
    if projection not in get_args(Projection):
        raise ValueError(f"projection={projection!r}: pass one of {', '.join(map(repr, get_args(Projection)))}")
    if len(penalty) != 2 or not 0 < penalty[0] <= penalty[1]:
        raise ValueError(f"penalty={tuple(penalty)}: pass lambda while searching and the larger one it grows to")


def parameters(base: torch.optim.Optimizer, model: nn.Module) -> None:
    """The base optimizer holds the model's parameters and no others."""
    own = set(model.parameters())
    if not own:
        raise ValueError(f"model ({type(model).__name__}) has no parameters")
    for k, group in enumerate(base.param_groups):
        foreign = [p for p in group["params"] if p not in own]
        if foreign:
            raise ValueError(
                f"base_optimizer holds {len(foreign)} parameter(s) that are not the model's, the first in group {k} "
                f"of shape {tuple(foreign[0].shape)}: build it over model.parameters(), after moving the model"
            )


def modules(model: nn.Module, layers: Iterable[nn.Module | str]) -> list[nn.Module]:
    """The modules of `model` that `layers` gives, by themselves or by name."""
    named = dict(model.named_modules())
    found = []
    for layer in layers:
        module = named.get(layer) if isinstance(layer, str) else layer
        if module is None or module not in set(named.values()):
            raise ValueError(f"ignored_layers: {layer!r} is no module of the model; names are those of named_modules()")
        found.append(module)
    return found


def budget(target_flops: float, plan: Plan, least: float) -> None:
    """Something can be pruned, and the budget can be reached."""
    if target_flops == 1:
        return
    if not plan.groups.layers:
        reasons = "; ".join(f"{', '.join(e.layers) or '?'} {e.reason}" for e in plan.groups.left_out[:10])
        raise ValueError(f"model has nothing to prune: {reasons or 'it has no convolution or linear layer'}")
    if target_flops < least:
        raise ValueError(
            f"target_flops={target_flops} cannot be reached: the least budget of this model is {least:.4f} with the "
            "present min_width, round_to and ignored_layers"
        )


def checkpoint(
    saved: dict[str, Any] | None, version: int, settings: dict[str, Any], compressed: bool
) -> dict[str, Any]:
    """`saved`, the entry "ato" of a state_dict, if it fits this ATO's settings."""
    if saved is None:
        raise ValueError(
            'state_dict has no entry "ato": it was not taken from an ATO; load it into the base optimizer instead'
        )
    if saved["version"] != version:
        raise ValueError(f"state_dict has format version {saved['version']}, this ato_optim reads {version}")
    for name, value in settings.items():
        if saved["settings"][name] != value:
            there = saved["settings"][name]
            if name == "groups":
                difference = next(
                    (p for p in zip(there, value, strict=False) if p[0] != p[1]), (len(there), len(value))
                )
                raise ValueError(f"state_dict belongs to another model: prunable groups differ at {difference}")
            raise ValueError(f"state_dict was taken with {name}={there}, this ATO has {name}={value}: build it alike")
    if compressed and saved["cut"] is None:
        raise ValueError(
            "state_dict was taken before compress(), this ATO's model is compressed: load into a dense one"
        )
    return saved
