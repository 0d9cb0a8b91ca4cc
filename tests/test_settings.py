"""What is given to ATO is what it does: pulls against a plain loop over groups, widths, rates."""

import copy

import pytest
import torch
from networks import Residual
from test_optimizer import make, train


def pulled_one_by_one(model, optimizer, step, lr):
    """The producers after the pull of `step`, group by group as docs/method.md has it."""
    schedule, layer_of_gate = optimizer.schedule, optimizer.plan.layer_of_gate.tolist()
    table, closed = optimizer.plan.groups.producers, (~optimizer.mask).nonzero().flatten().tolist()
    weights = {name: p.detach().clone() for name, p in model.named_parameters()}
    places = [
        (weights[name].movedim(dim, 0), owners.flatten().tolist())
        for name, dim, owners in zip(
            table.names, table.dims, table.split(torch.arange(len(optimizer.mask)).float()), strict=True
        )
    ]
    grown = min(max(0.0, (step - schedule.commit) / (schedule.zero - schedule.commit)), 1.0)
    first, last = optimizer.penalty
    for gate in closed:
        entries = [weight[k] for weight, owners in places for k, owner in enumerate(owners) if owner == gate]
        norm = sum(entry.square().sum() for entry in entries).sqrt()
        share = sum(layer_of_gate[other] == layer_of_gate[gate] for other in closed) / len(closed)
        factor = max(0.0, 1 - first * (last / first) ** grown * lr * share / norm)
        if optimizer.projection == "halfspace" and factor < optimizer.epsilon:
            factor = 0.0
        if optimizer.projection == "timed":
            left = schedule.zero - step + 1 if step > schedule.commit else 0.2 * optimizer.total_steps
            factor = 1 - 1 / left
        for entry in entries:
            entry.mul_(factor)
    return weights


@pytest.mark.parametrize("projection", ["timed", "proximal", "halfspace"])
@pytest.mark.parametrize("step", [55, 62])
def test_a_pull_is_what_the_arguments_say(projection, step):
    """While searching, and in the middle of the commit phase."""
    lr = 0.05
    model, optimizer = make(total_steps=200, projection=projection, pull_time=0.2, penalty=(4, 400), epsilon=0.6)
    assert (optimizer.schedule.search, optimizer.schedule.commit, optimizer.schedule.zero) == (20, 60, 64)
    generator = torch.Generator().manual_seed(0)
    optimizer.mask = torch.rand(len(optimizer.mask), generator=generator) < 0.6
    before = copy.deepcopy(model.state_dict())
    expected = pulled_one_by_one(model, optimizer, step, lr)
    optimizer._pull(step)
    moved = 0
    for name, p in model.named_parameters():
        torch.testing.assert_close(p.detach(), expected[name], rtol=1e-5, atol=1e-7)
        moved += not torch.equal(p, before[name])
    assert moved >= 4
    if projection == "halfspace":  # epsilon has a say: some that a step would have left are zero
        optimizer.epsilon = 0.0
        model.load_state_dict(before)
        optimizer._pull(step)
        assert any(not torch.equal(p, expected[name]) for name, p in model.named_parameters())


def test_widths_are_multiples_of_round_to_from_the_commit_on():
    widths = []
    for round_to in (1, 4):
        model, optimizer = make(round_to=round_to)
        train(model, optimizer, 19)
        assert optimizer.phase == "zero"
        widths.append([width.after for width in optimizer.report().widths])
    assert any(width % 4 for width in widths[0]) and not any(width % 4 for width in widths[1])


def test_the_controllers_rates_are_the_users_and_those_of_a_checkpoint():
    rates = {"controller_lr": 0.5, "controller_weight_decay": 0.9}
    _, optimizer = make(Residual, **rates)
    (group,) = optimizer.search.optimizer.param_groups
    assert (group["lr"], group["weight_decay"]) == (0.5, 0.9)
    for name in rates:
        _, other = make(Residual, **{**rates, name: 0.1})
        with pytest.raises(ValueError, match=f"{name}={rates[name]}, this ATO has {name}=0.1: build alike"):
            other.load_state_dict(optimizer.state_dict())
