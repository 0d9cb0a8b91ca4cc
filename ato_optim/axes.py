"""Where the channels of a tensor are after an operation that moves them: concat, split, slice, reshape and GLU.

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


class Unsafe(Exception):
    """Channels have to stay; the message completes "the layer ..."."""


Move = Callable[[Tensor], Tensor]


ORDERS = (
    "Amax", "Amin", "Aminmax", "Max", "Min", "Cummax", "Cummin",
    "Topk", "Sort", "Kthvalue", "Median", "Nanmedian", "Mode",
)  # fmt: skip
"""Autograd's names, up to "Backward", of what compares entries along dimensions: a zero is more than nothing to it."""
POOLS = {
    "MaxPool2DWithIndices": 2, "AdaptiveMaxPool2D": 2, "FractionalMaxPool2D": 2,
    "MaxPool3DWithIndices": 3, "AdaptiveMaxPool3D": 3, "FractionalMaxPool3D": 3,
}  # fmt: skip
"""The same of what does along so many of the last dimensions."""


def mover(kind: OPTYPE, grad_fn: Any, place: int, forward: bool, last: bool = False) -> Move:
    """What carries labels through the operation of autograd's node `grad_fn`, `forward` or back.

    It takes labels (positions,) and gives (positions,), or (positions, several) where several become one; it raises
    Unsafe if a reshape neither keeps, nor merges, nor splits the channels' axis.

    Args:
        kind: torch-pruning's name of the operation: RESHAPE, CONCAT, SPLIT or SLICE.
        place: for a concat the number of the input, for a split that of the output.
        last: for a reshape whether channels are last on both sides, if both sides end in as many.
    """
    if kind == OPTYPE.RESHAPE:
        sides = tuple(grad_fn._saved_self_sym_sizes), _shape(grad_fn)
        before, after = sides if forward else sides[::-1]
        return partial(reshape, before=before, after=after, last=last)
    window, total = _concat_window(grad_fn, place) if kind == OPTYPE.CONCAT else _window(kind, grad_fn, place)
    widens = forward == (kind == OPTYPE.CONCAT)
    return partial(_put if widens else _take, window=torch.tensor(window, dtype=torch.long), total=total)


def moves_by_name(grad_fn: Any, place: int, forward: bool) -> list[Move]:
    """What happens to labels in an operation that torch-pruning takes for one that works entry by entry.

    `place` is the number of its argument that they come from, or go back to.
    """
    name = grad_fn.name() if hasattr(grad_fn, "name") else ""
    kind = name.partition("Backward")[0]
    if kind == "Glu":
        return [partial(_halve if forward else _double, size=_input_shape(grad_fn)[_dimensions(grad_fn)[0]])]
    if kind.startswith("ScaledDotProduct") and place > 0 and hasattr(grad_fn, "_saved_query"):
        heads, shared = (saved.shape[1] for saved in (grad_fn._saved_query, grad_fn._saved_key))
        if 1 < shared < heads:  # a single one is broadcast, and stays
            return [partial(_spread if forward else _gather, heads=heads, shared=shared)]
    if forward and (kind in ORDERS or kind in POOLS):
        shape = _input_shape(grad_fn)
        dims = list(range(len(shape)))[-POOLS[kind] :] if kind in POOLS else _dimensions(grad_fn)
        return [partial(_refuse_order, shape=shape, dims=dims, name=name)]
    return []


def _halve(labels: Tensor, size: int) -> Tensor:
    return labels.view(2, -1).T if len(labels) == size else labels


def _double(labels: Tensor, size: int) -> Tensor:
    return labels.repeat(2) if 2 * len(labels) == size else labels


def _spread(labels: Tensor, heads: int, shared: int) -> Tensor:
    """Each key's head serves as many queries' heads in a row (grouped-query attention)."""
    return labels.repeat_interleave(heads // shared) if len(labels) == shared else labels


def _gather(labels: Tensor, heads: int, shared: int) -> Tensor:
    return labels.view(shared, -1) if len(labels) == heads else labels


def _refuse_order(labels: Tensor, shape: Sequence[int], dims: Sequence[int], name: str) -> Tensor:
    if channel_axis(len(labels), shape) in dims:
        raise Unsafe(f"is compared with other channels ({name})")
    return labels


def channel_axis(size: int, shape: Sequence[int]) -> int | None:
    """Which axis of `shape` has `size` channels: the second if it may be, or the last, or else another."""
    rank = len(shape)
    order = (1, rank - 1, *range(2, rank - 1), 0)
    return next((axis for axis in order if axis < rank and shape[axis] == size > 1), None)


def reshape(labels: Tensor, before: Sequence[int], after: Sequence[int], last: bool = False) -> Tensor:
    """Labels (n,) of the axis of n positions in shape `before` as labels of the axis that holds it in `after`.

    If it may be the `last` on both sides, it is.
    """
    size = len(labels)
    empty = 0 in before
    if (last or empty) and before[-1] == after[-1] == size:
        return labels
    if empty:  # of its axes none can be told from another
        raise Unsafe(f"runs through a reshape of an empty tensor ({tuple(before)} to {tuple(after)})")
    axis = channel_axis(size, before)
    if axis is None:
        return labels
    i, end, j, there = _block(axis, before, after)
    parts = [n for n in after[j:there] if n > 1]
    if len(parts) == 1:  # kept, or merged with the other axes of the block
        outer, inner = math.prod(before[i:axis]), math.prod(before[axis + 1 : end])
        return labels.repeat_interleave(inner).repeat(outer)
    if math.prod(before[i:end]) == size:  # split: along the axis that carries the labels, or by whole runs
        split = labels.view(parts)
        for k, part in enumerate(parts):
            along = split.movedim(k, 0).reshape(part, -1)
            if (along == along[:, :1]).all():
                return along[:, 0]
        return labels.view(parts[0], -1)
    raise Unsafe(f"runs through a reshape that mixes its channels ({tuple(before)} to {tuple(after)})")


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


def _input_shape(grad_fn: Any) -> tuple[int, ...]:
    sizes = getattr(grad_fn, "_saved_self_sym_sizes", None)
    return tuple(grad_fn._saved_self.shape if sizes is None else sizes)


def _signed(number: int) -> int:
    """A dimension, or an end of a slice: torch keeps negative ones as unsigned 64-bit numbers."""
    return number - (1 << 64) if number >= 1 << 63 else number


def _dimension(dim: int, rank: int) -> int:
    """The dimension `dim` of a tensor of `rank` dimensions, counted from the front."""
    return _signed(dim) % rank


def _dimensions(grad_fn: Any) -> list[int]:
    """The dimensions along which it reduces or sorts; all of them if it names none."""
    rank, dims = len(_input_shape(grad_fn)), getattr(grad_fn, "_saved_dim", None)
    named = () if dims is None else dims if isinstance(dims, tuple) else (dims,)
    return [_dimension(dim, rank) for dim in named] or list(range(rank))


def _concat_window(grad_fn: Any, place: int) -> tuple[range, int]:
    """Positions, along its dimension, of input number `place` of a concat, and how many there are in all."""
    shape = _shape(grad_fn)
    dim = _dimension(grad_fn._saved_dim, len(shape))
    sizes = [None if fn is None else _shape(fn, number)[dim] for fn, number in grad_fn.next_functions]
    if sizes.count(None) > 1:
        raise Unsafe("runs through a concat of several tensors without gradients")
    rest = shape[dim] - sum(size for size in sizes if size is not None)  # of an input without a gradient
    known = [rest if size is None else size for size in sizes]
    start = sum(known[:place])
    return range(start, start + known[place]), shape[dim]


def _window(kind: OPTYPE, grad_fn: Any, place: int) -> tuple[range, int]:
    """Positions, along its dimension, that output number `place` of a split or slice takes, and of how many."""
    shape = tuple(grad_fn._saved_self_sym_sizes)
    everything = range(shape[_dimension(grad_fn._saved_dim, len(shape))])
    if kind == OPTYPE.SLICE:
        start, end = _signed(grad_fn._saved_start), _signed(grad_fn._saved_end)
        return everything[start : end : grad_fn._saved_step], len(everything)
    sizes = getattr(grad_fn, "_saved_split_sizes", None)
    start = sum(sizes[:place]) if sizes is not None else place * grad_fn._saved_split_size
    size = sizes[place] if sizes is not None else grad_fn._saved_split_size
    return everything[start : start + size], len(everything)


def _take(labels: Tensor, window: Tensor, total: int) -> Tensor:
    return labels[window] if len(labels) == total else labels


def _put(labels: Tensor, window: Tensor, total: int) -> Tensor:
    return torch.full((total,), -1).index_copy_(0, window, labels) if len(labels) == len(window) else labels
