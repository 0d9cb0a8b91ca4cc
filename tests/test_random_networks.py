"""Whatever is put together: construction never crashes, what is pruned is exact, and it costs what was predicted."""

import copy
import os
import random

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from networks import randomised
from random_networks import OPERATIONS, RandomNetwork, Recipe

from ato_optim.compress import apply_cut, derive_cut
from ato_optim.cost import count_macs
from ato_optim.graph import call
from ato_optim.nests import tensors_in
from ato_optim.plan import make_plan
from ato_optim.proof import difference, zero_producers

NETWORKS = int(os.environ.get("ATO_RANDOM_NETWORKS", "200"))
"""Thousands when asked: then drawn anew each time."""

recipes = st.builds(
    Recipe,
    rank=st.sampled_from([2, 1, 3]),
    inputs=st.integers(1, 2),
    steps=st.lists(
        st.tuples(st.sampled_from(OPERATIONS), st.integers(0, 30), st.integers(0, 30)), min_size=2, max_size=12
    ),
    head=st.sampled_from(["pool", "flatten", "map"]),
    outputs=st.integers(1, 2),
)


def check(recipe: Recipe, seed: int) -> int:
    """How many gates the network has, after a random cut of it was compared with its masked self."""
    torch.manual_seed(seed)
    model = randomised(RandomNetwork(recipe))
    example = model.example()
    plan = make_plan(model, example, call, [], set(model.parameters()))
    mask = torch.rand(plan.groups.num_gates) < 0.6
    for layer in plan.groups.layers:
        mask[layer.start + torch.randint(layer.size, ())] = True
    small, masked = copy.deepcopy(model), copy.deepcopy(model)
    apply_cut(derive_cut(model, plan.groups, mask), small)
    if plan.groups.layers:
        zero_producers(masked, plan.groups, mask)
    inputs = tuple(torch.randn_like(x) for x in example)
    with torch.no_grad():
        assert difference(masked(*inputs), small(*inputs)) < 1e-4
    assert count_macs(small, example) == plan.cost(mask).item()
    assert sum(p.numel() for p in small.parameters()) == plan.count_parameters(mask)
    sum(t.sum() for t in tensors_in(small.train()(*inputs))).backward()
    return plan.groups.num_gates


@settings(max_examples=NETWORKS, deadline=None, derandomize=NETWORKS == 200)
@given(recipes, st.integers(0, 9))
def test_random_networks_are_pruned_exactly_or_left_alone(recipe, seed):
    check(recipe, seed)


def test_most_random_networks_have_something_to_prune():
    generator = random.Random(0)
    found = 0
    for seed in range(40):
        steps = [("conv", 1, 3), ("act", 1, 0)] + [
            (generator.choice(OPERATIONS), generator.randrange(31), generator.randrange(31))
            for _ in range(generator.randrange(3, 8))
        ]
        found += check(Recipe(2, 1, steps, "pool", 1), seed) > 0
    assert found >= 20


@pytest.mark.parametrize("seed", range(5))
def test_a_shuffle_that_some_widths_do_not_divide_is_left_alone(seed):
    # Found by test_random_networks: with half of the channels gone the shuffle still went through.
    check(Recipe(2, 1, [("conv", 0, 0), ("conv", 0, 16), ("shuffle", 1, 0), ("conv", 18, 0)], "pool", 1), seed)


@pytest.mark.parametrize("seed", range(5))
def test_halves_that_change_places_are_left_alone(seed):
    # Found by test_random_networks: one trial left a single channel, the other took one that does not matter.
    check(Recipe(2, 1, [("conv", 0, 0), ("swap", 1, 0)], "pool", 1), seed)
