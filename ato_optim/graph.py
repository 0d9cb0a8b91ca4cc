"""What is coupled to one layer's channels, read off torch-pruning's dependency graph in one walk.

torch-pruning's own search lists positions one by one and compares each list with all it has met, which takes it
minutes on dense connections and never ends on some slices. Here a walk carries one array a place: for every
position of the channels' axis the channel of the root layer that it goes with, or -1. Where two channels meet in
one position (a sum, a grouped convolution, a slice of the layer itself) they can only go together.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Set
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch_pruning as tp
from torch import Tensor, nn
from torch_pruning.dependency import Node
from torch_pruning.ops import OPTYPE

from .axes import Move, Unsafe, channel_axis, mover, moves_by_name
from .guard import build_graph
from .nests import tensors_in

ForwardFn = Callable[[nn.Module, Any], Any]

MOST_PLACES = 100_000
"""Places that the walks of one graph may visit together: twelve times what densenet201 takes, with its dense blocks."""


def call(model: nn.Module, example_inputs: Any) -> Any:
    """`model` on `example_inputs`: a tensor is its argument, a tuple or list its arguments, a dict its keywords."""
    if isinstance(example_inputs, Mapping):
        return model(**example_inputs)
    if isinstance(example_inputs, (tuple, list)):
        return model(*example_inputs)
    return model(example_inputs)


@dataclass(frozen=True)
class Trace:
    """torch-pruning's `graph` of one forward of a model.

    Attributes:
        outputs: the nodes that write the model's outputs.
        parameters: those that the outputs depend on, as autograd sees it.
        training: whether it is a forward in training mode.
    """

    graph: tp.DependencyGraph
    outputs: set[Node]
    parameters: set[Tensor]
    training: bool


def trace(model: nn.Module, example_inputs: Any, forward_fn: ForwardFn, called: Set[nn.Module]) -> Trace:
    """The trace of a forward in training mode, which runs auxiliary heads, or in eval mode.

    That is where the model wants targets in training mode, or leaves out, as stochastic depth does, some of the modules
    that are `called` in eval mode, and runs no others. All parameters of `model` that can do so require gradients
    afterwards.
    """
    for parameter in model.parameters():
        parameter.requires_grad_(parameter.is_floating_point() or parameter.is_complex())
    try:
        trained = _trace(model.train(), example_inputs, forward_fn)
    except Exception:
        return _trace(model.eval(), example_inputs, forward_fn)
    modules = set(model.modules())
    reached = modules & trained.graph.module2node.keys()
    if called <= reached:
        return trained
    evaluated = _trace(model.eval(), example_inputs, forward_fn)
    return evaluated if reached < modules & evaluated.graph.module2node.keys() else trained


def _trace(model: nn.Module, example_inputs: Any, forward_fn: ForwardFn) -> Trace:
    outputs: list[Tensor] = []
    training = model.training

    def forward(model: nn.Module, inputs: Any) -> list[Tensor]:
        model.train(training)  # torch-pruning has put it in eval mode
        found = [t for t in tensors_in(forward_fn(model, inputs)) if t.requires_grad]
        outputs.extend(found)
        return found

    with torch.enable_grad(), warnings.catch_warnings(), _out_of_place(model):
        warnings.simplefilter("ignore")
        graph = build_graph(model, example_inputs, forward_fn=forward)
    if not outputs:
        raise ValueError(
            f"model ({type(model).__name__}) gives no output with a gradient for example_inputs, so that its layers "
            "cannot be traced: pass a forward_fn that runs it without torch.no_grad() and detach()"
        )
    functions = {t.grad_fn for t in outputs}
    writers = {node for node in graph.module2node.values() if node.grad_fn in functions}
    return Trace(graph, writers, _leaves(functions), training)


@contextmanager
def _out_of_place(model: nn.Module) -> Iterator[None]:
    """Activations give new tensors: one that changes a view takes the place of the layer that wrote it in autograd."""
    changing = [module for module in model.modules() if getattr(module, "inplace", False) is True]
    for module in changing:
        vars(module)["inplace"] = False
    try:
        yield
    finally:
        for module in changing:
            vars(module)["inplace"] = True


def _leaves(functions: Iterable[Any]) -> set[Tensor]:
    """The tensors to which autograd's `functions` pass gradients in the end."""
    seen, stack = set(functions), list(functions)
    while stack:
        following = {function for function, _ in getattr(stack.pop(), "next_functions", ())} - seen
        seen |= following
        stack += following
    return {function.variable for function in seen if hasattr(function, "variable")}


def grouped(module: Any) -> bool:
    """Whether `module` is a convolution whose channels go group by group."""
    return isinstance(module, nn.modules.conv._ConvNd) and module.groups > 1


@dataclass(frozen=True)
class Touch:
    """Channels of one module, operation or parameter that go with the root's."""

    node: Node
    writes: bool
    """Whether they are its output channels; those of an operation, a norm or a parameter are both."""
    gates: Tensor
    """(channels,) int64: the gate of each, -1 for none."""


@dataclass(frozen=True)
class Place:
    """The input or output channels of a node, as torch-pruning tells them apart: by the function that prunes them."""

    node: Node
    prune: Callable[..., Any]


class Walker:
    """Walks of one `graph`; `objection` gives the reason against channels that come to a node, or None."""

    def __init__(self, graph: tp.DependencyGraph, objection: Callable[[Node, bool], str | None]):
        self.graph, self.objection = graph, objection
        self.visits = 0
        self._edges: dict[Place, list[tuple[Place, list[Move]]]] = {}
        self._sizes: dict[Place, int | None] = {}

    def couple(self, root: nn.Module, channels: Tensor) -> tuple[int, list[Touch]]:
        """How many gates the output `channels` (k,) int64 of `root` have, and all that is coupled to them.

        Raises:
            Unsafe: if they have to stay.
        """
        start = self._place(self.graph.module2node[root], writes=True)
        size = self._size(start)
        assert size is not None
        labels = torch.full((size,), -1)
        labels[channels] = channels
        seen = {start: labels}
        pairs: list[tuple[Tensor, Tensor]] = []
        stack = [start]
        while stack:
            place = stack.pop()
            self._check(place)
            try:
                stack += [
                    other
                    for other, arriving in self._reached(place, seen[place])
                    if self._merge(seen, other, arriving, pairs)
                ]
            except (ArithmeticError, AttributeError, LookupError, RuntimeError, TypeError) as error:
                # Of an operation that torch-pruning takes for another by its name, say.
                reason = f"is followed no further than to {self._name(place.node)} ({type(error).__name__}: {error})"
                raise Unsafe(reason) from error
        gates = _together(size, pairs)
        used, gates[channels] = gates[channels].unique(return_inverse=True)
        return len(used), [
            Touch(place.node, self._writes(place), torch.where(found < 0, -1, gates[found]))
            for place, found in seen.items()
        ]

    def _place(self, node: Node, writes: bool) -> Place:
        pruner = self.graph.get_pruner_of_module(node.module)
        return Place(node, pruner.prune_out_channels if writes else pruner.prune_in_channels)

    def _name(self, node: Node) -> str:
        """The module's or parameter's name in the model, or the operation's in autograd."""
        named = self.graph._param_to_name.get(node.module) or node._name
        return str(named or getattr(node.grad_fn, "name", lambda: node.name)())

    def _writes(self, place: Place) -> bool:
        return place.prune == self._place(place.node, writes=True).prune

    def _size(self, place: Place) -> int | None:
        """How many channels there are, None for an operation."""
        if place not in self._sizes:
            count = self.graph.get_out_channels if self._writes(place) else self.graph.get_in_channels
            self._sizes[place] = None if place.node.type == OPTYPE.OUTPUT else count(place.node)
        return self._sizes[place]

    def _check(self, place: Place) -> None:
        self.visits += 1
        if self.visits > MOST_PLACES:  # no measure of time: all ranks of a run shall plan alike
            raise Unsafe(f"is coupled to more than is followed ({MOST_PLACES} places), up to {self._name(place.node)}")
        reason = self.objection(place.node, self._writes(place))
        if reason:
            raise Unsafe(reason)

    def _reached(self, place: Place, labels: Tensor) -> Iterator[tuple[Place, Tensor]]:
        """The places next to `place`, and the labels that come there."""
        node = place.node
        if grouped(node.module):
            whole = labels.view(node.module.groups, -1).amax(1)
            for writes in (True, False):
                there = self._place(node, writes)
                size = self._size(there)
                assert size is not None
                yield there, whole.repeat_interleave(size // len(whole))
        if place not in self._edges:
            self._edges[place] = [
                (Place(dep.target, dep.handler), _moves(node, k))
                for k, dep in enumerate(node.dependencies)
                if dep.is_triggered_by(place.prune)
            ]
        for other, moves in self._edges[place]:
            arriving = labels
            for move in moves:
                arriving = move(arriving)
            if not (_back_to_operand(node, other.node) and len(arriving) not in _operand_shape(other.node, arriving)):
                if other.node.type == OPTYPE.PARAMETER and other not in self._sizes and arriving.ndim == 1:
                    _orient(other.node, _operand_shape(node, arriving), len(arriving))
                yield other, arriving

    def _merge(
        self, seen: dict[Place, Tensor], place: Place, labels: Tensor, pairs: list[tuple[Tensor, Tensor]]
    ) -> bool:
        """Whether `labels` (positions,) or (positions, several) are news to `place`; pairs that meet are noted."""
        several = labels.view(len(labels), -1)
        labels = several.amax(1)
        size = self._size(place)
        if size == 1 < len(labels) or not (labels >= 0).any():  # broadcast: the one channel does not carry the others
            return False
        if size not in (None, len(labels)):
            raise Unsafe(f"has {len(labels)} channels where {self._name(place.node)} has {size}")
        known = seen.get(place)
        if known is not None and len(known) != len(labels):
            raise Unsafe(f"is read as {len(known)} and as {len(labels)} channels at {self._name(place.node)}")
        columns = [*several.unbind(1), *([] if known is None else [known])]
        for column in columns:
            meet = (column >= 0) & (labels >= 0) & (column != labels)
            if meet.any():
                pairs.append((column[meet], labels[meet]))
        merged = labels if known is None else torch.where(known < 0, labels, known)
        seen[place] = merged
        return known is None or not torch.equal(merged, known)


def _orient(node: Node, beside: tuple[int, ...], size: int) -> None:
    """Let a parameter be cut along the axis that meets the `size` channels of a tensor of shape `beside`.

    torch-pruning takes the last axis, which in a map that is added to a convolution's is the width.
    """
    axis = channel_axis(size, beside)
    dim = -1 if axis is None else axis - len(beside) + node.module.ndim
    if dim >= 0 and node.module.shape[dim] == size:
        node.pruning_dim = dim


def _back_to_operand(node: Node, other: Node) -> bool:
    """Whether the way from `node` to `other` leads back from an operation, entry by entry, to what it reads."""
    return node.type == OPTYPE.ELEMENTWISE and other in node.inputs and other not in node.outputs


def _operand_shape(node: Node, labels: Tensor) -> tuple[int, ...]:
    """The shape of what `node` is or writes; that of `labels` if it is not known.

    What has no axis of as many positions as there are labels is broadcast: an entry of a vector, say.
    """
    if node.type == OPTYPE.PARAMETER:
        return tuple(node.module.shape)
    written: list[Any] = list(getattr(node.grad_fn, "_input_metadata", ()))
    return tuple(written[0].shape) if len(written) == 1 else tuple(labels.shape)


def _is_product(node: Node) -> bool:
    return str(getattr(node.grad_fn, "name", str)()).startswith(("AddmmBackward", "MmBackward"))


def _moves(node: Node, k: int) -> list[Move]:
    """What happens to labels at `node` on their way over its edge number `k`: edges to its inputs come first."""
    forward = k >= len(node.inputs)
    neighbours = node.outputs[: k - len(node.inputs) + 1] if forward else node.inputs[: k + 1]
    source, reader = (node, neighbours[-1]) if forward else (neighbours[-1], node)
    # Several edges between the same two follow each other in the order in which autograd holds them.
    twins = sum(other is neighbours[-1] for other in neighbours[:-1])
    functions = getattr(reader.grad_fn, "next_functions", ())
    same = [(argument, output) for argument, (fn, output) in enumerate(functions) if fn is source.grad_fn]
    argument, output = same[twins] if twins < len(same) else (0, 0)
    moves = []
    if source.type == OPTYPE.SPLIT:
        moves.append(mover(source.type, source.grad_fn, output, forward))
    if reader.type in (OPTYPE.CONCAT, OPTYPE.SLICE, OPTYPE.RESHAPE):
        # torch folds the leading dimensions for the product of a linear layer: its channels are last.
        last = any(_is_product(other) for other in (*reader.inputs, *reader.outputs))
        moves.append(mover(reader.type, reader.grad_fn, argument, forward, last))
    if reader.type == OPTYPE.ELEMENTWISE:
        moves += moves_by_name(reader.grad_fn, argument, forward)
    if reader.type == OPTYPE.IN and hasattr(reader.grad_fn, "_saved_self_sym_sizes"):
        # torch folds the batch into the channels of an instance norm, and back at its end.
        moves.append(mover(OPTYPE.RESHAPE, reader.grad_fn, argument, forward))
    return moves if forward else moves[::-1]


def _together(size: int, pairs: list[tuple[Tensor, Tensor]]) -> Tensor:
    """(size,) int64: for each channel the least of those that `pairs` tie it to, directly or through others."""
    least = torch.arange(size)
    if not pairs:
        return least
    one, other = (torch.cat(side) for side in zip(*pairs, strict=True))
    while True:
        before = least.clone()
        least.scatter_reduce_(0, one, before[other], "amin")
        least.scatter_reduce_(0, other, before[one], "amin")
        least = least[least]
        if torch.equal(least, before):
            return least
