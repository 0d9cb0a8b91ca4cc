"""The capacity that the controller prefers: channels by their norms, chains from the graph, branches that add up."""

import math
from collections import defaultdict

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from networks import SHORT, Block, Concat, Residual, Waves, example
from torch import nn

from ato_optim import ATO
from ato_optim.capacity import capacity, channel_weights, find_chains
from ato_optim.optimizer import call
from ato_optim.plan import make_plan


def chains_of(model: nn.Module) -> set[frozenset[str]]:
    """The roots of the layer groups of each chain."""
    plan = make_plan(model, example(), call, [], set(model.parameters()))
    found = defaultdict(set)
    for layer, chain in zip(plan.groups.layers, find_chains(plan.cost, plan.layer_of_gate, plan.summed), strict=True):
        found[int(chain)].add(layer.root)
    return set(map(frozenset, found.values()))


class Bottlenecks(nn.Module):
    """Two branches of two inner layers each, on one stream."""

    def __init__(self):
        super().__init__()
        self.stem = Block(3, 8)
        self.one, self.two = (
            nn.Sequential(Block(8, 4, 1), Block(4, 4), nn.Conv2d(4, 8, 1, bias=False), nn.BatchNorm2d(8))
            for _ in range(2)
        )
        self.fc = nn.Linear(8, 5)

    def forward(self, x):
        x = self.stem(x)
        x = (x + self.one(x)).relu()
        x = (x + self.two(x)).relu()
        return self.fc(x.mean((2, 3)))


def plain():
    """Layers one after the other, each cheaper than the one before."""
    layers = [Block(3, 16), nn.MaxPool2d(2), Block(16, 16), nn.MaxPool2d(2), Block(16, 16)]
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, 5))


def test_layers_one_after_the_other_are_a_chain():
    assert chains_of(plain()) == {frozenset({"0.0", "2.0", "4.0"})}


def test_streams_end_chains():
    assert chains_of(Bottlenecks()) == {
        frozenset({"stem.0"}),
        frozenset({"one.0.0", "one.1.0"}),
        frozenset({"two.0.0", "two.1.0"}),
    }


def test_what_is_concatenated_is_in_series_with_what_reads_it():
    assert len(chains_of(Concat())) == 1


layers = st.lists(st.tuples(st.integers(1, 64), st.floats(0.05, 1), st.integers(0, 5)), min_size=1, max_size=8)


@settings(max_examples=100, deadline=None)
@given(layers)
def test_capacity_is_that_of_the_formula(layers):
    whole, shares, chain = map(torch.tensor, zip(*layers, strict=True))
    found = capacity(shares.double() * whole, whole, chain.unique(return_inverse=True)[1])
    chains = [[layer for layer in layers if layer[2] == index] for index in {layer[2] for layer in layers}]
    expected = sum(
        sum(layer[0] for layer in chain) * math.prod(layer[1] for layer in chain) ** (1 / len(chain))
        for chain in chains
    ) / sum(layer[0] for layer in layers)
    assert found.item() == pytest.approx(expected, rel=1e-6)
    assert capacity(whole, whole, torch.zeros_like(chain)).item() == pytest.approx(1)


def ato(model, **options):
    base = torch.optim.SGD(model.parameters(), lr=0.1)
    return ATO(base, model, example(), **{"target_flops": 0.5, "total_steps": 60, "phases": SHORT, **options})


def weights_of(optimizer):
    return channel_weights(optimizer.plan.groups, optimizer.model)


@pytest.mark.parametrize("network", [Residual, plain])
def test_the_controller_finds_more_capacity_at_the_same_macs_the_more_it_weighs(network):
    """Where the loss has no say. In so small a network the default's weight is hardly ahead of chance."""
    left = []
    for beta in (0.0, 6.0):
        torch.manual_seed(0)
        optimizer = ato(network(), total_steps=4000, interval=2, beta=beta)
        search, schedule, plan, weights = optimizer.search, optimizer.schedule, optimizer.plan, weights_of(optimizer)
        for step in range(schedule.search, schedule.commit, schedule.interval):
            search.learn(step, torch.zeros_like(weights), weights, schedule.budget(step, 0.5))
        kept = search._by_layer(search.settle(plan.lots(1)) * weights)
        left.append(capacity(kept, search._by_layer(weights), search.chain))
    assert left[1] > left[0]


def test_a_channel_weighs_the_norms_of_what_produces_and_of_what_reads_it():
    model = plain()
    optimizer, expected = ato(model), []
    for (conv, norm, *_), reader in ((model[0], model[2][0]), (model[2], model[4][0]), (model[4], model[-1])):
        rows = torch.cat([conv.weight.flatten(1), norm.weight[:, None], norm.bias[:, None]], 1).norm(dim=1)
        expected.append(rows * reader.weight.transpose(0, 1).flatten(1).norm(dim=1))
    torch.testing.assert_close(weights_of(optimizer), torch.cat(expected).detach(), rtol=1e-4, atol=0)


def test_what_a_complex_layer_reads_weighs_the_same_whatever_its_phase():
    model = Waves()
    groups = make_plan(model, example(), call, [], set(model.parameters())).groups
    assert "two.weight" in groups.consumers.names
    before = channel_weights(groups, model)
    with torch.no_grad():
        model.two.weight.mul_(1j)
    assert torch.equal(channel_weights(groups, model), before)


def test_what_is_pulled_to_zero_weighs_next_to_nothing():
    optimizer = ato(plain())
    before, producers = weights_of(optimizer), optimizer.plan.groups.producers
    producers.scale(producers.parameters(optimizer.model), torch.ones_like(before).index_fill(0, torch.arange(8), 0.0))
    after = weights_of(optimizer)
    assert (after[:8] < 0.01 * before[:8]).all()
    torch.testing.assert_close(after[8:], before[8:], rtol=1e-4, atol=0)


def test_a_gate_of_several_channels_weighs_what_all_of_them_do():
    """Whole groups of a grouped convolution go together."""
    model = nn.Sequential(Block(3, 8), Block(8, 8, groups=2), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 5))
    optimizer = ato(model, target_flops=0.7, min_width=0.5)
    assert optimizer.plan.channels.max() > 1
    columns = model[-1].weight.detach().square().sum(0).view(2, 4).sum(1)
    entries = [p.detach().reshape(8, -1).square().sum(1) for p in model[:2].parameters()]
    rows = sum(entries).view(2, 4).sum(1)
    torch.testing.assert_close(weights_of(optimizer), (rows * columns).sqrt(), rtol=1e-4, atol=0)


@pytest.mark.parametrize("nothing", [["4"], ["0", "2", "4"]])
def test_weights_that_start_at_zero_do_not_stop_the_search(nothing):
    """Some networks begin with layers of zeros, so that a channel, a layer or all of them are read by nothing."""
    model = plain()
    for name in nothing:
        nn.init.zeros_(model.get_submodule(name)[0].weight)
    nn.init.zeros_(model[-1].weight)
    optimizer = ato(model)
    search, weights = optimizer.search, weights_of(optimizer)
    assert weights.min() > 0
    for step in range(20):
        search.learn(step, torch.zeros_like(weights), weights, 0.5)
    assert all(parameter.isfinite().all() for parameter in search.controller.parameters())
