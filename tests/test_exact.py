"""Removal changes nothing, and the cost model knows what it leaves."""

import copy

import pytest
import torch
import torchvision
from networks import NETWORKS, Concat, example, randomised

from ato_optim import ATO, checks
from ato_optim.compress import apply_cut, derive_cut, select
from ato_optim.cost import build_cost, count_macs, counted
from ato_optim.discovery import Discovery
from ato_optim.gating import Masking
from ato_optim.graph import call
from ato_optim.plan import make_plan
from ato_optim.proof import difference, zero_producers


def random_mask(groups, seed):
    generator = torch.Generator().manual_seed(seed)
    mask = torch.rand(groups.num_gates, generator=generator) < 0.6
    for layer in groups.layers:
        mask[layer.start] = True
    return mask


def planned(network):
    model = randomised(network())
    plan = make_plan(model, example(), call, [], set(model.parameters()))
    assert all(entry.reason == "is an output of the model" for entry in plan.groups.left_out)
    return model, plan


@pytest.mark.parametrize("network", NETWORKS)
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_zeroed_equals_masked_equals_removed(network, seed):
    model, plan = planned(network)
    mask, x = random_mask(plan.groups, seed), example(seed=seed)
    cut = derive_cut(model, plan.groups, mask)
    small = copy.deepcopy(model)
    apply_cut(cut, small)
    zeroed = copy.deepcopy(model)
    zero_producers(zeroed, plan.groups, mask)
    masking = Masking(model, plan.groups.consumers, mask.float())
    masking.apply()
    with torch.no_grad():
        assert difference(zeroed(x), small(x)) < 1e-5
        assert difference(model(x), small(x)) < 1e-5
        assert difference(copy.deepcopy(zeroed)(x), zeroed(x)) == 0
    assert count_macs(small, example()) == plan.cost(mask).item()
    assert sum(p.numel() for p in small.parameters()) == plan.count_parameters(mask)
    for root in {layer.root for layer in plan.groups.layers}:
        closed = sum(
            plan.channels[layer.gates][~mask[layer.gates]].sum() for layer in plan.groups.layers if layer.root == root
        )
        assert small.get_submodule(root).weight.shape[0] == model.get_submodule(root).weight.shape[0] - closed


@pytest.mark.parametrize("name", ["resnet18", "mobilenet_v3_small", "densenet121", "squeezenet1_1"])
def test_predicted_macs_are_measured_macs_on_torchvision(name):
    model = torchvision.models.get_model(name, weights=None).eval()
    x = torch.randn(1, 3, 64, 64)
    groups = Discovery(copy.deepcopy(model), x, call, [], [], {}).groups()
    cost = build_cost(model, groups, counted(model, x)[1])
    mask = random_mask(groups, 0)
    cut = derive_cut(model, groups, mask)
    apply_cut(cut, model)
    assert count_macs(model, x) == cost(mask).item()


def test_cost_is_differentiable_to_the_unit():
    """As a function that is linear in each single gate, its derivative is the difference between open and closed."""
    _, plan = planned(Concat)
    gates = random_mask(plan.groups, 3).double().requires_grad_()
    plan.cost(gates).backward()
    for gate in (0, 5, 11):
        open_, closed = gates.detach().clone(), gates.detach().clone()
        open_[gate], closed[gate] = 1, 0
        assert gates.grad[gate] == plan.cost(open_) - plan.cost(closed)


class ShiftedSum(torch.nn.Module):
    """sigmoid(0) is not zero: the first layer's channels cannot go."""

    def __init__(self):
        super().__init__()
        self.a, self.b, self.c = (torch.nn.Conv2d(3, 8, 1), torch.nn.Conv2d(8, 8, 1), torch.nn.Conv2d(8, 4, 1))

    def forward(self, x):
        return self.c(self.b(torch.sigmoid(self.a(x))).relu())


class Sliced(torch.nn.Module):
    """One channel gates all others: removing a channel before it shifts the slice."""

    def __init__(self):
        super().__init__()
        self.a, self.b, self.c = (torch.nn.Conv2d(3, 16, 1), torch.nn.Conv2d(16, 8, 1), torch.nn.Conv2d(8, 4, 1))

    def forward(self, x):
        x = self.a(x).relu()
        return self.c(self.b(x * x[:, 3:4]).relu())


class PeeksAtOne(torch.nn.Module):
    """As Sliced, in a form that torch-pruning takes: found by trial alone."""

    def __init__(self):
        super().__init__()
        self.a, self.b, self.c = (torch.nn.Conv2d(3, 16, 1), torch.nn.Conv2d(16, 8, 1), torch.nn.Linear(8, 4))

    def forward(self, x):
        x = self.a(x).relu()
        return self.c((self.b(x).mean((2, 3)) * x.mean((2, 3))[:, 3:4]).relu())


class Chunked(torch.nn.Module):
    """The outputs of several layers of one width, told apart by counting channels: right while they are as many."""

    def __init__(self, layers):
        super().__init__()
        self.one = torch.nn.ModuleList(torch.nn.Conv2d(3, 8, 1) for _ in range(layers))
        self.two = torch.nn.ModuleList(torch.nn.Conv2d(8, 6, 1) for _ in range(layers))
        self.last = torch.nn.Conv2d(6, 5, 1)

    def forward(self, x):
        x = torch.cat([layer(x).relu() for layer in self.one], 1)
        parts = zip(self.two, x.chunk(len(self.one), 1), strict=True)
        return self.last(sum(layer(part) for layer, part in parts).relu())


@pytest.mark.parametrize("layers", [2, 5])
def test_layers_that_would_have_to_stay_equally_wide_are_left_alone(layers):
    model = randomised(Chunked(layers))
    plan = make_plan(model, example(), call, [], set(model.parameters()))
    left = {layer for entry in plan.groups.left_out for layer in entry.layers}
    assert left == {f"one.{k}" for k in range(layers)} | {"last"}


def test_layers_of_an_unknown_kind_are_reported():
    class Transposed(torch.nn.Module):
        """A linear layer with its weight the other way round, as in GPT-2."""

        def __init__(self, inputs, outputs):
            super().__init__()
            self.weight = torch.nn.Parameter(torch.randn(inputs, outputs))

        def forward(self, x):
            return x @ self.weight

    model = torch.nn.Sequential(Transposed(8, 16), torch.nn.ReLU(), Transposed(16, 8), torch.nn.Linear(8, 4))
    with pytest.raises(ValueError, match="nothing to prune: 0, 2 is a Transposed"):
        ATO(torch.optim.SGD(model.parameters(), lr=0.1), model, torch.randn(2, 8), target_flops=0.5, total_steps=100)


class TrainingHead(torch.nn.Module):
    """An auxiliary head that evaluation does not run."""

    def __init__(self):
        super().__init__()
        self.a, self.b, self.c = (torch.nn.Conv2d(3, 8, 1), torch.nn.Conv2d(8, 8, 1), torch.nn.Conv2d(8, 4, 1))
        self.head = torch.nn.Conv2d(8, 4, 1)

    def forward(self, x):
        x = self.a(x).relu()
        y = self.c(self.b(x).relu())
        return (y, self.head(x)) if self.training else y


class SpatialGate(torch.nn.Module):
    """One channel that gates all others."""

    def __init__(self):
        super().__init__()
        self.a, self.gate = torch.nn.Conv2d(3, 8, 1), torch.nn.Conv2d(8, 1, 1)
        self.b, self.c = torch.nn.Conv2d(8, 8, 1), torch.nn.Conv2d(8, 4, 1)

    def forward(self, x):
        x = self.a(x).relu()
        return self.c(self.b(x * self.gate(x).sigmoid()).relu())


@pytest.mark.parametrize("network", [ShiftedSum, Sliced, PeeksAtOne])
@pytest.mark.parametrize("inputs", [example(), torch.zeros(4, 3, 16, 16)])
def test_what_is_not_exact_is_left_alone_with_a_reason(network, inputs):
    model = network()
    plan = make_plan(model, inputs, call, [], set(model.parameters()))
    assert ("a",) not in [tuple(layer.layers) for layer in plan.groups.layers]
    reasons = {entry.layers: entry.reason for entry in plan.groups.left_out}
    words = ("change the output", "cannot be", "is read as", "channels where")
    assert any(word in reason for layers, reason in reasons.items() if "a" in layers for word in words), reasons
    assert any("output of the model" in reason for reason in reasons.values())


@pytest.mark.parametrize("network", [TrainingHead, SpatialGate])
def test_heads_of_training_and_gates_of_one_channel_follow(network):
    model = randomised(network())
    plan = make_plan(model, example(), call, [], set(model.parameters()))
    assert {layer.root for layer in plan.groups.layers} == {"a", "b"}
    mask = random_mask(plan.groups, 0)
    small = copy.deepcopy(model)
    apply_cut(derive_cut(model, plan.groups, mask), small)
    zero_producers(model, plan.groups, mask)
    for training in (True, False):
        assert difference(model.train(training)(example()), small.train(training)(example())) < 1e-5


def test_a_model_may_keep_activations():
    class Keeps(NETWORKS[0]):
        def forward(self, x):
            self.seen = super().forward(x)
            self.all_seen = [self.seen, {"again": self.seen * 2}]
            return self.seen

    model = Keeps()
    model(example())
    plan = make_plan(model, example(), call, [], set(model.parameters()))
    derive_cut(model, plan.groups, random_mask(plan.groups, 0))


class Tied(torch.nn.Module):
    """Two layers with one weight, both read by one layer, or each by its own."""

    def __init__(self, apart):
        super().__init__()
        self.a, self.b = torch.nn.Conv2d(3, 8, 1), torch.nn.Conv2d(3, 8, 1)
        self.b.weight = self.a.weight
        self.d = torch.nn.Conv2d(8, 4, 1)
        self.e = torch.nn.Conv2d(8, 4, 1) if apart else None

    def forward(self, x):
        a, b = self.a(x), self.b(x)
        return self.d(torch.relu(a + b)) if self.e is None else self.d(a.relu()) + self.e(b.relu())


def test_shared_parameters_are_cut_alike_and_stay_shared():
    model = randomised(Tied(apart=False))
    plan = make_plan(model, example(), call, [], set(model.parameters()))
    mask = random_mask(plan.groups, 0)
    small = copy.deepcopy(model)
    apply_cut(derive_cut(model, plan.groups, mask), small)
    zero_producers(model, plan.groups, mask)
    with torch.no_grad():
        assert difference(model(example()), small(example())) < 1e-5
    assert small.a.weight is small.b.weight
    assert len(small.a.weight) == mask.sum() < 8


def test_shared_parameters_that_would_be_cut_differently_are_left_alone():
    model = Tied(apart=True)
    plan = make_plan(model, example(), call, [], set(model.parameters()))
    assert not plan.groups.layers
    assert any("shares" in entry.reason for entry in plan.groups.left_out)


def test_planning_touches_neither_model_nor_random_state():
    model = NETWORKS[0]().train()
    before = copy.deepcopy(model.state_dict())
    state = torch.get_rng_state()
    make_plan(model, example(), call, [], set(model.parameters()))
    assert torch.equal(state, torch.get_rng_state())
    assert model.training and all(m.training for m in model.modules())
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


class Cardinality(torch.nn.Module):
    """A bottleneck with a grouped convolution, and one that doubles its channels."""

    def __init__(self):
        super().__init__()
        self.a, self.b = torch.nn.Conv2d(3, 16, 1), torch.nn.Conv2d(16, 16, 3, 1, 1, groups=4)
        self.c, self.up = torch.nn.Conv2d(16, 12, 1), torch.nn.Conv2d(12, 24, 3, 1, 1, groups=12)
        self.back = torch.nn.ConvTranspose2d(24, 36, 3, 1, 1, groups=6)
        self.d = torch.nn.Conv2d(36, 5, 1)

    def forward(self, x):
        x = self.c(self.b(self.a(x).relu()).relu()).relu()
        return self.d(self.back(self.up(x).relu()).relu()).mean((2, 3))


def test_groups_of_a_convolution_go_whole():
    model = randomised(Cardinality())
    plan = make_plan(model, example(), call, [], set(model.parameters()))
    sizes = {layer.root: (layer.size, layer.layers[layer.root]) for layer in plan.groups.layers}
    assert sizes == {"a": (4, 4), "c": (6, 2)}
    mask = torch.tensor([1, 0, 1, 0, 0, 1, 1, 1, 0, 1]).bool()
    small = copy.deepcopy(model)
    apply_cut(derive_cut(model, plan.groups, mask), small)
    assert (small.b.groups, small.b.in_channels, small.b.out_channels) == (2, 8, 8)
    assert (small.up.groups, small.up.in_channels, small.up.out_channels) == (8, 8, 16)
    assert (small.back.groups, small.back.in_channels, small.back.out_channels) == (4, 16, 24)
    zero_producers(model, plan.groups, mask)
    with torch.no_grad():
        assert difference(model(example()), small(example())) < 1e-5
    assert count_macs(small, example()) == plan.cost(mask).item()
    assert [(w.before, w.least, w.after) for w in plan.facts(mask, ~mask)["widths"]] == [(16, 8, 8), (12, 4, 8)]
    assert plan.lots(8).tolist() == [2, 4]


class WideFirst(torch.nn.Module):
    """A wide layer to which the concatenation of two narrow ones is added."""

    def __init__(self):
        super().__init__()
        self.wide, self.left, self.right = (torch.nn.Conv2d(3, width, 1) for width in (16, 10, 6))
        self.last = torch.nn.Conv2d(16, 5, 1)

    def forward(self, x):
        return self.last((self.wide(x) + torch.cat([self.left(x), self.right(x)], 1)).relu()).mean((2, 3))


@pytest.mark.parametrize("kept", [0, -1])
def test_the_least_that_groups_keep_leaves_no_layer_without_channels(kept):
    # In one group with the wide layer, the narrow ones could lose all of theirs: the cut failed after the whole run.
    model = randomised(WideFirst())
    plan = make_plan(model, example(), call, [], set(model.parameters()))
    assert [tuple(layer.layers) for layer in plan.groups.layers] == [("wide", "left"), ("wide", "right")]
    mask = torch.zeros(plan.groups.num_gates, dtype=torch.bool)
    for layer in plan.groups.layers:
        mask[layer.start + kept % layer.size] = True
    small = copy.deepcopy(model)
    apply_cut(derive_cut(model, plan.groups, mask), small)
    assert (small.wide.out_channels, small.left.out_channels, small.right.out_channels) == (2, 1, 1)
    zero_producers(model, plan.groups, mask)
    with torch.no_grad():
        assert difference(model(example()), small(example())) < 1e-5
    assert count_macs(small, example()) == plan.cost(mask).item()


def test_nothing_can_be_selected():
    assert select(torch.ones(3, 2), {0: []}).shape == (0, 2)


class Attends(torch.nn.Module):
    """A transformer block: its MLP can go, its heads and stream cannot."""

    def __init__(self):
        super().__init__()
        self.patch, self.position = torch.nn.Conv2d(3, 8, 4, 4), torch.nn.Parameter(torch.randn(1, 16, 8))
        self.norm1, self.norm2 = torch.nn.LayerNorm(8), torch.nn.LayerNorm(8)
        self.attention = torch.nn.MultiheadAttention(8, 2, batch_first=True)
        self.mlp = torch.nn.Sequential(torch.nn.Linear(8, 24), torch.nn.GELU(), torch.nn.Linear(24, 8))
        self.head = torch.nn.Linear(8, 5)

    def forward(self, x):
        x = self.patch(x).flatten(2).mT + self.position
        y = self.norm1(x)
        x = x + self.attention(y, y, y, need_weights=False)[0]
        return self.head((x + self.mlp(self.norm2(x))).mean(1))


def test_a_transformer_loses_its_hidden_widths_alone():
    model = Attends()
    plan = make_plan(model, example(), call, [], set(model.parameters()))
    assert [layer.root for layer in plan.groups.layers] == ["mlp.0"]
    reasons = {layer: entry.reason for entry in plan.groups.left_out for layer in entry.layers}
    assert "LayerNorm" in reasons["patch"] or "MultiheadAttention" in reasons["patch"]


class Aliased(torch.nn.Module):
    """One module under two names, as in networks that keep their blocks in a list as well."""

    def __init__(self):
        super().__init__()
        self.a, self.b, self.c = (torch.nn.Conv2d(3, 8, 1), torch.nn.Conv2d(8, 8, 1), torch.nn.Linear(8, 4))
        self.blocks = torch.nn.ModuleList([self.a, self.b])

    def forward(self, x):
        for block in self.blocks:
            x = block(x).relu()
        return self.c(x.mean((2, 3)))


@pytest.mark.parametrize("network", [Aliased])
def test_modules_with_two_names_are_cut_once(network):
    model = randomised(network())
    plan = make_plan(model, example(), call, [], set(model.parameters()))
    mask = random_mask(plan.groups, 0)
    small = copy.deepcopy(model)
    apply_cut(derive_cut(model, plan.groups, mask), small)
    assert small.blocks[0] is small.a
    assert count_macs(small, example()) == plan.cost(mask).item()
    zero_producers(model, plan.groups, mask)
    with torch.no_grad():
        assert difference(model(example()), small(example())) < 1e-5


class Quantizable(torch.nn.Module):
    """A float model whose sums are modules that quantization will replace."""

    def __init__(self):
        super().__init__()
        self.a, self.b, self.c = torch.nn.Conv2d(3, 8, 1), torch.nn.Conv2d(8, 8, 1), torch.nn.Conv2d(8, 4, 1)
        self.sum = torch.ao.nn.quantized.FloatFunctional()

    def forward(self, x):
        x = self.a(x).relu()
        return self.c(self.sum.add_relu(x, self.b(x)))


@pytest.mark.filterwarnings("ignore")
def test_models_that_are_yet_to_be_quantized_are_float_models():
    model = Quantizable()
    checks.tractable(model)
    plan = make_plan(model, example(), call, [], set(model.parameters()))
    assert [layer.layers for layer in plan.groups.layers] == [{"a": 1, "b": 1}]


class Halves(torch.nn.Module):
    """Counts its channels to halve them: a trial that takes as many from both halves would not notice."""

    def __init__(self):
        super().__init__()
        self.a, self.b = torch.nn.Conv2d(3, 4, 1), torch.nn.Conv2d(2, 5, 1)

    def forward(self, x):
        x = self.a(x).relu()
        return self.b(x[:, x.shape[1] // 2 :])


def test_a_slice_by_the_number_of_channels_is_left_alone():
    model = Halves()
    plan = make_plan(model, example(), call, [], set(model.parameters()))
    assert not plan.groups.layers
