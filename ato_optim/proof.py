"""Proof by trial: groups whose removal changes the output, or costs other than predicted, are found before training."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree

from .compress import apply_cut, derive_cut
from .cost import CostModel, count_macs
from .groups import ForwardFn, Groups, LayerGroup
from .unwrap import copy_model, tensors_in

TOLERANCE = 1e-4
"""Largest difference of outputs, relative to the largest output."""


@torch.no_grad()
def randomised(model: nn.Module) -> nn.Module:
    """A copy in eval mode without the zeros of a fresh network (biases, means), which would hide what is not exact."""
    copied = copy_model(model).eval()
    generator = torch.Generator().manual_seed(0)

    def noise(tensor: Tensor) -> Tensor:
        return torch.rand(tensor.shape, generator=generator).to(tensor)

    for parameter in copied.parameters():
        if parameter.ndim == 1:
            parameter.add_(noise(parameter), alpha=0.5)
    for name, buffer in copied.named_buffers():
        if name.endswith(("running_mean", "running_var")):
            buffer.add_(noise(buffer), alpha=0.5)
    return copied


def _halves(groups: Groups, chosen: Sequence[LayerGroup]) -> list[Tensor]:
    """Two masks (gates,) bool that close a random half of the gates of the `chosen` each, and between them all.

    What a network does may hang on one channel (a slice, say), so that every gate must be closed once.
    """
    masks = [torch.ones(groups.num_gates, dtype=torch.bool) for _ in range(2)]
    generator = torch.Generator().manual_seed(1)
    for layer in chosen:
        order = torch.randperm(layer.size, generator=generator)
        for mask, closed in zip(masks, order.tensor_split(2), strict=True):
            mask[layer.start + closed[: layer.size - 1]] = False
    return masks


def _telling_inputs(example_inputs: Any) -> Any:
    """The example inputs, constant floating-point tensors among them drawn anew: zeros would hide what is not exact."""
    generator = torch.Generator().manual_seed(2)

    def draw(leaf: Any) -> Any:
        if not isinstance(leaf, Tensor) or not leaf.is_floating_point() or leaf.numel() < 2:
            return leaf
        if leaf.isfinite().all() and leaf.min() < leaf.max():
            return leaf
        return torch.randn(leaf.shape, generator=generator).to(leaf)

    return _pytree.tree_map(draw, example_inputs)


def _runs_in_training(model: nn.Module, inputs: Any, forward_fn: ForwardFn) -> bool:
    """Whether the model takes the example inputs in training mode, where some want targets or larger batches."""
    try:
        with torch.no_grad():
            forward_fn(copy_model(model).train(), inputs)
    except Exception:
        return False
    return True


@torch.no_grad()
def zero_producers(model: nn.Module, groups: Groups, mask: Tensor) -> None:
    """Set all producer entries of the groups that `mask` (gates,) bool closes to zero, in place."""
    groups.producers.scale(groups.producers.parameters(model), mask.float())


def difference(outputs: Any, others: Any) -> float:
    """Largest difference of two nests of tensors, relative to the largest value; inf for NaN and other shapes."""
    pairs = list(zip(tensors_in(outputs), tensors_in(others), strict=True))
    tensors = [(a, b) for a, b in pairs if a.is_floating_point() and a.numel()]
    if any(a.shape != b.shape for a, b in tensors):
        return float("inf")
    if not tensors:
        return 0.0
    largest = torch.stack([a.abs().max().double() for a, _ in tensors]).max().item()
    apart = torch.stack([(a - b).abs().max().double() for a, b in tensors]).max().item()
    return apart / max(largest, 1e-12) if math.isfinite(apart) and math.isfinite(largest) else float("inf")


def _objection(
    model: nn.Module, groups: Groups, mask: Tensor, cost: CostModel, inputs: Any, forward_fn: ForwardFn, trains: bool
) -> str | None:
    """What goes wrong when the gates that `mask` (gates,) bool closes are removed; None if nothing does."""
    masked, pruned = randomised(model), randomised(model)
    zero_producers(masked, groups, mask.to(next(model.parameters()).device))
    try:
        apply_cut(derive_cut(model, groups, mask, inputs, forward_fn), pruned)
        with torch.no_grad():
            tried = _telling_inputs(inputs)
            apart = difference(forward_fn(masked, tried), forward_fn(pruned, tried))
    except Exception as error:  # whatever torch-pruning or the cut model raises is a reason to leave the group alone
        return f"cannot be cut by torch-pruning ({type(error).__name__}: {error})"
    if not apart <= TOLERANCE:
        return f"its removal would change the output by {apart:.0e} of the largest value"
    if count_macs(pruned, inputs, forward_fn)[""] != cost(mask).item():
        return "its share of the MACs cannot be predicted"
    if trains and not _runs_in_training(pruned, inputs, forward_fn):
        return "is read by a layer that runs in training mode only"
    return None


def objections(
    model: nn.Module, groups: Groups, cost: CostModel, example_inputs: Any, forward_fn: ForwardFn
) -> dict[str, str]:
    """Root layers of the groups that fail the trial, with the reason: found by halving. `model` is not touched."""
    failed: dict[str, str] = {}
    trains = _runs_in_training(model, example_inputs, forward_fn)
    stack = [groups.layers] if groups.layers else []
    while stack:
        chosen = stack.pop()
        trials = (
            _objection(model, groups, mask, cost, example_inputs, forward_fn, trains)
            for mask in _halves(groups, chosen)
        )
        reason = next((reason for reason in trials if reason is not None), None)
        if reason is None:
            continue
        if len(chosen) == 1:
            failed[chosen[0].root] = reason
        else:
            half = len(chosen) // 2
            stack += [chosen[:half], chosen[half:]]
    return failed
