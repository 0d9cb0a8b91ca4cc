"""ATO is a torch.optim.Optimizer: one contract for every optimizer and scheduler that the installed torch exports."""

import copy
import inspect
import io
import pickle
import warnings

import pytest
import torch
import torch.nn.functional as F
from networks import SHORT, Block, batches, example
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
    return model, ATO(base, model, example(1), target_flops=target_flops, total_steps=total_steps, phases=SHORT, **more)


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
    assert optimizer.plan.groups.producers.largest_closed(model, optimizer.mask) == 0
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
            assert {group["lr"] for group in optimizer.search.optimizer.param_groups} == {
                optimizer.schedule.controller_lr
            }
            optimizer.load_state_dict(optimizer.state_dict())
            scheduler.load_state_dict(scheduler.state_dict())
            assert scheduler.get_last_lr() == [group["lr"] for group in optimizer.base.param_groups]
    assert trails[0] == trails[1]
    assert len({str(values) for values in trails[0]}) > 1
