"""What a run says on its way when the controller can learn nothing."""

import copy
import warnings

import pytest
import torch
from networks import SHORT, Residual, batches, example
from test_optimizer import make, train
from torch.nn.functional import cross_entropy

from ato_optim import ATO


def test_a_run_without_controller_turns_warns():
    model, optimizer = make()
    model.eval()
    with pytest.warns(UserWarning, match="no training forward"):
        train(model, optimizer, 40)
    with pytest.warns(UserWarning, match="removes channels that are a guess") as said:
        optimizer.compress(inplace=False)
    assert said[0].filename == __file__


def run(epochs: int, forget: bool) -> tuple[int, int]:
    """Turns of a run of 200 steps whose loop evaluates after each epoch, and warnings of it."""
    torch.manual_seed(0)
    model = Residual()
    base = torch.optim.SGD(model.parameters(), lr=0.05)
    optimizer = ATO(base, model, example(), target_flops=0.5, total_steps=200, phases=SHORT)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for k, (x, y) in enumerate(batches(200)):
            if k % (200 // epochs) == 0:
                model.eval()
                model(x)
                model.train(not forget or k == 0)
            optimizer.zero_grad()
            cross_entropy(model(x), y).backward()
            optimizer.step()
    said = [warning for warning in caught if "no training forward" in str(warning.message)]
    assert all("after each evaluation" in str(warning.message) for warning in said)
    return len(optimizer.history) - 1, len(said)


@pytest.mark.parametrize("epochs", [4, 5, 8, 10])
def test_a_loop_that_stays_in_eval_mode_after_an_evaluation_is_told_so(epochs):
    assert run(epochs, forget=False) == (20, 0)
    turns, said = run(epochs, forget=True)
    assert turns < 20 and said == 1


class Careful(torch.optim.SGD):
    """Drops gradients that are not finite, so that the weights survive."""

    def step(self, closure=None):
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is not None and not p.grad.isfinite().all():
                    p.grad = None
        return super().step(closure)


def test_a_turn_whose_gradients_are_not_finite_teaches_nothing_and_says_so():
    torch.manual_seed(0)
    model = Residual()
    optimizer = ATO(
        Careful(model.parameters(), lr=0.05), model, example(), target_flops=0.5, total_steps=200, phases=SHORT
    )
    for x, y in batches(200):
        optimizer.zero_grad()
        loss = cross_entropy(model(x), y)
        if optimizer.turn_begun and len(optimizer.history) == 5:
            (loss * float("nan")).backward()
            before = copy.deepcopy(optimizer.search.state_dict())
            with pytest.warns(UserWarning, match="gradients at step .* are not finite"):
                optimizer.step()
            after = optimizer.search.state_dict()
            assert all(
                torch.equal(before["controller"][name], after["controller"][name]) for name in after["controller"]
            )
        else:
            loss.backward()
            optimizer.step()
    assert len(optimizer.history) == 21
    assert all(torch.isfinite(p).all() for p in optimizer.search.controller.parameters())
    optimizer.compress()


def first_turn(model, optimizer, backward):
    """Train until `backward` of a loss has left the gradients of a turn."""
    for x, y in batches(100):
        optimizer.zero_grad()
        loss = cross_entropy(model(x), y)
        if optimizer.turn_begun:
            return backward(loss)
        loss.backward()
        optimizer.step()
    raise AssertionError("no turn came")


def test_a_turn_without_gradients_teaches_nothing_and_says_so():
    """They are elsewhere by then: taken over in the backward, say, or zeroed before the step."""
    model, optimizer = make(total_steps=200)
    before = copy.deepcopy(optimizer.search.state_dict())
    first_turn(model, optimizer, lambda loss: (loss.backward(), optimizer.zero_grad()))
    with pytest.warns(UserWarning, match="no layer that is pruned has a gradient at step") as said:
        optimizer.step()
    assert said[0].filename == __file__
    after = optimizer.search.state_dict()
    assert all(torch.equal(value, after["controller"][name]) for name, value in before["controller"].items())


def test_a_gradient_whose_square_overflows_teaches_nothing():
    """An infinite second moment would keep the controller's weights where they are for the rest of the run."""
    model, optimizer = make(base="sgd", total_steps=200)
    first_turn(model, optimizer, lambda loss: (loss * 1e25).backward())
    with pytest.warns(UserWarning, match="gradients at step .* are not finite"):
        optimizer.step()
    assert not optimizer.search.optimizer.state


def test_warnings_point_at_the_loop_through_a_scheduler():
    """Which wraps step(), in a file of torch."""
    model, optimizer = make()
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 5)
    model.eval()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for x, y in batches(40):
            cross_entropy(model(x), y).backward()
            optimizer.step()
            scheduler.step()
    said = [warning for warning in caught if "no training forward" in str(warning.message)]
    assert [warning.filename for warning in said] == [__file__]


def test_layers_that_are_frozen_on_the_way_are_named():
    model, optimizer = make(total_steps=200)
    model.one.requires_grad_(False)
    with pytest.warns(UserWarning, match=r"one\.0\.weight, .*no longer require gradients.*before ATO is built"):
        train(model, optimizer, 40)


def test_weights_that_have_diverged_are_said_to_have():
    model, optimizer = make()
    train(model, optimizer, 60)
    with torch.no_grad():
        for p in model.parameters():
            p.fill_(float("nan"))
    with pytest.raises(ValueError, match="not finite: it has diverged"):
        optimizer.compress()
