"""What a cut carries over, what it refuses, and models of kinds that are cut like any other."""

import collections
import copy
import threading
import warnings
from typing import ClassVar

import pytest
import torch
import torch.nn.functional as F
from networks import NETWORKS, SHORT, Residual, batches, example
from test_optimizer import make, train
from torch import Tensor, nn
from torch.nn.utils import parametrizations, prune

from ato_optim import ATO, load_pruned, save_pruned
from ato_optim.compress import apply_cut, derive_cut
from ato_optim.graph import call
from ato_optim.plan import make_plan
from ato_optim.proof import difference


def pruned(model: nn.Module, target_flops: float = 0.6) -> tuple[nn.Module, ATO]:
    """`model` after a run that ends in a cut, which is checked to be exact."""
    base = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    optimizer = ATO(base, model, example(), target_flops=target_flops, total_steps=20, phases=SHORT, interval=1)
    train(model, optimizer, 20)
    expected = model.eval()(example())
    small = optimizer.compress()
    assert difference(expected, small(example())) < 1e-5
    assert optimizer.report().macs_after < optimizer.report().macs_before
    return small.train(), optimizer


def test_hooks_and_attributes_of_parameters_go_on():
    """A clip by hooks, say; and the handles still remove them."""
    model, optimizer = make()
    weight, seen = model.one[0].weight, []
    handle = weight.register_hook(lambda gradient: gradient.clamp(-1e-3, 1e-3))
    weight.register_post_accumulate_grad_hook(lambda parameter: seen.append(parameter.shape))
    weight.decays, weight.fisher = False, torch.ones_like(weight)
    train(model, optimizer, 60)
    optimizer.compress()
    new = model.one[0].weight
    assert new is not weight and new.decays is False and new.fisher.shape == new.shape
    seen.clear()
    for limited in (True, False):
        x, y = next(iter(batches(1)))
        optimizer.zero_grad()
        F.cross_entropy(model(x), y).backward()
        assert (new.grad.abs().max() <= 1e-3) == limited
        handle.remove()
    assert seen == [new.shape] * 2


class Named(nn.Parameter):
    """A class of somebody's own."""


@pytest.mark.skipif(not hasattr(torch.zeros(1), "grad_dtype"), reason="not in this torch")
@pytest.mark.parametrize("without", [(), ("stem.0.weight", "one.0.weight")])
def test_the_dtype_of_gradients_and_the_class_of_parameters_go_on(without):
    """Also where only some have a gradient when the cut comes: a failure between two of them would leave a ruin."""
    model = Residual().to(torch.bfloat16)
    model.one[0].weight = Named(model.one[0].weight.detach())
    for p in model.parameters():
        p.grad_dtype = torch.float32
    base = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    inputs = example().to(torch.bfloat16)
    optimizer = ATO(base, model, inputs, target_flops=0.6, total_steps=20, phases=SHORT, interval=1)
    for x, y in batches(20):
        optimizer.zero_grad()
        F.cross_entropy(model(x.to(torch.bfloat16)).float(), y).backward()
        optimizer.step()
    for name in without:
        model.get_parameter(name).grad = None
    optimizer.compress()
    assert type(model.one[0].weight) is Named
    for name, p in model.named_parameters():
        assert p.grad_dtype == torch.float32 and (p.grad is None) == (name in without), name
        assert p.grad is None or (p.grad.dtype == torch.float32 and p.grad.shape == p.shape)


class Inner(torch.optim.Optimizer):
    """A base that hands its parameters to optimizers of its own, as ZeroRedundancyOptimizer does."""

    def __init__(self, parameters, **options):
        parameters = list(parameters)
        super().__init__(parameters, options)
        self.chain = [torch.optim.SGD(parameters[:2], **options), torch.optim.SGD(parameters[2:], **options)]

    def step(self, closure=None):
        for inner in self.chain:
            inner.step()


def test_an_optimizer_within_the_base_cannot_follow_and_nothing_is_changed():
    model = Residual()
    optimizer = ATO(
        Inner(model.parameters(), lr=0.05), model, example(), target_flops=0.5, total_steps=20, phases=SHORT
    )
    train(model, optimizer, 20)
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(ValueError, match=r"Inner\) holds another optimizer \(SGD\).*inplace=False"):
        optimizer.compress()
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    assert difference(model.eval()(example()), optimizer.compress(inplace=False).eval()(example())) < 1e-5


class Shares(torch.optim.Optimizer):
    """A wrapper that shares its base's lists and has state of its own, as Lookahead does."""

    def __init__(self, base: torch.optim.Optimizer):
        super().__init__(base.param_groups, base.defaults)
        self.base_optimizer, self.param_groups = base, base.param_groups

    @torch.no_grad()
    def step(self, closure=None):
        self.base_optimizer.step()
        for group in self.param_groups:
            for p in group["params"]:
                self.state[p].setdefault("slow", p.clone()).lerp_(p, 0.5)


def test_a_wrapper_that_shares_its_lists_is_carried_over_with_all_state():
    torch.manual_seed(0)
    model = Residual()
    base = Shares(torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9))
    optimizer = ATO(base, model, example(), target_flops=0.5, total_steps=20, phases=SHORT, streams=0)
    train(model, optimizer, 20)
    momentum = base.base_optimizer.state[model.fc.weight]["momentum_buffer"].clone()
    kept = optimizer.plan.groups.sides["fc", False]
    optimizer.compress()
    mine = base.base_optimizer.state[model.fc.weight]["momentum_buffer"]
    assert torch.equal(mine, momentum[:, optimizer.mask[kept]])
    assert mine.shape == base.state[model.fc.weight]["slow"].shape == model.fc.weight.shape
    before = [p.clone() for p in model.parameters()]
    train(model, optimizer, 1)
    assert not any(torch.equal(p, q) for p, q in zip(model.parameters(), before, strict=True))


def test_a_traced_module_is_cut_saved_and_loaded(tmp_path):
    torch.manual_seed(0)
    small, _ = pruned(torch.fx.symbolic_trace(Residual()))
    save_pruned(small, tmp_path / "small.pt")
    loaded = load_pruned(torch.fx.symbolic_trace(Residual()), tmp_path / "small.pt")
    assert torch.equal(loaded.eval()(example()), small.eval()(example()))


class Recorder:
    def record(self, module: nn.Module, inputs: tuple, output: Tensor) -> None:
        self.features = output


class Holder:
    pass


def test_activations_may_be_kept_by_hooks_and_objects():
    class Keeps(Residual):
        def forward(self, x: Tensor) -> Tensor:
            y = super().forward(x)
            self.last = Holder()
            self.last.logits = y
            return y

    model, recorder = Keeps(), Recorder()
    model.one.register_forward_hook(recorder.record)
    model(example())
    small, _ = pruned(model)
    small(example())
    assert recorder.features.shape[1] == small.one[0].out_channels < 12


@pytest.mark.parametrize("where", ["one.0", "two", "short", "fc"])
@pytest.mark.parametrize(
    "change",
    [
        parametrizations.weight_norm,
        parametrizations.spectral_norm,
        lambda layer: prune.l1_unstructured(layer, "weight", amount=0.3),
    ],
    ids=["weight_norm", "spectral_norm", "prune"],
)
def test_weights_that_are_computed_from_others_are_left_alone(change, where):
    model = Residual()
    change(model.get_submodule(where))
    shape = model.get_submodule(where).weight.shape
    small, optimizer = pruned(model, target_flops=0.9)
    assert small.get_submodule(where).weight.shape == shape
    reasons = {layer: reason for layers, reason in optimizer.report().left_out for layer in layers}
    assert any("parametrized" in reason for reason in reasons.values())


def test_channels_last_survives_in_three_dimensions():
    model = nn.Sequential(nn.Conv3d(3, 8, 3), nn.ReLU(), nn.Conv3d(8, 8, 3), nn.ReLU(), nn.Conv3d(8, 4, 1))
    model.to(memory_format=torch.channels_last_3d)
    x = torch.randn(2, 3, 8, 8, 8)
    plan = make_plan(model, x, call, [], set(model.parameters()))
    mask = torch.arange(plan.groups.num_gates) % 2 == 0
    apply_cut(derive_cut(model, plan.groups, mask), model)
    assert [layer.weight.shape[:2] for layer in model[::2]] == [(4, 3), (4, 4), (4, 4)]
    assert all(layer.weight.is_contiguous(memory_format=torch.channels_last_3d) for layer in model[::2])


class TwoTasks(NETWORKS[0]):
    """A second head, which the example inputs alone do not run."""

    def __init__(self):
        super().__init__()
        self.second = nn.Linear(16, 3)
        self.fc, self.first = nn.Identity(), nn.Linear(16, 5)

    def forward(self, x: Tensor, task: str = "first") -> Tensor:
        return getattr(self, task)(super().forward(x))


def test_layers_that_the_example_inputs_do_not_reach_are_named():
    model = TwoTasks()

    def build(**options) -> ATO:
        base = torch.optim.SGD(model.parameters(), lr=0.05)
        return ATO(base, model, example(), target_flops=0.5, total_steps=100, phases=SHORT, **options)

    with pytest.warns(UserWarning, match=r"do not reach layers that are trained: second\. .*forward_fn"):
        report = build().report()
    reasons = {layer: reason for layers, reason in report.left_out for layer in layers}
    assert reasons["second"] == "is not reached by example_inputs"
    optimizer = build(forward_fn=lambda model, x: (model(x), model(x, "second")))
    left = [layer for layers, reason in optimizer.report().left_out for layer in layers if "reached" in reason]
    assert not left


@pytest.mark.filterwarnings("error:example_inputs")
def test_layers_whose_gradients_stay_inside_are_no_reason_to_warn():
    """The trial has run them."""

    class Counts(Residual):
        def __init__(self):
            super().__init__()
            self.count = nn.Linear(16, 3)

        def forward(self, x: Tensor) -> Tensor:
            x = self.stem(x)
            x = torch.relu(x + self.norm(self.two(self.one(x))))
            x = (self.wider(x) + self.short(x)).mean((2, 3))
            self.chosen = self.count(x).argmax(1)
            return self.fc(x)

    _, optimizer = pruned(Counts())
    left = {layer: reason for layers, reason in optimizer.report().left_out for layer in layers}
    assert "its gradients stay inside" in left["count"]


class ReturnsView(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x).unsqueeze(1)


def test_a_layer_that_the_graph_lost_is_named():
    """An operation in place on a view gives it another node of autograd's graph."""

    class InPlace(Residual):
        def __init__(self):
            super().__init__()
            self.hidden, self.head = ReturnsView(5, 8), nn.Linear(8, 5)

        def forward(self, x: Tensor) -> Tensor:
            return self.head(self.hidden(super().forward(x)).relu_().squeeze(1))

    _, optimizer = pruned(InPlace())
    left = {layer: reason for layers, reason in optimizer.report().left_out for layer in layers}
    assert "a view that is changed in place" in left["hidden"]


def test_weights_that_do_not_fit_are_refused(tmp_path):
    small, _ = pruned(Residual())
    save_pruned(small, tmp_path / "small.pt")
    content = torch.load(tmp_path / "small.pt", weights_only=True)
    content["weights"]["fc.bias"] = torch.zeros(3)
    torch.save(content, tmp_path / "other.pt")
    dense = Residual()
    before = copy.deepcopy(dense.state_dict())
    with pytest.raises(ValueError, match=r"(?s)do not fit dense_model.*fc\.bias"):
        load_pruned(dense, tmp_path / "other.pt")
    assert all(torch.equal(value, before[key]) for key, value in dense.state_dict().items())


class Mixed(Residual):
    """A tied weight, and weights that no cut touches."""

    def __init__(self):
        super().__init__()
        self.tied, self.aside = nn.Linear(5, 5), nn.Linear(5, 5)
        self.tied.weight = self.aside.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.tied(self.aside(super().forward(x)))


def test_a_loaded_network_keeps_dtype_ties_memory_format_and_what_was_not_cut(tmp_path):
    small, _ = pruned(Mixed())
    save_pruned(small, tmp_path / "small.pt")
    dense = Mixed().double().to(memory_format=torch.channels_last)
    weight = dense.tied.weight
    loaded = load_pruned(dense, tmp_path / "small.pt")
    assert {p.dtype for p in loaded.parameters()} == {torch.float64}
    assert loaded.tied.weight is loaded.aside.weight is weight
    assert loaded.one[0].weight.is_contiguous(memory_format=torch.channels_last)
    torch.testing.assert_close(loaded.eval()(example().double()).float(), small.eval()(example()))


def test_a_data_parallel_wrapper_is_refused_by_load(tmp_path, monkeypatch):
    small, _ = pruned(Residual())
    save_pruned(small, tmp_path / "small.pt")
    monkeypatch.setattr(nn.parallel.DistributedDataParallel, "__init__", nn.Module.__init__)
    wrapped = nn.parallel.DistributedDataParallel()
    wrapped.module = Residual()
    with pytest.raises(ValueError, match="DistributedDataParallel.*load into its module"):
        load_pruned(wrapped, tmp_path / "small.pt")


@pytest.mark.parametrize("wrap", [nn.DataParallel, lambda model: torch.compile(model, backend="eager")])
def test_a_file_is_loaded_into_a_wrapped_network(wrap, tmp_path):
    small, _ = pruned(Residual())
    save_pruned(wrap(small), tmp_path / "small.pt")
    loaded = load_pruned(wrap(Residual()), tmp_path / "small.pt").eval()
    assert torch.equal(loaded(example()), small.eval()(example()))


def test_a_model_that_cannot_be_copied_is_refused_by_what_it_holds():
    model = Residual()
    model.lock = threading.Lock()
    base = torch.optim.SGD(model.parameters(), lr=0.05)
    with pytest.raises(ValueError, match=r"cannot be copied \(TypeError: cannot pickle.*lock"):
        ATO(base, model, example(), target_flops=0.6, total_steps=100, phases=SHORT)


class Refusing(torch.Tensor):
    """A state that cannot be indexed, as that of optimizers in 8 bits."""

    @classmethod
    def __torch_function__(cls, function, types, arguments=(), options=None):
        if function is torch.Tensor.index_select:
            raise NotImplementedError("index_select of a Refusing")
        return super().__torch_function__(function, types, arguments, options or {})


class Holding(torch.optim.SGD):
    """Keeps something else than a tensor a parameter in its state."""

    def __init__(self, parameters, kind):
        super().__init__(parameters, lr=0.05)
        self.kind, self.own = kind, [1]

    @torch.no_grad()
    def step(self, closure=None):
        super().step(closure)
        for group in self.param_groups:
            for p in group["params"]:
                made = torch.zeros_like(p)
                if self.kind == "subclass":
                    self.state[p]["slow"] = made.as_subclass(Refusing)
                elif self.kind == "dict":
                    self.state[p]["slow"] = {"m": made}
                elif self.kind == "deque":
                    self.state[p]["slow"] = collections.deque([made])
                elif self.kind == "key":
                    self.state["slow"] = {p: made}
                else:
                    self.slow = [p for group in self.param_groups for p in group["params"]]


@pytest.mark.parametrize("kind", ["subclass", "dict", "deque", "key", "attribute"])
def test_a_state_that_cannot_follow_is_said_at_once_and_nothing_is_changed(kind):
    torch.manual_seed(0)
    model = Residual()
    optimizer = ATO(Holding(model.parameters(), kind), model, example(), target_flops=0.5, total_steps=20, phases=SHORT)
    with pytest.warns(UserWarning, match="compress.. in place will fail: .*slow'.* cannot follow the cut"):
        train(model, optimizer, 20)
    before, shapes = list(model.parameters()), [p.shape for p in model.parameters()]
    with pytest.raises(ValueError, match="slow'.* cannot follow the cut"):
        optimizer.compress()
    assert all(old is new for old, new in zip(before, model.parameters(), strict=True))
    assert [p.shape for p in model.parameters()] == shapes and optimizer.param_groups[0]["params"] == before
    assert set(map(id, optimizer.state)) <= {id(p) for p in before} | {id("slow")} and optimizer.phase == "zero"
    train(model, optimizer, 2)
    assert difference(model.eval()(example()), optimizer.compress(inplace=False).eval()(example())) < 1e-5


def compress_without_a_warning(model, optimizer):
    """Train and cut, with every warning an error but that of a short run."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warnings.filterwarnings("ignore", message="total_steps")
        train(model, optimizer, 20)
    optimizer.compress()


def test_numbers_and_lists_of_the_groups_follow():
    """What holds no tensors, and the very lists that are changed in place."""

    class Plain(torch.optim.SGD):
        def step(self, closure=None):
            self.all = self.param_groups[0]["params"]
            for p in self.all:
                self.state[p]["betas"] = (0.9, [1, 2])
            return super().step(closure)

    torch.manual_seed(0)
    model = Residual()
    base = Plain(model.parameters(), lr=0.05, momentum=0.9)
    optimizer = ATO(base, model, example(), target_flops=0.5, total_steps=20, phases=SHORT)
    compress_without_a_warning(model, optimizer)
    assert [id(p) for p in base.all] == [id(p) for p in model.parameters()]
    assert all(optimizer.state[p]["betas"] == (0.9, [1, 2]) for p in model.parameters())


def test_zero_grad_is_the_bases():
    class Counting(torch.optim.SGD):
        calls: ClassVar = []

        def zero_grad(self, set_to_none=True):
            self.calls.append(set_to_none)
            super().zero_grad(set_to_none)

    model = Residual()
    optimizer = ATO(Counting(model.parameters(), lr=0.05), model, example(), target_flops=0.5, total_steps=20)
    model(example()).sum().backward()
    optimizer.zero_grad(set_to_none=False)
    assert all(not p.grad.any() for p in model.parameters())
    optimizer.zero_grad()
    assert Counting.calls == [False, True] and all(p.grad is None for p in model.parameters())


def test_a_layer_that_is_not_what_it_was_is_named():
    model, optimizer = make()
    train(model, optimizer, 10)
    parametrizations.weight_norm(model.one[0])
    with pytest.raises(ValueError, match="model has changed since ATO was built .*weight"):
        train(model, optimizer, 50, skip=10)
    model, optimizer = make()
    train(model, optimizer, 60)
    model.eval()
    model.one[0], model.one[1] = torch.nn.utils.fusion.fuse_conv_bn_eval(model.one[0], model.one[1]), nn.Identity()
    with pytest.raises(ValueError, match="model has changed since ATO was built .*weight"):
        optimizer.compress()


class Delegates(torch.optim.Optimizer):
    """A wrapper whose groups and state are its base's, as Accelerate's, and that remembers groups by their kind."""

    def __init__(self, base):
        self.__setstate__({"base": base, "matrices": [base.param_groups[0]], "defaults": base.defaults})
        self.lists = {"all": base.param_groups[0]["params"]}

    param_groups = property(lambda self: self.base.param_groups)
    state = property(lambda self: self.base.state)

    def step(self, closure=None):
        return self.base.step(closure)


def test_a_base_that_shares_state_and_remembers_groups_follows():
    torch.manual_seed(0)
    model = Residual()
    base = Delegates(torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9))
    optimizer = ATO(base, model, example(), target_flops=0.5, total_steps=20, phases=SHORT)
    compress_without_a_warning(model, optimizer)
    assert all(base.state[p]["momentum_buffer"].shape == p.shape for p in model.parameters())
    assert len(base.state) == len(list(model.parameters())) and base.lists["all"] == list(model.parameters())
    train(model, optimizer, 2)


def test_a_state_that_is_a_tensor_follows():
    class Bare(torch.optim.SGD):
        def step(self, closure=None):
            for p in self.param_groups[0]["params"]:
                self.state.setdefault(p, torch.zeros_like(p)).add_(1)
            return None

    torch.manual_seed(0)
    model = Residual()
    optimizer = ATO(Bare(model.parameters(), lr=0.05), model, example(), target_flops=0.5, total_steps=20, phases=SHORT)
    train(model, optimizer, 20)
    optimizer.compress()
    assert all(torch.equal(optimizer.state[p], torch.full_like(p, 20)) for p in model.parameters())
