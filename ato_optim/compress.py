"""Physical removal: the cut that a mask makes, as plain data, applied wherever it is wanted.

The tables say which positions of every tensor go; torch-pruning's own pruners, run on a copy without data, say what
becomes of the modules' attributes, and must leave the same shapes. The same cut serves the trained model in place,
an averaged copy, a fresh dense model that a file is loaded into, and the optimizer's state.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from numbers import Integral, Real
from typing import Any

import torch
import torch_pruning as tp
from torch import Tensor, nn

from .copies import skeleton
from .default_device import on_cpu
from .graph import grouped
from .groups import Groups

CUT = "ato_cut"
"""Attribute of a pruned network's root module that holds its cut, as a dict."""
_OF_TRAINING = ("inplace", "p", "dropout", "momentum", "sparse", "scale_grad_by_freq")
"""Settings of torch's modules that change no evaluation."""
_BATCH_NORMS = {"BatchNorm1d", "BatchNorm2d", "BatchNorm3d", "SyncBatchNorm"}
"""Classes that evaluate alike."""
_WAY_OUT = (
    "pass the dense model from which the pruned one was made, built with the same arguments and with the same layers "
    "replaced since"
)


@dataclass(frozen=True)
class Cut:
    """What a removal leaves of a model, as plain data by names.

    Attributes:
        kept: tensor name -> dimension -> kept positions, for the parameters and buffers that shrink.
        attributes: module name -> attribute -> value after the cut, for those that change (out_channels ...).
        dense: tensor name -> shape before the cut, for all parameters and buffers, but for buffers that are neither cut
            nor saved: a forward may make them, or let them grow.
        modules: module name -> class and settings (stride ...) before the cut, for all modules.
    """

    kept: dict[str, dict[int, list[int]]]
    attributes: dict[str, dict[str, Any]]
    dense: dict[str, list[int]]
    modules: dict[str, dict[str, Any]]

    def shape(self, name: str) -> list[int]:
        """The shape after the cut of the tensor `name`."""
        dims = self.kept.get(name, {})
        return [len(dims.get(dim, range(size))) for dim, size in enumerate(self.dense[name])]


def tensors(model: nn.Module) -> dict[str, Tensor]:
    """Parameters and buffers by name; a tensor with two names appears under both."""
    return dict(model.named_parameters(remove_duplicate=False)) | dict(model.named_buffers(remove_duplicate=False))


def _plain(values: dict[str, Any]) -> dict[str, Any]:
    """Those of `values` that are plain data, numbers of numpy as Python's."""
    return {key: plain for key, value in values.items() if (plain := _as_plain(value)) is not NotImplemented}


def _as_plain(value: Any) -> Any:
    """`value` as plain data, NotImplemented if it is none."""
    if isinstance(value, (bool, str, type(None))):
        return value
    if isinstance(value, Integral):
        return int(value)
    if isinstance(value, Real):
        return float(value)
    plain = tuple(map(_as_plain, value)) if isinstance(value, tuple) else (NotImplemented,)
    return NotImplemented if NotImplemented in plain else plain


def _plain_attributes(model: nn.Module) -> dict[str, dict[str, Any]]:
    found = {name: _plain(vars(module)) for name, module in model.named_modules()}
    return {name: {key: value for key, value in values.items() if key != "training"} for name, values in found.items()}


def _settings(module: nn.Module) -> dict[str, Any]:
    """Class and constants (stride ...) of a module."""
    constants = getattr(module, "__constants__", ())
    # torch.fx makes a class for each of its modules, whose name deepcopy changes.
    name = "GraphModule" if isinstance(module, torch.fx.GraphModule) else type(module).__name__
    return {"class": name, **_plain({key: vars(module)[key] for key in constants if key in vars(module)})}


def _passing(model: nn.Module, kept: Iterable[str]) -> set[str]:
    """Names of buffers that are not saved, but for those that are cut: a forward may make them, or let them grow."""
    named = model.named_modules(remove_duplicate=False)
    names = {f"{name}.{key}".lstrip(".") for name, module in named for key in module._non_persistent_buffers_set}
    return names - {*kept}


def describe(model: nn.Module, kept: Iterable[str]) -> tuple[dict[str, list[int]], dict[str, dict[str, Any]]]:
    """Shapes of tensors, classes and settings of all modules: what a cut that leaves `kept` must match."""
    passing = _passing(model, kept)
    shapes = {name: list(t.shape) for name, t in tensors(model).items() if name not in passing}
    return shapes, {name: _settings(module) for name, module in model.named_modules()}


def _kept(model: nn.Module, groups: Groups, mask: Tensor) -> dict[str, dict[int, list[int]]]:
    """Tensor name -> dimension -> positions that stay, under every name that a tensor has."""
    kept: dict[str, dict[int, list[int]]] = {}
    for table in (groups.producers, groups.consumers, groups.followers):
        for name, dim, open_ in zip(table.names, table.dims, table.split(mask), strict=True):
            if not open_.all():
                kept.setdefault(name, {})[dim] = open_.flatten().nonzero().flatten().tolist()
    found = tensors(model)
    first = {id(found[name]): dims for name, dims in kept.items()}
    return {name: first[id(tensor)] for name, tensor in found.items() if id(tensor) in first}


def _close_groups(conv: Any, inputs: list[int], outputs: list[int]) -> None:
    """Remove whole groups of a grouped convolution, where torch-pruning would thin out all of them."""
    gone = set(inputs if conv.transposed else outputs)
    conv.groups -= conv.groups * len(outputs) // conv.out_channels
    conv.in_channels -= len(inputs)
    conv.out_channels -= len(outputs)
    keep = [k for k in range(len(conv.weight)) if k not in gone]
    conv.weight = nn.Parameter(conv.weight[keep])
    if conv.bias is not None:
        conv.bias = nn.Parameter(conv.bias[: conv.out_channels])


def _prune(model: nn.Module, groups: Groups, mask: Tensor) -> None:
    """Let torch-pruning's pruners remove from every module of `model` the channels that `mask` (gates,) closes."""
    open_ = torch.cat([mask, mask.new_ones(1)])
    gone = {key: (~open_[gates]).nonzero().flatten().tolist() for key, gates in groups.sides.items()}
    by_group = {name for name, _ in gone if grouped(model.get_submodule(name))}  # it may be left with one group
    for (name, writes), channels in gone.items():
        module = model.get_submodule(name)
        pruner = tp.pruner.function.PrunerBox.get(tp.ops.module2type(module))
        if not channels or pruner is None:
            continue
        if name in by_group:
            if writes:
                _close_groups(module, gone.get((name, False), channels), channels)
        elif writes:
            pruner.prune_out_channels(module, channels)
        else:
            pruner.prune_in_channels(module, channels)


@on_cpu
def derive_cut(model: nn.Module, groups: Groups, mask: Tensor) -> Cut:
    """The cut that removes the gates that `mask` (gates,) bool closes. `model` is not touched.

    Raises:
        RuntimeError: if torch-pruning's pruners leave other shapes than the tables say.
    """
    groups, mask = groups.to(torch.device("cpu")), mask.cpu()
    bare = skeleton(model)
    kept = _kept(bare, groups, mask)
    shapes, modules = describe(bare, {*kept, *_cut_before(bare)})
    before = _plain_attributes(bare)
    _prune(bare, groups, mask)
    pruned = {name for name, _ in groups.sides}
    cut = Cut(kept, {}, shapes, modules)
    for name, tensor in tensors(bare).items():
        if name.rpartition(".")[0] in pruned and name in shapes and list(tensor.shape) != cut.shape(name):
            raise RuntimeError(f"torch-pruning leaves {name} in shape {list(tensor.shape)}, expected {cut.shape(name)}")
    attributes = {
        name: {key: value for key, value in values.items() if value != before[name].get(key)}
        for name, values in _plain_attributes(bare).items()
    }
    return replace(cut, attributes={name: values for name, values in attributes.items() if values})


def _alike(here: Any, there: Any) -> bool:
    """Whether a setting, or a class, of two modules evaluates alike."""
    return here == there or {here, there} <= _BATCH_NORMS


def check_cut(cut: Cut, model: nn.Module) -> None:
    """Raise ValueError, naming the first module that differs, unless `cut` was made from a model like `model`."""
    shapes, modules = describe(model, cut.kept)
    for name in dict.fromkeys((*cut.modules, *modules)):
        here, there = modules.get(name, {}), cut.modules.get(name, {})
        what = f"module '{name}'" if name else "the model itself"
        for key in dict.fromkeys((*there, *here)):
            if key not in _OF_TRAINING and not _alike(here.get(key), there.get(key)):
                raise ValueError(
                    f"the cut belongs to another architecture: {what} has {key} {here.get(key)}, expected "
                    f"{there.get(key)}; {_WAY_OUT}"
                )
    for name in sorted({*cut.dense, *shapes} - _passing(model, cut.kept)):
        here_shape, there_shape = shapes.get(name), cut.dense.get(name)
        if here_shape != there_shape:
            raise ValueError(
                f"the cut belongs to another architecture: {name} has shape {here_shape}, expected {there_shape}; "
                f"{_WAY_OUT}"
            )


def select(tensor: Tensor, kept: dict[int, list[int]], dense: list[int] | None = None) -> Tensor:
    """The `kept` positions of `tensor`, channels_last if it was.

    With `dense`, dimensions whose size is not the dense one are left whole (factored optimizer state).
    """
    channels_last = {4: torch.channels_last, 5: torch.channels_last_3d}
    memory_format = None if tensor.is_contiguous() else channels_last.get(tensor.ndim)
    for dim, positions in kept.items():
        if dense is None or tensor.shape[dim] == dense[dim]:
            tensor = tensor.index_select(dim, torch.tensor(positions, dtype=torch.long, device=tensor.device))
    return tensor if memory_format is None else tensor.contiguous(memory_format=memory_format)


def _successor(old: nn.Parameter, data: Tensor, dims: dict[int, list[int]]) -> nn.Parameter:
    """A parameter with `data`, the rest of `old`'s gradient, and all that others have put on `old`."""
    new = type(old)(data, old.requires_grad)  # as torch copies it
    if hasattr(old, "grad_dtype"):  # not in older torch
        new.grad_dtype = old.grad_dtype
    if old.grad is not None:
        new.grad = select(old.grad, dims)
    for key, value in vars(old).items():
        alike = isinstance(value, Tensor) and value.shape == old.shape
        setattr(new, key, select(value, dims) if alike else value)
    # The same dicts, so that the handles which registering gave still remove.
    new._backward_hooks = old._backward_hooks
    new._post_accumulate_grad_hooks = old._post_accumulate_grad_hooks
    return new


def apply_cut(cut: Cut, model: nn.Module) -> dict[nn.Parameter, nn.Parameter]:
    """Cut `model` in place; gradients are cut along. Returns the new parameter of each one that was replaced.

    Raises ValueError, before anything is changed, if the model is another architecture or two layers share a
    parameter that the cut leaves different parts of.
    """
    check_cut(cut, model)
    kept: dict[int, dict[int, list[int]]] = {}
    found = tensors(model)
    for name, tensor in found.items():
        dims = cut.kept.get(name, {})
        if kept.setdefault(id(tensor), dims) != dims:
            raise ValueError(f"{name} is shared by layers that are cut differently: name them in ignored_layers")
    successors: dict[int, Tensor] = {}
    replaced: dict[nn.Parameter, nn.Parameter] = {}
    for name, dims in cut.kept.items():  # all of them before one is put in place: what is on a parameter may refuse
        old = found[name]
        if id(old) not in successors:
            new: Tensor = select(old.detach(), dims)
            if isinstance(old, nn.Parameter):
                replaced[old] = new = _successor(old, new, dims)
            successors[id(old)] = new
    for name in cut.kept:
        path, _, leaf = name.rpartition(".")
        found[name].grad = None
        setattr(model.get_submodule(path), leaf, successors[id(found[name])])
    for name, values in cut.attributes.items():
        for key, value in values.items():
            setattr(model.get_submodule(name), key, value)
    # Plain data: a model that is pickled whole can be loaded where this package is not.
    whole = dict(vars(cut_by(cut, model)))
    for part, module in model.named_modules():  # parts that were cut before are not any more what their own would say
        if any(name.startswith(f"{part}.") for name in cut.kept):
            vars(module).pop(CUT, None)
    setattr(model, CUT, whole)
    return replaced


def cut_of(model: nn.Module) -> Cut | None:
    """What was cut from the dense network that `model`, or a part of it, once was; None if nothing."""
    own = getattr(model, CUT, None)
    if own is not None:
        return Cut(**own)
    parts = {name: module for name, module in model.named_modules(remove_duplicate=False) if hasattr(module, CUT)}
    merged: dict[str, dict[str, Any]] = {field: {} for field in Cut.__dataclass_fields__}
    for name, module in parts.items():
        if not any(name.startswith(f"{other}.") for other in parts):  # which says it of its own parts
            for field, values in getattr(module, CUT).items():
                merged[field] |= {f"{name}.{key}".rstrip("."): value for key, value in values.items()}
    return Cut(**merged) if parts else None


def _cut_before(model: nn.Module) -> set[str]:
    """Names of what was cut before."""
    earlier = cut_of(model)
    return set() if earlier is None else set(earlier.kept)


def cut_by(cut: Cut, model: nn.Module) -> Cut:
    """What will have been cut from the dense network that `model` once was after `cut`, which fits `model`."""
    earlier = cut_of(model)
    return cut if earlier is None else compose(earlier, cut)


def uncut(model: nn.Module) -> Cut:
    """The cut that leaves all of `model` as it is."""
    return Cut({}, {}, *describe(model, _cut_before(model)))


def compose(first: Cut, second: Cut) -> Cut:
    """The cut that does at once what `first`, and then `second` on what it left, does.

    What was replaced between the two counts as if it had always been what it is for `second`.
    """
    kept, dense = {}, {}
    for name, now in second.dense.items():
        earlier = {dim: at for dim, at in first.kept.get(name, {}).items() if now[dim : dim + 1] == [len(at)]}
        later = second.kept.get(name, {})
        dense[name] = [first.dense[name][dim] if dim in earlier else size for dim, size in enumerate(now)]
        both = {dim: [at[k] for k in later.get(dim, range(len(at)))] for dim, at in earlier.items()}
        if earlier or later:
            kept[name] = later | both
    attributes, modules = {}, {}
    for name, settings in second.modules.items():
        before, after = first.modules.get(name, {}), first.attributes.get(name, {})
        left = all(settings.get(key, value) == value for key, value in after.items())
        if not left or not _alike(settings["class"], before.get("class")):
            after = {}
        modules[name] = settings | {key: before[key] for key in after if key in settings}
        if values := after | second.attributes.get(name, {}):
            attributes[name] = values
    return Cut(kept, attributes, dense, modules)
