"""A pruned network as a file: weights and the cut as plain data, no pickled code."""

from __future__ import annotations

from dataclasses import asdict
from os import PathLike
from typing import IO, TypeVar

import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from .compress import Cut, apply_cut, cut_of
from .unwrap import copy_model, unwrap, wrappers

FORMAT = "ato_optim.pruned"
VERSION = 1

Model = TypeVar("Model", bound=nn.Module)
File = str | PathLike[str] | IO[bytes]


def save_pruned(model: nn.Module, path: File) -> None:
    """Write the compressed `model` to `path`: its state_dict and what was cut from the dense network.

    Raises:
        ValueError: if `model` was not compressed by ATO, or a layer of it was replaced since.
    """
    model = unwrap(model)
    cut = cut_of(model)
    if cut is None:
        raise ValueError(
            f"model ({type(model).__name__}) holds no cut: pass what ATO.compress() returned, not the dense model"
        )
    for name, parameter in model.named_parameters():
        if name in cut.dense and list(parameter.shape) != cut.shape(name):
            raise ValueError(
                f"model ({type(model).__name__}) has {name} of shape {list(parameter.shape)} where its cut leaves "
                f"{cut.shape(name)}, and would not load into the dense network: save before layers are replaced, or "
                "replace them before ATO is built"
            )
    torch.save({"format": FORMAT, "version": VERSION, "cut": asdict(cut), "weights": model.state_dict()}, path)


def load_pruned(dense_model: Model, path: File, map_location: torch.device | str | None = None) -> Model:
    """Cut `dense_model` as the network in `path` was, load its weights, and return it.

    The file is read with weights_only=True: it can hold no code. `dense_model`, bare or in a wrapper of torch.compile
    or an average, is changed in place and keeps its device, dtype and mode; its outputs are then those of the saved
    network, to the bit if the dtype is the same.

    Raises:
        ValueError: if the file is none of save_pruned's, or was made from another architecture; the first
            module that differs is named, and `dense_model` is as it was.
    """
    content = torch.load(path, map_location=map_location, weights_only=True)
    if not isinstance(content, dict) or content.get("format") != FORMAT:
        raise ValueError(f"path ({path}) is no pruned network: write it with ato_optim.save_pruned")
    if content["version"] != VERSION:
        raise ValueError(
            f"path ({path}) has format version {content['version']}, this ato_optim reads {VERSION}: "
            "install the version that wrote it"
        )
    model, cut = unwrap(dense_model), Cut(**content["cut"])
    if any(isinstance(wrapper, DistributedDataParallel) for wrapper in wrappers(dense_model)):
        raise ValueError(
            "dense_model is wrapped in a DistributedDataParallel, which would not average the gradients of the smaller "
            "parameters: load into its module, and wrap that"
        )
    if any(parameter.is_meta for parameter in model.parameters()):
        raise ValueError(
            "dense_model is on the meta device and holds no weights: dense_model.to_empty(device='cpu') first"
        )
    trial = copy_model(model)
    apply_cut(cut, trial)
    try:
        trial.load_state_dict(content["weights"])
    except RuntimeError as error:
        raise ValueError(f"path ({path}) holds weights that do not fit dense_model after its cut: {error}") from error
    apply_cut(cut, model)
    model.load_state_dict(content["weights"])
    return dense_model
