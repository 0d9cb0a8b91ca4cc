"""Zero-invariant groups: which parameter entries produce a channel, and which read it.

torch-pruning's DependencyGraph says what is coupled. This module turns its groups into frozen tables of
(parameter, dimension, position, gate), decides which of them may be pruned and says why the others may not.
Terms are those of docs/method.md; a zero-invariant group is Chen et al.'s (OTO, arXiv:2107.07467).
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch_pruning as tp
from torch import Tensor, nn
from torch_pruning.dependency import Group, Node
from torch_pruning.ops import OPTYPE

from .guard import settling
from .sharding import like, whole
from .unwrap import tensors_in

ForwardFn = Callable[[nn.Module, Any], Any]

# Modules that write their rows (dimension 0 unless transposed) and read their columns.
_READERS = (OPTYPE.CONV, OPTYPE.LINEAR)
# Per-channel modules whose scale and shift belong to the channel that passes.
_CHANNELWISE = (OPTYPE.BN, OPTYPE.IN, OPTYPE.DEPTHWISE_CONV)
_UNSAFE = {
    OPTYPE.LN: "crosses a LayerNorm, which mixes its channels",
    OPTYPE.GN: "crosses a GroupNorm, which mixes its channels",
    OPTYPE.MHA: "runs through nn.MultiheadAttention",
    OPTYPE.LSTM: "runs through an LSTM",
    OPTYPE.OUTPUT: "is an output of the model",
}


@dataclass(frozen=True)
class LayerGroup:
    """Channels that are pruned by one row of gates: a root layer and all that is coupled to it."""

    root: str
    """Name of the module from which torch-pruning reaches the others."""
    start: int
    """Its first gate."""
    size: int
    """How many gates it has, one a root channel."""
    layers: tuple[str, ...]
    """Names of the convolutions and linear layers whose outputs it prunes."""

    @property
    def gates(self) -> slice:
        return slice(self.start, self.start + self.size)


@dataclass(frozen=True)
class LeftOut:
    """Layers that are not pruned, and why."""

    layers: tuple[str, ...]
    reason: str


@dataclass
class GateTable:
    """For each of several parameters: along one dimension, the gate of every position.

    `gate` holds all positions of all parameters one after the other, int64; positions that belong to no
    gate hold the number of gates, so that a value appended to a vector over gates stands for them.
    """

    names: list[str] = field(default_factory=list)
    dims: list[int] = field(default_factory=list)
    ndims: list[int] = field(default_factory=list)
    sizes: list[int] = field(default_factory=list)
    gate: Tensor = field(default_factory=lambda: torch.empty(0, dtype=torch.long))

    def parameters(self, model: nn.Module) -> list[Tensor]:
        """The parameters' data: views whose changes autograd's version counters do not see."""
        return [model.get_parameter(name).data for name in self.names]

    def split(self, values: Tensor) -> list[Tensor]:
        """`values` (gates,), one a gate, as one tensor a parameter that broadcasts along its dimension.

        Positions without a gate get 1.
        """
        spread = torch.cat([values, values.new_ones(1)])[self.gate]
        shapes = ([-1 if d == dim else 1 for d in range(n)] for dim, n in zip(self.dims, self.ndims, strict=True))
        return [part.view(shape) for part, shape in zip(spread.split(self.sizes), shapes, strict=True)]

    def scale(self, parameters: list[Tensor], values: Tensor) -> None:
        """Multiply all entries of each gate by its value in `values` (gates,), in place."""
        parts = self.split(values)
        torch._foreach_mul_(parameters, [like(part, p) for part, p in zip(parts, parameters, strict=True)])

    def sum(self, tensors: Sequence[Tensor], gates: int) -> Tensor:
        """Sums of `tensors`, shaped like the parameters, over all entries of each gate: (gates,)."""
        rows = [
            whole(t if n == 1 else t.sum([d for d in range(n) if d != dim]))
            for t, dim, n in zip(tensors, self.dims, self.ndims, strict=True)
        ]
        out = rows[0].new_zeros(gates + 1)
        return out.index_add_(0, self.gate, torch.cat(rows))[:-1]

    @torch.no_grad()
    def closed_are_zero(self, model: nn.Module, mask: Tensor) -> bool:
        """Whether all entries of the gates that `mask` (gates,) bool closes are exactly zero in `model`."""
        if not self.names:
            return True
        return not bool(self.sum([p.abs() for p in self.parameters(model)], len(mask))[~mask].any())

    def to(self, device: torch.device) -> GateTable:
        return GateTable(self.names, self.dims, self.ndims, self.sizes, self.gate.to(device))


@dataclass(frozen=True)
class Groups:
    """All that can be pruned in one model, by names: it holds for every copy of the model."""

    layers: list[LayerGroup]
    producers: GateTable
    consumers: GateTable
    left_out: list[LeftOut]

    @property
    def num_gates(self) -> int:
        return sum(layer.size for layer in self.layers)

    def layer_of_gate(self) -> Tensor:
        """(gates,) int64: the index of each gate's layer group."""
        sizes = torch.tensor([layer.size for layer in self.layers], dtype=torch.long)
        return torch.arange(len(self.layers)).repeat_interleave(sizes)

    def to(self, device: torch.device) -> Groups:
        return Groups(self.layers, self.producers.to(device), self.consumers.to(device), self.left_out)


def call(model: nn.Module, example_inputs: Any) -> Any:
    """`model` on `example_inputs`: a tensor is its argument, a tuple or list its arguments, a dict its keywords."""
    if isinstance(example_inputs, Mapping):
        return model(**example_inputs)
    if isinstance(example_inputs, (tuple, list)):
        return model(*example_inputs)
    return model(example_inputs)


def trace(model: nn.Module, example_inputs: Any, forward_fn: ForwardFn) -> tuple[tp.DependencyGraph, set[Node]]:
    """torch-pruning's graph of `model`, which is put in eval mode, and the nodes that write its outputs."""
    outputs: list[Tensor] = []

    def forward(model: nn.Module, inputs: Any) -> list[Tensor]:
        found = [t for t in tensors_in(forward_fn(model, inputs)) if t.requires_grad]
        outputs.extend(found)
        return found

    for parameter in model.parameters():
        parameter.requires_grad_(parameter.is_floating_point())
    with torch.enable_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        graph = tp.DependencyGraph().build_dependency(model, example_inputs, forward_fn=forward, verbose=False)
    functions = {t.grad_fn for t in outputs}
    return graph, {node for node in graph.module2node.values() if node.grad_fn in functions}


Role = tuple[bool, nn.Parameter, int, list[int], list[int]]
"""(writes, parameter, dimension, positions, root channels): what a parameter has to do with a group."""


class _Builder:
    """Collects the tables of the groups that may be pruned."""

    def __init__(self, model: nn.Module):
        self.names = {p: name for name, p in model.named_parameters()}
        self.module_names = {m: name for name, m in model.named_modules()}
        self.gates = 0
        self.layers: list[LayerGroup] = []
        self.left_out: list[LeftOut] = []
        self.producers: dict[tuple[str, int], Tensor] = {}
        self.consumers: dict[tuple[str, int], Tensor] = {}
        self.shapes = {name: p.shape for name, p in model.named_parameters()}

    def add(self, group: Group, roles: list[Role], layers: tuple[str, ...]) -> None:
        root = group[0].dep.target.module
        size = len(group[0].idxs)
        for writes, parameter, dim, positions, roots in roles:
            table = self.producers if writes else self.consumers
            key = (self.names[parameter], dim)
            rows = table.setdefault(key, torch.full((parameter.shape[dim],), -1))
            rows[torch.tensor(positions)] = torch.tensor(roots) + self.gates
        self.layers.append(LayerGroup(self.module_names[root], self.gates, size, layers))
        self.gates += size

    def table(self, rows: dict[tuple[str, int], Tensor]) -> GateTable:
        gate = torch.cat(list(rows.values())) if rows else torch.empty(0, dtype=torch.long)
        return GateTable(
            [name for name, _ in rows],
            [dim for _, dim in rows],
            [len(self.shapes[name]) for name, _ in rows],
            [len(row) for row in rows.values()],
            torch.where(gate < 0, self.gates, gate),
        )

    def build(self) -> Groups:
        return Groups(self.layers, self.table(self.producers), self.table(self.consumers), self.left_out)


def written_layers(group: Group, builder: _Builder) -> tuple[str, ...]:
    """Names of the layers whose output channels `group` prunes, in the model's order."""
    written = {
        dep.target.module
        for dep, _ in group
        if dep.target.type in (*_READERS, OPTYPE.DEPTHWISE_CONV) and _prunes_outputs(group, dep)
    }
    return tuple(name for module, name in builder.module_names.items() if module in written)


def _prunes_outputs(group: Group, dep: Any) -> bool:
    return group._DG.is_out_channel_pruning_fn(dep.handler)


def _roles(group: Group) -> list[Role]:
    """The roles of all parameters that `group` touches."""
    roles: list[Role] = []
    for item in group.items:
        node, idxs, roots = item.dep.target, item.idxs, item.root_idxs
        module = node.module
        if node.type == OPTYPE.PARAMETER:
            roles.append((True, module, node.pruning_dim, idxs, roots))
        elif node.type == OPTYPE.EMBED:
            roles.append((True, module.weight, 1, idxs, roots))
        elif node.type in _READERS:
            writes = _prunes_outputs(group, item.dep)
            dim = int(writes == getattr(module, "transposed", False))
            roles.append((writes, module.weight, dim, idxs, roots))
            if writes and module.bias is not None:
                roles.append((True, module.bias, 0, idxs, roots))
        elif node.type in _CHANNELWISE:
            parameters = (p for p in (module.weight, module.bias) if p is not None)
            roles.extend((True, p, 0, idxs, roots) for p in parameters)
    return roles


def _reason_against(
    group: Group,
    outputs: set[Node],
    ignored: set[nn.Module],
    frozen: set[nn.Parameter],
    names: Mapping[nn.Parameter, str],
) -> str | None:
    """Why the channels of `group` must stay, None if nothing speaks against their removal."""
    for item in group.items:
        node, module = item.dep.target, item.dep.target.module
        writes = _prunes_outputs(group, item.dep)
        if node in outputs and writes:
            return _UNSAFE[OPTYPE.OUTPUT]
        if node.type in _UNSAFE:
            return _UNSAFE[node.type]
        if module in ignored and writes:
            return "is named in ignored_layers"
        if node.type in _READERS and getattr(module, "groups", 1) > 1:
            return "is coupled to a grouped convolution"
        if node.type in (OPTYPE.BN, OPTYPE.IN) and not module.affine:
            return "crosses a norm layer without a scale, which shifts zeros"
        if item.root_idxs is None or any(root is None for root in item.root_idxs):
            return "is mapped by torch-pruning to no single channel"
    if len(group[0].idxs) == 1:
        return "is one channel wide"
    roles = _roles(group)
    if any(parameter not in names for _, parameter, *_ in roles):
        return "holds parameters that are computed from others (parametrized)"
    if any(max(positions) >= parameter.shape[dim] for _, parameter, dim, positions, _ in roles):
        return "is broadcast over channels"
    if any(parameter in frozen for _, parameter, *_ in roles):
        return "holds parameters that are frozen (requires_grad=False) or not in base_optimizer"
    if all(writes for writes, *_ in roles):
        return "is read by no layer of the model"
    return None


def _all_groups(graph: tp.DependencyGraph) -> Iterator[tuple[nn.Module, Group | None, str]]:
    """Each root layer with its full group; None and the reason where torch-pruning finds none."""
    visited: set[nn.Module] = set()
    for root in list(graph.module2node):
        if not isinstance(root, (tp.ops.TORCH_CONV, tp.ops.TORCH_LINEAR)) or root in visited:
            continue
        pruner = graph.get_pruner_of_module(root)
        try:
            with settling(graph.model):
                channels = list(range(pruner.get_out_channels(root)))
                group = graph.get_pruning_group(root, pruner.prune_out_channels, channels)
        except Exception as error:  # whatever torch-pruning raises on what it does not understand
            yield root, None, f"cannot be grouped by torch-pruning ({type(error).__name__}: {error})"
            continue
        # One channel that gates many others is coupled to the first of them alone: they are still to be looked at.
        visited.add(root)
        if len(channels) > 1:
            visited.update(item.dep.target.module for item in group.items if _prunes_outputs(group, item.dep))
        yield root, group, ""


def discover(
    model: nn.Module,
    example_inputs: Any,
    forward_fn: ForwardFn = call,
    ignored_layers: Iterable[nn.Module] = (),
    frozen: Iterable[nn.Parameter] = (),
    excluded: Mapping[str, str] | None = None,
) -> Groups:
    """The prunable groups of `model`, which is traced once and left in eval mode with all gradients required.

    `ignored_layers` and `frozen` are modules and parameters of `model` whose groups are left out;
    `excluded` maps names of root layers to reasons for leaving them out.
    """
    graph, outputs = trace(model, example_inputs, forward_fn)
    builder = _Builder(model)
    ignored = {child for layer in ignored_layers for child in layer.modules()}
    frozen = set(frozen)
    found = []
    for root, group, reason in _all_groups(graph):
        name = builder.module_names[root]
        layers = (name,) if group is None else written_layers(group, builder)
        if group is not None:
            reason = (excluded or {}).get(name) or _reason_against(group, outputs, ignored, frozen, builder.names) or ""
        found.append((layers, group, reason))
    order = {name: k for k, name in enumerate(builder.module_names.values())}
    for layers, group, reason in sorted(found, key=lambda entry: order[entry[0][0]]):
        if group is None or reason:
            builder.left_out.append(LeftOut(layers, reason))
        else:
            builder.add(group, _roles(group), layers)
    return builder.build()


def remove(graph: tp.DependencyGraph, groups: Groups, mask: Tensor) -> None:
    """Remove the channels that `mask` (gates,) bool closes from the model of `graph`, through torch-pruning.

    A group that was fetched before another is pruned would be silently wrong after it, so each is fetched
    when its turn comes; positions in its own root layer are still the original ones then.
    """
    for layer in groups.layers:
        root = graph.model.get_submodule(layer.root)
        gone = (~mask[layer.gates]).nonzero().flatten().tolist()
        if gone:
            prune = graph.get_pruner_of_module(root).prune_out_channels
            with settling(graph.model):
                group = graph.get_pruning_group(root, prune, gone)
            group.prune()
