"""What is counted: MACs that do not depend on the kernel that runs them, and a budget that holds with all of them."""

from functools import partial

import pytest
import torch
import torch.nn.functional as F
from networks import randomised
from torch import Tensor, nn

from ato_optim import ATO
from ato_optim.budget import least_mask
from ato_optim.compress import apply_cut, derive_cut
from ato_optim.cost import count_macs
from ato_optim.proof import Trial, difference, zero_producers

WIDTH, HEAD, LENGTH = 16, 4, 20


def fused(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return F.scaled_dot_product_attention(q, k, v)


def by_hand(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return (q @ k.transpose(-1, -2) / HEAD**0.5).softmax(-1) @ v


def by_einsum(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    weights = torch.einsum("bhqd,bhkd->bhqk", q / HEAD**0.5, k).softmax(-1)
    return torch.einsum("bhqk,bhkd->bhqd", weights, v)


class Attention(nn.Module):
    """A block whose heads have a fixed width, so that their number may change."""

    def __init__(self, attend):
        super().__init__()
        self.embed, self.attend = nn.Linear(3, WIDTH), attend
        self.q, self.k, self.v = (nn.Linear(WIDTH, 6 * HEAD) for _ in range(3))
        self.out, self.hidden, self.fc = nn.Linear(6 * HEAD, WIDTH), nn.Linear(WIDTH, 32), nn.Linear(32, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x)
        heads = (layer(x).unflatten(-1, (-1, HEAD)).transpose(1, 2) for layer in (self.q, self.k, self.v))
        x = x + self.out(self.attend(*heads).transpose(1, 2).flatten(2))
        return self.fc(self.hidden(x).relu().mean(1))


def tokens() -> Tensor:
    return torch.randn(2, LENGTH, 3, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("attend", [fused, by_hand, by_einsum])
def test_heads_are_pruned_at_what_they_cost(attend):
    model = randomised(Attention(attend))
    model.train()
    optimizer = ATO(torch.optim.SGD(model.parameters(), lr=0.1), model, tokens(), target_flops=0.5, total_steps=1)
    layers = {layer.root: layer for layer in optimizer.plan.groups.layers}
    assert layers["q"].size == 6 and {"q", "k", "v"} <= layers["q"].layers.keys()
    products = 2 * 2 * LENGTH * LENGTH * HEAD  # two products a head and sample
    projections = 2 * LENGTH * HEAD * 4 * WIDTH
    one_head_less = torch.ones_like(optimizer.mask)
    one_head_less[layers["q"].start] = False
    cost = optimizer.plan.cost
    assert cost.dense - cost(one_head_less).item() == products + projections
    for least in (optimizer.least, torch.full_like(optimizer.least, 1), optimizer.plan.sizes - 1):
        mask = least_mask(optimizer.plan.layer_of_gate, least)
        pruned = randomised(Attention(attend))
        apply_cut(derive_cut(pruned, optimizer.plan.groups, mask), pruned)
        assert count_macs(pruned, tokens()) == cost(mask).item()


class SharedKeys(Attention):
    """Grouped-query attention: two heads of keys serve three heads of queries each."""

    def __init__(self):
        super().__init__(partial(F.scaled_dot_product_attention, enable_gqa=True))
        self.k, self.v = nn.Linear(WIDTH, 2 * HEAD), nn.Linear(WIDTH, 2 * HEAD)


def test_heads_of_queries_go_with_the_keys_that_they_share():
    model = randomised(SharedKeys()).train()
    optimizer = ATO(torch.optim.SGD(model.parameters(), lr=0.1), model, tokens(), target_flops=0.8, total_steps=1)
    attention = next(layer for layer in optimizer.plan.groups.layers if "q" in layer.layers)
    assert attention.size == 2 and attention.layers == {"q": 3 * HEAD, "k": HEAD, "v": HEAD}
    mask = torch.ones_like(optimizer.mask)
    mask[attention.start] = False
    restore = zero_producers(model.eval(), optimizer.plan.groups, mask)
    expected = model(tokens())
    restore()
    apply_cut(derive_cut(model, optimizer.plan.groups, mask), model)
    assert model.q.out_features == 3 * HEAD and model.k.out_features == HEAD
    assert difference(expected, model(tokens())) < 1e-6
    assert count_macs(model, tokens()) == optimizer.plan.cost(mask).item()


class Blocks(nn.Sequential):
    """Attentions on a residual stream."""

    def forward(self, x: Tensor) -> Tensor:
        for block in self:
            h = F.layer_norm(x, x.shape[-1:])
            q, k, v = (layer(h).unflatten(-1, (-1, HEAD)).transpose(1, 2) for layer in (block.q, block.k, block.v))
            x = x + block.out(fused(q, k, v).transpose(1, 2).flatten(2))
        return x


def test_trials_do_not_grow_in_number_with_the_attentions(monkeypatch):
    met = []
    objection = Trial.objection
    monkeypatch.setattr(Trial, "objection", lambda *arguments: met.append(1) or objection(*arguments))

    def trials(depth: int) -> int:
        met.clear()
        model = Blocks(*(Attention(fused) for _ in range(depth)))
        for block in model:
            del block.embed, block.hidden, block.fc
        base = torch.optim.SGD(model.parameters(), lr=0.1)
        plan = ATO(base, model, torch.randn(2, LENGTH, WIDTH), target_flops=1, total_steps=1).plan
        assert len(plan.groups.layers) == depth
        return len(met)

    assert trials(2) == trials(6)


def test_a_fused_attention_costs_what_one_by_hand_does():
    macs = [count_macs(Attention(attend), tokens()) for attend in (fused, by_hand, by_einsum)]
    assert len(set(macs)) == 1
    layer = nn.TransformerEncoderLayer(WIDTH, 2, 32, batch_first=True, dropout=0.0)
    x = torch.randn(2, LENGTH, WIDTH)
    linear = 2 * LENGTH * (4 * WIDTH * WIDTH + 2 * WIDTH * 32)
    assert count_macs(layer, x) == linear + 2 * 2 * LENGTH * LENGTH * WIDTH


def test_queries_that_share_keys_cost_what_they_do_apart():
    class Shared(nn.Module):
        def forward(self, q, k, v):
            return F.scaled_dot_product_attention(q, k, v, enable_gqa=True)

    q, k, v = torch.randn(2, 6, 9, 4), torch.randn(2, 2, 7, 4), torch.randn(2, 2, 7, 5)
    assert count_macs(Shared(), (q, k, v)) == 2 * 6 * 9 * 7 * (4 + 5)


@pytest.mark.skipif(not hasattr(F, "grouped_mm"), reason="not in the oldest torch")
def test_grouped_products_cost_what_they_do_apart():
    class Grouped(nn.Module):
        def forward(self, a, b, offs=None):
            return F.grouped_mm(a, b, offs=offs)

    ends = torch.tensor([16, 24, 48], dtype=torch.int32)
    tokens, batch = torch.randn(48, 64), torch.randn(3, 24, 64)
    experts = torch.randn(3, 64, 32)
    assert count_macs(Grouped(), (tokens, experts, ends)) == 48 * 64 * 32
    assert count_macs(Grouped(), (batch, experts)) == 3 * 24 * 64 * 32


@pytest.mark.parametrize("bidirectional", [False, True])
def test_a_fused_lstm_costs_what_its_products_do(bidirectional):
    lstm = nn.LSTM(6, 10, num_layers=2, bidirectional=bidirectional, batch_first=True)
    x = torch.randn(3, 7, 6)
    matrices = sum(p.numel() for p in lstm.parameters() if p.ndim == 2)
    assert count_macs(lstm, x) == 3 * 7 * matrices
    assert count_macs(lstm.double(), x.double()) == 3 * 7 * matrices  # in which no fused kernel runs


class Recurrent(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed, self.lstm = nn.Linear(3, 12), nn.LSTM(12, 10, batch_first=True)
        self.hidden, self.fc = nn.Linear(10, 8), nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.hidden(self.lstm(self.embed(x))[0].mean(1)).relu())


def test_an_lstm_counts_in_the_budget_and_is_named_among_what_is_left_alone():
    model = Recurrent()
    base = torch.optim.SGD(model.parameters(), lr=0.1)
    report = ATO(base, model, tokens(), target_flops=1, total_steps=1).report()
    assert report.prunable_flops < 0.2
    assert (("lstm",), "is a LSTM: convolutions and linear layers of torch.nn are what is pruned") in report.left_out


class Latent(nn.Module):
    """Samples in its forward."""

    def __init__(self):
        super().__init__()
        self.encode, self.mean, self.scale = nn.Linear(3, 12), nn.Linear(12, 4), nn.Linear(12, 4)
        self.decode, self.out = nn.Linear(4, 10), nn.Linear(10, 3)

    def forward(self, x: Tensor) -> Tensor:
        h = self.encode(x).relu()
        return self.out(self.decode(self.mean(h) + self.scale(h) * torch.randn_like(self.mean(h))).relu())


def test_a_model_that_samples_is_compared_with_the_same_sample():
    model = Latent()
    optimizer = ATO(torch.optim.SGD(model.parameters(), lr=0.1), model, tokens(), target_flops=1, total_steps=1)
    assert {layer.root for layer in optimizer.plan.groups.layers} >= {"encode", "decode"}
    assert difference(model(tokens()), model(tokens())) > 0


def test_a_model_without_macs_is_reported_and_not_pruned():
    def embedding():
        return nn.Sequential(nn.Embedding(7, 4), nn.LayerNorm(4))

    words, model = torch.arange(6)[None], embedding()
    base = torch.optim.SGD(model.parameters(), lr=0.1)
    assert ATO(base, model, words, target_flops=1, total_steps=1).report().prunable_flops == 0
    model = embedding()
    with pytest.raises(ValueError, match="nothing to prune"):
        ATO(torch.optim.SGD(model.parameters(), lr=0.1), model, words, target_flops=0.5, total_steps=10)
