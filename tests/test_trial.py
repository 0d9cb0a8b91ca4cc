"""The trial before training: no group passes whose removal would change outputs, and it does not refuse too much."""

import pytest
import torch
from torch import Tensor, nn

from ato_optim import ATO, proof
from ato_optim.conditions import COARSE_TOLERANCE, TOLERANCE, in_float64
from ato_optim.proof import difference


def images(batch: int = 2) -> Tensor:
    return torch.randn(batch, 3, 8, 8, generator=torch.Generator().manual_seed(0))


class Shifted(nn.Module):
    """A layer `a` whose zeroed channels are not zero where `b` reads them, and ways to hide that."""

    def __init__(self, depth: int = 0, zero_head: bool = False):
        super().__init__()
        self.a, self.b = nn.Conv2d(3, 16, 3, padding=1), nn.Conv2d(16, 16, 3, padding=1)
        self.rest = nn.Sequential(*(nn.Sequential(nn.Conv2d(16, 16, 3, padding=1), nn.ReLU()) for _ in range(depth)))
        self.fc = nn.Linear(16, 4)
        if zero_head:
            nn.init.zeros_(self.fc.weight)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.rest(self.b(torch.sigmoid(self.a(x)))).mean((2, 3)))


class LayerScale(nn.Module):
    """A residual branch that begins with next to nothing, and whose hidden width is not exact."""

    def __init__(self):
        super().__init__()
        self.stem, self.a, self.b = nn.Conv2d(3, 16, 3), nn.Conv2d(16, 32, 1), nn.Conv2d(32, 16, 1)
        self.scale, self.fc = nn.Parameter(torch.full((16, 1, 1), 1e-6)), nn.Linear(16, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        return self.fc((x + self.scale * self.b(torch.sigmoid(self.a(x)))).mean((2, 3)))


class WithCoordinates(Shifted):
    """Other outputs that are a hundred thousand times larger."""

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return super().forward(x), torch.arange(0.0, 1e5).to(x)


class Complex(Shifted):
    def forward(self, x: Tensor) -> Tensor:
        return torch.view_as_complex(super().forward(x).view(-1, 2, 2))


@pytest.mark.parametrize(
    "model",
    [
        lambda: Shifted(),
        lambda: Shifted(zero_head=True),
        lambda: Shifted(depth=12),
        LayerScale,
        WithCoordinates,
        Complex,
        lambda: Shifted().bfloat16(),
    ],
    ids=["plain", "zeros in the last layer", "many layers on", "LayerScale", "large outputs", "complex", "bfloat16"],
)
def test_what_is_not_exact_does_not_hide(model):
    model = model()
    x = images().to(next(model.parameters()).dtype)
    report = ATO(torch.optim.SGD(model.parameters(), lr=0.1), model, x, target_flops=1, total_steps=1).report()
    left = {layer: reason for layers, reason in report.left_out for layer in layers}
    assert "would change the output" in left["a"]
    assert not any("a" in width.layers for width in report.widths)


class Samples(nn.Module):
    """Noise in eval mode, as a variational autoencoder has it."""

    def __init__(self):
        super().__init__()
        self.encode, self.decode = nn.Linear(8, 16), nn.Linear(4, 16)
        self.mean, self.spread, self.out = nn.Linear(16, 4), nn.Linear(16, 4), nn.Linear(16, 8)

    def forward(self, x: Tensor) -> Tensor:
        h = torch.relu(self.encode(x))
        z = self.mean(h) + torch.randn(len(x), 4).to(x) * self.spread(h).exp()
        return self.out(torch.relu(self.decode(z)))


def test_a_model_that_samples_is_pruned():
    model = Samples()
    base = torch.optim.SGD(model.parameters(), lr=0.1)
    report = ATO(base, model, torch.randn(4, 8), target_flops=0.6, total_steps=100).report()
    assert [width.layers for width in report.widths] == [("encode",), ("decode",)]


class Fixed(nn.Linear):
    """A layer that computes in the precision that it names."""

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.linear(x.float(), self.weight.float(), self.bias.float()).to(x)


class Converts(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.float())


class Sums(nn.Linear):
    """Asks for float32 in other ways than a conversion, and makes a constant in it."""

    def forward(self, x: Tensor) -> Tensor:
        x = super().forward(x[None].sum(0, dtype=torch.float32).to(x))
        kept = torch.zeros(x.shape)
        kept[:] = x.detach()
        return x + 0 * kept


@torch.library.custom_op("ato_tests::rounded", mutates_args=())
def rounded(x: Tensor) -> Tensor:
    return x.to(torch.float32, copy=True)


class Rounds(nn.Linear):
    """Has a kernel of its own, which works in float32 whatever it gets."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) + 0 * rounded(x.detach()).mean().to(x)


class Imaginary(nn.Linear):
    """Goes through complex numbers."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) + 0 * x.detach().to(torch.complex64).real.mean()


class Insists(nn.Linear):
    """Works in float32 alone, as kernels of an extension may."""

    def forward(self, x: Tensor) -> Tensor:
        assert x.dtype == torch.float32
        return super().forward(x)


@pytest.mark.parametrize(
    ("layer", "doubled", "allowed"),
    [
        (nn.Linear, True, TOLERANCE),
        (Fixed, True, TOLERANCE),
        (Converts, True, TOLERANCE),
        (Sums, True, TOLERANCE),
        (Rounds, True, COARSE_TOLERANCE),
        (Imaginary, True, TOLERANCE),
        (Insists, False, COARSE_TOLERANCE),
    ],
)
def test_float64_where_the_model_runs_in_it(layer, doubled, allowed):
    model, x = nn.Sequential(layer(8, 16), nn.ReLU(), layer(16, 4)), torch.randn(2, 8)
    before = [p.clone() for p in model.parameters()]
    tried, inputs, forward_fn, tolerance = in_float64(model, x, lambda model, x: model(x), trains=True)
    assert tolerance == allowed
    found = forward_fn(tried, inputs)
    assert found.dtype == inputs.dtype and difference(model(x).to(found), found) < 1e-5
    assert inputs.dtype == tried[0].weight.dtype == (torch.float64 if doubled else torch.float32)
    for network in (model, tried):
        assert all(torch.equal(p.float(), q) for p, q in zip(network.parameters(), before, strict=True))
    base = torch.optim.SGD(model.parameters(), lr=0.1)
    assert len(ATO(base, model, x, target_flops=0.6, total_steps=100).plan.groups.layers) == 1


class InFloat32(Shifted):
    """Fixes a dtype, always or in training alone, after it has assigned a buffer."""

    def __init__(self, always: bool):
        super().__init__()
        self.always, self.empty = always, nn.Parameter(torch.empty(0, 4))
        self.register_buffer("seen", torch.zeros(1))

    def forward(self, x: Tensor) -> Tensor:
        self.seen = 0.9 * self.seen + 0.1 * x.detach().mean()
        x = self.rest(torch.relu(self.b(torch.relu(self.a(x) * (1 + self.seen))))).mean((2, 3))
        assert x.dtype == torch.float32 or not (self.training or self.always)
        return self.fc(x)


@pytest.mark.parametrize("always", [True, False])
def test_what_will_not_run_in_float64_is_tried_as_it_is(always):
    model = InFloat32(always)
    base = torch.optim.SGD(model.parameters(), lr=0.1)
    assert len(ATO(base, model, images(), target_flops=0.6, total_steps=100).plan.groups.layers) == 2


def test_a_plan_of_a_large_model_takes_as_many_forwards_as_the_docs_say(monkeypatch):
    monkeypatch.setattr(proof, "MACS_OF_TRIALS", 0)
    met = []

    def forward(model: nn.Module, x: Tensor) -> Tensor:
        met.append((next(model.parameters()).dtype, model.training))
        return model(x)

    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 4, 3))
    base = torch.optim.SGD(model.parameters(), lr=0.1)
    ATO(base, model, images(), target_flops=1, total_steps=1, forward_fn=forward)
    assert len(met) == 18
    assert met.count((torch.float64, False)) == 11 and met.count((torch.float64, True)) == 4


class ComplexConvolution(nn.Module):
    """torch runs it as three real ones, on views of the numbers' parts."""

    def __init__(self):
        super().__init__()
        self.one, self.two = nn.Conv2d(3, 8, 3, 1, 1), nn.Conv2d(8, 6, 1, dtype=torch.complex64)
        self.three, self.four, self.fc = nn.Conv2d(6, 8, 1), nn.Conv2d(8, 8, 1), nn.Linear(8, 5)

    def forward(self, x):
        x = torch.relu(self.one(x))
        x = torch.relu(self.three(self.two(torch.complex(x, x / 2)).abs()))
        return self.fc(torch.relu(self.four(x)).mean((2, 3)))


def test_a_network_of_complex_numbers_is_tried_in_their_finest():
    model = nn.Sequential(*(nn.Linear(m, n, dtype=torch.complex64) for m, n in ((6, 8), (8, 12), (12, 3))))
    x = torch.randn(4, 6, dtype=torch.complex64)
    base = torch.optim.SGD(model.parameters(), lr=0.1)
    optimizer = ATO(base, model, x, target_flops=0.5, total_steps=100, forward_fn=lambda model, x: model(x).abs())
    assert [layer.root for layer in optimizer.plan.groups.layers] == ["0", "1"]


def test_a_layer_that_a_complex_convolution_reads_is_left_alone_and_others_are_pruned():
    model = ComplexConvolution()
    base = torch.optim.SGD(model.parameters(), lr=0.1)
    optimizer = ATO(base, model, torch.randn(2, 3, 8, 8), target_flops=1, total_steps=1)
    roots = {layer.root for layer in optimizer.plan.groups.layers}
    assert {"three", "four"} <= roots and "one" not in roots


class BesideLargeOutputs(nn.Module):
    """Scores behind a norm over channels that is written by hand, in float32 as usual; boxes in pixels."""

    def __init__(self, size: float):
        super().__init__()
        self.a, self.b = nn.Conv2d(3, 8, 3, 1, 1), nn.Conv2d(8, 16, 3, 1, 1)
        self.scores, self.boxes, self.size = nn.Conv2d(16, 4, 1), nn.Conv2d(8, 4, 1), size

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        x = torch.relu(self.a(x))
        normed = self.b(x).float()
        normed = normed * torch.rsqrt(normed.square().mean(1, keepdim=True) + 1e-6)
        return {"scores": self.scores(normed.relu().to(x)).sigmoid(), "boxes": self.boxes(x).sigmoid() * self.size}


@pytest.mark.parametrize("size", [1.0, 1e3, 1e5])
def test_an_output_that_is_much_larger_hides_nothing(size):
    model = BesideLargeOutputs(size)
    optimizer = ATO(torch.optim.SGD(model.parameters(), lr=0.1), model, images(), target_flops=1, total_steps=1)
    assert [layer.root for layer in optimizer.plan.groups.layers] == ["a"]


class Checkpointed(nn.Module):
    """Recomputes a part that converts, in the backward."""

    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(6, 16), nn.Linear(16, 3)

    def forward(self, x: Tensor) -> Tensor:
        def part(x: Tensor) -> Tensor:
            return self.a(x).float().square().sqrt()  # whose slope at zero is not finite

        return self.b(torch.utils.checkpoint.checkpoint(part, x, use_reentrant=False))


def test_a_steep_function_shows_in_a_checkpointed_part_too():
    base = torch.optim.SGD((model := Checkpointed()).parameters(), lr=0.1)
    plan = ATO(base, model, torch.randn(4, 6), target_flops=1, total_steps=1).plan
    assert not plan.groups.layers and "finite" in plan.groups.left_out[0].reason
