"""Zero-invariant groups as frozen tables: which entries of which tensor produce a channel, and which read it.

Terms are those of docs/method.md; a zero-invariant group is Chen et al.'s (OTO, arXiv:2107.07467).
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor, nn

from .sharding import like, whole


def segment_sums(values: Tensor, lengths: Tensor) -> Tensor:
    """Sums (segments,) of `values`, whose segments follow each other and have `lengths` (segments,); differentiable."""
    # index_add on an accelerator adds in any order, and each rank would get another sum.
    every, starts = torch.arange(len(values), device=values.device), lengths.cumsum(0) - lengths
    return nn.functional.embedding_bag(every, values[:, None], starts, mode="sum")[:, 0]


@dataclass(frozen=True)
class LayerGroup:
    """Channels that are pruned by one row of gates: a root layer and all that is coupled to it."""

    root: str
    """Name of the module from which torch-pruning reaches the others."""
    part: int
    """Which part of the root's channels, where they are pruned in several."""
    start: int
    """Its first gate."""
    size: int
    """How many gates it has."""
    layers: dict[str, int]
    """Names of the convolutions and linear layers whose outputs it prunes, the root among them, and how many channels
    of each a gate has, 0 if some have more than others."""
    summed: bool
    """Whether what it prunes is added up somewhere: a residual stream."""

    @property
    def key(self) -> tuple[str, int]:
        """What it is called, whichever other groups there are."""
        return self.root, self.part

    @property
    def gates(self) -> slice:
        """Where its gates are among all."""
        return slice(self.start, self.start + self.size)


@dataclass(frozen=True)
class LeftOut:
    """Layers that are not pruned, and why."""

    layers: tuple[str, ...]
    reason: str


@dataclass(frozen=True)
class GateTable:
    """For each of several parameters: along one dimension, the gate of every position.

    `gate` holds all positions of all parameters one after the other, int64; positions that belong to no
    gate hold the number of gates, so that a value appended to a vector over gates stands for them.
    """

    names: list[str]
    dims: list[int]
    ndims: list[int]
    sizes: list[int]
    gate: Tensor

    def parameters(self, model: nn.Module) -> list[Tensor]:
        """The parameters' data: views whose changes autograd's version counters do not see.

        Raises ValueError if one is not there any more.
        """
        try:
            return [model.get_parameter(name).data for name in self.names]
        except AttributeError as error:
            raise ValueError(
                f"model has changed since ATO was built ({error}): parametrize, fuse or replace layers before ATO is "
                "built, or after compress()"
            ) from error

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

    def sum(self, tensors: Iterable[Tensor], gates: int) -> Tensor:
        """Sums of `tensors`, shaped like the parameters, over all entries of each gate: (gates,), at least float32."""
        rows = [
            whole(t if n == 1 else t.sum([d for d in range(n) if d != dim]))
            for t, dim, n in zip(tensors, self.dims, self.ndims, strict=True)
        ]
        values = torch.cat([row.to(torch.promote_types(row.dtype, torch.float32)) for row in rows])
        return segment_sums(values[self._order], nn.functional.pad(self._counts, (0, gates + 1 - len(self._counts))))[
            :gates
        ]

    @cached_property
    def _order(self) -> Tensor:
        """All positions, gate by gate."""
        return self.gate.argsort(stable=True)

    @cached_property
    def _counts(self) -> Tensor:
        """How many positions each gate has, as far as there are any: counted once, for the count waits for a GPU."""
        return self.gate.bincount()

    @torch.no_grad()
    def largest_closed(self, model: nn.Module, mask: Tensor) -> float:
        """How much `model` holds of a gate that `mask` (gates,) bool closes: the largest sum of absolute entries.

        NaN if there is one among the entries.
        """
        if not self.names or mask.all():
            return 0.0
        return self.sum([p.abs() for p in self.parameters(model)], len(mask))[~mask].max().item()

    def to(self, device: torch.device) -> GateTable:
        """The same on `device`."""
        return GateTable(self.names, self.dims, self.ndims, self.sizes, self.gate.to(device))


@dataclass(frozen=True)
class Groups:
    """All that can be pruned in one model, by names: it holds for every copy of the model."""

    layers: list[LayerGroup]
    producers: GateTable
    """Entries that are zero when the channel is closed."""
    consumers: GateTable
    """Entries that read it."""
    followers: GateTable
    """Entries of parameters and buffers that only go with it: slopes of PReLU, norm statistics."""
    sides: dict[tuple[str, bool], Tensor]
    """(module, whether its outputs) -> (channels,) int64: the gate of each channel, num_gates for none."""
    left_out: list[LeftOut]

    @property
    def num_gates(self) -> int:
        """Gates of all layer groups together."""
        return sum(layer.size for layer in self.layers)

    def layer_of_gate(self) -> Tensor:
        """(gates,) int64: the index of each gate's layer group."""
        sizes = torch.tensor([layer.size for layer in self.layers], dtype=torch.long)
        return torch.arange(len(self.layers)).repeat_interleave(sizes)

    def channels(self) -> Tensor:
        """(gates,) int64: how many channels of its layer group's root each gate opens."""
        channels = torch.zeros(self.num_gates, dtype=torch.long)
        for layer in self.layers:
            opened_by = self.sides[layer.root, True]
            channels[layer.gates] = torch.bincount(opened_by, minlength=layer.gates.stop)[layer.gates]
        return channels

    def to(self, device: torch.device) -> Groups:
        """The same on `device`."""
        producers, consumers, followers = (t.to(device) for t in (self.producers, self.consumers, self.followers))
        return Groups(self.layers, producers, consumers, followers, self.sides, self.left_out)
