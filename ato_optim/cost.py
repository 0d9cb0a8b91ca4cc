"""MACs of the physically pruned network as an exact, differentiable function of the gates.

    MACs(w) = c_0 + sum over layers l of u_l * kept_in_l(w) * kept_out_l(w) + sum over layer groups j of s_j * open_j(w)

with u_l the MACs of layer l per pair of input and output channel, s_j those of products of activations (the heads of an
attention) per gate, c_0 whatever no gate changes, and kept counts linear in w. The yardstick is torch's FlopCounterMode
at two FLOPs a MAC. Counts are float64, which holds them to the unit up to 2^53.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from .graph import ForwardFn, call, grouped
from .groups import GateTable, Groups
from .threads import one_at_a_time


def _attention_flop(query: Any, key: Any, value: Any, *_: Any, **__: Any) -> int:
    """FLOPs of a fused attention from the shapes of its arguments; torch's own formula knew no shared keys for long."""
    return int(2 * math.prod(query[:-1]) * key[-2] * (query[-1] + value[-1]))


def _recurrent_flop(inputs: Any, matrices: Sequence[Any]) -> int:
    """FLOPs of a fused recurrent layer from shapes: each matrix meets each vector of the sequence, or its state."""
    return int(2 * math.prod(inputs[:-1]) * sum(math.prod(shape) for shape in matrices if len(shape) == 2))


def _grouped_flop(a: Any, b: Any, *_: Any, **__: Any) -> int:
    """FLOPs of grouped matrix products from shapes: groups are an axis of both, or runs of rows or columns of one."""
    groups = a[0] if len(a) == len(b) == 3 else 1
    return int(2 * groups * a[-2] * a[-1] * b[-1])


UNCOUNTED = {
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: _attention_flop,
    torch.ops.aten.mkldnn_rnn_layer: lambda x, *arguments, **_: _recurrent_flop(x, arguments[:2]),
    torch.ops.aten._cudnn_rnn: lambda x, weights, *_, **__: _recurrent_flop(x, weights),
}
"""Fused operations that FlopCounterMode takes for free: a model's MACs shall not depend on device and dtype."""
if hasattr(torch.ops.aten, "_grouped_mm"):  # not in the oldest torch
    UNCOUNTED[torch.ops.aten._grouped_mm] = _grouped_flop


@one_at_a_time
def counted(model: nn.Module, example_inputs: Any, forward_fn: ForwardFn = call) -> tuple[Any, dict[str, int]]:
    """The outputs of one forward in eval mode, and its MACs by module name; the empty name has the total.

    Modules with a weight of their own are listed, wherever they are called from, under their first name. The fused
    attention path goes uncounted by torch and is switched off meanwhile.
    """
    training = {module: module.training for module in model.modules()}
    required = [p for p in model.parameters() if p.requires_grad]
    fastpath = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        try:
            return _counted(model.eval(), example_inputs, forward_fn)
        except Exception:
            # FlopCounterMode looks in the graph for what requires gradients, and a parameter's view is in none here. A
            # forward may differentiate by its parameters, so that they are not switched off at once.
            for parameter in required:
                parameter.requires_grad_(False)
            return _counted(model, example_inputs, forward_fn)
    finally:
        torch.backends.mha.set_fastpath_enabled(fastpath)
        for parameter in required:
            parameter.requires_grad_(True)
        for module, flag in training.items():
            module.training = flag


def _counted(model: nn.Module, example_inputs: Any, forward_fn: ForwardFn) -> tuple[Any, dict[str, int]]:
    names = {module: name for name, module in model.named_modules()}
    counts: dict[str, int] = dict.fromkeys(names.values(), 0)
    handles = []
    try:
        with torch.no_grad(), FlopCounterMode(display=False, custom_mapping=UNCOUNTED) as counter:

            def begin(module: nn.Module, _: Any) -> None:
                counts[names[module]] -= counter.get_total_flops() // 2

            def end(module: nn.Module, _: Any, output: Any) -> None:
                counts[names[module]] += counter.get_total_flops() // 2

            for module in names:
                if has_width(module):
                    handles += [module.register_forward_pre_hook(begin), module.register_forward_hook(end)]
            outputs = forward_fn(model, example_inputs)
    finally:
        for handle in handles:
            handle.remove()
    counts[""] = counter.get_total_flops() // 2
    return outputs, counts


def count_macs(model: nn.Module, example_inputs: Any, forward_fn: ForwardFn = call) -> int:
    """MACs of one forward in eval mode."""
    return counted(model, example_inputs, forward_fn)[1][""]


def has_width(module: nn.Module) -> bool:
    """Whether `module` is a convolution or linear layer, whose MACs the gates change."""
    return isinstance(module, (nn.Linear, nn.modules.conv._ConvNd))


@dataclass(frozen=True)
class Kept:
    """Counts of kept channels of each layer, linear in the gates: fixed + sum of the gates at `gate`."""

    fixed: Tensor
    layer: Tensor
    gate: Tensor

    def __call__(self, gates: Tensor) -> Tensor:
        """Channels that are kept (layers,) if `gates` (gates,) are open."""
        return self.fixed.index_add(0, self.layer, gates[self.gate])

    def extended(self, fixed: float, gates: Tensor) -> Kept:
        """The same with one layer more, which keeps `fixed` channels and those of `gates` (k,) int64."""
        layer = torch.full_like(gates, len(self.fixed))
        return Kept(
            torch.cat([self.fixed, self.fixed.new_tensor([fixed])]),
            torch.cat([self.layer, layer]),
            torch.cat([self.gate, gates]),
        )


@dataclass(frozen=True)
class CostModel:
    """MACs of one forward on the example inputs, or another count, as a function of the gates (gates,)."""

    constant: float
    unit: Tensor
    inputs: Kept
    outputs: Kept
    num_gates: int

    def __call__(self, gates: Tensor) -> Tensor:
        """The count, a float64 scalar, for `gates` (gates,) of any float dtype or bool; differentiable in them."""
        gates = gates.double()
        return self.constant + (self.unit * self.inputs(gates) * self.outputs(gates)).sum()

    @cached_property
    def dense(self) -> float:
        """The count with all gates open."""
        return self(torch.ones(self.num_gates, device=self.unit.device)).item()


def _kept(table: GateTable, num_gates: int, slots: dict[tuple[str, int], int], totals: list[int]) -> Kept:
    """Kept counts of the layers whose (weight, dimension) has a slot, from the gates in `table`."""
    fixed = torch.tensor(totals, dtype=torch.float64)
    layers, gates = [], []
    for name, dim, rows in zip(table.names, table.dims, table.gate.split(table.sizes), strict=True):
        slot = slots.get((name, dim))
        if slot is not None:
            rows = rows[rows < num_gates]
            fixed[slot] -= len(rows)
            layers.append(torch.full((len(rows),), slot))
            gates.append(rows)
    empty = torch.empty(0, dtype=torch.long)
    return Kept(fixed, torch.cat([empty, *layers]), torch.cat([empty, *gates]))


def build_cost(
    model: nn.Module, groups: Groups, counts: dict[str, int], slopes: Mapping[tuple[str, int], float] | None = None
) -> CostModel:
    """The cost model of `model` under `groups`, from its own `counts` (see counted).

    `slopes` are what a gate costs outside of layers, by the keys of layer groups; where it is missing, nothing.
    """
    # One entry a weight: layers that share a weight share its widths, and their MACs add up.
    names: dict[Tensor, str] = {p: name for name, p in model.named_parameters()}
    index: dict[str, int] = {}
    units: list[float] = []
    totals: tuple[list[int], list[int]] = ([], [])
    slots: tuple[dict[tuple[str, int], int], dict[tuple[str, int], int]] = ({}, {})
    rest = counts[""]
    for name, module in model.named_modules():
        if not has_width(module) or not counts.get(name) or module.weight not in names:  # or it is parametrized
            continue
        # What a group of a grouped convolution costs is the same whatever is removed: its rows alone count.
        rows_alone = grouped(module)
        out_dim = int(getattr(module, "transposed", False) and not rows_alone)
        sizes = 1 if rows_alone else module.weight.shape[1 - out_dim], module.weight.shape[out_dim]
        weight = names[module.weight]
        if weight not in index:
            index[weight] = len(units)
            units.append(0.0)
            for side, dim in enumerate((1 - out_dim, out_dim)):
                totals[side].append(sizes[side])
                slots[side][weight, dim] = index[weight]
        units[index[weight]] += counts[name] / (sizes[0] * sizes[1])
        rest -= counts[name]
    inputs = _kept(groups.consumers, groups.num_gates, slots[0], totals[0])
    outputs = _kept(groups.producers, groups.num_gates, slots[1], totals[1])
    sloping = [(slopes[layer.key], layer) for layer in groups.layers if slopes and layer.key in slopes]
    for slope, layer in sloping:  # one more layer, of one input
        gates = torch.arange(layer.gates.start, layer.gates.stop)
        outputs = outputs.extended(0.0, gates)
        inputs = inputs.extended(1.0, gates[:0])
        units.append(slope)
    constant = rest - sum(slope * layer.size for slope, layer in sloping)
    return CostModel(float(constant), torch.tensor(units, dtype=torch.float64), inputs, outputs, groups.num_gates)
