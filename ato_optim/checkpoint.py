"""A pruned network as a file: weights and the cut as plain data, no pickled code."""

from __future__ import annotations

import io
from dataclasses import asdict
from os import PathLike
from typing import IO, Any, TypeVar

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.serialization import get_unsafe_globals_in_checkpoint

from .checks import module, owner_of
from .compress import Cut, apply_cut, compose, cut_of, uncut
from .copies import copy_model
from .sharding import is_sharded
from .unwrap import unwrap, wrappers

FORMAT = "ato_optim.pruned"
VERSION = 1
_ADVICE = "which ato_optim.save_pruned writes"

Model = TypeVar("Model", bound=nn.Module)
File = str | PathLike[str] | IO[bytes]


def save_pruned(model: nn.Module, path: File) -> None:
    """Write the compressed `model` to `path`: its state_dict and what was cut from the dense network.

    Layers that were added or replaced since the cut belong to the network, a module around it, too: the file loads into
    a dense model with the same change. Under fully_shard all ranks call it, and each writes the whole network.

    Raises:
        TypeError, ValueError: if `model` is no module, was not compressed by ATO, or has an extra state that is no
            plain data. Nothing is written then.
    """
    module("model", model)
    model = copy_model(unwrap(model)) if is_sharded(unwrap(model)) else unwrap(model)
    cut = cut_of(model)
    if cut is None:
        raise ValueError(
            f"model ({type(model).__name__}) holds no cut: pass what ATO.compress() returned, or what holds that, not "
            "the dense model or a part of the pruned one"
        )
    weights = model.state_dict()
    _check_plain(weights)
    content = {"cut": asdict(compose(cut, uncut(model))), "weights": weights}
    torch.save({"format": FORMAT, "version": VERSION, **content}, path)


def _check_plain(weights: dict[str, Any]) -> None:
    """Raise ValueError if `weights` hold what cannot be read with weights_only=True: what get_extra_state() gave."""
    for key, value in weights.items():
        if type(value) is not Tensor:
            torch.save(value, file := io.BytesIO())
            file.seek(0)
            if unknown := get_unsafe_globals_in_checkpoint(file):
                raise ValueError(
                    f"model holds {key} of {', '.join(unknown)}, which a file without code cannot: return plain data "
                    "from get_extra_state(), or allow the types where it is written and where it is read "
                    "(torch.serialization.add_safe_globals)"
                )


def load_pruned(dense_model: Model, path: File) -> Model:
    """Cut `dense_model` as the network in `path` was, load its weights, and return it.

    The file is read with weights_only=True: it can hold no code. `dense_model`, bare or in a wrapper of torch.compile
    or an average, is changed in place and keeps its device, dtype and mode; its outputs are then those of the saved
    network, to the bit if the dtype is the same (and if what its state_dict leaves out is). Its parameters are
    others afterwards: build optimizers, this package's too, after loading.

    Raises:
        TypeError, ValueError: if `dense_model` is no module, or has been given to an ATO; if the file is none of
            save_pruned's, or was made from another architecture; the first module that differs is named, and
            `dense_model` is as it was.
    """
    module("dense_model", dense_model)
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except OSError:
        raise
    except Exception as error:  # as many kinds as there are other files
        raise ValueError(f"path ({path}) is no pruned network, {_ADVICE} ({type(error).__name__}: {error})") from error
    if not isinstance(content, dict) or content.get("format") != FORMAT:
        raise ValueError(f"path ({path}) is no pruned network, {_ADVICE}")
    if content.get("version") != VERSION:
        raise ValueError(
            f"path ({path}) has format version {content.get('version')}, this ato_optim reads {VERSION}: "
            "install the version that wrote it"
        )
    model = unwrap(dense_model)
    if any(isinstance(wrapper, DistributedDataParallel) for wrapper in wrappers(dense_model)):
        raise ValueError(
            "dense_model is wrapped in a DistributedDataParallel, which would not average the gradients of the smaller "
            "parameters: load into its module, and wrap that"
        )
    if any(parameter.is_meta for parameter in model.parameters()):
        raise ValueError(
            "dense_model is on the meta device and holds no weights: dense_model.to_empty(device='cpu') first"
        )
    if owner_of(model) is not None:
        raise ValueError(
            "dense_model has been given to an ATO, which would go on with parameters that are replaced: load first, "
            "then build the optimizers"
        )
    if cut_of(model) is not None:
        raise ValueError("dense_model is cut already: pass a fresh dense model, and load further weights by state_dict")
    trial = copy_model(model)
    try:
        cut = Cut(**content["cut"])
        apply_cut(cut, trial)
        trial.load_state_dict(content["weights"])
    except RuntimeError as error:
        raise ValueError(f"path ({path}) holds weights that do not fit dense_model after its cut: {error}") from error
    except (AttributeError, LookupError, TypeError) as error:
        raise ValueError(
            f"path ({path}) is damaged ({type(error).__name__}: {error}), or not what ato_optim.save_pruned writes"
        ) from error
    apply_cut(cut, model)
    model.load_state_dict(content["weights"])
    return dense_model
