"""Proof by trial: groups whose removal changes the output, or costs other than predicted, are found before training."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree
from torch.utils._python_dispatch import TorchDispatchMode

from .budget import minimum_widths
from .compress import apply_cut, derive_cut
from .cost import build_cost, counted
from .graph import ForwardFn
from .groups import Groups, LayerGroup
from .unwrap import copy_model, sharing_copy, tensors_in

TOLERANCE = 1e-8
"""Largest difference of outputs, relative to the largest of all, where the trial runs in float64 throughout."""
COARSE_TOLERANCE = 1e-4
"""The same where the model insists on a lower precision."""
MACS_OF_TRIALS = 5e9
"""Pairs of trials are as many as forwards that cost this together, from one to MOST_PAIRS."""
MOST_PAIRS = 3


_UNPREDICTED = "its share of the MACs cannot be predicted"


def forked_rng(device: torch.device) -> AbstractContextManager[None]:
    """A context after which the random states of the CPU and of `device` are what they were."""
    return torch.random.fork_rng([device] if device.type == "cuda" else [])


@torch.no_grad()
def randomise(model: nn.Module) -> None:
    """Put `model` in eval mode, without what hides that a cut is not exact: the constants of a fresh network.

    Biases and means of zero do, and so does a last layer of zeros, or a scale of 1e-6 in front of a branch.
    """
    model.eval()
    generator = torch.Generator().manual_seed(0)

    def noise(tensor: Tensor) -> Tensor:
        return torch.rand(tensor.shape, generator=generator).to(tensor)

    for parameter in model.parameters():
        if not parameter.is_floating_point() or not parameter.numel():
            continue
        if parameter.ndim == 1 or parameter.min() == parameter.max():
            parameter.add_(noise(parameter), alpha=0.5)
    for name, buffer in model.named_buffers():
        if name.endswith(("running_mean", "running_var")):
            buffer.add_(noise(buffer), alpha=0.5)


def _shares(size: int) -> list[int]:
    """Two to four numbers of `size` gates to close (one of two gates): about half, no divisor in common with `size`."""
    shares = sorted((k for k in range(1, size) if math.gcd(k, size) == 1), key=lambda k: abs(2 * k - size))
    return [k for k in shares[:4] if abs(2 * k - size) <= size / 2] or shares[:2]


def _halves(groups: Groups, chosen: Sequence[LayerGroup], pair: int) -> tuple[Tensor, Tensor]:
    """Two masks (gates,) bool that close about half of the gates of the `chosen` each, and between them all.

    What a network does may hang on one channel (a slice, say), so that every gate must be closed once. In the first
    pair most of the first half goes together, the others at random: what halves its channels by counting them would
    pass if every part lost its share. For the same reason layers of one size lose different numbers: their places in
    the model, written with as many digits as there are numbers, differ in one of the first pairs. No number
    has a divisor in common with the whole, for what is left may have to be divided as the whole was (a shuffle).
    """
    masks = torch.ones(2, groups.num_gates, dtype=torch.bool)
    place = {layer.start: k for k, layer in enumerate(groups.layers)}
    for layer in chosen:
        # The same gates, whichever others are chosen.
        generator = torch.Generator().manual_seed(layer.start + pair)
        shares = _shares(layer.size)
        share = shares[place[layer.start] // len(shares) ** pair % len(shares)]
        first = math.ceil(2 * share / 3) if pair == 0 else 0
        others = first + torch.randperm(layer.size - first, generator=generator)
        order = layer.start + torch.cat((torch.arange(first), others))
        for mask, closed in zip(masks, order.tensor_split([share]), strict=True):
            mask[closed] = False
    return masks[0], masks[1]


def _least(groups: Groups, chosen: Sequence[LayerGroup], min_width: float) -> Tensor:
    """A mask (gates,) bool that leaves the `chosen` layer groups the least: what takes k channels of them may fail."""
    mask = torch.ones(groups.num_gates, dtype=torch.bool)
    kept = minimum_widths(torch.tensor([layer.size for layer in chosen]), min_width, 1).tolist()
    for layer, width in zip(chosen, kept, strict=True):
        generator = torch.Generator().manual_seed(layer.start)
        mask[layer.start + torch.randperm(layer.size, generator=generator)[width:]] = False
    return mask


def _redrawn(example_inputs: Any) -> Any:
    """The example inputs with floating-point tensors drawn anew, with a mean of the other sign."""
    generator = torch.Generator().manual_seed(0)

    def draw(leaf: Any) -> Any:
        if not isinstance(leaf, Tensor) or not leaf.is_floating_point():
            return leaf
        return (torch.randn(leaf.shape, generator=generator) + (-1 if leaf.mean() > 0 else 1)).to(leaf)

    return _pytree.tree_map(draw, example_inputs)


def _telling_inputs(example_inputs: Any) -> Any:
    """The example inputs, drawn anew if a floating-point tensor is constant: zeros would hide what is not exact."""
    floats = [t for t in _pytree.tree_leaves(example_inputs) if isinstance(t, Tensor) and t.is_floating_point()]
    telling = all(t.numel() < 2 or (t.isfinite().all() and t.min() < t.max()) for t in floats)
    return example_inputs if telling else _redrawn(example_inputs)


def wandering_layer(model: nn.Module, example_inputs: Any, forward_fn: ForwardFn, counts: dict[str, int]) -> str | None:
    """Name of a layer with a width that `model`, in eval mode, calls for some inputs only; None if there is none.

    What was traced would not hold for a forward that depends on data. `counts` are those of the example inputs.
    """
    try:
        _, others = counted(model, _redrawn(example_inputs), forward_fn)
    except Exception:  # values that the model refuses tell nothing about its layers
        return None
    return min((name for name in counts if name and bool(counts[name]) != bool(others[name])), default=None)


class _Rounding(TorchDispatchMode):
    """Notes in `met` whether an operation made something coarser of a tensor in float64."""

    met = False

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        found = func(*args, **(kwargs or {}))
        read, written = (
            {leaf.dtype for leaf in _pytree.tree_leaves(side) if isinstance(leaf, Tensor)} for side in (args, found)
        )
        fine = {torch.float64, torch.complex128}
        self.met |= bool(read & fine) and any(d.is_floating_point or d.is_complex for d in written - fine)
        return found


def _doubled(value: Any) -> Any:
    return value.double() if isinstance(value, Tensor) and value.is_floating_point() else value


@torch.no_grad()
def in_float64(
    model: nn.Module, example_inputs: Any, forward_fn: ForwardFn, trains: bool
) -> tuple[nn.Module, Any, float]:
    """`model`, in eval mode, and the example inputs in float64, if it runs in that, and the tolerance of its outputs.

    In float32 a small difference far from the output drowns in rounding. A model that fixes a dtype in its forward, of
    training too if it `trains`, or whose device has no float64, is tried as it is.
    """
    inputs = _pytree.tree_map(_doubled, example_inputs)
    try:
        fine = copy_model(model, lambda t: t.to(torch.float64, copy=True) if t.is_floating_point() else t.clone())
        with _Rounding() as rounding:
            forward_fn(fine, inputs)
        if trains:
            forward_fn(sharing_copy(fine).train(), inputs)
    except Exception:
        return model, example_inputs, COARSE_TOLERANCE
    return fine, inputs, COARSE_TOLERANCE if rounding.met else TOLERANCE


@torch.no_grad()
def zero_producers(model: nn.Module, groups: Groups, mask: Tensor) -> Callable[[], None]:
    """Set all producer entries of the groups that `mask` (gates,) bool closes to zero; returns what undoes it."""
    table, undo = groups.producers.to(torch.device("cpu")), []
    for parameter, dim, open_ in zip(table.parameters(model), table.dims, table.split(mask.cpu()), strict=True):
        closed = (~open_.flatten()).nonzero().flatten().to(parameter.device)
        undo.append(partial(parameter.index_copy_, dim, closed, parameter.index_select(dim, closed)))
        parameter.index_fill_(dim, closed, 0)

    def restore() -> None:
        for put_back in reversed(undo):
            put_back()

    return restore


def difference(outputs: Any, others: Any) -> float:
    """Largest difference of two nests of tensors, relative to the largest value; inf for NaN and other shapes."""
    here, there = list(tensors_in(outputs)), list(tensors_in(others))
    if [t.shape for t in here] != [t.shape for t in there]:
        return math.inf
    both = zip(here, there, strict=True)
    pairs = [(a, b) for a, b in both if a.numel() and (a.is_floating_point() or a.is_complex())]
    if not pairs:
        return 0.0
    largest = torch.stack([a.abs().max().double() for a, _ in pairs]).max().item()
    apart = torch.stack([(a - b).abs().max().double() for a, b in pairs]).max().item()
    return apart / max(largest, 1e-12) if math.isfinite(apart) and math.isfinite(largest) else math.inf


class Trial:
    """Cuts of one randomised copy of a model, compared with the same copy when its producers are zero.

    Args:
        model: a copy, which is changed.
        trains: whether the model runs on the example inputs in training mode.
        macs: of a forward; a cheap one is tried more often.
        min_width: share of the channels that a layer keeps at least.

    Attributes:
        slopes: MACs of a gate outside of layers, by the root of its layer group, as far as trials have met some.
    """

    def __init__(
        self, model: nn.Module, example_inputs: Any, forward_fn: ForwardFn, trains: bool, macs: int, min_width: float
    ):
        randomise(model)
        self.min_width = min_width
        self.model, example_inputs, self.tolerance = in_float64(model, example_inputs, forward_fn, trains)
        self.pairs = min(max(1, int(MACS_OF_TRIALS // max(1, macs))), MOST_PAIRS)
        self.inputs, self.forward_fn, self.trains = _telling_inputs(example_inputs), forward_fn, trains
        self.device = next(model.parameters()).device
        self.slopes: dict[str, float] = {}

    def objection(self, groups: Groups, mask: Tensor, trains: bool) -> str | None:
        """What goes wrong when the gates that `mask` (gates,) bool closes are removed; None if nothing does.

        `trains` asks for a forward in training mode as well.
        """
        try:
            pruned, found, counts = self._cut(groups, mask)
        except Exception as error:  # whatever the cut model raises is a reason to leave the group alone
            return f"cannot go: the forward fails without it ({_named(error)})"
        restore = zero_producers(self.model, groups, mask)
        try:
            with forked_rng(self.device):
                expected, dense_counts = counted(self.model, self.inputs, self.forward_fn)
        finally:
            restore()
        apart = difference(expected, found)
        predicted = build_cost(self.model, groups, dense_counts, self.slopes)(mask).item()
        if not apart <= self.tolerance:
            return f"its removal would change the output by {apart:.0e} of the largest value"
        if counts[""] != predicted:
            return _UNPREDICTED
        if trains:
            try:
                with torch.no_grad():
                    self.forward_fn(pruned.train(), self.inputs)
            except Exception as error:
                return f"cannot go: the forward in training mode fails without it ({_named(error)})"
        return None

    def _cut(self, groups: Groups, mask: Tensor) -> tuple[nn.Module, Any, dict[str, int]]:
        """A copy without the gates that `mask` (gates,) bool closes, its outputs and its MACs."""
        pruned = sharing_copy(self.model)
        apply_cut(derive_cut(pruned, groups, mask), pruned)
        with forked_rng(self.device):  # a model that samples draws the same again
            return pruned, *counted(pruned, self.inputs, self.forward_fn)

    def _learn_slope(self, groups: Groups, layer: LayerGroup, mask: Tensor) -> None:
        """Take what `mask` (gates,) bool, closed in `layer` alone, saves outside of layers for linear in its gates.

        The other trials say whether it is.
        """
        _, dense = counted(self.model, self.inputs, self.forward_fn)
        *_, counts = self._cut(groups, mask)
        saved = build_cost(self.model, groups, dense)(mask).item() - counts[""]
        self.slopes[layer.root] = saved / int((~mask).sum())

    def failures(self, groups: Groups) -> dict[str, str]:
        """Root layers of groups that fail, with the reason; none only if all groups pass together."""
        # Bundles first: where some fail, heads of an attention say, most others pass together.
        layers = sorted(groups.layers, key=lambda layer: layer.layers[layer.root] == 1)
        for trial in range(2 * self.pairs + 1):
            failed = self._culprits(groups, layers, trial)
            if failed:
                return failed
        return {}

    def _culprits(self, groups: Groups, chosen: Sequence[LayerGroup], trial: int) -> dict[str, str]:
        """Which of the `chosen` groups fail: found by halving, all of them if they fail together alone."""
        if not chosen:
            return {}
        trains = self.trains and trial == 0  # what training alone runs does not fit after any cut
        pair, half = divmod(trial, 2)
        mask = _halves(groups, chosen, pair)[half] if pair < self.pairs else _least(groups, chosen, self.min_width)
        reason = self.objection(groups, mask, trains)
        if reason is None:
            return {}
        found: dict[str, str] = {}
        middle = len(chosen) // 2
        for part in (chosen[:middle], chosen[middle:]) if middle else ():
            found |= self._culprits(groups, part, trial)
        if reason == _UNPREDICTED and not found:
            if len(chosen) == 1 and chosen[0].root not in self.slopes:
                self._learn_slope(groups, chosen[0], mask)
            reason = self.objection(groups, mask, trains)
        return found or ({layer.root: reason for layer in chosen} if reason else {})


def _named(error: Exception) -> str:
    """Kind and first line of an error."""
    return f"{type(error).__name__}: {(str(error).splitlines() or [''])[0]}"
