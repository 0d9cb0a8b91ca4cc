"""What ATO does to the process around it: nothing that stays."""

import copy
import multiprocessing
import os
import pickle
import threading
import warnings
from typing import ClassVar

import pytest
import torch
import torch.nn.functional as F
from networks import SHORT, Flatten, Residual, batches, example
from test_optimizer import make, train
from torch_pruning.dependency import index_mapping, shape_infer

from ato_optim import ATO, threads
from ato_optim.controller import Controller


def switches():
    return (
        torch.Tensor.__deepcopy__,
        index_mapping.update_index_mapping,
        shape_infer.init_shape_information,
        torch.backends.mha.get_fastpath_enabled(),
    )


def test_optimizers_that_are_built_in_threads_are_alike_and_leave_all_as_it_was():
    before, heads, errors = switches(), [], []

    def build():
        try:
            for _ in range(4):
                model = Flatten()
                base = torch.optim.SGD(model.parameters(), lr=0.05)
                optimizer = ATO(base, model, example(2), target_flops=0.5, total_steps=200, phases=SHORT)
                heads.append(optimizer.search.controller.head.detach().clone())
        except Exception as error:
            errors.append(error)

    threads = [threading.Thread(target=build) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not errors
    assert switches() == before
    assert len(heads) == 16 and all(torch.equal(head, heads[0]) for head in heads)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="the system does not fork")
def test_a_process_that_is_forked_while_another_thread_builds_does_not_wait_for_it():
    with threads._LOCK:
        held = threading.Thread(target=lambda: None)
        held.start()
        held.join()
        context = multiprocessing.get_context("fork")
        child = context.Process(target=threads.one_at_a_time(lambda: None))
        other = threading.Thread(target=child.start)  # which does not hold the lock
        other.start()
        other.join()
        child.join(60)
    waited = child.is_alive()
    child.kill()
    assert not waited and child.exitcode == 0


def test_no_accelerators_random_state_is_touched(monkeypatch):
    """torch.manual_seed is every device's, and fork_rng() puts back only what it knows of."""

    def refuse(seed):
        raise AssertionError("torch.manual_seed was called")

    state = torch.get_rng_state()
    monkeypatch.setattr(torch, "manual_seed", refuse)
    monkeypatch.setattr(torch.random, "manual_seed", refuse)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model = Residual()
        state = torch.get_rng_state()
        base = torch.optim.SGD(model.parameters(), lr=0.1)
        ATO(base, model, example(), target_flops=0.5, total_steps=200, phases=SHORT)
    assert torch.equal(torch.get_rng_state(), state)


def test_a_controllers_weights_depend_on_its_seed_alone():
    layers = torch.tensor([0, 0, 1, 1, 1])
    one, same, other = (Controller(layers, seed).state_dict() for seed in (3, 3, 4))
    torch.randn(5)
    assert all(torch.equal(one[name], same[name]) for name in one)
    assert not torch.equal(one["head"], other["head"]) and not torch.equal(one["gru.weight_hh_l0"], other["head"])
    bound = 128**-0.5
    for name, value in one.items():
        if name.startswith("gru."):
            assert 0.9 * bound < value.abs().max() <= bound  # as torch.nn.GRU draws them


def test_a_smaller_network_that_is_pickled_whole_needs_no_ato_optim():
    model, optimizer = make(Flatten)
    average = torch.optim.swa_utils.AveragedModel(model)  # with the hooks that it has while the controller searches
    train(model, optimizer, 60)
    average.update_parameters(model)
    for small in (optimizer.compress(model=average), optimizer.compress()):
        assert b"ato_optim" not in pickle.dumps(small)
        torch.export.export(small, (example(),), strict=True)


def test_hooks_go_with_the_optimizer():
    model, optimizer = make()
    assert b"ato_optim" in pickle.dumps(model)
    del optimizer
    assert b"ato_optim" not in pickle.dumps(model)


class Positions(Flatten):
    """Makes a tensor in its forward without naming a device."""

    seen: ClassVar[set[str]] = set()

    def forward(self, x):
        self.seen.add(torch.arange(2).device.type)
        return super().forward(x)


def test_torchs_default_device_is_the_forwards_business_alone():
    """In notebooks it is an accelerator, often; here one that holds no data, so that what is made there is an error."""
    data, inputs, ends = list(batches(40)), example(), []
    for default in ("cpu", "meta"):
        torch.manual_seed(0)
        Positions.seen.clear()
        model = Positions()
        base = torch.optim.SGD(model.parameters(), lr=0.05)
        with torch.device(default):
            optimizer = ATO(base, model, inputs, target_flops=0.5, total_steps=40, phases=SHORT, projection="proximal")
            for k, (x, y) in enumerate(data):
                torch.manual_seed(k)  # dropout
                optimizer.zero_grad()
                F.cross_entropy(model(x), y).backward()
                optimizer.step()
            ends.append(optimizer.compress().state_dict())
        assert Positions.seen == {default}
    assert all(torch.equal(value, ends[1][name]) for name, value in ends[0].items())


def test_gradients_of_parameters_that_are_replaced_are_let_go():
    model, optimizer = make()
    train(model, optimizer, 60)
    old = list(model.parameters())
    optimizer.compress()
    new = set(model.parameters())
    assert any(p not in new for p in old)
    assert all(p.grad is None for p in old if p not in new) and all(p.grad is not None for p in new)


def test_replicas_of_data_parallel_are_refused():
    model, _optimizer = make()
    replica = model._replicate_for_data_parallel()
    with pytest.raises(RuntimeError, match=r"torch\.nn\.DataParallel.*DistributedDataParallel"):
        replica(example())
    with torch.no_grad():
        replica(example())
    copy.deepcopy(model)._replicate_for_data_parallel()(example())  # an average of the model, say
    model.eval()._replicate_for_data_parallel()(example())
