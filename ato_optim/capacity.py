"""What a mask leaves of a network's capacity: branches add up, what is in series multiplies."""

from __future__ import annotations

import torch
from torch import Tensor

from .cost import CostModel


def _components(linked: Tensor) -> Tensor:
    """The connected component (nodes,) int64 of each node of a symmetric graph (nodes, nodes) bool: its least node."""
    nodes = torch.arange(len(linked), device=linked.device)
    component, linked = nodes, linked | (nodes == nodes[:, None])
    while True:
        least = torch.where(linked, component, len(linked)).amin(1)
        if torch.equal(least, component):
            return component
        component = least


def find_series(cost: CostModel, layer_of_gate: Tensor, summed: Tensor) -> tuple[Tensor, Tensor]:
    """The chain (layers,) and the stage (layers,), both int64, that each layer group belongs to.

    Where a weight reads the channels of one group and writes those of another, the two are in series: a chain. A
    residual stream ends chains: what lies between two of its sums is a branch of its own. The chains that write the
    same stream are a stage; a chain that writes none, and each stream, is one by itself.

    Args:
        cost: whose weights say which gates they read and write.
        layer_of_gate: (gates,) int64.
        summed: (layers,) bool, which groups are residual streams.
    """
    reads, writes = (
        torch.zeros(len(cost.unit), len(summed), device=summed.device).index_put_(
            (side.layer, layer_of_gate[side.gate]), torch.ones((), device=summed.device)
        )
        for side in (cost.inputs, cost.outputs)
    )
    series = reads.T @ writes > 0
    branch = ~summed[:, None] & ~summed
    in_chain = (series | series.T) & branch
    into_stream = (series & summed).float()
    return _components(in_chain), _components(in_chain | ((into_stream @ into_stream.T > 0) & branch))


def capacity(shares: Tensor, channels: Tensor, chain: Tensor, stage: Tensor) -> Tensor:
    """A scalar in (0, 1]: the geometric mean of the stages' capacities, weighted by their channels.

    A stage has that of its chains added up, in channels; a chain has the geometric mean of its layers' shares. The
    narrowest layer limits what is in series, so that widths multiply there; branches of one stream are a sum of what
    each can do. Differentiable in `shares`.

    Args:
        shares: of the channels of each layer group that are kept (layers,), above 0.
        channels: of each layer group (layers,), without a mask.
        chain, stage: (layers,) int64, as of find_series.
    """
    weight = channels.to(shares)
    zeros = shares.new_zeros(int(torch.stack((chain, stage)).max()) + 1)
    length = zeros.index_add(0, chain, torch.ones_like(shares))
    mean = (zeros.index_add(0, chain, shares.log()) / length.clamp_min(1)).exp()
    whole = zeros.index_add(0, stage, weight)
    left = zeros.index_add(0, stage, weight * mean[chain])
    present = whole > 0
    return ((left[present] / whole[present]).log() * whole[present]).sum().div(weight.sum()).exp()
