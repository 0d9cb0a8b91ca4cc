"""The search: what it asks of the controller follows the budget, in short runs as in long ones; and its control."""

import itertools
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from networks import NETWORKS, SHORT, Residual, batches, example

from ato_optim import ATO
from ato_optim.budget import least_mask
from ato_optim.controller import EVEN, Controller, binarise, controller_loss, gumbel_noise
from ato_optim.groups import GateTable
from ato_optim.schedule import MOST_LR, TRAVEL, Schedule


@settings(max_examples=100, deadline=None)
@given(st.integers(1, 100_000), st.floats(0.05, 1))
def test_the_budget_falls_from_the_whole_to_the_target_until_the_commit(total_steps, target):
    schedule = Schedule.over(total_steps, SHORT, 0.1)
    asked = [schedule.budget(step, target) for step in range(schedule.search, min(schedule.commit, 500))]
    assert all(one >= other for one, other in itertools.pairwise(asked))
    assert all(target <= share <= 1 for share in asked)
    if schedule.commit > schedule.search:
        assert schedule.budget(schedule.search, target) == pytest.approx(1)
    assert schedule.budget(schedule.commit, target) == target


@settings(max_examples=100, deadline=None)
@given(st.integers(10, 200_000), st.one_of(st.none(), st.integers(1, 50)))
def test_the_controller_gets_equally_far_whatever_the_number_of_turns(total_steps, interval):
    schedule = Schedule.over(total_steps, SHORT, 0.1, interval)
    turns, last = 0, -1
    for step in range(schedule.search, min(schedule.commit, schedule.search + 3000)):
        if schedule.turn_due(step, last):
            turns, last = turns + 1, step
    if schedule.commit <= schedule.search + 3000 and turns:
        assert schedule.controller_lr == pytest.approx(min(TRAVEL / turns, MOST_LR), rel=0.5 / turns + 1e-9)


@pytest.mark.parametrize("turns", [40, 400])
@pytest.mark.parametrize("target", [0.3, 0.6])
def test_the_mask_follows_the_budget_where_the_loss_has_no_say(turns, target):
    model = Residual()
    total = math.ceil(turns * 2 / (SHORT[1] - SHORT[0]))
    base = torch.optim.SGD(model.parameters(), lr=0.1)
    optimizer = ATO(base, model, example(), target_flops=target, total_steps=total, phases=SHORT, interval=2)
    search, schedule, plan = optimizer.search, optimizer.schedule, optimizer.plan
    nothing, last, off = torch.zeros(plan.groups.num_gates), -1, []
    alike = torch.ones_like(nothing)
    for step in range(schedule.search, schedule.commit):
        if schedule.turn_due(step, last):
            search.learn(step, nothing, alike, schedule.budget(step, target))
            last = step
            off.append(plan.share(search.proposal()) - schedule.budget(step, target))
    assert max(map(abs, off)) < 0.3
    assert abs(off[-1]) < 0.1


def test_the_loss_of_the_controller_has_the_gradient_that_it_states():
    gates = torch.rand(6, dtype=torch.float64, requires_grad=True)
    gradient, macs, channels = torch.randn(6).double(), torch.rand(6).double(), torch.rand(6).double()
    share, kept = gates @ macs / macs.sum(), gates @ channels / channels.sum()
    target = share.item() / 2
    controller_loss(gates, gradient, share, target, 8.0, kept, 0.6).backward()
    expected = gradient + 8 * macs / (gates @ macs) - 0.6 * channels / (gates @ channels)
    torch.testing.assert_close(gates.grad, expected.detach())


def test_a_gate_at_the_even_logit_opens_in_half_of_the_draws():
    draws = torch.stack([binarise(torch.full((100,), EVEN), gumbel_noise(100, 0, step)) for step in range(200)])
    assert draws.mean().item() == pytest.approx(0.5, abs=0.02)


class Bias(torch.nn.Module):
    """A parameter is added to what one layer writes."""

    def __init__(self):
        super().__init__()
        self.a, self.b = torch.nn.Conv2d(3, 8, 3), torch.nn.Conv2d(8, 5, 3)
        self.shift = torch.nn.Parameter(torch.zeros(1, 8, 1, 1))

    def forward(self, x):
        return self.b((self.a(x) + self.shift).relu()).mean((2, 3))


def run(network=Residual, steps=0, **options):
    """An ATO after `steps` steps of its model."""
    torch.manual_seed(0)
    model = network()
    base = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    optimizer = ATO(
        base, model, example(), **{"target_flops": 0.5, "total_steps": 60, "phases": SHORT, "interval": 2, **options}
    )
    for x, y in batches(steps):
        optimizer.zero_grad()
        torch.nn.functional.cross_entropy(model(x), y).backward()
        optimizer.step()
    return optimizer


def test_streams_are_what_is_summed_and_no_product_concatenation_or_bias():
    found = {
        network.__name__: {layer.root for layer in run(network).plan.groups.layers if layer.summed}
        for network in (*NETWORKS, Bias)
    }
    summed = {"Residual": {"stem.0", "wider.0"}, "Depthwise": {"stem.0"}}
    assert found == {name: summed.get(name, set()) for name in found}


@pytest.mark.parametrize("seed", [0, 1])
def test_whole_streams_are_the_same_as_streams_that_are_named_in_ignored_layers(seed):
    """Step for step: what cannot close changes neither the controller nor its noise."""
    named = run(steps=60, seed=seed, ignored_layers=["stem.0", "two", "wider.0", "short"])
    found = run(steps=60, seed=seed, streams=1)
    assert named.history == found.history and len(found.history) > 5
    assert found.compress().stem[0].out_channels == 8
    for (name, one), (_, other) in zip(
        named.compress().named_parameters(), found.model.named_parameters(), strict=True
    ):
        assert torch.equal(one, other), name


@pytest.mark.parametrize("target", [0.7, 0.5, 0.3, 0.2, 0.1])
def test_streams_keep_what_half_of_the_budget_pays(target):
    optimizer = run(steps=60, target_flops=target)
    plan = optimizer.plan
    floor = plan.share(least_mask(plan.layer_of_gate, optimizer.least))
    assert optimizer.least_flops < floor <= (optimizer.least_flops + target) / 2
    streams = [width for width in optimizer.report().widths if width.layers[0] in ("stem.0", "wider.0")]
    assert all(width.least <= width.after <= width.before for width in optimizer.report().widths)
    whole = [width.least == width.before for width in streams]
    assert all(whole) if target >= 0.7 else not any(whole) if target <= 0.2 else True
    assert 0.9 * target < plan.share(optimizer.mask) <= target
    optimizer.compress()


def test_without_room_for_streams_they_are_pruned_like_the_rest():
    optimizer = run(steps=60, streams=0)
    assert all(width.least <= math.ceil(0.1 * width.before) for width in optimizer.report().widths)
    assert optimizer.compress().stem[0].out_channels < 8


@pytest.mark.parametrize("threads", [1, 2])
def test_gradient_of_the_controller_and_sums_over_gates_have_one_order(threads):
    """Or a resumed run is another one, and the masks of two ranks part. Layers that end between two threads' shares."""
    layers = torch.arange(7).repeat_interleave(600)[:-1]
    table = GateTable(["weight"], [0], [2], [90_000], torch.arange(90_000) % 7)
    torch.set_num_threads(threads)
    try:
        controller, weight = Controller(layers, 0), torch.randn(90_000, 3)
        drawn = torch.randn(len(layers))
        found = []
        for _ in range(20):
            controller.zero_grad()
            (controller() * drawn).sum().backward()
            found.append([table.sum([weight], 7), *(p.grad.clone() for p in controller.parameters())])
    finally:
        torch.set_num_threads(1)
    assert all(torch.equal(one, other) for each in found[1:] for one, other in zip(found[0], each, strict=True))
    torch.testing.assert_close(found[0][0], torch.zeros(7).index_add(0, table.gate, weight.sum(1)), atol=1e-2, rtol=0)
