"""What is computed on the CPU, whatever torch.set_default_device says; the model's own forward goes by that."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from functools import wraps
from typing import ParamSpec, TypeVar

import torch

P = ParamSpec("P")
R = TypeVar("R")


def on_cpu(function: Callable[P, R]) -> Callable[P, R]:
    """`function`, in which tensors that name no device are made on the CPU."""
    return on(torch.device("cpu"), function)


def as_now(function: Callable[P, R]) -> Callable[P, R]:
    """`function`, in which tensors that name no device are made where they are now."""
    return on(torch.get_default_device(), function)


def on(device: torch.device, function: Callable[P, R]) -> Callable[P, R]:
    """`function`, in which tensors that name no device are made on `device`."""

    @wraps(function)
    def wrapped(*args: P.args, **kwargs: P.kwargs) -> R:
        # A context costs a Python call for each of torch's functions, and most are never asked for another device.
        same = torch.get_default_device() == device
        with nullcontext() if same else device:
            return function(*args, **kwargs)

    return wrapped
