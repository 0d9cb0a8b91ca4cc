"""What a user can get wrong, said before training begins: the argument, its value and the way out."""

from __future__ import annotations

import gc
import math
import weakref
from collections.abc import Callable, Collection, Iterable, Sequence
from numbers import Real
from typing import Any, get_args

import torch
from torch import nn
from torch.nn.parameter import is_lazy

from . import sharding
from .discovery import UNREACHED
from .plan import Plan
from .projection import Projection
from .schedule import FEWEST_TURNS, Schedule
from .unwrap import unwrap
from .warn import warn


def base_and_model(base: Any, model: Any) -> nn.Module:
    """The bare module of `model`, whose parameters, and no others, the base optimizer holds."""
    if not isinstance(base, torch.optim.Optimizer):
        raise TypeError(
            f"base_optimizer is a {type(base).__name__}: pass a torch.optim optimizer, such as "
            "torch.optim.SGD(model.parameters(), lr=0.1)"
        )
    if isinstance(base, torch.optim.SparseAdam):
        raise TypeError(
            "base_optimizer is a SparseAdam, which takes sparse gradients alone, and layers that can be pruned have "
            "dense ones: pass another optimizer, torch.optim.Adam say"
        )
    if hasattr(base, "target_flops"):
        raise TypeError("base_optimizer is an ATO already: pass the optimizer that it wraps (its .base)")
    if not isinstance(model, nn.Module):
        raise TypeError(f"model is a {type(model).__name__}: pass the torch.nn.Module that is trained")
    root = unwrap(model)
    sharding.check(root)
    tractable(root)
    _parameters(base, root)
    return root


def tractable(model: nn.Module) -> None:
    """The model is made of plain modules, on one device, whose shapes are known."""
    devices: dict[torch.device, str] = {}
    for name, module in model.named_modules():
        where = f"model's module '{name}' ({type(module).__name__})"
        if isinstance(module, torch.jit.ScriptModule):
            raise TypeError(f"{where} is compiled by torch.jit and cannot be cut: pass the module it was made from")
        if hasattr(module, "_packed_params"):
            raise TypeError(f"{where} is quantized: prune the float model, quantize what compress() returns")
        if any(is_lazy(p) for p in module.parameters(recurse=False)):
            raise ValueError(f"{where} is lazy: run one forward before building the optimizers")
        for parameter in module.parameters(recurse=False):
            devices.setdefault(parameter.device, name)
    if len(devices) > 1 or torch.device("meta") in devices:
        found = ", ".join(f"{name} on {device}" for device, name in devices.items())
        raise ValueError(
            f"model has parameters that do not share one real device ({found}): move it before, model.to(...)"
        )


OWNERS: weakref.WeakKeyDictionary[nn.Module, weakref.ref[Any]] = weakref.WeakKeyDictionary()
"""The ATO that each model has, while both live."""


def owner_of(model: nn.Module) -> Any:
    """The ATO that has the bare `model`, None if there is none."""
    return OWNERS.get(model, lambda: None)()


def free(model: nn.Module) -> None:
    """`model`, which is to be cut in place, has no ATO of its own that goes on training it."""
    owner = owner_of(model)
    if owner is not None and owner.cut is None:
        raise ValueError(
            "model has an ATO of its own, which would go on with parameters that are replaced: pass inplace=False, or "
            "drop that one first"
        )


def module(argument: str, value: Any) -> None:
    """`value` is a module."""
    if not isinstance(value, nn.Module):
        raise TypeError(f"{argument} is a {type(value).__name__}: pass a torch.nn.Module")


def unowned(base: torch.optim.Optimizer, model: nn.Module) -> None:
    """No ATO that has not compressed yet has the model, nor, if it trains the same, a part or a whole of it."""
    if _contended(base, model):
        gc.collect()  # an ATO that was dropped may live on in a cycle, with its scheduler say
    for owned in _contended(base, model):
        part = "part" if owned in set(model.modules()) else "whole"
        whose = "" if owned is model else f" for its {part} {type(owned).__name__}"
        raise ValueError(
            f"model ({type(model).__name__}) already has an ATO{whose}, at step {owner_of(owned).step_count}: use that "
            "one, or drop it first (del optimizer, and whatever holds it)"
        )


def _contended(base: torch.optim.Optimizer, model: nn.Module) -> list[nn.Module]:
    """The model, parts and wholes of it, as far as an ATO that has not compressed yet has them and trains the same."""
    parts, trained = set(model.modules()), {id(p) for group in base.param_groups for p in group["params"]}

    def contends(owned: nn.Module) -> bool:
        owner = owner_of(owned)
        if owner is None or owner.cut is not None or not (owned in parts or model in set(owned.modules())):
            return False
        return owned is model or not trained.isdisjoint(id(p) for group in owner.param_groups for p in group["params"])

    return [owned for owned in list(OWNERS) if contends(owned)]


PATIENCE = 5
"""Controller turns that may fail to come before a warning."""

_RANGES: dict[str, tuple[Callable[[float], bool], str]] = {
    "target_flops": (lambda v: 0 < v <= 1, "in (0, 1]: it is the share of the dense MACs that is kept, 0.45 say"),
    "total_steps": (lambda v: v >= 1 and v == int(v), "a whole number from 1: pass epochs * len(loader)"),
    "min_width": (lambda v: 0 <= v <= 1, "in [0, 1]: it is the share of its channels that a layer keeps at least"),
    "streams": (lambda v: 0 <= v <= 1, "in [0, 1]: it is the share of the budget that keeps residual streams wide"),
    "round_to": (lambda v: v >= 1 and v == int(v), "a whole number from 1: widths are multiples of it, 8 say"),
    "pull_time": (lambda v: v > 0, "above 0: it is a share of the run, 0.02 say"),
    "epsilon": (lambda v: 0 <= v < 1, "in [0, 1): 0.1 say"),
    "controller_lr": (lambda v: v > 0, "above 0, 1e-3 say, or None"),
    "controller_weight_decay": (lambda v: v >= 0, "at least 0: 1e-2 say"),
    "seed": (lambda v: v == int(v), "a whole number"),
    "interval": (lambda v: v >= 1 and v == int(v), "a whole number of steps from 1, or None"),
    "gamma": (lambda v: v > 0, "above 0: it is the weight of the budget in the controller's loss, 8 say"),
    "beta": (lambda v: v >= 0, "at least 0: it is the weight of the capacity in the controller's loss, 1.5 say"),
}


def arguments(
    phases: Any, projection: Any, penalty: Any, interval: Any, controller_lr: Any, forward_fn: Any, **numbers: Any
) -> None:
    """All arguments of ATO but the model's."""
    optional = {"interval": interval, "controller_lr": controller_lr}
    numbers |= {name: value for name, value in optional.items() if value is not None}
    for name, value in numbers.items():
        fits, meaning = _RANGES[name]
        if not isinstance(value, Real) or isinstance(value, bool):
            raise TypeError(f"{name}={value!r} is a {type(value).__name__}, not a number {meaning}")
        if not math.isfinite(value) or not fits(float(value)):
            raise ValueError(f"{name}={value} is not {meaning}")
    if not _reals(phases, 3) or not 0 <= phases[0] <= phases[1] <= phases[2] <= 1:
        raise ValueError(
            f"phases={phases}: pass three rising shares of the run at which search, commit and the exact zeros begin, "
            "(0.05, 0.48, 0.5) say"
        )
    if projection not in get_args(Projection):
        raise ValueError(f"projection={projection!r}: pass one of {', '.join(map(repr, get_args(Projection)))}")
    if not _reals(penalty, 2) or not 0 < penalty[0] <= penalty[1]:
        raise ValueError(f"penalty={penalty}: pass lambda while searching and the larger one it grows to")
    if forward_fn is not None and not callable(forward_fn):
        raise TypeError(f"forward_fn is a {type(forward_fn).__name__}: pass a function of model and example_inputs")


def _reals(values: Any, length: int) -> bool:
    """Whether `values` are `length` numbers."""
    return hasattr(values, "__len__") and len(values) == length and all(isinstance(v, Real) for v in values)


def end(zero: int, total_steps: int, phases: Sequence[float]) -> None:
    """The run is long enough for exact zeros."""
    if zero > total_steps:
        raise ValueError(
            f"phases={tuple(phases)} leave no step between commit and the end of total_steps={total_steps}: commit "
            "earlier"
        )


def _parameters(base: torch.optim.Optimizer, model: nn.Module) -> None:
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
    if isinstance(layers, (str, nn.Module)) or not isinstance(layers, Iterable):
        given = type(layers).__name__ if isinstance(layers, nn.Module) else repr(layers)
        raise TypeError(f"ignored_layers={given}: pass a list of modules, or of their names")
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
        left = plan.groups.left_out
        reasons = "; ".join(f"{', '.join(e.layers) or '?'} {e.reason}" for e in left[:10])
        another = bool(left) and all(e.reason == UNREACHED for e in left)
        raise ValueError(
            f"model has nothing to prune: {reasons or 'it has no convolution or linear layer'}"
            f"{'. A forward_fn has to run the model that it is given, which is a copy' if another else ''}"
        )
    if target_flops < least:
        raise ValueError(
            f"target_flops={target_flops} cannot be reached: the least budget of this model is "
            f"{math.ceil(least * 1e4) / 1e4:.4f} with the present min_width, round_to and ignored_layers"
        )


def reached(plan: Plan, model: nn.Module, trained: Collection[Any]) -> None:
    """Warn of layers that are trained and that the example inputs do not reach."""
    unreached = [name for entry in plan.groups.left_out if entry.reason == UNREACHED for name in entry.layers]
    unreached = [name for name in unreached if model.get_submodule(name).weight in trained]
    if unreached:
        warn(
            f"example_inputs do not reach layers that are trained: {', '.join(unreached)}. If these read channels that "
            "are pruned they will not fit after compress(): pass a forward_fn that runs all of the model, or name what "
            "they read in ignored_layers; if they run in training mode alone, pass a batch that this takes, of two say",
        )


def turns(schedule: Schedule) -> None:
    """Warn if the controller will have too few turns to learn from."""
    if schedule.turns < FEWEST_TURNS:
        warn(
            f"total_steps={schedule.total_steps} leaves {schedule.turns} controller turn(s), one every "
            f"{schedule.interval} steps: with fewer than {FEWEST_TURNS} the controller gets less far than in longer "
            "runs and may choose poorly. Train longer, or give the search more of the run (phases, interval)",
        )


def learning(step: int, last_turn: int, schedule: Schedule) -> None:
    """Warn if at `step`, in the search, PATIENCE turns in a row did not come, or the search ends without any."""
    since = max(last_turn, schedule.search)
    noticed = since + PATIENCE * schedule.interval
    never = last_turn < 0 and step == schedule.commit < noticed and step - since > schedule.interval
    if never or step == noticed <= schedule.commit:
        warn(
            f"ATO has seen no training forward of its model since step {since}, and searches: the controller learns "
            "nothing, and the channels to keep are a guess. Call the model itself, in training mode (model.train() "
            "after each evaluation) and with gradients, in each step; if your loop calls parts of it, pass as model a "
            "torch.nn.Module whose forward does what the loop does",
        )


def chosen(last_turn: int) -> None:
    """Warn before a cut if the controller had no turn."""
    if last_turn < 0:
        warn(
            "compress() removes channels that are a guess: in the search ATO had no controller turn. Call the model in "
            "training mode in each step, in a run that is long enough",
        )


def trained(model: nn.Module, names: Collection[str]) -> None:
    """Warn of parameters `names` of prunable layers that are frozen by now."""
    frozen = [name for name, p in model.named_parameters() if not p.requires_grad and name in names]
    if frozen:
        warn(
            f"{', '.join(frozen)} no longer require gradients, but belong to layers that are being pruned: what is "
            "masked goes all the same, and the controller chooses without their gradients. Freeze layers before ATO is "
            "built, which leaves them whole, or name them in ignored_layers",
        )


def given(model: nn.Module, names: Iterable[str], step: int) -> bool:
    """Whether any parameter of `names`, the masked ones, has a gradient to learn from; a warning if not."""
    if any(model.get_parameter(name).grad is not None for name in names):
        return True
    warn(
        f"no layer that is pruned has a gradient at step {step}: the controller learns nothing from this turn. step() "
        "reads the .grad of parameters: let it come before zero_grad(), and leave gradients there"
    )
    return False


def finite(gate_gradient: torch.Tensor, step: int) -> bool:
    """Whether the controller can learn from `gate_gradient` (gates,); a warning if not."""
    if gate_gradient.square().isfinite().all():  # its AdamW would never forget an infinite square
        return True
    warn(
        f"gradients at step {step} are not finite: the controller learns nothing from this turn. If it comes again, "
        "lower the learning rate, or clip",
    )
    return False


def rates(base: torch.optim.Optimizer, projection: str) -> None:
    """The base optimizer says with which learning rate the paper's pulls are to go."""
    for k, group in enumerate(base.param_groups):
        if projection != "timed" and group.get("lr") is None:
            raise ValueError(
                f"projection={projection!r} pulls by the learning rate, and group {k} of base_optimizer "
                f"({type(base).__name__}) has none: projection='timed' does without"
            )


def moved(model: nn.Module, device: torch.device) -> None:
    """The model is on the device on which ATO was built."""
    now = next(model.parameters()).device
    if now != device:
        raise ValueError(
            f"model was moved after ATO was built, from {device}, where its masks are, to {now}: move it before"
        )


def zeroed(step: int, schedule: Schedule, left: float) -> None:
    """Masked channels are due to be zero at `step`, and are: of the largest of them, `left` is left."""
    if step < schedule.zero:
        raise ValueError(
            f"compress() came {schedule.zero - step} step(s) too early: step {step} of total_steps="
            f"{schedule.total_steps}, masked channels are zero from step {schedule.zero} on; train on, or give a "
            "smaller total_steps to ATO if the run is shorter"
        )
    if not math.isfinite(left):
        raise ValueError("model has weights that are not finite: it has diverged; go back to an earlier checkpoint")
    if left:
        raise ValueError(
            "model holds masked channels that are not zero: its weights were loaded or changed since the last step(). "
            f"Load those of the same time as the optimizer's: weights from before step {schedule.zero} hold channels "
            "that were to go. What moves weights after step(), Lookahead around ATO say, belongs inside, as its base; "
            "an average that was put into the model is cut by compress(model=copy.deepcopy(model))"
        )


def replaceable(model: nn.Module) -> None:
    """The parameters of `model` can be replaced by smaller ones."""
    if sharding.is_sharded(model):
        raise ValueError(
            f"model ({type(model).__name__}) is under fully_shard, which holds on to its parameters: "
            "compress(inplace=False), called on all ranks, returns the smaller network whole; to train on, apply "
            "fully_shard to that and build a new base optimizer"
        )
