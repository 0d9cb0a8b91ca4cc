"""Proof by trial: groups whose removal changes the output, or costs other than predicted, are found before training."""

from __future__ import annotations

import math
import random
import traceback
from collections.abc import Callable, Sequence
from contextlib import nullcontext, suppress
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from .budget import minimum_widths
from .compress import apply_cut, derive_cut
from .conditions import TOLERANCE, Fine, forked_rng, in_float64, randomise, telling_inputs
from .copies import sharing_copy
from .cost import build_cost, counted
from .graph import ForwardFn
from .groups import Groups, LayerGroup
from .nests import tensors_in

MACS_OF_TRIALS = 5e9
"""Pairs of trials are as many as forwards that cost this together, from one to MOST_PAIRS."""
MOST_PAIRS = 3


_UNPREDICTED = "its share of the MACs cannot be predicted"
_UNSEEN = (
    "changes no output on example_inputs: pass others (masks of ones), a model whose factors are not zero, or a "
    "forward_fn that returns what it changes"
)
_STEEP = (
    "would get gradients that are not finite once channels of it are zero: a root has no slope there, "
    "torch.linalg.vector_norm one of zero"
)


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


def _bundles(layer: LayerGroup) -> bool:
    """Whether a gate of `layer` has several channels: heads of an attention do."""
    return layer.layers[layer.root] != 1


def _least(groups: Groups, chosen: Sequence[LayerGroup], min_width: float) -> Tensor:
    """A mask (gates,) bool that leaves the `chosen` layer groups the least: what takes k channels of them may fail."""
    mask = torch.ones(groups.num_gates, dtype=torch.bool)
    kept = minimum_widths(torch.tensor([layer.size for layer in chosen]), min_width, 1).tolist()
    for layer, width in zip(chosen, kept, strict=True):
        generator = torch.Generator().manual_seed(layer.start)
        mask[layer.start + torch.randperm(layer.size, generator=generator)[width:]] = False
    return mask


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


def difference(outputs: Any, others: Any, before: Any = None) -> float:
    """Largest difference of two nests of tensors, relative to the largest value; inf for NaN and other shapes.

    Given what `outputs` were `before` gates were closed, it is relative to the largest value that has changed since: a
    fill of -1e9 would hide all the rest. Infinities that are equal do not differ.
    """
    here, there, was = (list(tensors_in(nest)) for nest in (outputs, others, before))
    shapes, of_others, of_before = ([t.shape for t in tensors] for tensors in (here, there, was))
    if shapes != of_others:
        return math.inf
    references = was if shapes == of_before else [None] * len(here)
    largest, apart = [torch.tensor(1e-12, dtype=torch.float64)], [torch.tensor(0.0, dtype=torch.float64)]
    for a, b, reference in zip(here, there, references, strict=True):
        if a.numel() and (a.is_floating_point() or a.is_complex()):
            counted_in = a.isfinite() if reference is None else a.isfinite() & (a != reference)
            largest.append(torch.where(counted_in, a.abs(), 0).max().cpu().double())
            apart.append(torch.where(a == b, 0, (a - b).abs()).max().cpu().double())
    found = torch.stack(apart).max().item()
    return found / torch.stack(largest).max().item() if math.isfinite(found) else math.inf


class Trial:
    """Cuts of one randomised copy of a model, compared with the same copy when its producers are zero.

    Args:
        model: a copy, which is changed.
        trains: whether the model runs on the example inputs in training mode.
        macs: of a forward; a cheap one is tried more often.
        min_width: share of the channels that a layer keeps at least.

    Attributes:
        outputs, counts: of the whole network, in eval mode, and its MACs by layer.
        training: the same in training mode, without dropout.
        slopes: MACs of a gate outside of layers, by the key of its layer group, as far as trials have met some.
    """

    def __init__(
        self, model: nn.Module, example_inputs: Any, forward_fn: ForwardFn, trains: bool, macs: int, min_width: float
    ):
        randomise(model)
        self.min_width = min_width
        found = in_float64(model, example_inputs, forward_fn, trains)
        self.model, example_inputs, self.forward_fn, self.tolerance = found
        self.in_float64 = self.forward_fn is not forward_fn
        self.pairs = min(max(1, int(MACS_OF_TRIALS // max(1, macs))), MOST_PAIRS)
        self.inputs, self.trains = telling_inputs(self.model, example_inputs, self.forward_fn), trains
        self.device = next(model.parameters()).device
        self.slopes: dict[tuple[str, int], float] = {}
        with forked_rng(self.device):
            self.outputs, self.counts = counted(self.model, self.inputs, self.forward_fn)
        self.training = None
        try:
            if trains:
                self.training = self._in_training(self.model)
        except Exception:  # inputs that were drawn anew do for evaluation alone
            self.trains = False

    def objection(self, groups: Groups, mask: Tensor, trains: bool) -> str | None:
        """What goes wrong when the gates that `mask` (gates,) bool closes are removed; None if nothing does.

        `trains` asks for a forward in training mode as well.
        """
        try:
            pruned, found, counts = self._cut(groups, mask)
        except Exception as error:  # whatever the cut model raises is a reason to leave the group alone
            return f"cannot go: the forward fails without it ({named(error)}{self._place(error)})"
        restore = zero_producers(self.model, groups, mask)
        try:
            with forked_rng(self.device):
                expected, dense_counts = counted(self.model, self.inputs, self.forward_fn)
            expected_training = self._in_training(self.model) if trains else None
        finally:
            restore()
        predicted = build_cost(self.model, groups, dense_counts, self.slopes)(mask).item()
        if reason := self._changed(expected, found, self.outputs):
            return reason
        if counts[""] != predicted:
            return _UNPREDICTED
        if trains:
            try:
                found = self._in_training(pruned)
            except Exception as error:
                return f"cannot go: the forward in training mode fails without it ({named(error)})"
            # Norms over a batch of few values make much of the rounding of lower precisions.
            fine = self.tolerance == TOLERANCE
            reason = self._changed(expected_training, found, self.training) if fine else None
            if reason and not self._random_in_training(pruned, found):
                return f"{reason}, in training mode"
        return None

    def _place(self, error: Exception) -> str:
        """In which part of the model the innermost forward was that raised `error`, as far as its class tells."""
        # Not the frame that has caught it: where a frame keeps the copy of its locals (before Python 3.13), error,
        # traceback and frame would hold each other, and with them the optimizer, until garbage is collected.
        caught = error.__traceback__
        frames = (frame for frame, _ in traceback.walk_tb(caught and caught.tb_next))
        met = [one for frame in frames if isinstance(one := frame.f_locals.get("self"), nn.Module)]
        names = [name for top in met[:1] for name, module in top.named_modules() if module is met[-1]]
        return f", in {names[0]}" if names and names[0] else ""

    def _changed(self, expected: Any, found: Any, before: Any) -> str | None:
        """How a cut changed the outputs, `expected` of the whole network with zeros; None if it did not."""
        if [t.shape for t in tensors_in(expected)] != [t.shape for t in tensors_in(found)]:
            return "its removal would change the shape of an output"
        apart = difference(expected, found, before)
        if apart <= self.tolerance:
            return None
        return f"its removal would change the output by {apart:.0e} of the largest value"

    @torch.no_grad()
    def _in_training(self, model: nn.Module) -> Any:
        """The outputs of `model` in training mode, without dropout."""
        copied = sharing_copy(model).train()
        for module in copied.modules():
            if isinstance(module, nn.modules.dropout._DropoutNd):
                module.eval()
        with forked_rng(self.device):
            return self.forward_fn(copied, self.inputs)

    def _random_in_training(self, model: nn.Module, outputs: Any) -> bool:
        """Whether the `outputs` of `model` in training mode are others when other random numbers are drawn."""
        with forked_rng(self.device):
            torch.rand(1), torch.rand(1, device=self.device), np.random.rand(), random.random()
            return difference(self._in_training(model), outputs) > self.tolerance

    def _seen(self, groups: Groups, layers: Sequence[LayerGroup]) -> bool:
        """Whether anything that the model returns changes when all gates of `layers` close: else any cut passes."""
        mask = torch.ones(groups.num_gates, dtype=torch.bool)
        for layer in layers:
            mask[layer.gates] = False
        restore = zero_producers(self.model, groups, mask)
        try:
            with forked_rng(self.device):
                closed, _ = counted(self.model, self.inputs, self.forward_fn)
            seen = difference(closed, self.outputs) > 0
            return seen or (self.trains and difference(self._in_training(self.model), self.training) > 0)
        finally:
            restore()

    def _gradients(self, groups: Groups) -> Tensor:
        """Sums of absolute gradients over what produces each gate (gates,), of the outputs, weighed at random.

        Zeros if the model has no backward.
        """
        producers, generator = groups.producers, torch.Generator().manual_seed(0)
        parameters = [self.model.get_parameter(name) for name in producers.names]
        try:
            with forked_rng(self.device), torch.enable_grad():
                outputs = [t for t in tensors_in(self.forward_fn(self.model, self.inputs)) if t.requires_grad]
                weights = [torch.rand(t.shape, generator=generator).to(t) for t in outputs]
                with Fine() if self.in_float64 else nullcontext():  # what is checkpointed runs again
                    gradients = torch.autograd.grad(outputs, parameters, weights, materialize_grads=True)
        except Exception:  # whatever the model raises
            return torch.zeros(groups.num_gates)
        return producers.to(self.device).sum((gradient.abs() for gradient in gradients), groups.num_gates).cpu()

    def _unseen(self, groups: Groups, gradients: Tensor) -> dict[tuple[str, int], str]:
        """Keys of layer groups that change nothing by themselves, nor have any of the `gradients` (see _gradients)."""
        silent = [layer for layer in groups.layers if not gradients[layer.gates].any()]
        return {layer.key: _UNSEEN for layer in silent if not self._seen(groups, [layer])}

    def _steep(self, groups: Groups, gradients: Tensor) -> dict[tuple[str, int], str]:
        """Keys of layer groups that make `gradients` (see _gradients), which are finite, anything else by closing."""

        def finite(layers: Sequence[LayerGroup]) -> bool:
            restore = zero_producers(self.model, groups, _least(groups, layers, self.min_width))
            try:
                return bool(self._gradients(groups).isfinite().all())
            finally:
                restore()

        if not gradients.isfinite().all() or finite(groups.layers):
            return {}
        alone = [layer for layer in groups.layers if not finite([layer])]
        return {layer.key: _STEEP for layer in alone or groups.layers}

    def _cut(self, groups: Groups, mask: Tensor) -> tuple[nn.Module, Any, dict[str, int]]:
        """A copy without the gates that `mask` (gates,) bool closes, its outputs and its MACs."""
        pruned = sharing_copy(self.model)
        apply_cut(derive_cut(pruned, groups, mask), pruned)
        with forked_rng(self.device):  # a model that samples draws the same again
            return pruned, *counted(pruned, self.inputs, self.forward_fn)

    def _learn_slopes(self, groups: Groups, layers: Sequence[LayerGroup]) -> bool:
        """Take what gates of each of `layers` save outside of layers for linear in them; whether any was new.

        The other trials say whether it is. What cannot be cut alone has none.
        """
        known = len(self.slopes)
        for layer in layers:
            if layer.key in self.slopes:
                continue
            mask = _halves(groups, [layer], 0)[0]
            with suppress(Exception):  # whatever the cut model raises
                *_, counts = self._cut(groups, mask)
                saved = build_cost(self.model, groups, self.counts)(mask).item() - counts[""]
                self.slopes[layer.key] = saved / int((~mask).sum())
        return len(self.slopes) > known

    def failures(self, groups: Groups) -> dict[tuple[str, int], str]:
        """Keys of layer groups that fail, with the reason; none only if all groups pass together."""
        # Bundles first: where some fail, heads of an attention say, most others pass together.
        layers = sorted(groups.layers, key=lambda layer: not _bundles(layer))
        if not self._seen(groups, layers):
            return {layer.key: _UNSEEN for layer in layers}
        for trial in range(2 * self.pairs + 1):
            failed = self._culprits(groups, layers, trial)
            if failed:
                return failed
        gradients = self._gradients(groups)
        return self._unseen(groups, gradients) or self._steep(groups, gradients)

    def _culprits(self, groups: Groups, chosen: Sequence[LayerGroup], trial: int) -> dict[tuple[str, int], str]:
        """Which of the `chosen` groups fail: found by halving, all of them if they fail together alone."""
        if not chosen:
            return {}
        trains = self.trains and trial == 0  # what training alone runs does not fit after any cut
        pair, half = divmod(trial, 2)
        mask = _halves(groups, chosen, pair)[half] if pair < self.pairs else _least(groups, chosen, self.min_width)
        reason = self.objection(groups, mask, trains)
        if reason == _UNPREDICTED and self._learn_slopes(groups, [layer for layer in chosen if _bundles(layer)]):
            reason = self.objection(groups, mask, trains)
        if reason is None:
            return {}
        found: dict[tuple[str, int], str] = {}
        middle = len(chosen) // 2
        for part in (chosen[:middle], chosen[middle:]) if middle else ():
            found |= self._culprits(groups, part, trial)
        if reason == _UNPREDICTED and not found:
            if len(chosen) == 1:
                self._learn_slopes(groups, chosen)
            reason = self.objection(groups, mask, trains)
        return found or ({layer.key: reason for layer in chosen} if reason else {})


def named(error: Exception) -> str:
    """Kind and first line of an error."""
    return f"{type(error).__name__}: {(str(error).splitlines() or [''])[0]}"
