"""torch-pruning's dependency graph without its index mappings.

torch-pruning 1.6.1 asks torch for the shapes of a reshape under a name that torch has changed, takes negative
dimensions (2^64 - 1 for -1) for noise, and numbers the outputs of a split by the order in which it met their readers.
What follows is a ZeroDivisionError or TypeError for whole models, or positions that grow without end. ATO maps
positions itself, from the shapes that autograd holds (see axes.py), so that all of this can be left out.
"""

from __future__ import annotations

from typing import Any
from unittest import mock

import torch_pruning as tp
from torch_pruning.dependency import index_mapping, shape_infer


def _nothing(graph: Any) -> None:
    pass


def build_graph(*args: Any, **kwargs: Any) -> tp.DependencyGraph:
    """DependencyGraph.build_dependency: nodes, edges and pruners, with no index mappings on the edges."""
    with (
        mock.patch.object(index_mapping, "update_index_mapping", _nothing),
        mock.patch.object(shape_infer, "init_shape_information", _nothing),
    ):
        return tp.DependencyGraph().build_dependency(*args, verbose=False, **kwargs)
