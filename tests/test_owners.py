"""Several optimizers around one network, one after the other or beside each other: none undoes what is another's."""

import copy
import gc

import pytest
import torch
from networks import SHORT, Residual, example
from test_optimizer import make, train

from ato_optim import ATO


def again(first: ATO) -> ATO:
    """A second ATO around the network that `first` has cut."""
    base = torch.optim.SGD(first.model.parameters(), lr=0.05)
    return ATO(base, first.model, example(), target_flops=0.7, total_steps=60, phases=SHORT)


def compressed(steps: int = 30) -> ATO:
    model, first = make()
    train(model, first, steps)
    first.compress()
    return first


@pytest.mark.parametrize("collected", [True, False])
def test_an_optimizer_that_is_followed_by_another_takes_nothing_with_it(collected):
    """Also where the garbage collector is off, or frozen after all is built."""
    gc.collect()
    gc.disable()
    try:
        optimizer = compressed()
        optimizer = again(optimizer)
        if collected:
            gc.collect()
        assert len(optimizer.model._forward_pre_hooks) == 1
        train(optimizer.model, optimizer, 20)
        assert optimizer.last_turn > 0
    finally:
        gc.enable()


def test_a_second_compress_changes_nothing_of_another_optimizers():
    first = compressed(60)
    second = again(first)
    hooks = dict(first.model._forward_pre_hooks)
    assert first.compress() is first.model and first.model._forward_pre_hooks == hooks
    train(second.model, second, 20)
    assert second.last_turn > 0


def test_a_shallow_copy_takes_its_own_hooks_alone():
    model, optimizer = make()
    hooks = dict(model._forward_pre_hooks)
    other = copy.copy(optimizer)
    assert len(model._forward_pre_hooks) == 2
    del other
    gc.collect()
    assert model._forward_pre_hooks == hooks


def test_a_network_that_has_an_optimizer_of_its_own_is_not_cut_in_place():
    first = compressed()
    model, second = make(Residual)
    parameters = list(model.parameters())
    with pytest.raises(ValueError, match="has an ATO of its own"):
        first.compress(model=model)
    assert all(one is other for one, other in zip(model.parameters(), parameters, strict=True))
    small = first.compress(model=model, inplace=False)
    assert not small._forward_pre_hooks and small.one[0].weight.shape == first.model.one[0].weight.shape
    del second
    assert first.compress(model=model) is model
