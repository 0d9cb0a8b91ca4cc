"""All that is settled about a model before its training begins: groups, cost, and the proof that they are right."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from .budget import least_mask, minimum_widths
from .conditions import forked_rng, other_counts
from .copies import copy_model
from .cost import CostModel, build_cost, counted
from .default_device import on_cpu
from .discovery import Discovery
from .graph import ForwardFn
from .groups import Groups
from .nests import fresh
from .proof import Trial, named
from .report import Width
from .threads import one_at_a_time
from .warn import warn


@dataclass(frozen=True)
class Plan:
    """Groups and cost of one model: the tables of its groups on the model's device, all else on the CPU.

    Attributes:
        groups: what can be pruned, and what not and why.
        cost: MACs as a function of the gates.
        layer_of_gate: (gates,) int64, the layer group of each gate.
        channels: (gates,) int64, how many channels of the root of its layer group each gate opens.
        sizes: (layers,) int64, how many gates each layer group has.
        summed: (layers,) bool, which of them are residual streams.
        shapes: of all parameters, by name, before anything is removed.
    """

    groups: Groups
    cost: CostModel
    layer_of_gate: Tensor
    channels: Tensor
    sizes: Tensor
    summed: Tensor
    shapes: dict[str, tuple[int, ...]]

    @property
    def device(self) -> torch.device:
        """The model's."""
        return self.groups.producers.gate.device

    def share(self, mask: Tensor) -> float:
        """Share of the dense MACs with the gates that are True in `mask` (gates,) open."""
        dense = self.cost.dense
        return self.cost(mask.cpu()).item() / dense if dense else 1.0

    def count_parameters(self, mask: Tensor) -> int:
        """Entries of all parameters when the gates (gates,) that are False in `mask` are removed."""
        sizes = {name: list(shape) for name, shape in self.shapes.items()}
        for table in (self.groups.producers, self.groups.consumers, self.groups.followers):
            for name, dim, open_ in zip(table.names, table.dims, table.split(mask.to(self.device)), strict=True):
                if name in sizes:
                    sizes[name][dim] = int(open_.sum())
        return sum(math.prod(shape) for shape in sizes.values())

    def lots(self, round_to: int) -> Tensor:
        """Gates (layers,) int64 that go together for widths that are multiples of `round_to` channels."""
        lots = [
            math.lcm(*(round_to // math.gcd(channels, round_to) for channels in layer.layers.values()))
            for layer in self.groups.layers
        ]
        return torch.tensor(lots, dtype=torch.long, device="cpu")

    def stream_widths(self, min_width: float, round_to: int, limit: float) -> Tensor:
        """Minimum widths (layers,) int64 in which residual streams keep as many channels as they can.

        That is the largest share of them, from 1 down to `min_width`, with which the network costs at most `limit` of
        the dense MACs when all other layer groups are at `min_width`.
        """
        lots = self.lots(round_to)
        for width in torch.linspace(1, min_width, 101, dtype=torch.float64, device="cpu").tolist():
            least = minimum_widths(self.sizes, min_width + (width - min_width) * self.summed.double(), lots)
            if self.share(least_mask(self.layer_of_gate, least)) <= limit:
                break
        return least

    def facts(self, mask: Tensor, least: Tensor) -> dict[str, Any]:
        """What a Report says of the model, of `mask` (gates,) bool, and of `least`, what all masks of the run open."""
        mask = mask.cpu()
        dense = torch.ones_like(mask)
        return {
            "prunable_flops": 1 - self.share(torch.zeros_like(mask)),
            "macs_before": round(self.cost.dense),
            "macs_after": round(self.cost(mask).item()),
            "parameters_before": self.count_parameters(dense),
            "parameters_after": self.count_parameters(mask),
            "widths": tuple(
                Width(
                    tuple(layer.layers),
                    *(int(self.channels[layer.gates][which[layer.gates]].sum()) for which in (dense, least, mask)),
                )
                for layer in self.groups.layers
            ),
            "left_out": tuple((entry.layers, entry.reason) for entry in self.groups.left_out),
        }


@one_at_a_time
@on_cpu
def make_plan(
    model: nn.Module,
    example_inputs: Any,
    forward_fn: ForwardFn,
    ignored: list[nn.Module],
    trained: set[Any],
    min_width: float = 0.1,
) -> Plan:
    """The plan of `model`, which is not touched, nor are `example_inputs` and the global random states.

    Groups with parameters outside of `trained` are left alone, and so are those that fail the trial, also of a network
    whose layers have no more than `min_width` of their channels.

    Raises:
        ValueError: if the model refuses the example inputs, or torch-pruning the model.
    """
    device = next(model.parameters()).device
    forward_fn = _on_fresh_inputs(forward_fn)
    with forked_rng(device):
        copied = copy_model(model)
        counts = _layer_counts(model, copied, example_inputs, forward_fn)
        twin = dict(zip(model.modules(), copied.modules(), strict=True))
        parameters = dict(zip(model.parameters(), copied.parameters(), strict=True))
        frozen = [there for here, there in parameters.items() if here not in trained]
        try:
            found = Discovery(copied, example_inputs, forward_fn, [twin[layer] for layer in ignored], frozen, counts)
        except (ArithmeticError, AttributeError, LookupError, RuntimeError, TypeError) as error:
            raise ValueError(
                f"model ({type(model).__name__}) cannot be traced by torch-pruning ({named(error)}): "
                "pass a forward_fn that runs the part which is to be pruned, and returns its outputs"
            ) from error
        trial = Trial(copied, example_inputs, forward_fn, found.trains, counts[""], min_width)
        groups = found.groups()
        while failed := trial.failures(groups):
            found.refuse(failed)
            groups = found.groups()
        cost = build_cost(copied, groups, counts, trial.slopes)
    return Plan(
        groups.to(device),
        cost,
        groups.layer_of_gate(),
        groups.channels(),
        torch.tensor([layer.size for layer in groups.layers], dtype=torch.long),
        torch.tensor([layer.summed for layer in groups.layers], dtype=torch.bool),
        {name: tuple(p.shape) for name, p in model.named_parameters()},
    )


def _on_fresh_inputs(forward_fn: ForwardFn) -> ForwardFn:
    """`forward_fn`, which gets a copy of the example inputs each time: a forward may write into them."""
    return lambda model, example_inputs: forward_fn(model, fresh(example_inputs))


def _layer_counts(model: nn.Module, copied: nn.Module, example_inputs: Any, forward_fn: ForwardFn) -> dict[str, int]:
    """MACs by layer (see counted) of `copied`, a copy of `model`; refused if it cannot run, or leaves out layers."""
    try:
        _, counts = counted(copied, example_inputs, forward_fn)
    except Exception as error:
        alone = ", its layers alone if it differentiates" if "grad" in str(error) else ""
        raise ValueError(
            f"example_inputs ({_describe(example_inputs)}) are refused by the model on "
            f"{next(model.parameters()).device} ({named(error)}): pass what one forward takes, or a "
            f"forward_fn that runs it{alone}"
        ) from error
    others = other_counts(copied, example_inputs, forward_fn, counts)
    uneven = sorted(name for name in counts if name and counts[name] != others[name])
    for layer in uneven:
        if not counts[layer] or not others[layer]:
            raise ValueError(
                f"model ({type(model).__name__}) calls its layer '{layer}' for some inputs only: what holds for one "
                "forward need not hold for another. Pass a forward_fn that runs all of its layers"
            )
    if uneven:
        warn(
            f"model ({type(model).__name__}) gives its layer '{uneven[0]}' more to do for some inputs than for others: "
            "MACs, and the budget, are those of a forward on example_inputs with the weights of now",
        )
    return counts


def _describe(inputs: Any) -> str:
    if isinstance(inputs, Tensor):
        return f"a tensor of shape {tuple(inputs.shape)}, {inputs.dtype}, on {inputs.device}"
    return f"a {type(inputs).__name__}"
