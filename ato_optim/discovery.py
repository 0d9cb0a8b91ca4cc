"""Which groups of a model may be pruned, and why the others may not.

What is coupled is read off torch-pruning's graph (see graph.py). Rules leave out what is known to change outputs
when it goes; the trial (see proof.py) finds the rest.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch_pruning as tp
from torch import Tensor, nn
from torch_pruning.dependency import Node
from torch_pruning.ops import OPTYPE

from .axes import Unsafe
from .cost import has_width
from .graph import ForwardFn, Touch, Walker, grouped, trace
from .groups import GateTable, Groups, LayerGroup, LeftOut

# Modules that write their rows (dimension 0 unless transposed) and read their columns.
_READERS = (OPTYPE.CONV, OPTYPE.LINEAR)
# Per-channel modules whose scale and shift belong to the channel that passes.
_CHANNELWISE = (OPTYPE.BN, OPTYPE.IN, OPTYPE.DEPTHWISE_CONV)
_UNSAFE = {
    OPTYPE.LN: "crosses a LayerNorm, which mixes its channels",
    OPTYPE.GN: "crosses a GroupNorm, which mixes its channels",
    OPTYPE.MHA: "runs through nn.MultiheadAttention, which ties its heads to the width around it",
    OPTYPE.LSTM: "runs through an LSTM",
    OPTYPE.OUTPUT: "is an output of the model",
}

# What torch-pruning takes a module for that it knows nothing of, and one that is nowhere pruned.
_UNTOLD = (OPTYPE.ELEMENTWISE, OPTYPE.LSTM)

UNREACHED = "is not reached by example_inputs"
_HIDDEN = (
    "is not in the graph: no output depends on it, its gradients stay inside (reentrant checkpointing, say), or its "
    "output is a view that is changed in place (relu(..., inplace=True), say)"
)


@dataclass(frozen=True)
class Role:
    """What one tensor of the model has to do with a group."""

    kind: str
    """producers, consumers or followers."""
    tensor: Tensor
    dim: int
    gates: Tensor
    """(positions,) int64: the gate of each position along `dim`, -1 for none."""


def _roles(touch: Touch) -> Iterator[Role]:
    """The roles of the tensors of what a group touches."""
    node, module, gates = touch.node, touch.node.module, touch.gates
    if node.type == OPTYPE.PARAMETER:
        yield Role("producers", module, node.pruning_dim % module.ndim, gates)
    elif node.type == OPTYPE.EMBED:
        yield Role("producers", module.weight, 1, gates)
    elif node.type in _READERS:
        transposed = getattr(module, "transposed", False)
        if not grouped(module):
            kind = "producers" if touch.writes else "consumers"
            yield Role(kind, module.weight, int(touch.writes == transposed), gates)
        elif touch.writes != transposed:  # rows of a grouped convolution hold the weights of one group alone
            yield Role("producers", module.weight, 0, gates)
        if touch.writes and module.bias is not None:
            yield Role("producers", module.bias, 0, gates)
    elif node.type in _CHANNELWISE:
        yield from (Role("producers", p, 0, gates) for p in (module.weight, module.bias) if p is not None)
        yield from (Role("followers", b, 0, gates) for b in module.buffers() if b.ndim)
    elif node.type == OPTYPE.PRELU and module.num_parameters > 1:
        yield Role("followers", module.weight, 0, gates)


@dataclass(frozen=True)
class Candidate:
    """A group that nothing in the graph speaks against."""

    key: tuple[str, int]
    """Name of the layer that the walk began at, and which part of its channels this is."""
    size: int
    layers: dict[str, int]
    touches: list[Touch]
    roles: list[Role]


def _written_layers(touches: list[Touch], order: Mapping[nn.Module, str]) -> dict[str, int]:
    """Names of the layers whose output channels are touched, in the model's order, and how many channels a gate has."""
    gates_of = {
        touch.node.module: touch.gates[touch.gates >= 0]
        for touch in touches
        if touch.writes and touch.node.type in (*_READERS, OPTYPE.DEPTHWISE_CONV)
    }
    counts = {module: gates.bincount() for module, gates in gates_of.items() if len(gates)}
    counts = {module: count[count > 0] for module, count in counts.items()}
    return {
        name: int(counts[module][0]) if (counts[module] == counts[module][0]).all() else 0
        for module, name in order.items()
        if module in counts
    }


def _summed(touches: list[Touch]) -> bool:
    """Whether channels of several modules or operations are added up, and not just a parameter to one."""
    return any(
        touch.node.type == OPTYPE.ELEMENTWISE
        and touch.node.grad_fn is not None
        and touch.node.grad_fn.name().startswith("AddBackward")
        and sum(source.type != OPTYPE.PARAMETER for source in touch.node.inputs) > 1
        for touch in touches
    )


def _objection_to(outputs: set[Node], ignored: set[nn.Module]) -> Any:
    """The reason against channels that come to a node, None for none."""

    def objection(node: Node, writes: bool) -> str | None:
        module = node.module
        if node in outputs and writes:
            return _UNSAFE[OPTYPE.OUTPUT]
        if node.type in _UNSAFE:
            return _UNSAFE[node.type]
        if module in ignored and writes:
            return "is named in ignored_layers"
        if node.type in (OPTYPE.BN, OPTYPE.IN) and not module.affine and module.track_running_stats:
            return "crosses a norm layer without a scale, whose mean shifts zeros"
        if not node.inputs and (node.type in _CHANNELWISE or grouped(module)):
            return "goes channel by channel with an input of the model"
        if node.type == OPTYPE.DEPTHWISE_CONV and module.in_channels != module.out_channels:
            return "is coupled to a convolution that torch-pruning takes for a depthwise one"
        return None

    return objection


def _reason_against(roles: list[Role], names: Mapping[Tensor, str], frozen: set[Tensor]) -> str | None:
    """Why the tensors of a group must stay as they are, None if nothing speaks against it."""
    if any(role.tensor not in names for role in roles):
        return "holds parameters that are computed from others (parametrized)"
    if any(len(role.gates) != role.tensor.shape[role.dim] for role in roles):
        return "is broadcast over channels"
    if any(role.tensor in frozen for role in roles):
        return (
            "holds parameters that are frozen (requires_grad=False) or not in base_optimizer, which is to hold all "
            "that are trained"
        )
    if not any(role.kind == "consumers" for role in roles):
        return "is read by no layer of the model"
    return None


def _unknown(module: nn.Module, pruned: set[Tensor]) -> str | None:
    """Why no walk begins or ends at a layer with weights, none of them `pruned`, of a kind unknown to torch-pruning."""
    own = [p for p in module.parameters(recurse=False) if sum(n > 1 for n in p.shape) > 1]
    if own and pruned.isdisjoint(own) and tp.ops.module2type(module) in _UNTOLD:
        whole = next(module.children(), None) is None
        what = f"is a {type(module).__name__}" if whole else "holds weights besides its layers"
        return f"{what}: convolutions and linear layers of torch.nn are what is pruned"
    return None


class Discovery:
    """All groups that one traced model has: candidates, and what is left out and why.

    Args:
        model: traced once and changed: left in eval mode, all gradients required.
        ignored_layers, frozen: modules and parameters of `model` whose groups are left out.
        counts: MACs by module of a forward (see cost.counted).

    Attributes:
        candidates: what nothing in the graph speaks against.
        left_out: root layer -> reason.
        trains: whether the model takes the example inputs in training mode.
    """

    def __init__(
        self,
        model: nn.Module,
        example_inputs: Any,
        forward_fn: ForwardFn,
        ignored_layers: Iterable[nn.Module],
        frozen: Iterable[Tensor],
        counts: Mapping[str, int],
    ):
        called = {module for name, module in model.named_modules() if counts.get(name) and has_width(module)}
        traced = trace(model, example_inputs, forward_fn, called)
        self.trains = traced.training
        model.eval()
        self.shapes = {name: tuple(t.shape) for name, t in (*model.named_parameters(), *model.named_buffers())}
        self._names: dict[Tensor, str] = {t: name for name, t in (*model.named_buffers(), *model.named_parameters())}
        self._modules = {module: name for name, module in model.named_modules()}
        self.candidates: list[Candidate] = []
        self.left_out: dict[str, str] = {}
        ignored = {child for layer in ignored_layers for child in layer.modules()}
        self._find(Walker(traced.graph, _objection_to(traced.outputs, ignored)), set(frozen))
        self._refuse_conflicts()
        pruned = {role.tensor for candidate in self.candidates for role in candidate.roles}
        met = [module for module in traced.graph.module2node if isinstance(module, nn.Module)]  # and no parameter
        inside = {child for module in met for child in module.modules()}  # an attention's projection
        for module, name in self._modules.items():
            if has_width(module) and module not in traced.graph.module2node:
                if counts.get(name):
                    self.left_out[name] = _HIDDEN
                elif module.weight not in self._names:  # it is parametrized
                    continue
                elif module.weight not in traced.parameters:
                    self.left_out[name] = UNREACHED
                elif module not in inside and module.weight not in pruned:
                    self.left_out[name] = "is not called: its weight is read by another module"
        unknown = {name: _unknown(module, pruned) for module, name in self._modules.items()}
        self.left_out |= {name: reason for name, reason in unknown.items() if name and reason}  # the root is no layer

    def _find(self, walker: Walker, frozen: set[Tensor]) -> None:
        """Walk from every layer whose channels no earlier walk has met."""
        graph = walker.graph
        free = {
            module: torch.ones(graph.get_out_channels(node), dtype=torch.bool)
            for module, node in graph.module2node.items()
            if isinstance(module, (tp.ops.TORCH_CONV, tp.ops.TORCH_LINEAR))
        }
        for root in [module for module in self._modules if module in free]:
            channels = free[root].nonzero().flatten()
            if not len(channels):
                continue
            name = self._modules[root]
            try:
                if len(channels) == 1:
                    raise Unsafe("is one channel wide")
                for part, (size, touches) in enumerate(self._coupled(walker, root, channels)):
                    if size == 1:
                        raise Unsafe("has channels that can only go together")
                    roles = [role for touch in touches for role in _roles(touch)]
                    reason = _reason_against(roles, self._names, frozen)
                    if reason:
                        raise Unsafe(reason)
                    layers = _written_layers(touches, self._modules)
                    self.candidates.append(Candidate((name, part), size, layers, touches, roles))
                    for touch in touches:
                        if touch.writes and touch.node.module in free:
                            free[touch.node.module] &= touch.gates < 0
            except Unsafe as reason:
                self.left_out[name] = str(reason)

    def _coupled(self, walker: Walker, root: nn.Module, channels: Tensor) -> list[tuple[int, list[Touch]]]:
        """What is coupled to the output `channels` (k,) int64 of `root`: an entry for all that the same layers write.

        Where a layer writes a part of what is coupled, into a concatenation say, a mask over the whole could leave
        it nothing.
        """
        size, touches = walker.couple(root, channels)
        places = [touch for touch in touches if touch.writes and touch.node.module in self._modules]
        held = torch.zeros(len(places), size + 1, dtype=torch.bool)
        for row, touch in zip(held, places, strict=True):
            row[touch.gates] = True  # the last one stands for none
        part = held[:, :-1].unique(dim=1, return_inverse=True)[1]
        part_of_channel = part[touches[0].gates[channels]]
        parts = list(dict.fromkeys(part_of_channel.tolist()))
        if len(parts) == 1:
            return [(size, touches)]
        return [walker.couple(root, channels[part_of_channel == k]) for k in parts]

    def _refuse_conflicts(self) -> None:
        """Leave out groups that claim the same positions of one tensor, or one group that does so differently."""
        claimed: dict[tuple[str, int], tuple[Tensor, Tensor]] = {}
        refused: dict[tuple[str, int], str] = {}
        for k, candidate in enumerate(self.candidates):
            for role in candidate.roles:
                name = self._names[role.tensor]
                nobody = torch.full_like(role.gates, -1)
                owners, gates = claimed.setdefault((name, role.dim), (nobody, nobody.clone()))
                mine = role.gates >= 0
                clash = mine & (owners >= 0) & ((owners != k) | (gates != role.gates))
                for other in {k, *owners[clash].tolist()} if clash.any() else ():
                    refused[self.candidates[other].key] = f"shares {name} with layers that are cut differently"
                owners[mine], gates[mine] = k, role.gates[mine]
        self.refuse(refused)

    def refuse(self, reasons: Mapping[tuple[str, int], str]) -> None:
        """Leave out the groups of these keys, and name the layers of which no other group prunes a part."""
        refused = [candidate for candidate in self.candidates if candidate.key in reasons]
        self.candidates = [candidate for candidate in self.candidates if candidate.key not in reasons]
        pruned = {name for candidate in self.candidates for name in candidate.layers}
        for candidate in refused:
            for name in (candidate.key[0], *candidate.layers):
                if name not in pruned:
                    self.left_out.setdefault(name, reasons[candidate.key])

    def groups(self) -> Groups:
        """The tables of all candidates."""
        num_gates = sum(candidate.size for candidate in self.candidates)
        rows: dict[str, dict[tuple[str, int], Tensor]] = {"producers": {}, "consumers": {}, "followers": {}}
        sides: dict[tuple[str, bool], Tensor] = {}
        layers = []
        start = 0

        def fill(table: dict[Any, Tensor], key: Any, gates: Tensor, offset: int) -> None:
            row = table.setdefault(key, torch.full((len(gates),), num_gates))
            row[gates >= 0] = gates[gates >= 0] + offset

        for candidate in self.candidates:
            for role in candidate.roles:
                fill(rows[role.kind], (self._names[role.tensor], role.dim), role.gates, start)
            for touch in candidate.touches:
                if touch.node.module in self._modules:
                    fill(sides, (self._modules[touch.node.module], touch.writes), touch.gates, start)
            summed = _summed(candidate.touches)
            layers.append(LayerGroup(*candidate.key, start, candidate.size, candidate.layers, summed))
            start += candidate.size
        reasons = defaultdict(list)
        for name in self._modules.values():
            if name in self.left_out:
                reasons[self.left_out[name]].append(name)
        left_out = [LeftOut(tuple(roots), reason) for reason, roots in reasons.items()]
        producers, consumers, followers = (self._table(rows[kind]) for kind in rows)
        return Groups(layers, producers, consumers, followers, sides, left_out)

    def _table(self, rows: dict[tuple[str, int], Tensor]) -> GateTable:
        return GateTable(
            [name for name, _ in rows],
            [dim for _, dim in rows],
            [len(self.shapes[name]) for name, _ in rows],
            [len(row) for row in rows.values()],
            torch.cat(list(rows.values())) if rows else torch.empty(0, dtype=torch.long),
        )
