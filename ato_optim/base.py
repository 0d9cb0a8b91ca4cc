"""The base optimizer: what its groups say of the model's parameters, and the optimizers within it."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from torch import nn
from torch.optim import Optimizer
from torch.utils import _pytree


def option(base: Optimizer, model: nn.Module, key: str) -> dict[str, Any]:
    """What the groups of `base` say for `key` (lr, maximize ...), by the names of the parameters of `model`."""
    value_of = {id(p): group.get(key) for group in base.param_groups for p in group["params"]}
    return {name: value_of[id(p)] for name, p in model.named_parameters() if id(p) in value_of}


def held(optimizer: Optimizer) -> Iterator[tuple[str, Any]]:
    """What the attributes of `optimizer` hold, by their names, but for its state, its groups, and their lists."""
    known = [optimizer.param_groups, *optimizer.param_groups, *(group["params"] for group in optimizer.param_groups)]

    def is_known(value: Any) -> bool:
        return any(value is one for one in known)

    for name, value in vars(optimizer).items():
        if name != "state":
            leaves = _pytree.tree_leaves(value, is_leaf=is_known)
            yield from ((name, leaf) for leaf in leaves if not is_known(leaf))


def with_inner(base: Optimizer) -> list[Optimizer]:
    """`base` and the optimizers that it holds, as Lookahead and ZeroRedundancyOptimizer do."""
    found = [base]
    for one in found:
        inner = [leaf for _, leaf in held(one) if isinstance(leaf, Optimizer)]
        found += [other for other in inner if all(other is not known for known in found)]
    return found


def of_base(name: str) -> Any:
    """An attribute that is the base optimizer's own at any time: it assigns others when a state_dict is loaded."""

    def assigned(self: Any, value: Any) -> None:
        if hasattr(self, "_hooks"):  # torch.optim.Optimizer.__init__ begins with empty ones
            setattr(self.base, name, value)

    return property(lambda self: getattr(self.base, name), assigned)
