"""The simpler ways to a smaller network: one that is thin from the start, and torch-pruning's cut by magnitude."""

import copy
from collections.abc import Callable
from typing import Any

import torch
import torch_pruning as tp
from measure import macs
from torch import Tensor, nn

MAGNITUDE = tp.importance.GroupMagnitudeImportance(p=2)


def classifier(model: nn.Module) -> nn.Module:
    """The last linear layer: its outputs are the network's and stay."""
    return [m for m in model.modules() if isinstance(m, nn.Linear)][-1]


def first(group: tp.Group) -> Tensor:
    """What says that of the channels of a group the first ones count most."""
    return torch.arange(len(group[0].idxs), 0, -1)


def thinned(
    model: nn.Module,
    example: Tensor,
    width: Callable[[str, int], int],
    importance: Callable[[tp.Group], Tensor] = first,
) -> nn.Module:
    """A copy of `model` in which a layer of n channels keeps width(name, n) of them, one at least, by `importance`."""
    small = copy.deepcopy(model)
    names = {module: name for name, module in small.named_modules()}
    graph = tp.DependencyGraph().build_dependency(small, example)
    for group in graph.get_all_groups(ignored_layers=[classifier(small)]):
        root, prune = group[0].dep.target.module, group[0].dep.handler
        channels = graph.get_out_channels(root)
        kept = max(1, width(names[root], channels))
        removed = importance(group).argsort(descending=True)[kept:].tolist()
        graph.get_pruning_group(root, prune, removed).prune()
    return small.train()


def narrow(model: nn.Module, example: Tensor, wanted: float) -> nn.Module:
    """The uniformly thinned copy of `model` whose MACs are closest to `wanted`."""
    low, high, networks = 0.0, 1.0, []
    for _ in range(10):
        factor = (low + high) / 2
        networks.append(thinned(model, example, lambda _, channels, factor=factor: round(factor * channels)))
        low, high = (factor, high) if macs(networks[-1], example) < wanted else (low, factor)
    return min(networks, key=lambda network: abs(macs(network, example) - wanted))


def of_widths(
    model: nn.Module, example: Tensor, widths: dict[str, int], importance: Callable[[tp.Group], Tensor] = first
) -> nn.Module:
    """The copy of `model` that has the `widths` of another run, by layer; `importance` says with which channels."""
    return thinned(model, example, lambda name, _: widths[name], importance)


def prune_by_magnitude(model: nn.Module, example: Tensor, wanted: float, **pruner_arguments: Any) -> None:
    """Remove the channels of the smallest group norm, wherever they are, until `wanted` MACs are left.

    `ignored_layers` among the arguments of torch-pruning are names: their channels stay, as the classifier's do.
    """
    steps = 400
    model.eval()
    ignored = [model.get_submodule(name) for name in pruner_arguments.get("ignored_layers", ())]
    chosen = {"global_pruning": True, "pruning_ratio": 0.98, **pruner_arguments}
    chosen["ignored_layers"] = [*ignored, classifier(model)]
    pruner = tp.pruner.BasePruner(model, example, MAGNITUDE, iterative_steps=steps, **chosen)
    for _ in range(steps):
        pruner.step()
        if macs(model, example) <= wanted:
            break
    else:
        raise ValueError(
            f"torch-pruning left more than the {wanted:.0f} MACs that were wanted, with {pruner_arguments}"
        )
    model.train()
