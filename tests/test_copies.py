"""Copies of a network whose modules hold functions: these refer to the copy, whatever they know the network by."""

import pickle
from functools import partial

import pytest
import torch
from networks import example
from test_cut import pruned
from torch import nn

from ato_optim.copies import copy_model

FEATURES: dict[str, torch.Tensor] = {}


class Keeping(nn.Module):
    """Keeps a feature on the way, and reads it at the end."""

    def __init__(self, kind: str):
        super().__init__()
        self.stem, self.deep = nn.Conv2d(3, 12, 3, 1, 1), nn.Conv2d(12, 16, 3, 1, 1)
        self.fc, self.aside, self.features = nn.Linear(16, 5), nn.Linear(12, 5), {}
        if kind == "global":
            self.features = FEATURES
        call = self.stem.forward

        def by_closure(module, args, output):
            self.features["stem"] = output

        def by_name(name, module, args, output):
            self.features[name] = output

        def by_global(module, args, output):
            FEATURES["stem"] = output

        def by_default(module, args, output, features=self.features):
            features["stem"] = output

        def instead(x):
            self.features["stem"] = call(x)
            return self.features["stem"]

        hooks = {"closure": by_closure, "partial": partial(by_name, "stem"), "global": by_global, "default": by_default}
        if kind in hooks:
            self.stem.register_forward_hook(hooks[kind])
        else:
            self.stem.forward = instead

    def forward(self, x):
        x = self.fc(torch.relu(self.deep(torch.relu(self.stem(x)))).mean((2, 3)))
        return x + self.aside(self.features["stem"].relu().mean((2, 3)))


KINDS = ["closure", "partial", "global", "default", "forward"]


@pytest.mark.parametrize("kind", KINDS)
def test_a_copy_neither_reads_nor_writes_what_the_original_keeps(kind):
    model = Keeping(kind)
    model(example())
    kept = model.features["stem"]
    copied = copy_model(model)
    found = copied(example(seed=1))
    assert model.features["stem"] is kept and copied.features["stem"] is not kept
    assert torch.equal(found, model(example(seed=1)))


@pytest.mark.parametrize("run_before", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_a_network_that_keeps_features_by_a_function_is_pruned(kind, run_before):
    """If the trial's copies read the original's feature, layers pass that cannot be cut alone."""
    torch.manual_seed(0)
    FEATURES.clear()
    model = Keeping(kind)
    if run_before:
        model(example())
    small, _ = pruned(model)
    assert small.stem.out_channels == small.deep.in_channels == small.aside.in_features


def test_functions_that_share_a_variable_share_it_in_the_copy_and_others_stay():
    model = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3))
    seen, last = [], None

    def count(module, args, output):
        nonlocal last
        last = model[0].weight
        seen.append(last)

    def check(module, args, output):
        seen.append(last)

    model[0].register_forward_hook(count)
    model[1].register_forward_hook(check)
    model[1].plain = plain = len
    copied = copy_model(model)
    copied(torch.randn(2, 3))
    assert seen[0] is seen[1] is copied[0].weight and copied[1].plain is plain


def importable(module, args, output):
    FEATURES["importable"] = output


def test_what_can_be_imported_is_the_same_in_the_copy():
    """Pickle knows it by its name."""
    model = nn.Sequential(nn.Linear(3, 3))
    model.known = FEATURES
    model[0].register_forward_hook(importable)
    copied = copy_model(model)
    assert next(iter(copied[0]._forward_hooks.values())) is importable
    pickle.loads(pickle.dumps(copied))


def test_a_function_that_calls_itself_and_one_that_keeps_a_table():
    model = nn.Sequential(nn.Linear(3, 3))
    table, seen = None, []

    def times(number):
        seen.append(model)
        return number and 1 + times(number - 1)

    def cached():
        nonlocal table
        table = model[0].weight if table is None else table
        return table

    model.times, model.cached = times, cached
    copied = copy_model(model)
    assert copied.times(3) == 3 and all(one is copied for one in seen)
    assert copied.cached() is copied[0].weight and table is None and model.cached() is model[0].weight


class Frozen(nn.Linear):
    def __deepcopy__(self, memo):
        return self


def test_hooks_of_what_copies_share_stay_the_originals():
    model = nn.Sequential(Frozen(3, 3))
    model.seen = []
    model[0].register_forward_hook(lambda module, args, output: model.seen.append(output))
    (hook,) = model[0]._forward_hooks.values()
    assert copy_model(model)[0] is model[0]
    assert list(model[0]._forward_hooks.values()) == [hook] and hook.__closure__[0].cell_contents is model
