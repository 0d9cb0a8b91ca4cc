"""What a trial runs under: constants, inputs and a precision that do not hide what a cut changes."""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils import _pytree
from torch.utils._python_dispatch import TorchDispatchMode

from .copies import copy_model, sharing_copy
from .cost import counted
from .graph import ForwardFn
from .nests import tensors_in, with_tensors

TOLERANCE = 1e-8
"""Largest difference of outputs, relative to the largest that closing changes, in a trial that runs in float64."""
COARSE_TOLERANCE = 1e-4
"""The same where the model insists on a lower precision."""


@contextmanager
def forked_rng(device: torch.device) -> Iterator[None]:
    """A context after which the random states of the CPU and of `device`, NumPy's and Python's are what they were."""
    states = random.getstate(), np.random.get_state()
    # An accelerator's state is asked for by device; MPS has one device, and takes none.
    with torch.random.fork_rng([] if device.type in ("cpu", "mps") else [device], device_type=device.type):
        try:
            yield
        finally:
            random.setstate(states[0])
            np.random.set_state(states[1])


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
        if name.endswith("running_var"):
            buffer.add_(noise(buffer), alpha=0.5)
        elif name.endswith("running_mean"):  # of both signs: a shift that is no parameter would not make up for one
            buffer.add_(noise(buffer) - 0.5, alpha=0.5)
        elif buffer.is_floating_point() and buffer.numel() == 1 and not buffer.any():  # what is faded in later
            buffer.fill_(0.5)


def _drawable(tensor: Tensor) -> bool:
    """Whether a tensor of the example inputs can be drawn anew: a dense one of floating-point numbers."""
    return tensor.is_floating_point() and tensor.layout is torch.strided


def _of_integers(tensor: Tensor) -> bool:
    """Whether `tensor` is a dense one of integers."""
    dense = tensor.layout is torch.strided and tensor.dtype != torch.bool
    return dense and not tensor.is_floating_point() and not tensor.is_complex()


def _redrawn(example_inputs: Any) -> Any:
    """The example inputs with floating-point tensors drawn anew, with a mean of the other sign."""
    generator = torch.Generator().manual_seed(0)

    def draw(tensor: Tensor) -> Tensor:
        if not _drawable(tensor):
            return tensor
        return (torch.randn(tensor.shape, generator=generator) + (-1 if tensor.mean() > 0 else 1)).to(tensor)

    return with_tensors(example_inputs, draw)


def telling_inputs(model: nn.Module, example_inputs: Any, forward_fn: ForwardFn) -> Any:
    """The example inputs, drawn anew if a floating-point tensor is constant: zeros would hide what is not exact.

    A model that makes NaN of what is drawn, or refuses it, gets positive values, or in the end what it was given. Where
    there are integers alone, all alike (tokens, between which an attention would not tell), they get two values.
    """
    return _with_two_integers(model, _with_floats_drawn(model, example_inputs, forward_fn), forward_fn)


def _with_floats_drawn(model: nn.Module, example_inputs: Any, forward_fn: ForwardFn) -> Any:
    floats = [t for t in tensors_in(example_inputs) if _drawable(t)]
    if all(t.numel() < 2 or (t.isfinite().all() and t.min() < t.max()) for t in floats):
        return example_inputs
    drawn = _redrawn(example_inputs)
    positive = with_tensors(drawn, lambda tensor: tensor.abs() if _drawable(tensor) else tensor)
    return next((inputs for inputs in (drawn, positive) if _takes(model, inputs, forward_fn)), example_inputs)


def _with_two_integers(model: nn.Module, example_inputs: Any, forward_fn: ForwardFn) -> Any:
    several = [tensor for tensor in tensors_in(example_inputs) if tensor.numel() > 1]
    if not all(_of_integers(tensor) and tensor.min() == tensor.max() for tensor in several):
        return example_inputs
    generator = torch.Generator().manual_seed(0)

    def draw(tensor: Tensor) -> Tensor:
        # What it was and the number below, of zeros that above: a larger index might not exist.
        steps = (torch.randperm(tensor.numel(), generator=generator) % 2).view(tensor.shape).to(tensor)
        return tensor - steps if tensor.any() else steps

    def drawn(chosen: set[int]) -> Any:
        return with_tensors(example_inputs, lambda tensor: draw(tensor) if id(tensor) in chosen else tensor)

    ones = {id(tensor) for tensor in several if tensor.all() and tensor.max() == 1}  # a mask may be among them
    for chosen in [*({id(tensor)} for tensor in several if id(tensor) not in ones), ones]:
        inputs = drawn(chosen)
        if _takes(model, inputs, forward_fn):
            return inputs
    return example_inputs


@torch.no_grad()
def _takes(model: nn.Module, inputs: Any, forward_fn: ForwardFn) -> bool:
    """Whether `model` runs on `inputs`, and gives numbers."""
    try:
        with forked_rng(next(model.parameters()).device):
            return not any(t.isnan().any() for t in tensors_in(forward_fn(model, inputs)))
    except Exception:
        return False


def other_counts(
    model: nn.Module, example_inputs: Any, forward_fn: ForwardFn, counts: dict[str, int]
) -> dict[str, int]:
    """MACs by layer (see counted) on example inputs that are drawn anew: a forward that depends on data shows here.

    They are `counts`, those of the example inputs, if the model refuses the values.
    """
    try:
        return counted(model, _redrawn(example_inputs), forward_fn)[1]
    except Exception:  # values that the model refuses tell nothing about its layers
        return counts


class Fine(TorchDispatchMode):
    """Keeps in float64 what a forward would make, or convert to, in less: norms written by hand go through float32."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if kwargs.get("dtype") is not None:
            kwargs = {**kwargs, "dtype": _finest(kwargs["dtype"])}
        found = func(*args, **kwargs)
        made = isinstance(found, Tensor) and not any(isinstance(leaf, Tensor) for leaf in _pytree.tree_leaves(args))
        return _doubled(found) if made else found


def _finely(forward_fn: ForwardFn) -> ForwardFn:
    """`forward_fn` in float64 throughout."""

    def run(model: nn.Module, example_inputs: Any) -> Any:
        with Fine():
            return forward_fn(model, example_inputs)

    return run


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


def _finest(dtype: torch.dtype) -> torch.dtype:
    """float64 for floating-point numbers, complex128 for complex ones."""
    return torch.float64 if dtype.is_floating_point else torch.complex128 if dtype.is_complex else dtype


def _doubled(value: Any) -> Any:
    return value.to(_finest(value.dtype)) if isinstance(value, Tensor) else value


@torch.no_grad()
def in_float64(
    model: nn.Module, example_inputs: Any, forward_fn: ForwardFn, trains: bool
) -> tuple[nn.Module, Any, ForwardFn, float]:
    """`model`, in eval mode, the example inputs, and how to run it, all in float64, and the tolerance of its outputs.

    In float32 a small difference far from the output drowns in rounding, and so does one beside an output that is much
    larger. A model that does not run in float64, of training too if it `trains`, is tried as it is.
    """
    finely = _finely(forward_fn)
    try:  # a device may have no float64
        inputs = with_tensors(example_inputs, _doubled)
        fine = copy_model(model, lambda t: t.to(_finest(t.dtype), copy=True))
        with _Rounding() as rounding:
            finely(fine, inputs)
        if trains:
            finely(sharing_copy(fine).train(), inputs)
    except Exception:
        return model, example_inputs, forward_fn, COARSE_TOLERANCE
    return fine, inputs, finely, COARSE_TOLERANCE if rounding.met else TOLERANCE
