"""What loops do to an optimizer: hooks, groups, closures, accumulation, precision. ATO takes it as torch's own do."""

import copy
import pickle
import warnings

import pytest
import torch
import torch.nn.functional as F
from networks import SHORT, Flatten, Residual, batches, example
from test_contract import Tiny, X, Y, assert_same, leaves, step
from torch import nn
from torch.utils import _pytree

from ato_optim import ATO
from ato_optim.proof import difference


def sgd(model, target_flops=0.5, total_steps=60, **options):
    base = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    return ATO(base, model, example(1), target_flops=target_flops, total_steps=total_steps, phases=SHORT, **options)


def to_a_turn(model, optimizer):
    """Train until the next training forward is a controller turn."""
    k = 0
    while not optimizer._turn_due:
        step(model, optimizer, k)
        k += 1
    # closed gates, so that the turn shows
    with torch.no_grad():
        head = optimizer.search.controller.head
        head.sub_(0.03 * (torch.arange(len(head))[:, None] % 3))


def test_step_hooks_and_state_hooks():
    model = Tiny()
    optimizer = sgd(model)
    seen = []
    optimizer.register_step_pre_hook(lambda opt, args, kwargs: seen.append("before"))
    optimizer.register_step_post_hook(lambda opt, args, kwargs: seen.append("after"))
    for k in range(12):  # controller turns among them
        step(model, optimizer, k)
    assert optimizer.history and seen == ["before", "after"] * 12
    seen.clear()
    optimizer.register_state_dict_pre_hook(lambda opt: seen.append("pack"))
    optimizer.register_state_dict_post_hook(lambda opt, state: {**state, "note": state["ato"]["step_count"]})
    optimizer.register_load_state_dict_pre_hook(lambda opt, state: seen.append(state.pop("note")))
    optimizer.register_load_state_dict_post_hook(lambda opt: seen.append(opt.step_count))
    state = optimizer.state_dict()
    step(model, optimizer, 12)
    optimizer.load_state_dict(state)
    assert seen[0] == "pack" and seen[-2:] == [12, 12] and state["note"] == 12


class Quantised(torch.optim.SGD):
    """A base that keeps something of its own in its state_dict, as many outside of torch do."""

    scale = 1.0

    def state_dict(self):
        return {**super().state_dict(), "scale": self.scale}

    def load_state_dict(self, state_dict):
        self.scale = state_dict["scale"]
        super().load_state_dict({k: v for k, v in state_dict.items() if k != "scale"})


def test_a_base_with_a_state_dict_of_its_own_is_asked_for_it():
    optimizers = []
    for scale in (2.0, 1.0):
        model = Tiny()
        base = Quantised(model.parameters(), lr=0.05, momentum=0.9)
        base.scale = scale
        optimizers.append(ATO(base, model, example(1), target_flops=0.5, total_steps=60, phases=SHORT))
    optimizers[1].load_state_dict(optimizers[0].state_dict())
    assert optimizers[1].base.scale == 2.0


def test_repr_names_the_groups():
    optimizer = sgd(Tiny())
    assert "lr: 0.05" in repr(optimizer) and "momentum: 0.9" in repr(optimizer)


def test_added_groups_are_trained_kept_and_carried_over_the_cut():
    model = Tiny()
    optimizer = sgd(model, total_steps=20)
    temperature = nn.Parameter(torch.ones(()))
    bias = nn.Parameter(torch.zeros(5))
    optimizer.add_param_group({"params": [temperature, bias], "lr": 0.5})
    assert optimizer.base.param_groups[-1] == {**optimizer.param_groups[-1]}
    assert optimizer.param_groups[-1]["momentum"] == 0.9
    for _ in range(25):
        optimizer.zero_grad()
        F.cross_entropy(model(X) * temperature + bias, Y).backward()
        optimizer.step()
        if optimizer.removable:
            optimizer.compress()
    assert temperature != 1 and bias.any()
    assert optimizer.param_groups[-1]["params"][1] is bias and optimizer.state[bias]["momentum_buffer"].any()


def test_closures_run_with_gradients_whatever_surrounds_step():
    runs = []
    for grad in (True, False):
        torch.manual_seed(0)
        model = Tiny()
        optimizer = sgd(model, total_steps=20, interval=2)
        for k in range(20):

            def closure(model=model, optimizer=optimizer, k=k):
                assert torch.is_grad_enabled()
                optimizer.zero_grad()
                loss = F.cross_entropy(model(X.roll(k, 0)), Y.roll(k, 0))
                loss.backward()
                return loss

            with torch.set_grad_enabled(grad):
                optimizer.step(closure)
        assert len(optimizer.history) > 2
        runs.append(leaves(model, optimizer))
    assert_same(*runs)


@pytest.mark.parametrize("set_to_none", [True, False])
def test_both_forms_of_zero_grad(set_to_none):
    model = Tiny()
    optimizer = sgd(model)
    to_a_turn(model, optimizer)
    F.cross_entropy(model(X), Y).backward()
    optimizer.zero_grad(set_to_none=set_to_none)
    assert all(p.grad is None if set_to_none else not p.grad.any() for p in model.parameters())
    optimizer.step()  # a turn without gradients; the weights stay
    assert optimizer.last_turn == optimizer.step_count - 1


@pytest.mark.parametrize("clip", [None, 0.1])
def test_accumulated_and_clipped_turns_equal_those_of_the_whole_batch(clip):
    """A mean over equal parts is the mean of the whole: controller and weights agree with one big batch."""
    runs = []
    for parts in (1, 4):
        torch.manual_seed(0)
        model = Flatten()
        model.head[3].p = 0.0
        model.double()
        base = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
        optimizer = ATO(base, model, example(1).double(), target_flops=0.5, total_steps=60, phases=SHORT)
        for x, y in batches(60):
            optimizer.zero_grad()
            for one, target in zip(x.double().chunk(parts), y.chunk(parts), strict=True):
                (F.cross_entropy(model(one), target) / parts).backward()
            if clip is not None:
                nn.utils.clip_grad_norm_(model.parameters(), clip)
            optimizer.step()
        runs.append((model, optimizer))
    (one, first), (other, second) = runs
    assert torch.equal(first.mask, second.mask) and not first.mask.all() and first.history == second.history
    torch.testing.assert_close(one.state_dict(), other.state_dict(), rtol=1e-9, atol=1e-11)


def test_a_clip_counts_nothing_of_channels_that_are_zero():
    """Behind a norm without a scale their gradients would be hundreds of times as large as those of all others."""
    runs = []
    for early in (False, True):
        torch.manual_seed(0)
        layers = [
            [nn.Conv2d(i, o, 3, padding=1), nn.InstanceNorm2d(o), nn.LeakyReLU(0.2)] for i, o in ((3, 16), (16, 32))
        ]
        model = nn.Sequential(*layers[0], *layers[1], nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(128, 5)).double()
        base = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9, weight_decay=1e-3)
        optimizer = ATO(base, model, example(1).double(), target_flops=0.3, total_steps=60, phases=SHORT)
        norms = []
        for x, y in batches(60):
            optimizer.zero_grad()
            F.cross_entropy(model(x.double()), y).backward()
            norms.append(nn.utils.clip_grad_norm_(model.parameters(), 0.5))
            optimizer.step()
            if early and optimizer.removable:
                optimizer.compress()
        runs.append((torch.stack(norms), optimizer.compress()))
    (late, one), (early, other) = runs
    torch.testing.assert_close(late, early, rtol=1e-9, atol=0)
    torch.testing.assert_close(one.state_dict(), other.state_dict(), rtol=1e-9, atol=1e-11)


def test_several_forwards_before_one_backward_are_one_turn():
    """Two views in one loss: the same mask in both, and the gradients of a model that is masked throughout."""
    torch.manual_seed(0)
    model = Flatten().double()
    model.head[3].p = 0.0
    base = torch.optim.SGD(model.parameters(), lr=0.05)
    optimizer = ATO(base, model, example(1).double(), target_flops=0.5, total_steps=60, phases=SHORT, interval=3)
    for _ in range(8):
        optimizer.zero_grad()
        F.cross_entropy(model(X.double()), Y).backward()
        optimizer.step()
    optimizer.search.controller.head.data.sub_(0.1)
    optimizer.zero_grad()
    views = X.double(), X.double().flip(3)
    (model(views[0]) * model(views[1])).sum().backward()
    assert optimizer.turn_begun
    masked = copy.deepcopy(model)
    table = optimizer.plan.groups.consumers
    assert not optimizer._turn.gates.bool().all()
    table.scale(table.parameters(masked), optimizer._turn.gates.double())
    masked.zero_grad()
    (masked(views[0]) * masked(views[1])).sum().backward()
    for (name, p), q in zip(model.named_parameters(), masked.parameters(), strict=True):
        torch.testing.assert_close(p.grad, q.grad, msg=name)
    optimizer.step()
    assert not optimizer.turn_begun and optimizer.last_turn == 8


def test_parameters_without_gradients_and_frozen_layers_stay_what_they_are():
    model = Residual()
    model.aside = nn.Linear(3, 3)  # in the optimizer, never used
    model.stem.requires_grad_(False)
    before = copy.deepcopy(model.state_dict())
    optimizer = sgd(model, target_flops=0.8, total_steps=30, interval=2)
    for x, y in batches(30):
        optimizer.zero_grad()
        F.cross_entropy(model(x), y).backward()
        optimizer.step()
    assert len(optimizer.history) > 2
    for name in ("aside.weight", "stem.0.weight", "stem.1.weight", "stem.1.bias"):
        assert torch.equal(model.state_dict()[name], before[name]), name
    model.eval()
    expected = model(example()).detach()
    assert difference(expected, optimizer.compress()(example())) < 1e-5


def test_a_root_that_is_never_called_gets_a_warning_and_no_turn():
    """The loop calls the children: turns wait, and after a while a warning says what to pass instead, once."""
    model = nn.Sequential(Flatten().features, Flatten().head)
    optimizer = sgd(model, total_steps=200)
    plain = copy.deepcopy(model)
    bare = torch.optim.SGD(plain.parameters(), lr=0.05, momentum=0.9)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for k in range(100):
            for net, opt in ((model, optimizer), (plain, bare)):
                torch.manual_seed(k)
                opt.zero_grad()
                F.cross_entropy(net[1](net[0](X)), Y).backward()
                opt.step()
            if k == 39:  # no turn has touched the weights, and nothing is masked yet
                assert_same(leaves(model), leaves(plain))
                assert len(caught) == 1, "in the search, long before the commit"
    assert [w.category for w in caught] == [UserWarning]
    assert "no training forward of its model" in str(caught[0].message)
    assert "pass as model a torch.nn.Module whose forward does what the loop does" in str(caught[0].message)
    assert caught[0].filename == __file__
    assert optimizer.last_turn == -1


@pytest.mark.parametrize("dtype", [None, torch.bfloat16, torch.float16])
def test_loss_scaling_changes_no_turn_and_a_skipped_step_nothing(dtype):
    """The controller moves alike with a scale of 65,536 and without; steps with inf, turns too, never were."""
    runs = []
    for scaled in (False, True):
        torch.manual_seed(0)
        model = Tiny()
        optimizer = sgd(model, interval=2)
        scaler = torch.amp.GradScaler("cpu", init_scale=65536.0, growth_interval=10_000, enabled=scaled)

        def backward(x, y, factor=1.0, model=model, scaler=scaler):
            with torch.autocast("cpu", dtype, enabled=dtype is not None):
                loss = F.cross_entropy(model(x).float(), y)
            scaler.scale(loss * factor).backward()

        for k in range(10):
            optimizer.zero_grad()
            if scaled and (k < 2 or optimizer._turn_due):
                before = leaves(model, optimizer)
                buffers = [b.clone() for b in model.buffers()]
                turn = optimizer._turn_due
                backward(X, Y, float("inf"))
                scaler.step(optimizer)
                scaler.update(65536.0)
                optimizer.zero_grad()
                if not turn:  # as with any optimizer, the norm statistics of an ordinary forward have moved
                    for buffer, was in zip(model.buffers(), buffers, strict=True):
                        buffer.copy_(was)
                after = optimizer.state_dict()
                assert after["ato"].pop("turn_begun") == turn
                values = [*_pytree.tree_leaves(model.state_dict()), *_pytree.tree_leaves(after)]
                state = optimizer.state_dict()
                state["ato"]["turn_begun"] = False
                assert len(values) == len(before) - 1
                assert_same(before, _pytree.tree_leaves([model.state_dict(), state]))
            backward(X.roll(k, 0), Y.roll(k, 0))
            scaler.step(optimizer)
            scaler.update()
        assert len(optimizer.history) >= 2
        runs.append(optimizer)
    one, other = runs
    assert one.step_count == other.step_count == 10 and one.last_turn == other.last_turn
    # In half precision a tenth of a step of the controller's AdamW, which takes noise near zero for a direction.
    tolerance = {"rtol": 1e-5, "atol": 1e-7} if dtype is None else {"rtol": 1e-2, "atol": 1e-3}
    for here, there in zip(one.search.controller.parameters(), other.search.controller.parameters(), strict=True):
        torch.testing.assert_close(here, there, **tolerance)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_runs_masked_in_a_turn_and_whole_outside_of_it(dtype):
    """autocast keeps casts of weights for as long as it lasts: none of them may outlive a masking."""
    model = Tiny()
    optimizer = sgd(model)
    to_a_turn(model, optimizer)
    optimizer.search.controller.head.data.sub_(0.1)
    table = optimizer.plan.groups.consumers
    with torch.autocast("cpu", dtype):
        whole = [model.eval()(X)]  # with gradients: these casts are kept
        masked = model.train()(X)
        gates = optimizer._turn.gates
        whole.append(model.eval()(X))
        loss = F.cross_entropy(masked.float(), Y)
    loss.backward()
    by_hand = copy.deepcopy(model).train()
    assert not gates.bool().all()
    table.scale(table.parameters(by_hand), gates)
    with torch.autocast("cpu", dtype):
        assert torch.equal(masked, by_hand(X))
    assert torch.equal(*whole)
    assert not torch.equal(masked, whole[0])


def test_copies_between_backward_and_step_repeat_the_turn():
    """torch copies parameters without their gradients, so that a copy has to see the batch again."""
    model = Tiny()
    optimizer = sgd(model)
    to_a_turn(model, optimizer)
    optimizer.zero_grad()
    F.cross_entropy(model(X), Y).backward()
    twins = copy.deepcopy(optimizer), pickle.loads(pickle.dumps(optimizer))
    optimizer.step()
    for twin in twins:
        F.cross_entropy(twin.model(X), Y).backward()
        twin.step()
        assert_same(leaves(model, optimizer), leaves(twin.model, twin))
