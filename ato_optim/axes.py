"""Where the channels of a tensor are after an operation that moves them: concat, split, slice and reshape.

Labels are int64, one a position of the channels' axis, -1 for none. The shapes on both sides are those that
autograd's node of the operation holds; what works along another axis leaves the labels as they are.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch_pruning.ops import OPTYPE


class MixedError(Exception):
    """A reshape puts channels together with something else; the message gives its shapes."""


Move = Callable[[Tensor], Tensor]


def mover(kind: OPTYPE, grad_fn: Any, place: int, forward: bool) -> Move:
    """What carries labels through the operation of autograd's node `grad_fn`, `forward` or back.

    It takes labels (positions,) and gives (positions,), or (positions, several) where several become one; it raises
    MixedError if a reshape neither keeps, nor merges, nor splits the channels' axis.

    Args:
        kind: torch-pruning's name of the operation: RESHAPE, CONCAT, SPLIT or SLICE.
        place: for a concat the number of the input, for a split that of the output.
    """
    if kind == OPTYPE.RESHAPE:
        if not hasattr(grad_fn, "_saved_self_sym_sizes"):  # a view of another kind: of complex numbers as real ones
            raise MixedError(grad_fn.name())
        sides = tuple(grad_fn._saved_self_sym_sizes), _shape(grad_fn)
        before, after = sides if forward else sides[::-1]
        return partial(reshape, before=before, after=after)
    window, total = _concat_window(grad_fn, place) if kind == OPTYPE.CONCAT else _window(kind, grad_fn, place)
    widens = forward == (kind == OPTYPE.CONCAT)
    return partial(_put if widens else _take, window=torch.tensor(window, dtype=torch.long), total=total)


def reshape(labels: Tensor, before: Sequence[int], after: Sequence[int]) -> Tensor:
    """Labels (n,) of the axis of n positions in shape `before` as labels of the axis that holds it in `after`."""
    size, rank = len(labels), len(before)
    axes = [axis for axis in (1, rank - 1, *range(2, rank - 1), 0) if axis < rank and before[axis] == size > 1]
    if not axes:
        return labels
    i, end, j, there = _block(axes[0], before, after)
    parts = [n for n in after[j:there] if n > 1]
    if len(parts) == 1:  # kept, or merged with the other axes of the block
        outer, inner = math.prod(before[i : axes[0]]), math.prod(before[axes[0] + 1 : end])
        return labels.repeat_interleave(inner).repeat(outer)
    if math.prod(before[i:end]) == size:  # split: along the axis that carries the labels, or by whole runs
        split = labels.view(parts)
        for k, part in enumerate(parts):
            along = split.movedim(k, 0).reshape(part, -1)
            if (along == along[:, :1]).all():
                return along[:, 0]
        return labels.view(parts[0], -1)
    raise MixedError(f"{tuple(before)} to {tuple(after)}")


def _block(axis: int, before: Sequence[int], after: Sequence[int]) -> tuple[int, int, int, int]:
    """The fewest axes [i, end) of `before` around `axis` that hold the same entries as axes [j, there) of `after`."""
    i = j = 0
    while True:
        end, there = i + 1, j + 1
        while (left := math.prod(before[i:end])) != (right := math.prod(after[j:there])):
            end, there = end + (left < right), there + (left > right)
        if axis < end:
            return i, end, j, there
        i, j = end, there


def _shape(grad_fn: Any, place: int = 0) -> tuple[int, ...]:
    return tuple(grad_fn._input_metadata[place].shape)


def _dimension(grad_fn: Any, rank: int) -> int:
    """The dimension along which it works; torch keeps negative ones as unsigned 64-bit numbers."""
    dim = int(grad_fn._saved_dim)
    return dim - (1 << 64) + rank if dim >= 1 << 63 else dim % rank


def _concat_window(grad_fn: Any, place: int) -> tuple[range, int]:
    """Positions, along its dimension, of input number `place` of a concat, and how many there are in all."""
    shape = _shape(grad_fn)
    dim = _dimension(grad_fn, len(shape))
    sizes = [None if fn is None else _shape(fn, number)[dim] for fn, number in grad_fn.next_functions]
    if sizes.count(None) > 1:
        raise MixedError("a concat of several tensors without gradients")
    rest = shape[dim] - sum(size for size in sizes if size is not None)  # of an input without a gradient
    known = [rest if size is None else size for size in sizes]
    start = sum(known[:place])
    return range(start, start + known[place]), shape[dim]


def _window(kind: OPTYPE, grad_fn: Any, place: int) -> tuple[range, int]:
    """Positions, along its dimension, that output number `place` of a split or slice takes, and of how many."""
    shape = tuple(grad_fn._saved_self_sym_sizes)
    everything = range(shape[_dimension(grad_fn, len(shape))])
    if kind == OPTYPE.SLICE:
        return everything[grad_fn._saved_start : grad_fn._saved_end : grad_fn._saved_step], len(everything)
    sizes = getattr(grad_fn, "_saved_split_sizes", None)
    start = sum(sizes[:place]) if sizes is not None else place * grad_fn._saved_split_size
    size = sizes[place] if sizes is not None else grad_fn._saved_split_size
    return everything[start : start + size], len(everything)


def _take(labels: Tensor, window: Tensor, total: int) -> Tensor:
    return labels[window] if len(labels) == total else labels


def _put(labels: Tensor, window: Tensor, total: int) -> Tensor:
    return torch.full((total,), -1).index_copy_(0, window, labels) if len(labels) == len(window) else labels
