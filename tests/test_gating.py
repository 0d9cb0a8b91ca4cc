"""Controller turns: what is read is right, what must not be touched or seen is not."""

import copy
import ctypes
import functools
import signal
from dataclasses import dataclass

import pytest
import torch
import torch.nn.functional as F
from networks import NETWORKS, SHORT, Flatten, Residual, batches, example
from torch import nn
from torch.utils.checkpoint import checkpoint

from ato_optim import ATO
from ato_optim.gating import Masking, gate_gradient
from ato_optim.graph import call
from ato_optim.plan import make_plan


def with_explicit_gates(model, table, gates):
    """Multiply what each consumer reads by its gates, inside autograd."""
    owners = {f"{name}.weight": module for name, module in model.named_modules()}
    for name, part in zip(table.names, table.split(gates), strict=True):

        def multiply(module, inputs, part=part):
            (x,) = inputs
            return (x * part.reshape(-1, *[1] * (x.ndim - 2)),)

        owners[name].register_forward_pre_hook(multiply)


@pytest.mark.parametrize("network", NETWORKS)
def test_gate_gradient_is_autograds(network):
    model = network().double()
    plan = make_plan(model, example().double(), call, [], set(model.parameters()))
    gates = (torch.rand(plan.groups.num_gates) < 0.7).double()
    x, y = next(iter(batches(1)))
    x = x.double()

    explicit = copy.deepcopy(model)
    variable = gates.clone().requires_grad_()
    with_explicit_gates(explicit, plan.groups.consumers, variable)
    torch.manual_seed(1)
    expected_loss = F.cross_entropy(explicit(x), y)
    expected_loss.backward()

    masking = Masking(model, plan.groups.consumers, gates)
    masking.apply()
    torch.manual_seed(1)
    loss = F.cross_entropy(model(x), y)
    loss.backward()
    masking.undo()
    torch.testing.assert_close(loss, expected_loss)
    found = gate_gradient(model, plan.groups.consumers, gates)
    assert variable.grad.abs().max() > 0
    torch.testing.assert_close(found, variable.grad.float(), rtol=1e-4, atol=1e-6)


class HandGated(nn.Module):
    """Gates written by hand, as in the authors' code: after norm and ReLU, on the residual stream and inside."""

    def __init__(self, net: Residual, inner: torch.Tensor):
        super().__init__()
        self.net, self.inner = net, inner

    def forward(self, x):
        net = self.net
        x = net.stem(x)
        inner = net.one(x) * self.inner[:, None, None]
        x = torch.relu(x + net.norm(net.two(inner)))
        return net.fc((net.wider(x) + net.short(x)).mean((2, 3)))


def test_gate_gradient_equals_gates_written_by_hand():
    model = Residual().double()
    plan = make_plan(model, example().double(), call, [], set(model.parameters()))
    (layer,) = [layer for layer in plan.groups.layers if layer.root == "one.0"]
    gates = torch.ones(plan.groups.num_gates, dtype=torch.double)
    gates[layer.start : layer.start + 4] = 0
    hand = HandGated(copy.deepcopy(model), gates[layer.gates].clone().requires_grad_())
    x, y = next(iter(batches(1)))
    F.cross_entropy(hand(x.double()), y).backward()
    masking = Masking(model, plan.groups.consumers, gates)
    masking.apply()
    F.cross_entropy(model(x.double()), y).backward()
    masking.undo()
    found = gate_gradient(model, plan.groups.consumers, gates)[layer.gates]
    torch.testing.assert_close(found, hand.inner.grad.float(), rtol=1e-4, atol=1e-7)


def momentum_sgd(parameters):
    return torch.optim.SGD(parameters, lr=0.05, momentum=0.9, weight_decay=1e-3)


def at_a_turn(network=Residual, base=momentum_sgd, **options):
    """A model and its ATO, the next training forward of which is a controller turn with closed gates."""
    model = network()
    base = base(model.parameters())
    # Every kind of gate closes, and a step is the base optimizer's alone: a pull that takes so long is none.
    options = {"streams": 0, "pull_time": 1e9, **options}
    optimizer = ATO(base, model, example(), target_flops=0.5, total_steps=100, phases=SHORT, interval=3, **options)
    for x, y in batches(12):

        def closure(x=x, y=y):
            optimizer.zero_grad()
            loss = F.cross_entropy(model(x), y)
            loss.backward()
            return loss

        optimizer.step(closure)
    with torch.no_grad():
        head = optimizer.search.controller.head
        head.sub_(0.02 * torch.arange(len(head))[:, None] % 0.2)
    assert optimizer._turn_due
    return model, optimizer


def snapshot(model):
    return {key: value.clone() for key, value in model.state_dict().items()}


def same(one, other):
    return all(torch.equal(one[key], other[key]) for key in one)


def explicitly_masked_twin(model, optimizer):
    """A copy of model and base optimizer whose gates, those of the coming turn, are multiplied inside autograd."""
    twin = copy.deepcopy(model)
    base = type(optimizer.base)(twin.parameters(), **optimizer.base.defaults)
    base.load_state_dict(copy.deepcopy(optimizer.base.state_dict()))
    gates = optimizer.search.gates(optimizer.step_count).detach()
    assert 0 < gates.mean() < 1
    with_explicit_gates(twin, optimizer.plan.groups.consumers, gates)
    return twin, base


@pytest.mark.parametrize("with_closure", [False, True])
def test_a_turn_teaches_the_controller_and_trains_the_masked_network(with_closure):
    """The step is the base optimizer's on the network with gates inside autograd; norm statistics stay."""
    model, optimizer = at_a_turn()
    before, controller = snapshot(model), snapshot(optimizer.search.controller)
    twin, base = explicitly_masked_twin(model, optimizer)
    x, y = next(iter(batches(1)))

    def closure(model, optimizer):
        optimizer.zero_grad()
        loss = F.cross_entropy(model(x), y)
        loss.backward()
        return loss

    expected = closure(twin, base)
    base.step()
    if with_closure:
        loss = optimizer.step(lambda: closure(model, optimizer))
    else:
        loss = closure(model, optimizer)
        optimizer.step()
    torch.testing.assert_close(loss, expected)
    moved = 0
    for (name, mine), theirs in zip(model.named_parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-6)
        torch.testing.assert_close(
            optimizer.state[mine]["momentum_buffer"], base.state[theirs]["momentum_buffer"], rtol=1e-4, atol=1e-6
        )
        moved += not torch.equal(mine, before[name])
    assert moved
    assert all(torch.equal(buffer, before[name]) for name, buffer in model.named_buffers())
    assert not same(controller, optimizer.search.controller.state_dict())
    assert optimizer.step_count == 13 and not optimizer._turn_due


def test_a_base_optimizer_that_evaluates_more_than_once_trains_one_masked_network():
    model, optimizer = at_a_turn(base=lambda p: torch.optim.LBFGS(p, lr=0.1, max_iter=3))
    twin, base = explicitly_masked_twin(model, optimizer)
    x, y = next(iter(batches(1)))
    calls = []

    def closure(model, optimizer):
        optimizer.zero_grad()
        loss = F.cross_entropy(model(x), y)
        loss.backward()
        calls.append(loss.item())
        return loss

    base.step(lambda: closure(twin, base))
    expected = calls.copy()
    calls.clear()
    optimizer.step(lambda: closure(model, optimizer))
    assert len(expected) > 1
    assert calls == pytest.approx(expected, rel=1e-4)
    for mine, theirs in zip(model.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-3, atol=1e-5)


class SharpnessAware(torch.optim.Optimizer):
    """SAM (Foret et al. 2021) as it is usually written: it has gradients, and its closure is for the second pass."""

    def __init__(self, params, lr, rho=0.05):
        super().__init__(params, {"lr": lr, "rho": rho})

    @torch.no_grad()
    def step(self, closure=None):
        if any(p.grad is None for group in self.param_groups for p in group["params"]):
            with torch.enable_grad():
                closure()
        found = [(p, p.grad.clone()) for group in self.param_groups for p in group["params"]]
        norm = torch.stack([gradient.norm() for _, gradient in found]).norm()
        for p, gradient in found:
            p.add_(gradient, alpha=self.defaults["rho"] / norm)
        self.zero_grad()
        with torch.enable_grad():
            closure()
        for p, gradient in found:
            p.sub_(gradient, alpha=self.defaults["rho"] / norm)
            p.sub_(p.grad, alpha=self.defaults["lr"])


def test_a_base_optimizer_whose_closure_is_a_second_pass_gets_it():
    model, optimizer = at_a_turn(base=lambda p: SharpnessAware(p, lr=0.1))
    twin, base = explicitly_masked_twin(model, optimizer)
    x, y = next(iter(batches(1)))

    def loss(model):
        loss = F.cross_entropy(model(x), y)
        loss.backward()
        return loss

    for network, stepping in ((twin, base), (model, optimizer)):
        stepping.zero_grad()
        loss(network)
        stepping.step(lambda network=network: loss(network))
    assert optimizer.last_turn == 12
    for mine, theirs in zip(model.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-6)


def test_a_closure_may_hold_the_last_of_several_batches():
    """As Lightning's does where it accumulates: the controller learns from all of them."""
    model, optimizer = at_a_turn()
    other, twin = copy.deepcopy((model, optimizer))
    assert twin.model is other
    (x, y), (v, w) = batches(2)

    def part(network, x, y):
        (F.cross_entropy(network(x), y) / 2).backward()

    for network, stepping in ((model, optimizer), (other, twin)):
        stepping.zero_grad()
        part(network, x, y)
    optimizer.step(lambda: part(model, v, w))
    part(other, v, w)
    twin.step()
    assert optimizer.last_turn == twin.last_turn == 12
    assert same(optimizer.search.controller.state_dict(), twin.search.controller.state_dict())
    assert same(model.state_dict(), other.state_dict())


def test_masked_weights_are_seen_by_the_training_forward_alone():
    """Evaluation, state_dict, deepcopy, an exception: at every moment of a turn they meet the real weights."""
    model, optimizer = at_a_turn()
    before = snapshot(model)
    x, y = next(iter(batches(1)))

    def evaluated(network):
        network.eval()
        with torch.no_grad():
            out = network(x)
        network.train()
        return out

    expected = evaluated(model)
    loss = F.cross_entropy(model(x), y)
    for _ in range(2):  # between forward and backward, and after it
        assert same(before, model.state_dict())
        assert torch.equal(evaluated(model), expected)
        assert torch.equal(evaluated(copy.deepcopy(model)), expected)
        with torch.no_grad():
            model(x)  # in train mode, but no training forward: moves the norm statistics, nothing else
        for name, buffer in model.named_buffers():
            buffer.data.copy_(before[name])
        if loss is not None:
            loss.backward()
            loss = None

    handle = model.fc.register_forward_hook(lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        model(x)
    handle.remove()
    assert same(before, model.state_dict())


def test_an_exception_in_the_backward_leaves_no_masked_weights_behind():
    model, optimizer = at_a_turn()
    before = snapshot(model)
    x, y = next(iter(batches(1)))
    handle = model.one[0].register_full_backward_hook(lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        F.cross_entropy(model(x), y).backward()
    handle.remove()
    assert same(before, model.state_dict())


def test_ctrl_c_in_a_masked_forward_leaves_no_masked_weights_behind():
    """Forward hooks are not called for a KeyboardInterrupt, after which people save a checkpoint, or load one."""
    model, optimizer = at_a_turn()
    before, other = snapshot(model), Residual().state_dict()
    x, y = next(iter(batches(1)))
    for load in (False, True):
        handle = model.fc.register_forward_hook(interrupt)
        with pytest.raises(KeyboardInterrupt):
            model.train()(x)
        handle.remove()
        assert same(before, model.state_dict())
        assert same({f"0.{name}": value for name, value in before.items()}, nn.Sequential(model).state_dict())
        if load:
            model.load_state_dict(other)
        model.eval()(x)
        assert same(dict(model.named_parameters()), other if load else before)


def interrupt(*_):
    raise KeyboardInterrupt


def test_a_signal_in_the_backward_leaves_no_masked_weights_behind():
    """While C++ runs it is but noted, and raised where Python runs next: in what is to put the weights back."""
    engine = torch.autograd.Variable._execution_engine
    note = functools.partial(getattr(ctypes.CDLL(None), "raise"), signal.SIGINT)  # no line of Python
    model, optimizer = at_a_turn()
    before = snapshot(model)
    x, y = next(iter(batches(1)))
    loss = F.cross_entropy(model(x), y)
    loss.register_hook(lambda _: engine.queue_callback(note))
    usual = signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background jobs ignore it
    with pytest.raises(KeyboardInterrupt) as interrupted:  # whose traceback holds all frames
        loss.backward()
    signal.signal(signal.SIGINT, usual)
    assert interrupted.tb is not None and same(dict(model.named_parameters()), before)


@pytest.mark.parametrize("where", ["forward", "backward"])
def test_a_signals_handler_that_saves_meets_the_real_weights_and_changes_nothing(where):
    """Schedulers of clusters announce the end by a signal, in the middle of whatever runs; the run goes on."""
    saved, ends = [], []
    for handled in (False, True):
        torch.manual_seed(0)
        model, optimizer = at_a_turn()
        before = snapshot(model)
        x, y = next(iter(batches(1)))

        def save(*_, model=model, handled=handled):
            if handled:
                saved.append(snapshot(model))

        layer = model.wider[0]
        handle = layer.register_forward_hook(save) if where == "forward" else layer.register_full_backward_hook(save)
        F.cross_entropy(model(x), y).backward()
        handle.remove()
        assert all(same(before, state) for state in saved)
        optimizer.step()
        ends.append({**snapshot(model), "controller": optimizer.search.controller.head.detach()})
    assert len(saved) == 1 and same(*ends)


@dataclass
class Output:
    logits: torch.Tensor


class Wrapped(Residual):
    def forward(self, x):
        return Output(super().forward(x))


def test_outputs_may_be_objects():
    """The backward through a dataclass's tensors runs masked like any other."""
    gradients = []
    for network, forward_fn in (Residual, None), (Wrapped, lambda model, x: model(x).logits):
        torch.manual_seed(0)
        model = network()
        base = torch.optim.SGD(model.parameters(), lr=0.05)
        optimizer = ATO(
            base, model, example(), target_flops=0.5, total_steps=40, phases=SHORT, interval=1, forward_fn=forward_fn
        )
        for x, y in batches(19):
            out = model(x)
            optimizer.zero_grad()
            F.cross_entropy(out if forward_fn is None else out.logits, y).backward()
            optimizer.step()
        assert optimizer.history
        gradients.append([p.grad.clone() for p in model.parameters()])
    for plain, wrapped in zip(*gradients, strict=True):
        assert torch.equal(plain, wrapped)


def test_the_backward_runs_masked_also_under_activation_checkpointing():
    """What a checkpointed segment recomputes in the backward must be the masked network again."""

    class Checkpointed(Residual):
        def forward(self, x):
            return checkpoint(super().forward, x, use_reentrant=False)

    gradients = []
    for network, outer in (Residual, False), (Checkpointed, False), (Residual, True):
        torch.manual_seed(0)
        model, optimizer = at_a_turn(network)
        x, y = next(iter(batches(1)))
        optimizer.zero_grad()
        before = snapshot(model)
        out = checkpoint(model, x, use_reentrant=False) if outer else model(x)
        F.cross_entropy(out, y).backward()
        assert same(before, model.state_dict())
        gradients.append([p.grad.clone() for p in model.parameters()])
    for plain, inner, outer in zip(*gradients, strict=True):
        torch.testing.assert_close(plain, inner)
        torch.testing.assert_close(plain, outer)


def test_gradients_accumulate_over_a_turn():
    model, optimizer = at_a_turn(Flatten)
    model.head[3].p = 0.0
    x, y = next(iter(batches(1)))
    optimizer.zero_grad()
    F.cross_entropy(model(x), y).backward()
    whole = gate_gradient(model, optimizer.plan.groups.consumers, optimizer.mask.float())
    optimizer.zero_grad()
    for part in range(2):
        (F.cross_entropy(model(x[4 * part : 4 * part + 4]), y[4 * part : 4 * part + 4]) / 2).backward()
    parts = gate_gradient(model, optimizer.plan.groups.consumers, optimizer.mask.float())
    torch.testing.assert_close(whole, parts)


def test_copies_of_the_model_are_free():
    model, optimizer = at_a_turn()
    copied = copy.deepcopy(model)
    ATO(torch.optim.SGD(copied.parameters(), lr=0.1), copied, example(), target_flops=0.5, total_steps=10)
    del optimizer
    ATO(torch.optim.SGD(model.parameters(), lr=0.1), model, example(), target_flops=0.5, total_steps=10)
