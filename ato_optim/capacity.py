"""What a mask leaves of a network's capacity: branches add up, the layers of a chain multiply."""

from __future__ import annotations

import torch
from torch import Tensor

from .cost import CostModel


def find_chains(cost: CostModel, layer_of_gate: Tensor, summed: Tensor) -> Tensor:
    """The chain (layers,) int64 that each layer group belongs to.

    Where a weight reads the channels of one group and writes those of another, the two are in series. A residual stream
    ends chains: what lies between two of its sums is a branch of its own.

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
    linked = (series | series.T) & ~summed & ~summed[:, None] | torch.eye(len(summed), device=summed.device).bool()
    chain = torch.arange(len(summed), device=summed.device)
    while True:
        least = torch.where(linked, chain, len(summed)).amin(1)
        if torch.equal(least, chain):
            return chain
        chain = least


def capacity(shares: Tensor, channels: Tensor, chain: Tensor) -> Tensor:
    """A scalar in (0, 1]: the channels of all chains, each by the geometric mean of its layers' shares.

    The narrowest layer limits what is in series, so that widths multiply there; branches that are added up are a sum of
    what each can do. Differentiable in `shares`.

    Args:
        shares: of the channels of each layer group that are kept (layers,), above 0.
        channels: of each layer group (layers,), without a mask.
        chain: (layers,) int64 below the number of layers.
    """
    # A matrix, for index_add on an accelerator adds in any order, and each rank would get another sum.
    member = chain == torch.arange(len(chain), device=chain.device)[:, None]  # (chains, layers)
    mean = ((member * shares.log()).sum(1) / member.sum(1).clamp_min(1)).exp()
    weight = (member * channels.to(shares)).sum(1)
    return (weight * mean).sum() / weight.sum()
