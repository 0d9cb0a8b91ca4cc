"""What a cut carries over, what it refuses, and models of kinds that are cut like any other."""

import copy
import threading

import pytest
import torch
import torch.nn.functional as F
from networks import NETWORKS, Residual, batches, example
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
    optimizer = ATO(base, model, example(), target_flops=target_flops, total_steps=20, interval=1)
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
    weight.decays = False
    train(model, optimizer, 60)
    optimizer.compress()
    new = model.one[0].weight
    assert new is not weight and new.decays is False
    seen.clear()
    for limited in (True, False):
        x, y = next(iter(batches(1)))
        optimizer.zero_grad()
        F.cross_entropy(model(x), y).backward()
        assert (new.grad.abs().max() <= 1e-3) == limited
        handle.remove()
    assert seen == [new.shape] * 2


class Inner(torch.optim.Optimizer):
    """A base that hands its parameters to an optimizer of its own, as ZeroRedundancyOptimizer does."""

    def __init__(self, parameters, **options):
        parameters = list(parameters)
        super().__init__(parameters, options)
        self.inner = torch.optim.SGD(parameters, **options)

    def step(self, closure=None):
        return self.inner.step(closure)


def test_an_optimizer_within_the_base_cannot_follow_and_nothing_is_changed():
    model = Residual()
    optimizer = ATO(Inner(model.parameters(), lr=0.05), model, example(), target_flops=0.5, total_steps=20)
    train(model, optimizer, 20)
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(ValueError, match=r"Inner\) holds another optimizer \(SGD\).*inplace=False"):
        optimizer.compress()
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    assert difference(model.eval()(example()), optimizer.compress(inplace=False).eval()(example())) < 1e-5


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
        return ATO(base, model, example(), target_flops=0.5, total_steps=100, **options)

    with pytest.warns(UserWarning, match=r"do not show what these layers read.*: second\. .*forward_fn"):
        report = build().report()
    reasons = {layer: reason for layers, reason in report.left_out for layer in layers}
    assert "example_inputs" in reasons["second"]
    optimizer = build(forward_fn=lambda model, x: (model(x), model(x, "second")))
    assert "second" not in {
        layer for layers, reason in optimizer.report().left_out for layer in layers if "not" in reason
    }


def test_what_was_replaced_since_the_cut_is_refused_by_both_sides(tmp_path):
    small, _ = pruned(Residual())
    save_pruned(small, tmp_path / "small.pt")
    head = small.fc
    small.fc = nn.Linear(head.in_features, 3)
    with pytest.raises(ValueError, match=r"fc\.(weight|bias) of shape .* where its cut leaves"):
        save_pruned(small, tmp_path / "other.pt")
    content = torch.load(tmp_path / "small.pt", weights_only=True)
    content["weights"]["fc.bias"] = torch.zeros(3)
    torch.save(content, tmp_path / "other.pt")
    dense = Residual()
    before = copy.deepcopy(dense.state_dict())
    with pytest.raises(ValueError, match=r"(?s)do not fit dense_model.*fc\.bias"):
        load_pruned(dense, tmp_path / "other.pt")
    assert all(torch.equal(value, before[key]) for key, value in dense.state_dict().items())


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
        ATO(base, model, example(), target_flops=0.6, total_steps=100)
