"""What could blind the trial does not: fills, outputs of integers, training alone, masks of zeros, sparse inputs."""

import math
import random

import numpy as np
import pytest
import torch
import torchvision
from networks import SHORT
from torch import Tensor, nn
from torch.nn import functional as F
from torchvision.ops import FrozenBatchNorm2d

from ato_optim import ATO
from ato_optim.proof import difference


def pruned(model: nn.Module, inputs, **options) -> dict[str, str]:
    """What became of each layer: pruned, or the reason why not."""
    options = {"target_flops": 1, "total_steps": 1, "phases": SHORT} | options
    report = ATO(torch.optim.SGD(model.parameters(), lr=0.1), model, inputs, **options).report()
    found = {layer: reason for layers, reason in report.left_out for layer in layers}
    return found | {layer: "pruned" for width in report.widths for layer in width.layers}


class Normed(nn.Module):
    """`b` is not exact: a norm over its channels follows. `a` is."""

    def __init__(self, inputs: int = 6):
        super().__init__()
        self.a, self.b, self.c = nn.Linear(inputs, 24), nn.Linear(24, 16), nn.Linear(16, 5)

    def hidden(self, x: Tensor) -> Tensor:
        h = F.relu(self.b(F.relu(self.a(x))))
        return F.layer_norm(h, h.shape[-1:])

    def forward(self, x: Tensor) -> Tensor:
        return self.c(self.hidden(x))


class Filled(Normed):
    def __init__(self, fill: float):
        super().__init__()
        self.fill = fill

    def forward(self, x: Tensor, valid: Tensor) -> Tensor:
        return super().forward(x).masked_fill(~valid, self.fill)


@pytest.mark.parametrize("fill", [-1e4, -1e9, torch.finfo(torch.float32).min, -math.inf])
def test_a_fill_value_hides_nothing_and_refuses_nothing(fill):
    valid = torch.tensor([True, True, False, True, True]).expand(4, 5)
    found = pruned(Filled(fill), (torch.randn(4, 6), valid))
    assert found["a"] == "pruned" and "would change the output by" in found["b"]


class Classes(Normed):
    def forward(self, x: Tensor) -> Tensor:
        y = super().forward(x)
        return y if self.training else y.argmax(1)


class Auxiliary(Normed):
    """The norm is in front of a head of training alone."""

    def __init__(self):
        super().__init__()
        self.drop, self.d, self.e = nn.Dropout(), nn.Linear(16, 16), nn.Linear(16, 5)

    def forward(self, x: Tensor):
        h = F.relu(self.b(self.drop(F.relu(self.a(x)))))
        y = self.e(F.relu(self.d(h)))
        return (y, self.c(F.layer_norm(h, h.shape[-1:]))) if self.training else y


@pytest.mark.parametrize("model", [Classes, Auxiliary])
def test_what_only_training_shows_is_compared_in_training_mode(model):
    found = pruned(model(), torch.randn(4, 6))
    assert found["a"] == "pruned"
    assert "would change the output by" in found["b"] and "in training mode" in found["b"]
    assert found.get("d", "pruned") == "pruned"


class Noisy(Auxiliary):
    """Exact, and no two forwards in training mode are alike."""

    def forward(self, x: Tensor):
        h = F.dropout(F.relu(self.b(F.relu(self.a(x)))), training=self.training)
        return self.e(F.relu(self.d(h)))


def test_a_training_forward_that_is_random_refuses_nothing():
    found = pruned(Noisy(), torch.randn(4, 6))
    assert [found[layer] for layer in "abd"] == ["pruned"] * 3


class Skips(Noisy):
    """Skips a block by the number that `draw` gives."""

    def __init__(self, draw):
        super().__init__()
        self.draw, self.skipped = draw, nn.Linear(24, 24)

    def forward(self, x: Tensor):
        h = F.relu(self.a(x))
        h = h if self.training and self.draw() < 0.5 else h + F.relu(self.skipped(h))
        return self.e(F.relu(self.d(F.relu(self.b(h)))))


@pytest.mark.parametrize("draw", [lambda: random.random(), lambda: float(np.random.rand())])
def test_a_skipped_block_of_other_generators_refuses_nothing(draw):
    """Both sides of a comparison draw the same, whatever that is."""
    for seed in range(6):
        random.seed(seed), np.random.seed(seed)
        found = pruned(Skips(draw), torch.randn(4, 6))
        assert [found[layer] for layer in "abd"] == ["pruned"] * 3


class NoisyChannels(Noisy):
    """Adds as many numbers of `draw` as there are channels, so that a cut network draws others."""

    def __init__(self, draw):
        super().__init__()
        self.draw = draw

    def forward(self, x: Tensor):
        h = F.relu(self.a(x))
        h = h * torch.tensor([self.draw() for _ in range(h.shape[1])]).to(h) if self.training else h
        return self.e(F.relu(self.d(F.relu(self.b(h)))))


@pytest.mark.parametrize("draw", [lambda: random.random(), lambda: float(np.random.rand())])
def test_noise_of_other_generators_refuses_nothing(draw):
    found = pruned(NoisyChannels(draw), torch.randn(4, 6))
    assert [found[layer] for layer in "abd"] == ["pruned"] * 3


def test_what_is_random_once_channels_are_gone_refuses_nothing():
    """The least of a map's values is drawn at random if it is negative: that of the whole network need not be."""
    for seed in range(6):
        torch.manual_seed(seed)
        slopes = nn.Sequential(nn.Conv2d(12, 10, 1), nn.RReLU(), nn.AdaptiveMaxPool2d(1), nn.Flatten())
        model = nn.Sequential(
            nn.Conv2d(3, 12, 3), nn.PReLU(12), nn.Conv2d(12, 12, 3), nn.PReLU(), slopes, nn.Linear(10, 3)
        )
        found = pruned(model, torch.randn(2, 3, 9, 11))
        assert [found[layer] for layer in ("0", "2", "4.0")] == ["pruned"] * 3


class Pooled(Normed):
    def __init__(self):
        super().__init__(12)
        self.e = nn.Embedding(20, 12)

    def forward(self, ids: Tensor, mask: Tensor) -> Tensor:
        weights = mask[..., None].float()
        return self.c((self.hidden(self.e(ids)) * weights).sum(1) / weights.sum(1).clamp(min=1))


def test_example_inputs_that_show_nothing_of_the_network_are_told_so():
    ids = torch.zeros(1, 7, dtype=torch.long)
    found = pruned(Pooled(), (ids, torch.ones_like(ids)))
    assert found["a"] == "pruned" and "would change the output by" in found["b"]
    with pytest.raises(ValueError, match="a, b changes no output on example_inputs: pass others"):
        pruned(Pooled(), (ids, torch.zeros_like(ids)), target_flops=0.6, total_steps=1000)


class Attends(nn.Module):
    """Attention whose scale is that of its heads as they are: not exact, but among equal tokens."""

    def __init__(self):
        super().__init__()
        self.e, self.q, self.k, self.v = nn.Embedding(9, 32), *(nn.Linear(32, 32) for _ in range(3))
        self.a, self.c = nn.Linear(32, 24), nn.Linear(24, 5)

    def forward(self, ids: Tensor, mask: Tensor) -> Tensor:
        x = self.e(ids)
        q, k, v = (f(x).unflatten(-1, (4, -1)).transpose(1, 2) for f in (self.q, self.k, self.v))
        h = F.scaled_dot_product_attention(q, k, v, mask[:, None, None].bool()).transpose(1, 2).flatten(2)
        return self.c(F.relu(self.a(h))).mean(1)


@pytest.mark.parametrize("value", [0, 1, 8])
@pytest.mark.parametrize("dtype", [torch.int64, torch.int32, torch.uint8])
def test_equal_tokens_hide_nothing(value, dtype):
    ids = torch.full((1, 7), value, dtype=torch.long)
    found = pruned(Attends(), {"mask": torch.ones(1, 7, dtype=dtype), "ids": ids})
    assert found["a"] == "pruned" and all("would change the output by" in found[layer] for layer in "qk")


class FadedIn(Normed):
    def __init__(self):
        super().__init__()
        self.d = nn.Linear(24, 5)
        self.register_buffer("alpha", torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        return (1 - self.alpha) * self.d(F.relu(self.a(x))) + self.alpha * super().forward(x)


def test_a_branch_that_is_faded_in_by_a_buffer_is_seen():
    found = pruned(FadedIn(), torch.randn(4, 6))
    assert found["a"] == "pruned" and "would change the output by" in found["b"]


class Switched(Normed):
    """A branch of `b` that a plain number switches on, as growing and warm-ups do, beside one that is on."""

    def __init__(self, factor: float = 0.0):
        super().__init__()
        self.d, self.factor = nn.Linear(24, 5), factor

    def forward(self, x: Tensor) -> Tensor:
        h = F.relu(self.a(x))
        return self.d(h) + self.factor * self.c(torch.sigmoid(self.b(h)))


class WithoutBackward(Switched):
    def forward(self, x: Tensor) -> Tensor:
        with torch.set_grad_enabled(self.training):
            return super().forward(x)


@pytest.mark.parametrize("model", [Switched, WithoutBackward])
def test_a_branch_without_any_effect_proves_nothing(model):
    found = pruned(model(), torch.randn(4, 6))
    assert found["a"] == "pruned" and "changes no output on example_inputs" in found["b"]
    assert "would change the output by" in pruned(model(1.0), torch.randn(4, 6))["b"]


class Statistics(nn.Module):
    """Means and deviations over a sequence, which are zero where a channel is."""

    def __init__(self, deviation):
        super().__init__()
        self.a, self.b, self.c, self.deviation = nn.Conv1d(6, 24, 3), nn.Conv1d(24, 16, 3), nn.Linear(32, 5), deviation

    def forward(self, x: Tensor) -> Tensor:
        h = self.b(F.relu(self.a(x)))
        return self.c(torch.cat([h.mean(2), self.deviation(h - h.mean(2, keepdim=True))], 1))


@pytest.mark.parametrize(
    ("deviation", "steep"),
    [(lambda h: h.square().sum(2).sqrt(), True), (lambda h: torch.linalg.vector_norm(h, dim=2), False)],
    ids=["root", "norm"],
)
def test_slopes_that_are_not_finite_at_zero_leave_a_layer_alone(deviation, steep):
    torch.manual_seed(0)
    model = Statistics(deviation)
    base = torch.optim.SGD(model.parameters(), lr=0.01)
    optimizer = ATO(base, model, torch.randn(1, 6, 20), target_flops=0.6, total_steps=20, phases=SHORT)
    reasons = {layer: reason for layers, reason in optimizer.report().left_out for layer in layers}
    assert set(reasons) == ({"b", "c"} if steep else {"c"})
    assert not steep or "not finite once channels of it are zero" in reasons["b"]
    for _ in range(20):
        optimizer.zero_grad()
        model(torch.randn(8, 6, 20)).square().mean().backward()
        optimizer.step()
    assert all(p.isfinite().all() for p in optimizer.compress().parameters())


class Logarithm(Normed):
    def forward(self, x: Tensor) -> Tensor:
        return self.c(F.relu(self.b(F.relu(self.a(torch.log(x + 1e-6))))))


class Checked(Logarithm):
    def forward(self, x: Tensor) -> Tensor:
        if (x < 0).any():
            raise ValueError("negative")
        return super().forward(x)


class CheckedInTraining(Normed):
    def forward(self, x: Tensor) -> Tensor:
        if self.training and (x < 0).any():
            raise ValueError("negative")
        return self.c(F.relu(self.b(F.relu(self.a(x)))))


@pytest.mark.parametrize("model", [Logarithm, Checked, CheckedInTraining])
def test_constant_inputs_of_a_model_that_takes_positive_ones_alone(model):
    found = pruned(model(), torch.ones(4, 6))
    assert found["a"] == found["b"] == "pruned"


class Graph(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(5, 16), nn.Linear(16, 3)

    def forward(self, x: Tensor, adjacency: Tensor) -> Tensor:
        return self.b(F.relu(torch.sparse.mm(adjacency, self.a(x))))


@pytest.mark.filterwarnings("ignore:Sparse CSR")
@pytest.mark.parametrize("layout", ["to_sparse", "to_sparse_csr"])
def test_sparse_inputs(layout):
    adjacency = getattr((torch.rand(10, 10) < 0.3).float(), layout)()
    assert pruned(Graph(), (torch.randn(10, 5), adjacency))["a"] == "pruned"


class Sparse(Normed):
    """Routes samples to a layer, as a sparse mixture of experts does."""

    def forward(self, x: Tensor) -> Tensor:
        h = F.relu(self.a(x))
        chosen = (x[:, 0] > 0).nonzero().flatten()
        return self.c(F.relu(h[:, :16].index_add(0, chosen, self.b(h[chosen]))))


def test_work_that_depends_on_data_is_told():
    x = torch.linspace(-1, 1, 30).view(30, 1).expand(30, 6).contiguous()
    with pytest.warns(UserWarning, match="gives its layer 'b' more to do for some inputs.*budget") as caught:
        pruned(Sparse(), x)
    assert caught[0].filename == __file__


class Differentiates(Normed):
    def forward(self, x: Tensor) -> Tensor:
        with torch.enable_grad():
            x = x.detach().requires_grad_()
            (slope,) = torch.autograd.grad(super().forward(x).sum(), x, create_graph=True)
        return slope


def test_a_forward_that_differentiates_is_referred_to_forward_fn():
    with pytest.raises(ValueError, match="forward_fn that runs it, its layers alone if it differentiates"):
        pruned(Differentiates(), torch.randn(4, 6))
    found = pruned(Differentiates(), torch.randn(4, 6), forward_fn=lambda model, x: Normed.forward(model, x))
    assert found["a"] == "pruned"


def test_difference_is_relative_to_what_has_changed():
    inf = math.inf
    before, zeroed = torch.tensor([-1e9, inf, 4.0, 7.0]), torch.tensor([-1e9, inf, 2.0, 7.0])
    assert difference(zeroed, zeroed, before) == 0
    assert difference(zeroed, torch.tensor([-1e9, inf, 2.5, 7.0]), before) == 0.25
    assert difference(zeroed, torch.tensor([-1e9, inf, 2.5, 7.0])) == pytest.approx(0.5e-9)
    assert difference(zeroed, torch.tensor([-1e9, 0.0, 2.0, 7.0]), before) == inf
    assert difference(zeroed, zeroed[:3], before) == difference(zeroed, zeroed * math.nan, before) == inf


def test_norms_of_buffers_are_not_put_to_sleep():
    model = torchvision.models.resnet18(norm_layer=FrozenBatchNorm2d)
    assert "the forward fails without it" in pruned(model, torch.randn(1, 3, 64, 64))["conv1"]


def test_norms_of_buffers_are_pruned_when_converted_as_the_docs_say():
    torch.manual_seed(0)
    model, x = torchvision.models.resnet18(norm_layer=FrozenBatchNorm2d).eval(), torch.randn(1, 3, 64, 64)
    frozen = {name: module for name, module in model.named_modules() if isinstance(module, FrozenBatchNorm2d)}
    for norm in frozen.values():
        for buffer in norm.buffers():
            buffer.uniform_(0.5, 1.5)
    with torch.no_grad():
        before = model(x)
        for name, norm in frozen.items():
            trainable = torch.nn.BatchNorm2d(len(norm.weight)).eval()
            trainable.load_state_dict(norm.state_dict(), strict=False)
            model.set_submodule(name, trainable)
        torch.testing.assert_close(model(x), before)
    assert pruned(model, x)["conv1"] == "pruned"
