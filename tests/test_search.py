"""The search: what it asks of the controller follows the budget, in short runs as in long ones; and its control."""

import itertools
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from networks import Residual, example

from ato_optim import ATO
from ato_optim.schedule import MOST_LR, TRAVEL, Schedule

PHASES = (0.1, 0.25, 0.3, 0.32)


@settings(max_examples=100, deadline=None)
@given(st.integers(1, 100_000), st.floats(0.05, 1))
def test_the_budget_falls_from_the_whole_to_the_target_before_anything_is_pulled(total_steps, target):
    schedule = Schedule.over(total_steps, PHASES, 0.1)
    asked = [schedule.budget(step, target) for step in range(schedule.search, min(schedule.commit, 500))]
    assert all(one >= other for one, other in itertools.pairwise(asked))
    assert all(target <= share <= 1 for share in asked)
    if schedule.pull > schedule.search:
        assert schedule.budget(schedule.search, target) == pytest.approx(1)
    assert schedule.budget(schedule.pull, target) == target


@settings(max_examples=100, deadline=None)
@given(st.integers(10, 200_000), st.one_of(st.none(), st.integers(1, 50)))
def test_the_controller_gets_equally_far_whatever_the_number_of_turns(total_steps, interval):
    schedule = Schedule.over(total_steps, PHASES, 0.1, interval)
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
    total = math.ceil(turns * 2 / (PHASES[2] - PHASES[0]))
    base = torch.optim.SGD(model.parameters(), lr=0.1)
    optimizer = ATO(base, model, example(), target_flops=target, total_steps=total, interval=2)
    search, schedule, plan = optimizer.search, optimizer.schedule, optimizer.plan
    nothing, last, off = torch.zeros(plan.groups.num_gates), -1, []
    for step in range(schedule.search, schedule.commit):
        if schedule.turn_due(step, last):
            search.learn(step, nothing, schedule.budget(step, target))
            last = step
            off.append(plan.share(search.proposal()) - schedule.budget(step, target))
    assert max(map(abs, off)) < 0.3
    assert abs(off[-1]) < 0.1
