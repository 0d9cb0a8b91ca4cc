"""What models and loops may do in a controller turn: its gradients are those of a twin that was masked by hand."""

import copy
from collections import UserDict

import pytest
import torch
import torch.nn.functional as F
from networks import SHORT, Residual, Waves, batches, example
from torch import Tensor, nn

from ato_optim import ATO
from ato_optim.controller import Controller
from ato_optim.gating import Masking, gate_gradient
from ato_optim.graph import call
from ato_optim.plan import make_plan


def at_a_turn(model: nn.Module, total_steps: int = 20, **options) -> tuple[nn.Module, ATO, nn.Module]:
    """`model` with an ATO whose next step is a turn that closes gates, and a twin in which they are closed by hand."""
    base = torch.optim.SGD(model.parameters(), lr=0.05, maximize=options.pop("maximize", False))
    optimizer = ATO(
        base, model, example(), target_flops=0.5, total_steps=total_steps, phases=SHORT, interval=1, **options
    )
    model.train()
    while not optimizer._turn_due:
        optimizer.zero_grad()
        optimizer.step()
    with torch.no_grad():
        optimizer.search.controller.head.sub_(0.06 * (torch.arange(len(optimizer.search.controller.head))[:, None] % 3))
        gates = optimizer.search.gates(optimizer.step_count)
        twin = copy.deepcopy(model)
        table = optimizer.plan.groups.consumers
        table.scale(table.parameters(twin), gates)
    assert 0 < gates.mean() < 1
    return model, optimizer, twin


class Assigns(Residual):
    """Replaces a buffer in its forward, and goes on to use the new tensor."""

    def __init__(self):
        super().__init__()
        self.register_buffer("scale", torch.ones(1))

    def forward(self, x: Tensor) -> Tensor:
        if self.training:
            self.scale = 0.5 * self.scale + 0.5 * x.detach().abs().mean()
        return super().forward(x) * self.scale


class Remembers(Assigns):
    """Makes its buffer in the first forward, and another in each forward after that."""

    def __init__(self):
        super().__init__()
        self.register_buffer("mask", None)

    def forward(self, x: Tensor) -> Tensor:
        if self.mask is None or self.mask.shape[0] < 2 * x.shape[0]:
            self.mask = torch.linspace(0, 1, 2 * x.shape[0])
        return super().forward(x * self.mask[: x.shape[0], None, None, None])


class View(Residual):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x).unsqueeze(1)


class Parts(Residual):
    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        return super().forward(x).split([2, 3], 1)


class Dict(dict):
    pass


class Slots:
    __slots__ = ("logits",)

    def __init__(self, logits: Tensor):
        self.logits = logits


class NamedSlots:
    __slots__ = {"logits": "of all classes"}

    def __init__(self, logits: Tensor):
        self.logits = logits


class Ring:
    """An object that holds itself."""

    def __init__(self, logits: Tensor):
        self.logits, self.ring = logits, self


def returns(wrap):
    class Returns(Residual):
        def forward(self, x: Tensor):
            return wrap(super().forward(x))

    return Returns


def cross_entropy(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    return F.cross_entropy(model(x), y)


def on_logits(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    out = model(x)
    return F.cross_entropy(getattr(out, "logits", None) if hasattr(out, "logits") else out["logits"], y)


@pytest.mark.parametrize(
    ("network", "loss"),
    [
        (Assigns, cross_entropy),
        (Remembers, cross_entropy),
        (View, lambda model, x, y: F.cross_entropy(model(x).mul_(2).squeeze(1), y)),
        (Residual, lambda model, x, y: F.cross_entropy(model(x).mul_(2), y)),
        (Parts, lambda model, x, y: model(x)[1].square().sum()),
        (Parts, lambda model, x, y: sum(part.mul(2).square().sum() for part in model(x))),
        (returns(lambda y: Dict(logits=y)), on_logits),
        (returns(lambda y: UserDict(logits=y)), on_logits),
        (returns(Slots), on_logits),
        (returns(NamedSlots), on_logits),
        (returns(Ring), on_logits),
    ],
    ids=[
        "assigned buffer",
        "late buffer",
        "view in place",
        "in place",
        "a part",
        "parts",
        *["dict", "user", "slots", "named slots", "ring"],
    ],
)
def test_gradients_are_those_of_a_network_masked_by_hand(network, loss):
    torch.manual_seed(0)
    model, optimizer, twin = at_a_turn(network())
    x, y = next(iter(batches(1)))
    optimizer.zero_grad()
    loss(model, x, y).backward()
    loss(twin, x, y).backward()
    assert optimizer.turn_begun
    for (name, mine), theirs in zip(model.named_parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(mine.grad, theirs.grad, rtol=1e-4, atol=1e-6, msg=name)


def test_a_buffer_that_is_returned_keeps_what_it_was_returned_with():
    class Returns(Assigns):
        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
            return super().forward(x), self.scale

    model, optimizer, twin = at_a_turn(Returns())
    before = model.scale.clone()
    x, _ = next(iter(batches(1)))
    (_, mine), (_, theirs) = model(x), twin(x)
    assert optimizer.turn_begun
    assert torch.equal(mine, theirs)
    assert torch.equal(model.scale, before) and not torch.equal(mine, before)


@pytest.mark.parametrize("assigns", [True, False])
def test_weights_that_a_forward_renormalises_keep_nothing_of_the_mask(assigns):
    class MaxNorm(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            if assigns:
                self.weight.data = torch.renorm(self.weight.data, p=2, dim=0, maxnorm=0.5)
            else:
                self.weight.data.renorm_(p=2, dim=0, maxnorm=0.5)
            return super().forward(x)

    class Constrained(Residual):
        def __init__(self):
            super().__init__()
            self.fc = MaxNorm(self.fc.in_features, self.fc.out_features)

    model, optimizer, twin = at_a_turn(Constrained())
    before = model.fc.weight.detach().clone()
    x, y = next(iter(batches(1)))
    loss = cross_entropy(model, x, y)
    assert optimizer.turn_begun and (twin.fc.weight == 0).all(0).any()
    assert torch.equal(model.fc.weight, before)
    loss.backward()
    assert torch.equal(model.fc.weight, before)


class Failing(torch.optim.SGD):
    """Raises in its next step: out of memory, say."""

    fails = False

    def step(self, closure=None):
        if self.fails:
            self.fails = False
            raise MemoryError
        return super().step(closure)


def test_a_turn_whose_step_raised_teaches_the_controller_once():
    """The step that is tried again goes on with the same mask, whose gradients the controller has seen."""
    torch.manual_seed(0)
    model = Residual()
    base = Failing(model.parameters(), lr=0.05)
    optimizer = ATO(base, model, example(), target_flops=0.5, total_steps=40, phases=SHORT, interval=1, streams=0)
    for k, (x, y) in enumerate(batches(8)):
        base.fails = k == 6
        gates = None
        while optimizer.step_count == k:
            optimizer.zero_grad()
            F.cross_entropy(model(x), y).backward()
            drawn = optimizer._turn.gates if optimizer.turn_begun else None
            assert gates is None or torch.equal(drawn, gates)
            gates = drawn
            try:
                optimizer.step()
            except MemoryError:
                learned = copy.deepcopy(optimizer.search.state_dict()["controller"])
                assert optimizer.last_turn == 6
        if k == 6:
            after = optimizer.search.state_dict()["controller"]
            assert all(torch.equal(value, after[name]) for name, value in learned.items())
    assert [step for step, _ in optimizer.history] == [4, 5, 6, 7]


def test_a_training_forward_without_gradients_is_no_error():
    class Predicts(Residual):
        def forward(self, x: Tensor, predict: bool = False) -> Tensor:
            return super().forward(x).argmax(1) if predict else super().forward(x)

    model, optimizer, _ = at_a_turn(Predicts())
    x, y = next(iter(batches(1)))
    assert model(x, predict=True).dtype == torch.long
    cross_entropy(model, x, y).backward()
    optimizer.step()
    assert len(optimizer.history) == 1


def test_an_ascent_on_the_negative_teaches_the_controller_the_same():
    """maximize=True with -L is the run of L."""
    learned = []
    for sign in (1, -1):
        torch.manual_seed(0)
        model, optimizer, _ = at_a_turn(Residual(), maximize=sign < 0)
        for x, y in batches(3):
            optimizer.zero_grad()
            (sign * cross_entropy(model, x, y)).backward()
            optimizer.step()
        learned.append([*optimizer.search.controller.parameters(), *model.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*learned, strict=True))


def test_logits_of_the_controller_do_not_depend_on_autocast_or_the_default_dtype():
    layer_of_gate = torch.arange(8).repeat_interleave(64)
    plain = Controller(layer_of_gate, seed=1)()
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(Controller(layer_of_gate, seed=1)(), plain)
    try:
        torch.set_default_dtype(torch.float64)
        assert torch.equal(Controller(layer_of_gate, seed=1)(), plain)
    finally:
        torch.set_default_dtype(torch.float32)


@pytest.mark.parametrize("seed", [2**62, 2**70, -5])
def test_any_whole_number_is_a_seed(seed):
    model, optimizer, _ = at_a_turn(Residual(), seed=seed)
    x, y = next(iter(batches(1)))
    cross_entropy(model, x, y).backward()
    optimizer.step()
    assert len(optimizer.history) == 1


@pytest.mark.parametrize("projection", ["timed", "proximal", "halfspace"])
def test_parameters_of_several_dtypes(projection):
    class Mixed(Residual):
        def forward(self, x: Tensor) -> Tensor:
            with torch.autocast("cpu", torch.bfloat16):
                return super().forward(x)

    model = Mixed()
    model.two.bfloat16()
    model.fc.double()
    model.fc.register_forward_pre_hook(lambda fc, args: args[0].double())
    base = torch.optim.SGD(model.parameters(), lr=0.05)
    optimizer = ATO(
        base, model, example(), target_flops=0.5, total_steps=30, phases=SHORT, interval=1, projection=projection
    )
    for x, y in batches(30):
        optimizer.zero_grad()
        cross_entropy(model, x, y).backward()
        optimizer.step()
    expected = model.eval()(example())
    torch.testing.assert_close(optimizer.compress()(example()), expected, rtol=1e-2, atol=1e-2)


def test_a_compiled_step_is_a_step():
    model = Residual()
    base = torch.optim.SGD(model.parameters(), lr=0.05)
    optimizer = ATO(base, model, example(), target_flops=0.5, total_steps=20, phases=SHORT, interval=1)

    @torch.compile(backend="eager")
    def step():
        optimizer.step()

    for x, y in batches(20):
        optimizer.zero_grad()
        cross_entropy(model, x, y).backward()
        step()
    assert optimizer.step_count == 20 and optimizer.history and optimizer.removable


class Tied(nn.Module):
    """A residual branch whose second layer reads the first one's weight the other way round."""

    def __init__(self):
        super().__init__()
        self.stem, self.one, self.two = nn.Conv2d(3, 12, 3, 1, 1), nn.Conv2d(12, 10, 1), nn.ConvTranspose2d(10, 12, 1)
        self.two.weight, self.fc = self.one.weight, nn.Linear(12, 5)

    def forward(self, x):
        x = torch.relu(self.stem(x))
        return self.fc((x + torch.relu(self.two(torch.relu(self.one(x))))).mean((2, 3)))


@pytest.mark.parametrize("network", [Tied, Waves])
def test_gate_gradient_is_that_of_finite_differences(network):
    torch.manual_seed(0)
    model = network()
    for p in model.parameters():
        p.data = p.data.to(torch.complex128 if p.is_complex() else torch.float64)
    x, y = next(iter(batches(1)))
    plan = make_plan(model, x.double(), call, [], set(model.parameters()))
    table, gates = plan.groups.consumers, (torch.rand(plan.groups.num_gates) < 0.7).double()
    assert (len(table.names) > len(set(table.names))) == (network is Tied)

    def loss(gates):
        twin = copy.deepcopy(model)
        table.scale(table.parameters(twin), gates)
        return F.cross_entropy(twin(x.double()), y)

    masking = Masking(model, table, gates)
    masking.apply()
    F.cross_entropy(model(x.double()), y).backward()
    masking.undo()
    found = gate_gradient(model, table, gates)
    with torch.no_grad():
        steps = 1e-6 * torch.eye(len(gates), dtype=torch.float64)
        expected = torch.stack([(loss(gates + step) - loss(gates - step)) / 2e-6 for step in steps])
    assert expected.abs().max() > 1e-3
    torch.testing.assert_close(found, expected.float(), rtol=1e-4, atol=1e-6)
