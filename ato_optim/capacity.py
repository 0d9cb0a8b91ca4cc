"""What a mask leaves of a network's capacity: channels by their norms, branches add up, chains multiply."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from .cost import CostModel
from .groups import Groups

NEGLIGIBLE = 1e-6
"""Squares of a channel whose entries are all zero, over the mean of all channels': shares have logarithms."""


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


@torch.no_grad()
def channel_weights(groups: Groups, model: nn.Module) -> Tensor:
    """What each channel weighs in the capacity (gates,) float32, above 0: ||[W]_g|| ||R_g||.

    [W]_g are the entries that produce the channel, R_g the columns that read it (see gating.gate_gradient). Scaling one
    up and the other down, which changes nothing in most networks, does not change their product. A channel that has
    been pulled to zero weighs next to nothing: it does not come back in place of one that has learned.
    """
    norms = []
    for table in (groups.producers, groups.consumers):
        # One after the other: the squares of all weights at once would leave the caches before they are summed.
        squares = table.sum((p.abs().square() for p in table.parameters(model)), groups.num_gates).float()
        norms.append((squares + NEGLIGIBLE * squares.mean() + torch.finfo(squares.dtype).tiny).sqrt())
    return norms[0] * norms[1]


def capacity(kept: Tensor, whole: Tensor, chain: Tensor) -> Tensor:
    """A scalar in (0, 1]: the weight of all chains, each by the geometric mean of its layers' shares.

    The narrowest layer limits what is in series, so that widths multiply there; branches that are added up are a sum of
    what each can do. Differentiable in `kept`.

    Args:
        kept: what the channels of each layer group that are kept weigh (layers,), above 0.
        whole: what all of its channels weigh (layers,).
        chain: (layers,) int64 below the number of layers.
    """
    # A matrix: its sums have one order, whatever the number of threads, and every rank gets the same.
    member = chain == torch.arange(len(chain), device=chain.device)[:, None]  # (chains, layers)
    mean = ((member * (kept / whole).log()).sum(1) / member.sum(1).clamp_min(1)).exp()
    weight = (member * whole).sum(1)
    return (weight * mean).sum() / weight.sum()
