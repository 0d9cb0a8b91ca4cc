"""The checkpoint of a run: the pruning's entry in the optimizer's state_dict, and what it must agree with."""

from __future__ import annotations

from dataclasses import asdict
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from .unwrap import process_groups

if TYPE_CHECKING:
    from .optimizer import ATO

VERSION = 7
"""Version of the format of state_dict()["ato"]."""


def settings(ato: ATO) -> dict[str, Any]:
    """What the rest of a run depends on and a new ATO must be built with again, as plain data."""
    return {
        "parameters": {name: list(shape) for name, shape in ato.plan.shapes.items()},
        "groups": [[layer.root, layer.size] for layer in ato.plan.groups.layers],
        "base_optimizer": type(ato.base).__name__,
        "MACs of example_inputs": round(ato.plan.cost.dense),
        "target_flops": ato.target_flops,
        "total_steps": ato.total_steps,
        "phases": [ato.schedule.search, ato.schedule.commit, ato.schedule.zero],
        "interval": ato.schedule.interval,
        "pull_time in steps": ato.schedule.pull_steps,
        "least widths": ato.least.tolist(),
        "round_to": ato.round_to,
        "projection": ato.projection,
        "penalty": [float(value) for value in ato.penalty],
        "epsilon": float(ato.epsilon),
        **({} if ato.search is None else ato.search.settings),
    }


def agreed(ato: ATO, model: nn.Module) -> None:
    """The processes that train `model` together, as far as its wrappers say which, have built ATO alike.

    A collective call. Raises ValueError, on all of them, naming the first setting that differs.
    """
    mine = settings(ato)
    for group in process_groups(model):
        found: list[Any] = [None] * torch.distributed.get_world_size(group)
        torch.distributed.all_gather_object(found, mine, group=group)
        for name in mine:
            values = [str(theirs.get(name)) for theirs in found]
            if len(set(values)) > 1:
                shown = " and ".join(value[:60] for value in dict.fromkeys(values))
                raise ValueError(
                    f"processes that train one model have built other ATOs, with {name}={shown}: build them alike on "
                    "all ranks, with example_inputs of the same shapes"
                )


def pack(ato: ATO) -> dict[str, Any]:
    """All of a run that the base optimizer does not hold: tensors and plain data only."""
    return {
        "version": VERSION,
        "settings": settings(ato),
        "step_count": ato.step_count,
        "last_turn": ato.last_turn,
        "turn_begun": ato.turn_begun,
        "mask": ato.mask.clone(),
        "history": [list(entry) for entry in ato.history],
        "search": ato.search.state_dict() if ato.search is not None and ato.searching else None,
        "cut": None if ato.cut is None else asdict(ato.cut),
    }


def unpack(ato: ATO, saved: dict[str, Any]) -> None:
    """Take over what `pack` gave, but for the cut, which goes before the base optimizer's state, and a turn begun."""
    ato.step_count, ato.last_turn = saved["step_count"], saved["last_turn"]
    ato.history = [tuple(item) for item in saved["history"]]
    ato.mask = saved["mask"].to(ato.plan.device)
    if ato.search is not None and saved["search"] is not None:
        ato.search.load_state_dict(saved["search"])


def entry(state_dict: dict[str, Any], ato: ATO) -> dict[str, Any]:
    """The pruning's entry of `state_dict`, if `ato` can go on from it.

    Raises:
        ValueError: saying what differs, if it was taken from another format, model, budget or length of run.
    """
    saved = state_dict.get("ato")
    if saved is None:
        raise ValueError(
            'state_dict has no entry "ato": it was not taken from an ATO; load it into the base optimizer instead'
        )
    if saved["version"] != VERSION:
        raise ValueError(
            f"state_dict has format version {saved['version']}, this ato_optim reads {VERSION}: go on with the "
            "ato_optim that wrote it"
        )
    _agree(saved["settings"], settings(ato))
    if ato.cut is not None and saved["cut"] != asdict(ato.cut):
        raise ValueError(
            "state_dict was taken before compress() or with another cut, and this ATO's model is compressed: load into "
            "a fresh one"
        )
    sizes = [[len(group["params"]) for group in groups] for groups in (state_dict["param_groups"], ato.param_groups)]
    if sizes[0] != sizes[1]:
        raise ValueError(f"state_dict has parameter groups of sizes {sizes[0]}, this ATO of sizes {sizes[1]}")
    return saved


def _agree(there: dict[str, Any], here: dict[str, Any]) -> None:
    """Raise ValueError, naming the first thing that differs, unless both settings are the same."""
    for name in dict.fromkeys((*there["parameters"], *here["parameters"])):
        shapes = [side["parameters"].get(name, "missing") for side in (there, here)]
        if shapes[0] != shapes[1]:
            raise ValueError(
                f"state_dict belongs to another model: parameter {name} is {shapes[0]} there and {shapes[1]} here"
            )
    if there["groups"] != here["groups"]:
        one, other = ({tuple(group) for group in side["groups"]} for side in (there, here))
        differ = ", ".join(sorted({root for root, _ in one ^ other}))
        raise ValueError(
            f"state_dict belongs to another model: the groups of {differ} are prunable in one "
            "of them alone; build model and ATO with the same frozen and ignored layers"
        )
    for name, value in here.items():
        if there[name] != value:
            raise ValueError(
                f"state_dict was taken with {name}={there[name]}, this ATO has {name}={value}: build alike"
            )
