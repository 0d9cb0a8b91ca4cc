"""ATO is a torch.optim.Optimizer: one contract for every optimizer and scheduler that the installed torch exports."""

import copy
import inspect
import io
import pickle
import warnings

import pytest
import torch
import torch.nn.functional as F
from networks import Block, Flatten, Residual, batches, example
from torch import nn
from torch.optim import lr_scheduler
from torch.utils import _pytree

from ato_optim import ATO
from ato_optim.proof import difference


class Tiny(nn.Module):
    def __init__(self):
        super().__init__()
        self.one, self.two, self.fc = Block(3, 6), nn.Conv2d(6, 6, 3, 2), nn.Linear(6, 5)

    def forward(self, x):
        return self.fc(torch.relu(self.two(self.one(F.avg_pool2d(x, 2)))).mean((2, 3)))


class Matrices(nn.Module):
    """For optimizers of matrices alone."""

    def __init__(self):
        super().__init__()
        self.one, self.two = nn.Linear(48, 12, bias=False), nn.Linear(12, 12, bias=False)
        self.out = nn.Linear(12, 5, bias=False)

    def forward(self, x):
        x = F.adaptive_avg_pool2d(x, 4).flatten(1)
        return self.out(torch.relu(self.two(torch.relu(self.one(x)))))


CLASSES = {
    name: getattr(torch.optim, name)
    for name in torch.optim.__all__
    if inspect.isclass(getattr(torch.optim, name)) and issubclass(getattr(torch.optim, name), torch.optim.Optimizer)
}
del CLASSES["Optimizer"], CLASSES["SparseAdam"]  # the base class; the one that cannot be wrapped (below)
SETTINGS = {"SGD": {"lr": 0.05, "momentum": 0.9}, "LBFGS": {"lr": 0.05, "max_iter": 2}, "Rprop": {"lr": 1e-3}}
X, Y = next(iter(batches(1)))


def step(model, optimizer, k, scale=1.0):
    """Step `k` of a run, through a closure: all optimizers take one, some want one."""
    x, y = X.roll(k, 0), Y.roll(k, 0)

    def closure():
        optimizer.zero_grad()
        loss = scale * F.cross_entropy(model(x), y)
        loss.backward()
        return loss

    if inspect.signature(type(getattr(optimizer, "base", optimizer)).step).parameters["closure"].default is None:
        loss = closure()
        optimizer.step()
        return loss.item()
    return optimizer.step(closure).item()


def network_for(name, options):
    """A network that the optimizer takes and makes a step on, if there is one."""
    for network in (Tiny, Matrices):
        try:
            model = network()
            step(model, CLASSES[name](model.parameters(), **options), 0)
        except (ValueError, RuntimeError, AssertionError):
            continue
        return network
    return None


def variants():
    """Every optimizer with every switch of its implementation that works on this machine's CPU."""
    for name, cls in CLASSES.items():
        yield pytest.param(name, {}, id=name)
        for switch in ("foreach", "fused", "capturable", "differentiable"):
            if switch in inspect.signature(cls).parameters and network_for(name, {switch: True}):
                yield pytest.param(name, {switch: True}, id=f"{name}-{switch}")


each_optimizer = pytest.mark.parametrize(("name", "options"), list(variants()))


def build(name, options, target_flops=0.5, total_steps=30, **more):
    torch.manual_seed(0)
    model = network_for(name, options)()
    torch.manual_seed(0)
    model.apply(lambda m: m.reset_parameters() if hasattr(m, "reset_parameters") else None)
    base = CLASSES[name](model.parameters(), **SETTINGS.get(name, {}), **options)
    if target_flops is None:
        return model, base
    return model, ATO(base, model, example(1), target_flops=target_flops, total_steps=total_steps, **more)


def leaves(*things):
    """Tensors and numbers of state_dicts, in order; gradients-to-be of differentiable optimizers cut off."""
    values = _pytree.tree_leaves([t.state_dict() for t in things])
    return [v.detach().clone() if isinstance(v, torch.Tensor) else v for v in values]


def assert_same(ones, others):
    for one, other in zip(ones, others, strict=True):
        assert type(one) is type(other)
        assert torch.equal(one, other) if isinstance(one, torch.Tensor) else one == other


def test_the_list_is_torchs_own():
    assert {"SGD", "AdamW", "Muon", "Adafactor", "LBFGS"} <= CLASSES.keys()
    assert all(network_for(name, {}) for name in CLASSES)


@each_optimizer
def test_with_the_whole_budget_it_is_the_bare_optimizer_bit_for_bit(name, options):
    model, optimizer = build(name, options, target_flops=1, total_steps=50)
    plain, bare = build(name, options, target_flops=None)
    assert [step(model, optimizer, k) for k in range(50)] == [step(plain, bare, k) for k in range(50)]
    assert_same(leaves(model, optimizer.base), leaves(plain, bare))


@each_optimizer
def test_a_whole_run_and_training_after_the_cut(name, options):
    model, optimizer = build(name, options, interval=2)
    for k in range(30):
        step(model, optimizer, k)
    assert len(optimizer.history) > 3
    assert 0.4 < optimizer.history[-1][1] <= 0.5
    assert optimizer.plan.groups.producers.closed_are_zero(model, optimizer.mask)
    model.eval()
    expected = model(example()).detach()
    if name == "LBFGS":  # its history is of vectors over all parameters
        with pytest.raises(ValueError, match=r"LBFGS.*inplace=False"):
            optimizer.compress()
        assert difference(expected, optimizer.compress(inplace=False)(example())) < 1e-5
        return
    small = optimizer.compress()
    assert difference(expected, small(example())) < 1e-5
    model.train()
    for k in range(3):
        step(model, optimizer, k)
    assert all(p.isfinite().all() for p in model.parameters())


@pytest.mark.parametrize("stop", [12, 17])
@each_optimizer
def test_a_copied_a_pickled_and_a_resumed_run_are_the_uninterrupted_one(name, options, stop):
    """Stopped in the search and in the commit phase."""
    if name == "LBFGS":
        bare = copy.deepcopy(build(name, options, target_flops=None))
        with pytest.raises(AttributeError):  # torch's own copies of it cannot step
            step(*bare, 0)
    model, optimizer = build(name, options, interval=2)
    for k in range(stop):
        step(model, optimizer, k)
    runs = []
    if name != "LBFGS" and "differentiable" not in options:
        copied = copy.deepcopy(optimizer)
        runs = [(copied.model, copied), pickle.loads(pickle.dumps((model, optimizer)))]
    file = io.BytesIO()
    torch.save([optimizer.state_dict(), model.state_dict()], file)
    file.seek(0)
    states = torch.load(file, weights_only=True)
    resumed = build(name, options, interval=2)
    resumed[1].load_state_dict(states[0])
    resumed[0].load_state_dict(states[1])
    runs.append(resumed)
    for k in range(stop, stop + 8):
        step(model, optimizer, k)
        for run in runs:
            step(*run, k)
    for run in runs:
        assert run[1].param_groups is run[1].base.param_groups
        assert run[1].state is run[1].base.state
        assert_same(leaves(model, optimizer), leaves(*run))


def test_an_optimizer_of_sparse_gradients_is_refused():
    model = Tiny()
    with pytest.raises(TypeError, match="SparseAdam, which takes sparse gradients alone"):
        ATO(torch.optim.SparseAdam(model.parameters()), model, example(), target_flops=0.5, total_steps=10)


SCHEDULERS = {
    "LambdaLR": {"lr_lambda": lambda k: 0.9**k},
    "MultiplicativeLR": {"lr_lambda": lambda k: 0.95},
    "StepLR": {"step_size": 4},
    "MultiStepLR": {"milestones": [3, 11]},
    "ConstantLR": {},
    "LinearLR": {},
    "ExponentialLR": {"gamma": 0.9},
    "SequentialLR": {"milestones": [7]},
    "CosineAnnealingLR": {"T_max": 20},
    "ChainedScheduler": {},
    "ReduceLROnPlateau": {"patience": 1},
    "CyclicLR": {"base_lr": 0.01, "max_lr": 0.1, "step_size_up": 5},
    "CosineAnnealingWarmRestarts": {"T_0": 6},
    "OneCycleLR": {"max_lr": 0.1, "total_steps": 40},
    "PolynomialLR": {},
    "SWALR": {"swa_lr": 0.02},
}
NAMES = [name for name in lr_scheduler.__all__ if name != "LRScheduler"] + ["SWALR"]


def schedule(name, optimizer):
    cls = getattr(lr_scheduler, name, None) or getattr(torch.optim.swa_utils, name)
    parts = [lr_scheduler.ConstantLR(optimizer), lr_scheduler.ExponentialLR(optimizer, 0.9)]
    if name == "ChainedScheduler":
        return cls(parts)
    if name == "SequentialLR":
        return cls(optimizer, parts, **SCHEDULERS[name])
    optimizer.param_groups[0]["lr"] = 0.05
    return cls(optimizer, **SCHEDULERS[name])


@pytest.mark.parametrize("base", ["SGD", "AdamW"])
@pytest.mark.parametrize("name", NAMES)
def test_schedulers_move_the_weights_learning_rate_and_not_the_controllers(name, base):
    trails = []
    for target_flops in (0.5, None):
        model, optimizer = build(base, {}, target_flops)
        with warnings.catch_warnings():
            warnings.simplefilter("error")  # "lr_scheduler.step() before optimizer.step()" among them
            scheduler = schedule(name, optimizer)
            trail = []
            for k in range(25):
                step(model, optimizer, k)
                scheduler.step(*([1.0] if name == "ReduceLROnPlateau" else []))
                trail.append(
                    [group.get(key) for group in optimizer.param_groups for key in ("lr", "momentum", "betas")]
                )
        trails.append(trail)
        if target_flops:
            assert optimizer.param_groups is optimizer.base.param_groups
            assert {group["lr"] for group in optimizer.search.optimizer.param_groups} == {3e-3}
            optimizer.load_state_dict(optimizer.state_dict())
            scheduler.load_state_dict(scheduler.state_dict())
            assert scheduler.get_last_lr() == [group["lr"] for group in optimizer.base.param_groups]
    assert trails[0] == trails[1]
    assert len({str(values) for values in trails[0]}) > 1


def sgd(model, target_flops=0.5, total_steps=60, **options):
    base = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    return ATO(base, model, example(1), target_flops=target_flops, total_steps=total_steps, **options)


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
        optimizers.append(ATO(base, model, example(1), target_flops=0.5, total_steps=60))
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
        optimizer = ATO(base, model, example(1).double(), target_flops=0.5, total_steps=60)
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


def test_several_forwards_before_one_backward_are_one_turn():
    """Two views in one loss: the same mask in both, and the gradients of a model that is masked throughout."""
    torch.manual_seed(0)
    model = Flatten().double()
    model.head[3].p = 0.0
    base = torch.optim.SGD(model.parameters(), lr=0.05)
    optimizer = ATO(base, model, example(1).double(), target_flops=0.5, total_steps=60)
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
    tolerance = {"rtol": 1e-5, "atol": 1e-7} if dtype is None else {"rtol": 1e-2, "atol": 1e-4}
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
    before = leaves(model)
    optimizer.step()
    assert_same(before, leaves(model))
    for twin in twins:
        F.cross_entropy(twin.model(X), Y).backward()
        twin.step()
        assert_same(leaves(model, optimizer), leaves(twin.model, twin))
