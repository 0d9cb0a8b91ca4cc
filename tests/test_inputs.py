"""Example inputs, in whatever form a model takes them, hide nothing, and construction leaves them as they are."""

import gc
import random
import threading
from collections import UserDict
from dataclasses import dataclass
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from networks import SHORT, Residual, batches, example
from test_blind import Attends, Auxiliary, pruned
from torch import Tensor, nn
from torch.nn import functional as F

from ato_optim import ATO
from ato_optim.nests import fresh, tensors_in


@dataclass
class Tokens:
    ids: Tensor
    mask: Tensor


class Slotted:
    __slots__ = ("inner",)

    def __init__(self, **tensors: Tensor):
        self.inner = SimpleNamespace(**tensors)


class OfObjects(nn.Module):
    """`model` for what has its keywords as attributes."""

    def __init__(self, model: nn.Module):
        super().__init__()
        self.model = model

    def forward(self, batch):
        return self.model(**vars(getattr(batch, "inner", batch)))


def reasons(found: dict[str, str]) -> dict[str, str]:
    return {layer.removeprefix("model."): reason for layer, reason in found.items()}


@pytest.mark.parametrize("form", [UserDict, lambda tokens: Tokens(**tokens), lambda tokens: Slotted(**tokens)])
def test_equal_tokens_hide_nothing_in_objects(form):
    tokens = {"ids": torch.ones(1, 7, dtype=torch.long), "mask": torch.ones(1, 7, dtype=torch.long)}
    inputs = form(tokens)
    model = Attends()
    found = reasons(pruned(model if isinstance(inputs, UserDict) else OfObjects(model), inputs))
    assert found["a"] == "pruned" and found == pruned(model, tokens)


@pytest.mark.parametrize("form", [UserDict, lambda x: SimpleNamespace(**x)])
def test_objects_are_tried_in_float64(form):
    """In float32 what only training shows would not be compared."""
    inputs = {"x": torch.randn(4, 6, generator=torch.Generator().manual_seed(0))}
    model, batch = Auxiliary(), form(inputs)
    found = reasons(pruned(model if isinstance(batch, UserDict) else OfObjects(model), batch))
    assert "in training mode" in found["b"] and found == pruned(model, inputs)


class Writing(Residual):
    """Normalises in place."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.sub_(0.3).div_(0.5))


class Filling(Residual):
    """Puts what it finds into the batch, which it returns."""

    def forward(self, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        batch["logits"] = super().forward(batch["x"])
        return batch


class Emptying(Residual):
    def forward(self, batch: dict[str, Tensor]) -> Tensor:
        return super().forward(batch.pop("x"))


@pytest.mark.parametrize("kind", [Writing, Filling, Emptying])
def test_a_forward_that_changes_its_inputs(kind):
    x = example()
    before = x.clone()
    batch = {"x": x}
    inputs = x if kind is Writing else (batch,)
    assert pruned(kind(), inputs) == pruned(Residual(), example())
    assert batch == {"x": x} and torch.equal(x, before)


def test_a_copy_of_a_nest_shares_nothing_and_keeps_what_is_shared_in_it():
    x = torch.randn(3, requires_grad=True)
    nest = {"pair": [x, x], "object": SimpleNamespace(x=x, name="x"), "view": (2 * x,), "tokens": UserDict(x=x)}
    copies = list(tensors_in(fresh(nest)))
    assert len({id(copied) for copied in copies}) == 2 == len({id(tensor) for tensor in tensors_in(nest)})
    for copied, tensor in zip(copies, tensors_in(nest), strict=True):
        assert copied.is_leaf and copied.requires_grad and copied.data_ptr() != tensor.data_ptr()
        assert torch.equal(copied, tensor)
    lock = threading.Lock()  # refuses to be copied
    assert fresh((x, lock))[0] is not x and fresh((x, lock))[1] is lock


class Draws(Residual):
    """Draws from the generators that are not torch's."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x * (1 + random.random() + float(np.random.rand())))


def test_construction_leaves_all_random_states_alone():
    random.seed(0), np.random.seed(0)
    expected = random.random(), float(np.random.rand())
    random.seed(0), np.random.seed(0)
    model = Draws()
    optimizer = ATO(torch.optim.SGD(model.parameters(), lr=0.1), model, example(), target_flops=1, total_steps=1)
    assert (random.random(), float(np.random.rand())) == expected
    assert optimizer.report().widths  # what is drawn is the same on both sides of a comparison


class Void(Residual):
    """Leaves its result in the batch, and returns nothing."""

    def forward(self, batch: dict[str, Tensor]) -> None:
        batch["logits"] = super().forward(batch["x"])


def result(model: nn.Module, inputs: tuple[dict[str, Tensor]]) -> Tensor:
    model(inputs[0])
    return inputs[0]["logits"]


def test_a_model_that_returns_nothing_is_told_in_the_first_turn():
    """Its backward could not be masked, and would give gradients of no network at all."""
    model = Void()
    base = torch.optim.SGD(model.parameters(), lr=0.1)
    inputs = ({"x": example()},)
    optimizer = ATO(base, model, inputs, target_flops=0.5, total_steps=40, phases=SHORT, interval=1, forward_fn=result)
    for x, y in batches(4):  # until the search begins
        F.cross_entropy(result(model, ({"x": x},)), y).backward()
        optimizer.step()
    before = {name: p.clone() for name, p in model.named_parameters()}
    with pytest.raises(TypeError, match="returned a NoneType in which ATO finds no tensor"):
        model({"x": x})
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())


def test_an_error_in_a_forward_is_not_taken_for_no_output():
    model = Residual()
    base = torch.optim.SGD(model.parameters(), lr=0.1)
    optimizer = ATO(base, model, example(), target_flops=0.5, total_steps=40, phases=(0, 0.48, 0.5), interval=1)
    with pytest.raises(RuntimeError, match="channels"):
        model(torch.randn(2, 4, 8, 8))
    assert not optimizer.history


class Gram(nn.Module):
    """A layer, `b`, without some of whose channels the forward raises."""

    def __init__(self):
        super().__init__()
        self.a, self.b, self.c = nn.Conv2d(3, 12, 3), nn.Conv2d(12, 6, 1), nn.Linear(36, 5)

    def forward(self, x: Tensor) -> Tensor:
        h = torch.relu(self.b(torch.relu(self.a(x)))).flatten(2)
        return self.c(torch.relu(h @ h.transpose(1, 2)).flatten(1))


def test_an_optimizer_that_is_dropped_goes_at_once_whatever_the_trial_met():
    """And its hooks with it, and the trial's copies."""
    model = Gram()
    gc.collect()
    gc.disable()
    try:
        optimizer = ATO(
            torch.optim.SGD(model.parameters(), lr=0.1), model, example(), target_flops=0.8, total_steps=1000
        )
        assert any("the forward fails without it" in reason for _, reason in optimizer.report().left_out)
        assert len(model._forward_pre_hooks) == 1
        del optimizer
        assert not model._forward_pre_hooks
    finally:
        gc.enable()
