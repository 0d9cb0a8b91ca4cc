"""The mask that is committed: within the budget, as close as one channel allows, whatever the scores are."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from networks import Concat, Flatten, Residual, example
from torch import nn

from ato_optim import ATO
from ato_optim.budget import least_mask, minimum_widths, ranks, solve
from ato_optim.compress import apply_cut, derive_cut
from ato_optim.graph import call
from ato_optim.plan import make_plan

PLANS = {
    network: make_plan(model := network(), example(), call, [], set(model.parameters()))
    for network in (Residual, Concat, Flatten)
}


def widths(plan, mask):
    return torch.stack([mask[layer.gates].sum() for layer in plan.groups.layers])


@settings(max_examples=60, deadline=None)
@given(
    st.sampled_from(list(PLANS)),
    st.integers(0, 10_000),
    st.floats(0.05, 1),
    st.sampled_from([0.0, 0.1, 0.5]),
    st.sampled_from([1, 2, 4, 8]),
)
def test_solution(network, seed, target, min_width, round_to):
    plan = PLANS[network]
    least = minimum_widths(plan.sizes, min_width, round_to)
    smallest = plan.share(least_mask(plan.layer_of_gate, least))
    if target < smallest:
        return
    scores = torch.randn(plan.groups.num_gates, generator=torch.Generator().manual_seed(seed))
    scores = (4 * scores).round() / 4  # ties
    mask = solve(scores, plan.layer_of_gate, plan.cost, target, least, round_to)
    kept = widths(plan, mask)
    assert plan.share(mask) <= target
    assert (kept >= least).all()
    assert ((kept % round_to == 0) | (kept == plan.sizes)).all()
    for k, layer in enumerate(plan.groups.layers):
        inside = mask[layer.gates]
        if not inside.all():
            # the best channels of a layer are the kept ones
            assert scores[layer.gates][inside].min() >= scores[layer.gates][~inside].max()
            # and no lot more would fit
            wider = mask.clone()
            order = ranks(scores, plan.layer_of_gate)[layer.gates]
            wider[layer.gates] = order < min(int(kept[k]) + round_to, layer.size)
            assert plan.share(wider) > target


@settings(max_examples=60, deadline=None)
@given(st.floats(0, 1), st.sampled_from([0.0, 0.1, 0.5, 1.0]), st.sampled_from([1, 2, 8]))
def test_streams_are_as_wide_as_their_limit_lets_them(limit, min_width, round_to):
    plan = PLANS[Residual]
    lots = plan.lots(round_to)

    def share(least):
        return plan.share(least_mask(plan.layer_of_gate, least))

    smallest = minimum_widths(plan.sizes, min_width, lots)
    least = plan.stream_widths(min_width, round_to, limit)
    assert torch.equal(least[~plan.summed], smallest[~plan.summed])
    assert (least >= smallest).all()
    if share(smallest) > limit:
        assert torch.equal(least, smallest)
    else:
        assert share(least) <= limit
    wider = torch.where(plan.summed, torch.minimum(least + lots, plan.sizes), least)
    assert torch.equal(least, wider) or share(wider) > limit


@pytest.mark.parametrize("target", [0.3, 0.45, 0.7])
def test_a_network_of_usual_size_is_met_within_one_percent(target):
    import torchvision

    model = torchvision.models.resnet18(weights=None)
    plan = make_plan(model, torch.randn(1, 3, 32, 32), call, [], set(model.parameters()))
    for round_to in (1, 8):
        least = minimum_widths(plan.sizes, 0.1, round_to)
        mask = solve(torch.randn(plan.groups.num_gates), plan.layer_of_gate, plan.cost, target, least, round_to)
        assert target - 0.01 <= plan.share(mask) <= target


class Halved(torch.nn.Module):
    """Both halves of one layer's channels are added to another layer, which has half as many."""

    def __init__(self):
        super().__init__()
        self.a, self.b, self.c = torch.nn.Conv2d(3, 64, 3), torch.nn.Conv2d(3, 32, 3), torch.nn.Conv2d(32, 4, 1)

    def forward(self, x):
        one, other = self.a(x).chunk(2, 1)
        return self.c(torch.relu(one + other + self.b(x)))


@pytest.mark.parametrize("target", [0.3, 0.5, 0.7, 0.9])
def test_rounded_widths_are_so_in_all_layers_that_are_coupled(target):
    model = Halved()
    plan = make_plan(model, example(), call, [], set(model.parameters()))
    assert [layer.layers for layer in plan.groups.layers] == [{"a": 2, "b": 1}]
    lots = plan.lots(8)
    mask = solve(torch.randn(32), plan.layer_of_gate, plan.cost, target, minimum_widths(plan.sizes, 0.1, lots), lots)
    apply_cut(derive_cut(model, plan.groups, mask), model)
    assert model.a.out_channels == 2 * model.b.out_channels
    assert model.b.out_channels % 8 == 0 and model.b.out_channels < 32


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_minimum_widths_are_rounded_up_and_do_not_depend_on_the_default_dtype(dtype):
    sizes = torch.tensor([50, 100, 261, 1, 3])
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        assert minimum_widths(sizes, 0.3, 1).tolist() == [15, 30, 79, 1, 1]
        assert minimum_widths(sizes, 0.6, 1).tolist() == [30, 60, 157, 1, 2]
        assert minimum_widths(sizes, 1.0, 1).tolist() == sizes.tolist()
        assert minimum_widths(sizes, 0.0, 1).tolist() == [1] * 5
    finally:
        torch.set_default_dtype(before)


def test_streams_that_stay_whole_do_so_in_every_default_dtype():
    plan = make_plan(model := Wide(), torch.randn(1, 3, 8, 8), call, [], set(model.parameters()))
    torch.set_default_dtype(torch.bfloat16)
    try:
        least = plan.stream_widths(0.1, 1, 1.0)
    finally:
        torch.set_default_dtype(torch.float32)
    assert least[plan.summed].tolist() == [261] and (least[~plan.summed] == 2).all()


def test_a_look_ahead_names_the_least_widths_and_what_they_cost():
    """With the whole budget nothing keeps streams wide: what a report calls the least is what least_flops costs."""
    model = Residual()
    optimizer = ATO(torch.optim.SGD(model.parameters(), lr=0.1), model, example(), target_flops=1, total_steps=1)
    assert optimizer.plan.share(least_mask(optimizer.plan.layer_of_gate, optimizer.least)) == optimizer.least_flops
    assert all(width.least < width.before == width.after for width in optimizer.report().widths)


class Wide(nn.Module):
    """A stream of a width that bfloat16 does not have."""

    def __init__(self):
        super().__init__()
        self.stem, self.inner, self.outer = nn.Conv2d(3, 261, 1), nn.Conv2d(261, 20, 1), nn.Conv2d(20, 261, 1)
        self.fc = nn.Linear(261, 5)

    def forward(self, x):
        x = torch.relu(self.stem(x))
        return self.fc((x + self.outer(torch.relu(self.inner(x)))).mean((2, 3)))
