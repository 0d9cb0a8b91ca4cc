"""From the controller's logits to a mask that meets the budget."""

from __future__ import annotations

import torch
from torch import Tensor

from .cost import CostModel


def minimum_widths(sizes: Tensor, min_width: Tensor | float, lots: Tensor | int) -> Tensor:
    """Fewest gates (layers,) int64 that each layer group keeps: a share of its size, at least one, rounded up.

    `min_width` is that share, for all or for each (layers,).
    """
    least = (sizes.double() * min_width - 1e-6).ceil().long().clamp_min(1)  # 0.3 of 50 is 15, also in binary
    return torch.minimum((least + lots - 1) // lots * lots, sizes)


def ranks(scores: Tensor, layer_of_gate: Tensor) -> Tensor:
    """Rank (gates,) int64 of each gate within its layer group by falling score, ties by position."""
    order = torch.argsort(scores, descending=True, stable=True)
    order = order[torch.argsort(layer_of_gate[order], stable=True)]
    sizes = torch.bincount(layer_of_gate)
    starts = sizes.cumsum(0) - sizes
    result = torch.empty_like(order)
    result[order] = torch.arange(len(order), device=order.device) - starts[layer_of_gate[order]]
    return result


def keep_minimum(gates: Tensor, scores: Tensor, layer_of_gate: Tensor, least: Tensor) -> Tensor:
    """`gates` (gates,) bool with the best `least` (layers,) gates of every layer group opened."""
    return gates | (ranks(scores, layer_of_gate) < least[layer_of_gate])


def least_mask(layer_of_gate: Tensor, least: Tensor) -> Tensor:
    """The mask (gates,) bool with minimum widths everywhere: the smallest network that can be reached."""
    scores = torch.zeros(len(layer_of_gate), device=layer_of_gate.device)
    return keep_minimum(scores.bool(), scores, layer_of_gate, least)


def solve(
    scores: Tensor, layer_of_gate: Tensor, cost: CostModel, target: float, least: Tensor, lots: Tensor | int = 1
) -> Tensor:
    """The mask (gates,) bool of highest scores whose MACs are at most `target` of the dense ones.

    Gates of a layer group are opened in order of score, `lots` (layers,) at a time (the last lot of a group may be
    smaller), beyond the minimum widths `least` (layers,). First the longest prefix of all lots, sorted by
    mean score, that fits; then whatever further lot fits, best first: no lot fits into what is left.
    """
    num_gates, num_layers = len(scores), int(layer_of_gate.max()) + 1
    rank = ranks(scores, layer_of_gate)
    lot_in_layer = rank // torch.as_tensor(lots, device=scores.device).expand(num_layers)[layer_of_gate]
    most = int(lot_in_layer.max()) + 1
    # Lots numbered layer by layer in order of rank, so that a stable sort keeps that order among ties.
    _, lot = torch.unique(layer_of_gate * most + lot_in_layer, return_inverse=True)
    ones = torch.ones(num_gates, dtype=torch.float64, device=scores.device)
    num_lots = int(lot.max()) + 1
    sums = torch.zeros(num_lots, dtype=torch.float64, device=scores.device)
    mean = sums.index_add(0, lot, scores.double()) / sums.index_add(0, lot, ones)
    position = torch.empty(num_lots, dtype=torch.long, device=scores.device)
    position[torch.argsort(mean, descending=True, stable=True)] = torch.arange(num_lots, device=scores.device)
    position_of_gate = position[lot]

    budget = target * cost.dense
    always = rank < least[layer_of_gate]

    low, high = 0, num_lots  # the longest prefix that fits lies in [low, high]
    while low < high:
        middle = (low + high + 1) // 2
        fits = cost(always | (position_of_gate < middle)).item() <= budget
        low, high = (middle, high) if fits else (low, middle - 1)
    mask = always | (position_of_gate < low)

    # Fill what is left, best first. MACs only grow: of a layer group whose next lot does not fit none ever will.
    layer_of_position = torch.empty_like(position).index_copy(0, position_of_gate, layer_of_gate).tolist()
    full = set()
    for at in range(low, num_lots):
        layer = layer_of_position[at]
        if layer not in full:
            wider = mask | (position_of_gate == at)
            if cost(wider).item() <= budget:
                mask = wider
            else:
                full.add(layer)
    return mask
