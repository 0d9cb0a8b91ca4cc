"""Interruption loses nothing: real processes, killed at random moments; checkpoints of other runs are refused."""

import copy
import random
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from networks import SHORT, Residual, example
from test_optimizer import make, train

from ato_optim import ATO

HERE = Path(__file__).parent


def log_of(folder):
    """(step, phase, checksum) of the steps that were finished, in the order in which they were done."""
    lines = (folder / "log.txt").read_text().splitlines() if (folder / "log.txt").exists() else []
    return [(int(step), phase, digest) for step, phase, digest in map(str.split, lines)]


def start(folder, when):
    return subprocess.Popen([sys.executable, str(HERE / "interrupted.py"), str(folder), when])


@pytest.mark.parametrize("when", ["late", "early"])
def test_a_run_that_is_killed_again_and_again_is_the_uninterrupted_one_bit_for_bit(when, tmp_path, kills):
    """At every step after every resumption: weights, momenta, controller, masks, schedule. compress() early or not."""
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    whole.mkdir()
    broken.mkdir()
    assert start(whole, when).wait(timeout=300) == 0
    expected = {step: (phase, digest) for step, phase, digest in log_of(whole)}
    assert len(expected) == 60 and len(dict(expected.values())) == len({phase for phase, _ in expected.values()})

    draw = random.Random(f"{when} {kills}")
    mine = kills // 2 + (kills % 2 if when == "late" else 0)
    span = 60 / max(mine, 1)  # one kill in each part of the run, so that all phases have theirs
    moments = [min(58, int((k + draw.random()) * span)) for k in range(mine)]
    phases = []
    for moment in moments:
        process = start(broken, when)
        try:
            deadline = time.monotonic() + 300
            while max((step for step, *_ in log_of(broken)), default=-1) < moment:
                assert process.poll() is None, "it ended by itself"
                assert time.monotonic() < deadline
                time.sleep(0.001)
            time.sleep(draw.random() * 0.02)  # somewhere within a step
        finally:
            process.kill()
        if process.wait() == 0:
            break  # it was done before the signal came
        phases.append(log_of(broken)[-1][1])
    assert start(broken, when).wait(timeout=300) == 0
    done = log_of(broken)
    assert {step for step, *_ in done} == set(expected)
    for step, phase, digest in done:
        assert (phase, digest) == expected[step], f"differs at step {step}, killed after {moments} in {phases}"
    assert len(phases) >= mine - 1


@pytest.mark.parametrize("stop", [13, 14, 15, 27])
def test_a_checkpoint_between_backward_and_step_holds_the_turn(stop):
    """What step() does with the gradients in hand is the same after a resume: a turn, or an update."""
    model, optimizer = make(interval=2)
    train(model, optimizer, stop)
    optimizer.zero_grad()
    model(example()).square().sum().backward()
    other = Residual()
    base = torch.optim.SGD(other.parameters(), lr=0.05, momentum=0.9, nesterov=True, weight_decay=1e-3)
    resumed = ATO(base, other, example(), target_flops=0.5, total_steps=60, phases=SHORT, interval=2, streams=0)
    resumed.load_state_dict(copy.deepcopy(optimizer.state_dict()))  # as a file is: tensors are not shared
    other.load_state_dict(model.state_dict())
    assert resumed.turn_begun == optimizer.turn_begun
    for mine, theirs in zip(other.parameters(), model.parameters(), strict=True):
        mine.grad = theirs.grad.clone()
    optimizer.step()
    resumed.step()
    assert optimizer.last_turn == resumed.last_turn
    for name, value in model.state_dict().items():
        assert torch.equal(value, other.state_dict()[name]), name
    if optimizer.searching:
        assert torch.equal(optimizer.search.controller.head, resumed.search.controller.head)


def other_classes():
    model = Residual()
    model.fc = torch.nn.Linear(16, 7)
    return model


def frozen():
    model = Residual()
    model.one.requires_grad_(False)
    return model


OTHERS = {
    "another number of classes": ({"network": other_classes}, r"another model: parameter fc.weight is \[5, 16\] there"),
    "other frozen layers": (
        {"network": frozen, "target_flops": 0.9},
        "groups of one.0, stem.0 are prunable in one of them alone",
    ),
    "another budget": ({"target_flops": 0.6}, "target_flops=0.5, this ATO has target_flops=0.6"),
    "another length": ({"total_steps": 61}, "total_steps=60, this ATO has total_steps=61"),
    "other phases": ({"phases": (0.1, 0.5, 0.7)}, r"phases=\[6, 18, 19\], this ATO has phases=\[6, 30, 42\]"),
    "another interval": ({"interval": 4}, "interval=2, this ATO has interval=4: build alike"),
    "another pull time": ({"pull_time": 0.5}, "pull_time in steps=1.2, this ATO has pull_time in steps=30.0"),
    "other widths": ({"round_to": 2}, "least widths|round_to"),
    "streams that stay": ({"streams": 1}, "least widths="),
    "another pull": ({"projection": "halfspace"}, "projection=timed, this ATO has projection=halfspace"),
    "another penalty": ({"penalty": (1, 2)}, "penalty="),
    "another base optimizer": ({"base": "adamw"}, "base_optimizer=SGD, this ATO has base_optimizer=AdamW"),
    "another seed": ({"seed": 1}, "seed=0, this ATO has seed=1"),
    "another weight of the budget": ({"gamma": 2}, "gamma="),
    "another weight of the channels": ({"beta": 2}, "beta="),
}


@pytest.mark.parametrize("case", OTHERS)
def test_a_checkpoint_of_another_run_is_refused_by_what_differs(case):
    options, words = OTHERS[case]
    model, optimizer = make(**options)
    train(model, optimizer, 2)
    before = optimizer.state_dict()
    with pytest.raises(ValueError, match=words):
        optimizer.load_state_dict(make()[1].state_dict())
    after = optimizer.state_dict()
    assert after["ato"]["step_count"] == 2
    for key, value in before["state"][0].items():
        assert torch.equal(value, after["state"][0][key])


def test_other_versions_inputs_and_optimizers_are_refused():
    _, optimizer = make()
    state = optimizer.state_dict()
    smaller = Residual()
    base = torch.optim.SGD(smaller.parameters(), lr=0.1)
    other = ATO(base, smaller, example()[..., :8, :8], target_flops=0.5, total_steps=60, phases=SHORT)
    with pytest.raises(ValueError, match=r"MACs of example_inputs=\d+, this ATO has"):
        other.load_state_dict(state)
    state["ato"]["version"] = 1
    with pytest.raises(ValueError, match=r"format version 1, this ato_optim reads 7: go on with the ato_optim that wr"):
        optimizer.load_state_dict(state)
    with pytest.raises(ValueError, match='no entry "ato"'):
        optimizer.load_state_dict(optimizer.base.state_dict())
    optimizer.add_param_group({"params": [torch.nn.Parameter(torch.ones(1))]})
    with pytest.raises(ValueError, match=r"parameter groups of sizes \[(\d+)\], this ATO of sizes \[\1, 1\]"):
        optimizer.load_state_dict(make()[1].state_dict())


def test_weights_of_a_cut_network_want_the_optimizer_first():
    model, optimizer = make()
    train(model, optimizer, 40)
    optimizer.compress()
    other, resumed = make()
    with pytest.raises(RuntimeError, match="size mismatch"):
        other.load_state_dict(model.state_dict())
    resumed.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    other.load_state_dict(model.state_dict())
    assert train(other, resumed, 3) == train(model, optimizer, 3)


def test_a_run_may_go_back_to_the_same_checkpoint_more_than_once():
    model = Residual()
    base = torch.optim.SGD(model.parameters(), lr=0.05)  # torch goes on in the momenta that it is given
    optimizer = ATO(base, model, example(), target_flops=0.5, total_steps=200, phases=SHORT)
    train(model, optimizer, 30)
    state, weights = copy.deepcopy(optimizer.state_dict()), copy.deepcopy(model.state_dict())
    ends = []
    for _ in range(3):
        optimizer.load_state_dict(state)
        model.load_state_dict(weights)
        train(model, optimizer, 50, skip=30)
        ends.append((optimizer.history, optimizer.search.controller.head.detach().clone()))
    assert all(history == ends[0][0] and torch.equal(head, ends[0][1]) for history, head in ends)
