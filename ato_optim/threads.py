"""What is changed in the whole process for a moment (torch's switches and random state), by one thread at a time."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable
from functools import wraps
from typing import ParamSpec, TypeVar

P = ParamSpec("P")
R = TypeVar("R")

_LOCK = threading.RLock()


def _renew() -> None:
    """A process that was forked meanwhile has no thread that would open the lock."""
    global _LOCK
    _LOCK = threading.RLock()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_renew)


def one_at_a_time(function: Callable[P, R]) -> Callable[P, R]:
    """`function`, which waits while another thread is in any function that has been treated so."""

    @wraps(function)
    def waiting(*args: P.args, **kwargs: P.kwargs) -> R:
        with _LOCK:
            return function(*args, **kwargs)

    return waiting
