"""What pulls a masked group to zero: pure functions from group norms to factors on group entries.

Each function returns one factor a group; the optimizer multiplies all entries of the group by it.
[W]_g stands for the entries of group g, ||.|| for the 2-norm.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

import torch
from torch import Tensor, nn

from .groups import GateTable

Projection = Literal["timed", "proximal", "halfspace"]
"""timed: a pull that does not depend on the base optimizer. The others as in the ATO paper, after OTO."""


def timed(steps_left: float) -> float:
    """Factor that, applied once a step, takes a group to zero in `steps_left` steps on a straight line.

    With s steps left, [W]_g <- (1 - 1/s) [W]_g; s falls by one each step and the last factor is zero
    whatever the updates between did. With s held constant the group decays with time constant s, and a
    gradient that needs the group can hold it.
    """
    return 1.0 - 1.0 / steps_left if steps_left > 1 else 0.0


def proximal(norm: Tensor, threshold: Tensor) -> Tensor:
    """Factors of argmin over X of 1/2 ||X - [W]_g||^2 + threshold_g ||X||, the proximal operator of the group norm.

    [W]_g <- max(0, 1 - threshold_g / ||[W]_g||) [W]_g (Wu et al. 2024, section 3.3). A zero group stays
    zero, at threshold zero too.

    Args:
        norm: ||[W]_g||, (groups,), non-negative.
        threshold: lambda_g * lr, (groups,), non-negative.
    """
    return torch.where(norm > threshold, 1 - threshold / norm.clamp_min(torch.finfo(norm.dtype).tiny), 0.0)


def halfspace(norm: Tensor, threshold: Tensor, epsilon: float) -> Tensor:
    """Factors of the half-space step: along -[W]_g by threshold_g, then zero where it crossed the half-space.

    [X]_g = [W]_g - threshold_g [W]_g / ||[W]_g||, set to zero if [X]_g . [W]_g < epsilon ||[W]_g||^2 (Chen
    et al. 2021, equation 7). As [X]_g is a multiple of [W]_g the test reads 1 - threshold_g / ||[W]_g|| <
    epsilon.

    Args:
        norm: ||[W]_g||, (groups,), non-negative.
        threshold: lambda_g * lr, (groups,), non-negative.
        epsilon: in [0, 1); at zero the step is the proximal one.
    """
    factor = proximal(norm, threshold)
    return torch.where(factor < epsilon, 0.0, factor)


def masked_shares(mask: Tensor, layer_of_gate: Tensor, num_layers: int) -> Tensor:
    """Each group's lambda weight: its layer's share of all masked groups, (gates,); zero if none is masked.

    Args:
        mask: (gates,) bool, True = kept.
        layer_of_gate: (gates,) int64.
    """
    masked = torch.zeros(num_layers, dtype=torch.float32, device=mask.device)
    masked.index_add_(0, layer_of_gate, (~mask).float())
    return (masked / masked.sum().clamp_min(1))[layer_of_gate]


def norms_and_rates(table: GateTable, model: nn.Module, rates: Mapping[str, Any], gates: int) -> tuple[Tensor, Tensor]:
    """||[W]_g|| and the learning rate of each group, both (groups,).

    The rate is the mean over its entries, weighted by their squares: with it ||[W]_g|| falls as much, to first order,
    as if each entry went down lambda ||[W]_g|| at its own rate.

    Args:
        table: the entries of the groups, of which there are `gates`.
        rates: parameter name -> learning rate, a number or scalar tensor.
    """
    sizes = torch._foreach_abs(table.parameters(model))
    of_entries = torch._foreach_mul(sizes, sizes)
    squares = table.sum(of_entries, gates)
    moved = table.sum(torch._foreach_mul(of_entries, [float(rates[name]) for name in table.names]), gates)
    return squares.sqrt(), moved / squares.clamp_min(torch.finfo(squares.dtype).tiny)
