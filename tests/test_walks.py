"""What a forward may do with channels between two layers, and what is found to be prunable then."""

import pytest
import torch
import torch.nn.functional as F
from networks import SHORT
from torch import Tensor, nn

from ato_optim import ATO


def plan(model: nn.Module, x: Tensor, **options):
    base = torch.optim.SGD(model.parameters(), lr=0.1)
    return ATO(base, model, x, **{"target_flops": 1, "total_steps": 1, "phases": SHORT, **options})


def roots(optimizer: ATO) -> set[str]:
    """Which layers lead a group; each passed the trial."""
    return {layer.root for layer in optimizer.plan.groups.layers}


def reasons(optimizer: ATO) -> dict[str, str]:
    return {layer: entry.reason for entry in optimizer.plan.groups.left_out for layer in entry.layers}


class Between(nn.Module):
    """A function of the channels between two linear layers."""

    def __init__(self, function, width: int = 24, reads: int | None = None):
        super().__init__()
        self.one, self.two, self.function = nn.Linear(6, width), nn.Linear(reads or width, 5), function

    def forward(self, x: Tensor) -> Tensor:
        return self.two(self.function(self.one(x)))


ORDERS = {
    "AmaxBackward0": lambda h: h * h.amax(-1, keepdim=True),
    "AminBackward0": lambda h: h * h.amin((-1,), keepdim=True),
    "MaxBackward0": lambda h: h * h.max(-1, keepdim=True).values,
    "TopkBackward0": lambda h: torch.zeros_like(h).scatter(-1, h.topk(4, -1).indices, h.topk(4, -1).values),
    "AminmaxBackward0": lambda h: h * torch.aminmax(h, dim=-1, keepdim=True).max,
    "MaxBackward1": lambda h: h * h.max(),
    "MaxPool2DWithIndicesBackward0": lambda h: F.max_pool1d(h[:, None], 3, 1, 1)[:, 0],
    "AdaptiveMaxPool2DBackward0": lambda h: h * F.adaptive_max_pool1d(h[:, None], 1)[:, 0],
    "SortBackward0": lambda h: h * h.sort(-1).values[..., -3:-2].sigmoid(),
    "MedianBackward1": lambda h: h * h.median(-1, keepdim=True).values.sigmoid(),
}


@pytest.mark.parametrize("name", ORDERS)
def test_channels_whose_order_counts_stay(name):
    try:
        ORDERS[name](torch.randn(4, 24, requires_grad=True) * 1).sum().backward()
    except RuntimeError:  # aminmax in torch 2.6
        pytest.skip("torch cannot differentiate it")
    optimizer = plan(Between(ORDERS[name]), torch.randn(4, 6))
    assert reasons(optimizer)["one"] == f"is compared with other channels ({name})"


class Pooled(nn.Module):
    """As many points as channels: the largest is taken over the points."""

    def __init__(self):
        super().__init__()
        self.one, self.two, self.fc = nn.Conv1d(3, 12, 1), nn.Conv1d(12, 16, 1), nn.Linear(16, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(torch.relu(self.two(torch.relu(self.one(x)))).amax(2))


@pytest.mark.parametrize("points", [9, 12, 16])
def test_an_order_along_another_axis_is_no_reason(points):
    assert roots(plan(Pooled(), torch.randn(2, 3, points))) == {"one", "two"}


def test_what_takes_more_channels_than_may_be_left_is_found_before_training():
    def largest(h):  # compared outside of the graph
        return h * (h >= h.detach().topk(8, -1).values[..., -1:])

    assert "selected index k out of range" in reasons(plan(Between(largest, 64), torch.randn(4, 6)))["one"]
    assert roots(plan(Between(largest, 64), torch.randn(4, 6), min_width=0.4)) == {"one"}  # 26 are enough


@pytest.mark.parametrize("dim", [1, -1])
def test_a_glu_is_followed_as_its_two_halves_are(dim):
    def halves(h):
        one, other = h.chunk(2, dim)
        return one * other.sigmoid()

    found = []
    for function in (halves, lambda h: F.glu(h, dim)):
        model = nn.Sequential(Between(function, 24, 12), nn.ReLU(), nn.Linear(5, 3))
        found.append([(layer.root, layer.size) for layer in plan(model, torch.randn(4, 6)).plan.groups.layers])
    assert found[0] == found[1] == [("0.one", 12), ("0.two", 5)]


class Mixed(nn.Module):
    """Maps that are weighed by entries of a vector, learned or predicted."""

    def __init__(self, predicted: bool):
        super().__init__()
        self.maps = nn.ModuleList([nn.Conv2d(3, 8, 1), nn.Conv2d(8, 8, 1), nn.Conv2d(8, 8, 1)])
        self.weights, self.fc = nn.Parameter(torch.zeros(3)), nn.Linear(8, 5)
        self.predict = nn.Linear(8, 3) if predicted else None

    def forward(self, x: Tensor) -> Tensor:
        found = []
        for conv in self.maps:
            x = torch.relu(conv(x))
            found.append(x)
        if self.predict is None:
            weights = list(self.weights.softmax(0))
        else:
            weights = self.predict(x.mean((2, 3))).softmax(1)[:, :, None, None, None].unbind(1)
        return self.fc(sum(weight * one for weight, one in zip(weights, found, strict=True)).mean((2, 3)))


@pytest.mark.parametrize("predicted", [False, True])
def test_an_entry_of_a_vector_that_weighs_a_map_is_not_coupled_to_its_channels(predicted):
    (stream,) = plan(Mixed(predicted), torch.randn(2, 3, 8, 8)).plan.groups.layers
    assert stream.layers.keys() == {"maps.0", "maps.1", "maps.2"} and stream.size == 8


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.inputs, self.norm, self.outputs = nn.Linear(6, 8), nn.LayerNorm(8), nn.Linear(8, 5)
        self.one, self.two = nn.Linear(8, 20), nn.Linear(20, 8)

    def forward(self, x: Tensor) -> Tensor:
        x = self.inputs(x)
        return self.outputs(x + self.two(torch.relu(self.one(self.norm(x)))))


@pytest.mark.parametrize("tokens", [8, 19, 20, 21])
def test_as_many_tokens_as_channels_are_told_apart_in_linear_layers(tokens):
    assert roots(plan(Block(), torch.randn(2, tokens, 6))) == {"one"}


class Queries(Block):
    """Learned queries, a view of a parameter, go into a module first."""

    def __init__(self):
        super().__init__()
        self.queries = nn.Parameter(torch.randn(4, 8))

    def forward(self, x: Tensor) -> Tensor:
        queries = self.norm(self.queries.expand(len(x), -1, -1))
        return super().forward(x) + self.outputs(self.two(torch.relu(self.one(queries)))).mean(1, keepdim=True)


def test_a_module_may_read_a_view_of_a_parameter():
    model = Queries()
    model.two.bias.requires_grad_(False)
    optimizer = plan(model, torch.randn(2, 7, 6))
    assert [(name, p.requires_grad) for name, p in model.named_parameters() if not p.requires_grad] == [
        ("two.bias", False)
    ]
    assert roots(optimizer) == {"one"}


class Rotary(Block):
    """Channels as complex numbers, as rotary position embeddings have them."""

    def forward(self, x: Tensor) -> Tensor:
        x = self.inputs(x)
        turned = torch.view_as_complex(x.unflatten(-1, (-1, 2))) * torch.polar(torch.ones(4), torch.arange(4.0))
        return self.outputs(torch.view_as_real(turned).flatten(-2) + self.two(torch.relu(self.one(x))))


class MyCat(torch.autograd.Function):
    """Doubles, under a name that torch-pruning takes for a concatenation's."""

    @staticmethod
    def forward(ctx, x):
        return 2 * x

    @staticmethod
    def backward(ctx, gradient):
        return 2 * gradient


class Renamed(Block):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(MyCat.apply(self.norm(MyCat.apply(self.inputs(x))))[..., :6])


@pytest.mark.parametrize("network", [Rotary, Renamed])
def test_an_operation_that_cannot_be_followed_keeps_only_what_it_reads(network):
    optimizer = plan(network(), torch.randn(2, 7, 6))
    assert "one" in roots(optimizer) and "inputs" not in roots(optimizer)


class Deep(nn.Module):
    """Stochastic depth: in training some blocks are not run."""

    def __init__(self):
        super().__init__()
        self.inputs, self.outputs = nn.Linear(6, 8), nn.Linear(8, 5)
        self.one = nn.ModuleList(nn.Linear(8, 12) for _ in range(3))
        self.two = nn.ModuleList(nn.Linear(12, 8) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        x = self.inputs(x)
        for one, two in zip(self.one, self.two, strict=True):
            if not self.training or torch.rand(()) < 0.5:
                x = x + two(torch.relu(one(x)))
        return self.outputs(x)


def test_the_plan_of_a_network_that_skips_blocks_at_random_is_that_of_the_whole():
    found = []
    for seed in range(4):
        torch.manual_seed(seed)
        found.append([(layer.root, layer.layers) for layer in plan(Deep(), torch.randn(2, 6)).plan.groups.layers])
    assert {root for root, _ in found[0]} == {"inputs", "one.0", "one.1", "one.2"}
    assert all(groups == found[0] for groups in found)


class Heads(nn.Module):
    """A head for training and another for evaluation."""

    def __init__(self):
        super().__init__()
        self.body, self.hidden = nn.Linear(6, 8), nn.Linear(8, 12)
        self.evaluated, self.trained = nn.Linear(12, 5), nn.Linear(12, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.hidden(torch.relu(self.body(x))))
        return self.trained(x) if self.training else self.evaluated(x)


@pytest.mark.filterwarnings("ignore:total_steps=20")
def test_what_a_head_for_training_alone_reads_is_not_cut_without_it():
    model = Heads()
    optimizer = plan(model, torch.randn(2, 6), target_flops=0.6, total_steps=20)
    assert roots(optimizer) == {"body"} and reasons(optimizer)["evaluated"].startswith("is not in the graph")
    for _ in range(20):
        model(torch.randn(2, 6)).sum().backward()
        optimizer.step()
    optimizer.compress()
    model(torch.randn(2, 6)).sum().backward()


class Adapts(Block):
    """Differentiates by a parameter in its forward."""

    def forward(self, x: Tensor) -> Tensor:
        with torch.enable_grad():
            loss = self.norm(self.inputs(x.detach())).square().mean()
            (gradient,) = torch.autograd.grad(loss, self.norm.weight, create_graph=self.training)
        return super().forward(x) + gradient.sum()


def test_a_model_may_differentiate_by_its_parameters_in_its_forward():
    assert roots(plan(Adapts(), torch.randn(2, 7, 6))) == {"one"}


class Forgotten(Block):
    def __init__(self):
        super().__init__()
        self.last = nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        self.last(self.inputs(x))
        return super().forward(x)


def test_a_layer_whose_output_nothing_reads_is_said_to_be_that():
    assert "no output depends on it" in reasons(plan(Forgotten(), torch.randn(2, 7, 6)))["last"]


class Scaled(nn.Module):
    def __init__(self):
        super().__init__()
        self.one, self.two = nn.Linear(6, 8), nn.Linear(8, 5)
        self.table = nn.Parameter(torch.randn(4, 2))

    def forward(self, x: Tensor) -> Tensor:
        return self.two(self.one(x) + self.table.flatten())


def test_reasons_name_parameters_as_the_model_does():
    left_out = reasons(plan(Scaled(), torch.randn(3, 6)))
    assert "table" in left_out.get("one", "table") and "UnwrappedParameter" not in str(left_out)


class InPlace(nn.Module):
    """A layer whose output is a view, and an activation that writes into it."""

    def __init__(self, layer, norm=nn.Identity):
        super().__init__()
        self.one, self.norm, self.two = layer(6, 16), norm(16), layer(16, 5)
        self.activation = nn.LeakyReLU(inplace=True)

    def forward(self, x: Tensor) -> Tensor:
        return self.two(self.activation(self.norm(self.one(x))))


def convolution(inputs: int, outputs: int) -> nn.Module:
    return nn.Conv2d(inputs, outputs, 3, padding=1)


@pytest.mark.filterwarnings("error:input's size at dim=1")
@pytest.mark.parametrize(
    ("model", "x"),
    [
        (InPlace(nn.Linear), torch.randn(2, 7, 6)),
        (InPlace(convolution, lambda c: nn.InstanceNorm2d(c, affine=True)), torch.randn(2, 6, 8, 8)),
        (InPlace(convolution, nn.InstanceNorm2d), torch.randn(2, 6, 8, 8)),
    ],
    ids=["linear", "affine", "plain"],
)
def test_activations_that_write_into_views_are_followed(model, x):
    optimizer = plan(model, x, target_flops=0.5, total_steps=20, interval=1)
    assert roots(optimizer) == {"one"} and model.activation.inplace
    for _ in range(20):
        optimizer.zero_grad()
        model(x).square().mean().backward()
        optimizer.step()
    with torch.no_grad():
        expected = model(x)
        small = optimizer.compress()
        torch.testing.assert_close(small(x), expected, rtol=1e-4, atol=1e-5)
    assert len(small.one.weight) < 16 and getattr(small.norm, "num_features", len(small.one.weight)) < 16


class Scale(nn.Module):
    def __init__(self):
        super().__init__()
        self.gamma = nn.Parameter(torch.rand(1, 16))

    def forward(self, x: Tensor) -> Tensor:
        return x * self.gamma


def test_a_module_whose_scale_is_pruned_is_not_among_what_is_left_alone():
    optimizer = plan(nn.Sequential(nn.Linear(6, 16), Scale(), nn.ReLU(), nn.Linear(16, 5)), torch.randn(3, 6))
    assert roots(optimizer) == {"0"} and "1" not in reasons(optimizer)


class CrossStage(nn.Module):
    """Half of a layer's channels, by a number, go through residual blocks, the other half around them."""

    def __init__(self):
        super().__init__()
        self.stem, self.split = nn.Conv2d(3, 24, 3), nn.Conv2d(24, 32, 1)
        self.a, self.b, self.out = nn.Conv2d(16, 12, 1), nn.Conv2d(12, 16, 1), nn.Conv2d(32, 20, 1)
        self.fc = nn.Linear(20, 5)

    def forward(self, x: Tensor) -> Tensor:
        around, h = torch.relu(self.split(torch.relu(self.stem(x)))).split(16, 1)
        h = torch.relu(h + self.b(torch.relu(self.a(h))))
        return self.fc(torch.relu(self.out(torch.cat([around, h], 1))).mean((2, 3)))


def test_parts_of_a_layer_fail_the_trial_one_by_one():
    optimizer = plan(CrossStage(), torch.randn(2, 3, 9, 9))
    parts = [layer for layer in optimizer.plan.groups.layers if layer.root == "split"]
    assert [(part.size, list(part.layers)) for part in parts] == [(16, ["split", "b"])]
    assert reasons(optimizer) == {"fc": "is an output of the model"}


class LearnedMap(nn.Module):
    """A map that is added to a residual stream, by place and channel."""

    def __init__(self, *shape: int):
        super().__init__()
        self.map = nn.Parameter(torch.randn(shape))
        self.stem, self.one, self.two = nn.Conv2d(3, 24, 3), nn.Conv2d(24, 32, 1), nn.Conv2d(32, 24, 1)
        self.fc = nn.Linear(24, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x) + self.map
        return self.fc(torch.relu(x + self.two(torch.relu(self.one(x)))).mean((2, 3)))


@pytest.mark.parametrize("shape", [(1, 24, 7, 6), (24, 7, 6), (1, 24, 1, 1), (24, 1, 6)])
def test_a_map_that_is_added_to_channels_goes_with_them(shape):
    optimizer = plan(LearnedMap(*shape), torch.randn(2, 3, 9, 8))
    assert roots(optimizer) == {"stem", "one"}


class Reads(nn.Module):
    """A layer that is not called, and a module that has both weights and a child."""

    class Experts(nn.Module):
        def __init__(self):
            super().__init__()
            self.weights, self.activation = nn.Parameter(torch.randn(6, 10)), nn.SiLU()

        def forward(self, x: Tensor) -> Tensor:
            return self.activation(x @ self.weights)

    def __init__(self):
        super().__init__()
        self.experts, self.read, self.one, self.two = (
            self.Experts(),
            nn.Linear(10, 8),
            nn.Linear(8, 12),
            nn.Linear(12, 5),
        )
        self.table = nn.Parameter(torch.randn(4, 5))
        self.scale = nn.Sequential()
        self.scale.vector = nn.Parameter(torch.ones(1, 1, 5))

    def forward(self, x: Tensor) -> Tensor:
        h = F.linear(self.experts(x), self.read.weight, self.read.bias)
        return self.two(torch.relu(self.one(h))) * self.scale.vector[0] + self.table


def test_all_that_is_left_alone_is_named():
    found = reasons(plan(Reads(), torch.randn(4, 6)))
    assert found.keys() == {"experts", "read", "two"}
    assert "holds weights besides its layers" in found["experts"] and "is not called" in found["read"]


@pytest.mark.parametrize("norm", [nn.LayerNorm, nn.Identity])
def test_layers_of_a_group_that_is_refused_are_all_named(norm):
    class Stream(nn.Module):
        def __init__(self):
            super().__init__()
            self.stem, self.one, self.two = nn.Linear(6, 20), nn.Linear(20, 12), nn.Linear(12, 20)
            self.norm, self.fc = norm(20), nn.Linear(20, 5)

        def forward(self, x: Tensor) -> Tensor:
            x = self.stem(x)
            return self.fc(self.norm(x + self.two(torch.relu(self.one(x)))).softmax(-1))

    optimizer = plan(Stream(), torch.randn(4, 6))
    assert roots(optimizer) == {"one"} and reasons(optimizer).keys() == {"stem", "two", "fc"}


def test_the_projection_inside_of_an_attention_is_no_layer_of_its_own():
    layer = nn.TransformerEncoderLayer(12, 3, 24, batch_first=True, dropout=0.0)
    found = reasons(plan(nn.Sequential(nn.Linear(6, 12), layer, nn.Linear(12, 5)), torch.randn(2, 7, 6)))
    assert "2" in found and "1.self_attn.out_proj" not in found


class Prefix(nn.Module):
    """Tokens of a memory that may be empty go before those of the input."""

    def __init__(self, merged):
        super().__init__()
        self.one, self.two, self.fc, self.merged = nn.Linear(6, 16), nn.Linear(16, 16), nn.Linear(16, 3), merged

    def forward(self, x, memory):
        x, memory = torch.relu(self.one(x)), torch.relu(self.one(memory))
        if self.merged:
            x, memory = x.flatten(0, 1), memory.flatten(0, 1)
        else:
            x, memory = x.reshape(-1, 4, 4), memory.reshape(-1, 4, 4)
            x = torch.cat([x, memory]).flatten(1)
            return self.fc(torch.relu(self.two(x)))
        return self.fc(torch.relu(self.two(torch.cat([x, memory]))))


@pytest.mark.parametrize("merged", [True, False])
def test_a_reshape_of_an_empty_tensor_comes_to_an_end(merged):
    model = Prefix(merged)
    inputs = torch.randn(2, 5, 6), torch.randn(2, 0, 6)
    found = roots(plan(model, inputs))
    assert "two" in found and ("one" in found) == merged


class Reshapes(nn.Module):
    def forward(self, x):
        return x.view(len(x), 24, -1).transpose(1, 2).reshape(len(x), -1)[:, :24]


def test_a_reason_names_the_part_of_the_model_that_fails():
    model = nn.Sequential(nn.Linear(6, 24), nn.Sequential(nn.ReLU(), Reshapes()), nn.Linear(24, 3))
    found = reasons(plan(model, torch.randn(2, 6)))
    assert found["0"].startswith(
        "cannot go: the forward fails without it (RuntimeError: shape '[2, 24, -1]' is invalid"
    )
    assert found["0"].endswith(", in 1.1)")


class Tail(nn.Module):
    """The last channels of two layers' go another way than the first, and a map's edges are cropped."""

    def __init__(self, negative: bool):
        super().__init__()
        self.a, self.t, self.negative = nn.Conv2d(3, 12, 3), nn.Conv2d(3, 8, 3), negative
        self.b, self.c, self.d = nn.Conv2d(12, 8, 3), nn.Conv2d(8, 8, 3), nn.Conv2d(8, 8, 3)
        self.head = nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu(torch.cat([self.a(x), self.t(x)], 1))
        k = -8 if self.negative else y.shape[1] - 8
        h = F.relu(self.b(y[:, :k]) + self.c(y[:, k:]))
        height, width = h.shape[2:]
        inside = h[..., 1:-1, 1:-1] if self.negative else h[..., 1 : height - 1, 1 : width - 1]
        return self.head(F.relu(inside + self.d(h)).mean((2, 3)))


def test_ends_of_slices_may_be_counted_from_behind():
    """torch keeps them as huge positive numbers. The map's width inside is that of the channels."""
    x = torch.randn(2, 3, 13, 15)
    found = [plan(Tail(negative), x) for negative in (True, False)]
    assert roots(found[0]) == roots(found[1]) == {"a", "b"} and "fails without it" in reasons(found[0])["t"]
    assert found[0].least_flops == found[1].least_flops < 0.5


class Groups(nn.Module):
    """A grouped convolution that may be defined before the layer that it reads."""

    def __init__(self, first: bool, convolution):
        super().__init__()
        if first:
            self.g = convolution(16, 16, 3, groups=4)
        self.a = nn.Conv2d(3, 16, 3)
        if not first:
            self.g = convolution(16, 16, 3, groups=4)
        self.b, self.head = nn.Conv2d(16, 12, 1), nn.Linear(12, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(F.relu(self.b(F.relu(self.g(F.relu(self.a(x)))))).mean((2, 3)))


@pytest.mark.parametrize("convolution", [nn.Conv2d, nn.ConvTranspose2d])
def test_a_grouped_convolution_may_be_left_with_one_group_in_any_order(convolution):
    """The least network has one of four groups, which is no grouped convolution any more."""
    found = [plan(Groups(first, convolution), torch.randn(2, 3, 9, 11)) for first in (True, False)]
    assert {min(layer.size for layer in optimizer.plan.groups.layers) for optimizer in found} == {4}
    assert not {"a", "b", "g"} & {layer for optimizer in found for layer in reasons(optimizer)}
    assert found[0].least_flops == found[1].least_flops < 0.3
