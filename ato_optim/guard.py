"""A guard for torch-pruning's search of a group, which on some graphs never ends (1.6.1: slices, 5-d reshapes)."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn
from torch_pruning.dependency import Group

SECONDS = 30.0
"""Time that one group may take."""


class UnsettledGroupError(RuntimeError):
    """torch-pruning's search of a group does not settle."""


@contextmanager
def settling(model: nn.Module) -> Iterator[None]:
    """Within, a group search of torch-pruning that leaves the channels of `model` or takes too long raises.

    The search ends when each operation that it meets is known to the group, so the question whether one is
    known is where to watch it: positions beyond the longest dimension of any parameter, or more of them
    than that, belong to no channel.

    Raises:
        UnsettledGroupError: from within torch-pruning.
    """
    longest = max((size for p in model.parameters() for size in p.shape), default=1)
    deadline = time.monotonic() + SECONDS
    known = Group.has_pruning_op

    def watched(group: Group, dep: Any, idxs: Any) -> bool:
        if len(idxs) > longest or max(index.idx for index in idxs) >= longest:
            raise UnsettledGroupError(f"torch-pruning's indices leave the channels at {dep.target.name}")
        if time.monotonic() > deadline:
            raise UnsettledGroupError(f"torch-pruning has not settled after {SECONDS:.0f} s, now at {dep.target.name}")
        return known(group, dep, idxs)

    Group.has_pruning_op = watched
    try:
        yield
    finally:
        Group.has_pruning_op = known
