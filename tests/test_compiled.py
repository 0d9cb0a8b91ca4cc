"""Compiled and averaged networks: the same run, no graph for controller turns, the same cut for the average."""

import copy
import shutil

import pytest
import torch
import torch.nn.functional as F
from networks import SHORT, Block, Flatten, Residual, batches, example
from test_optimizer import train
from torch import nn
from torch._dynamo.utils import counters
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from ato_optim import ATO
from ato_optim.proof import difference

STEPS = 30


def wrap(model, named):
    base = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    return ATO(base, named, example(), target_flops=0.5, total_steps=STEPS, phases=SHORT, interval=1)


def wrapper_passed(model, **options):
    called = torch.compile(model, **options)
    return called, wrap(model, called)


def compiled_before(model, **options):
    called = torch.compile(model, **options)
    return called, wrap(model, model)


def compiled_after(model, **options):
    optimizer = wrap(model, model)
    return torch.compile(model, **options), optimizer


def in_place_before(model, **options):
    model.compile(**options)
    return model, wrap(model, model)


def in_place_after(model, **options):
    optimizer = wrap(model, model)
    model.compile(**options)
    return model, optimizer


ORDERS = [wrapper_passed, compiled_before, compiled_after, in_place_before, in_place_after]


def run(model, called, optimizer, early=True):
    """Losses of a whole run, and how many graphs there were before the first turn and after the last."""
    losses, graphs = [], []
    for step in range(STEPS):
        turn = optimizer._turn_due
        losses += train(called, optimizer, 1, skip=step)
        if step == optimizer.schedule.search - 1 or turn:
            graphs.append(counters["stats"]["unique_graphs"])
        if early and optimizer.removable:
            optimizer.compress()
    assert len(optimizer.history) > 4
    return losses, graphs[0], graphs[-1]


def start(network=Residual):
    torch._dynamo.reset()
    counters.clear()
    torch.manual_seed(0)
    return network()


@pytest.fixture(scope="module")
def eager():
    model = start()
    optimizer = wrap(model, model)
    return run(model, model, optimizer)[0], optimizer.mask


@pytest.mark.parametrize("order", ORDERS)
def test_a_compiled_run_is_the_eager_one_in_one_graph_to_which_turns_add_none(order, eager):
    model = start()
    called, optimizer = order(model, backend="aot_eager", fullgraph=True)
    losses, before, after = run(model, called, optimizer)
    assert before == after == 1
    assert not counters["graph_break"]
    torch.testing.assert_close(losses, eager[0], rtol=1e-4, atol=1e-5)
    assert torch.equal(optimizer.mask, eager[1])
    assert sum(p.numel() for p in model.parameters()) == optimizer.report().parameters_after
    copied = copy.deepcopy(optimizer)
    train(copied.model, copied, 1)


def without_dropout():
    model = Flatten()
    model.head[3].p = 0.0
    return model


@pytest.mark.skipif(not any(map(shutil.which, ("c++", "g++", "clang++"))), reason="no C++ compiler for torch.compile")
def test_the_default_backend():
    """On a network without norms: torch's C++ for norms of few channels may corrupt memory (pytorch#181689)."""
    model = start(without_dropout)
    losses, *_ = run(model, model, wrap(model, model), early=False)
    model = start(without_dropout)
    called = torch.compile(model, fullgraph=True)
    compiled_losses, before, after = run(model, called, wrap(model, called), early=False)
    assert before == after == 1
    torch.testing.assert_close(compiled_losses, losses, rtol=1e-3, atol=1e-4)


def sequential():
    """A container of torch.nn as root, whose call torch.compile traces, hooks and all."""
    return nn.Sequential(Block(3, 8), Block(8, 12), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(12, 5))


@pytest.mark.parametrize("order", ORDERS)
def test_a_container_is_one_graph_if_ato_gets_the_compiled_wrapper(order):
    called, optimizer = order(start(sequential), backend="aot_eager", fullgraph=True)
    if order is wrapper_passed:
        assert run(optimizer.model, called, optimizer)[1:] == (1, 1)
        return
    with pytest.raises(torch._dynamo.exc.Unsupported, match=r"Skip calling `torch.compiler.disable\(\)`d function"):
        train(called, optimizer, 1)


@pytest.mark.parametrize("order", [compiled_after, in_place_before])
def test_a_container_in_several_graphs_has_no_more_of_them_for_turns(order):
    model = start(sequential)
    losses, *_ = run(model, model, wrap(model, model))
    model = start(sequential)
    called, optimizer = order(model, backend="aot_eager")
    compiled_losses, before, after = run(model, called, optimizer)
    assert 0 < before == after
    torch.testing.assert_close(compiled_losses, losses, rtol=1e-4, atol=1e-5)


class HandWritten:
    """What many loops hold: a deepcopy whose tensors are moved by hand."""

    def __init__(self, model):
        self.model = copy.deepcopy(model)

    @torch.no_grad()
    def update(self, model):
        for mine, theirs in zip(self.model.state_dict().values(), model.state_dict().values(), strict=True):
            mine.copy_(0.6 * mine + 0.4 * theirs if mine.is_floating_point() else theirs)


@pytest.mark.parametrize("early", [False, True])
@pytest.mark.parametrize("kind", ["AveragedModel", "by hand"])
def test_averages_are_cut_like_the_model(kind, early):
    """Cut in the middle or at the end, the average goes on; it is the one of an uncut run, but for its memory."""
    averages = []
    for cut in (early, False):
        model = start()
        optimizer = wrap(model, model)
        if kind == "by hand":
            ema = HandWritten(model)
            update, average = ema.update, ema.model
        else:
            average = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.6), use_buffers=True)
            update = average.update_parameters
        for step in range(STEPS + 10):  # so long that the average has forgotten the time before the cut
            train(model, optimizer, 1, skip=step)
            update(model)
            if cut and optimizer.removable:
                assert optimizer.compress(model=average) is getattr(average, "module", average)
                optimizer.compress()
        expected = average.eval()(example()).detach()
        if not cut:
            small = optimizer.compress(model=average, inplace=False)
            assert difference(expected, small.eval()(example())) < 1e-4
            optimizer.compress(model=average)
            optimizer.compress()
            assert {k: v.shape for k, v in small.state_dict().items()} == {
                k: v.shape for k, v in optimizer.model.state_dict().items()
            }
        bare = getattr(average, "module", average)
        assert {k: v.shape for k, v in bare.state_dict().items()} == {k: v.shape for k, v in model.state_dict().items()}
        averages.append(average.eval()(example()).detach())
        assert optimizer.compress(model=average) is bare  # a second time nothing is left to do
        assert difference(optimizer.compress(model=average, inplace=False).eval()(example()), averages[-1]) == 0
    assert difference(*averages) < 5e-3


def test_channels_last_survives_the_cut_in_weights_momenta_and_gradients():
    model = start().to(memory_format=torch.channels_last)
    optimizer = wrap(model, model)
    for x, y in batches(STEPS):
        optimizer.zero_grad()
        F.cross_entropy(model(x.to(memory_format=torch.channels_last)), y).backward()
        optimizer.step()
    optimizer.compress()
    images = [p for p in model.parameters() if p.ndim == 4 and p.shape[2] > 1]
    for p in images:
        for tensor in (p, p.grad, optimizer.state[p]["momentum_buffer"]):
            assert tensor.is_contiguous(memory_format=torch.channels_last)
    assert len(images) == 4


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_a_training_step_that_is_compiled_as_a_whole_is_the_plain_one(backend):
    """Forward, backward and step() in one compiled function."""
    losses = []
    for compiled in (False, True):
        torch._dynamo.reset()
        torch.manual_seed(0)
        model = Flatten().double()
        optimizer = ATO(
            torch.optim.AdamW(model.parameters(), lr=2e-3), model, example().double(), target_flops=0.5,
            total_steps=STEPS, phases=SHORT, interval=1,
        )  # fmt: skip

        def step(x, y, model=model, optimizer=optimizer):
            optimizer.zero_grad()
            loss = F.cross_entropy(model(x), y)
            loss.backward()
            optimizer.step()
            return loss

        step = torch.compile(step, backend=backend) if compiled else step
        losses.append([step(x.double(), y).item() for x, y in batches(STEPS)])
        assert len(optimizer.history) > 4
    assert losses[0] == pytest.approx(losses[1], rel=1e-12)
