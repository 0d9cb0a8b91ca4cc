"""More than one process: real ones, over gloo. All ranks do the same, and what one process would do."""

import pytest
import ranks
import torch
import torch.distributed
import torch.multiprocessing
from networks import batches

pytestmark = pytest.mark.skipif(
    not (torch.distributed.is_available() and torch.distributed.is_gloo_available()), reason="torch without gloo"
)


def launch(world, folder, names):
    # The server imports once what all ranks need; it runs nothing, so that its forks are as good as fresh processes.
    torch.multiprocessing.set_forkserver_preload(["torch_pruning", "torchvision", "torch.distributed.fsdp"])
    arguments = (world, str(folder), names)
    torch.multiprocessing.start_processes(ranks.main, arguments, nprocs=world, start_method="forkserver")
    return {name: [torch.load(folder / f"{name}.{r}.pt", weights_only=True) for r in range(world)] for name in names}


@pytest.fixture(scope="module")
def two(tmp_path_factory):
    return launch(
        2,
        tmp_path_factory.mktemp("two"),
        ["wrapper", "compiled", "compiled shards", "cut", "timed", "halfspace", "half", "otherwise"],
    )


@pytest.fixture(scope="module")
def four(tmp_path_factory):
    return launch(4, tmp_path_factory.mktemp("four"), ["bare"])


def assert_all_ranks_agree(results):
    first, *others = [result["sums"] for result in results]
    assert len(first) == len(set(first)) == ranks.STEPS
    assert all(sums == first for sums in others)


def assert_equals_one_process(result, projection="timed"):
    model, optimizer = ranks.single(projection)
    assert torch.equal(optimizer.mask, result["mask"]) and not optimizer.mask.all()
    assert optimizer.history == result["history"] and len(optimizer.history) > 3
    torch.testing.assert_close(result["weights"], dict(model.state_dict()), rtol=1e-7, atol=1e-9)
    return model, optimizer


@pytest.mark.parametrize("how", ["wrapper", "compiled", "compiled shards"])
def test_two_processes_and_the_wrapper(two, how):
    assert_all_ranks_agree(two[how])
    assert_equals_one_process(two[how][0])


def test_data_parallel_with_four_processes_and_the_bare_module(four):
    assert_all_ranks_agree(four["bare"])
    assert_equals_one_process(four["bare"][0])


def test_a_wrapper_from_before_the_cut_is_refused_and_a_new_one_goes_on(two):
    assert_all_ranks_agree(two["cut"])
    for result in two["cut"]:
        assert result["phase"] == "compressed"
        assert "wrap it again, model = DistributedDataParallel(model.module)" in result["refused"]


@pytest.fixture
def group():
    store = torch.distributed.HashStore()
    torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


@pytest.mark.parametrize(("given", "used"), [(0, 1), (0, 2), (1, 1), (1, 2), (2, 2)])
def test_a_wrapper_from_before_the_cut_is_found_wherever_it_is(group, given, used):
    """ATO was given the module, its wrapper, or that compiled."""
    model = ranks.plain()
    ddp = torch.nn.parallel.DistributedDataParallel(model)
    forms = model, ddp, torch.compile(ddp, backend="eager")
    optimizer = ranks.wrap(model, forms[given])
    for x, y in batches(ranks.STEPS):
        ranks.step(forms[used], optimizer, x.double(), y)
        if optimizer.removable:
            optimizer.compress()
            break
    with pytest.raises(RuntimeError, match="wrap it again"):
        forms[used](x.double())
    again = torch.compile(torch.nn.parallel.DistributedDataParallel(model), backend="eager")
    ranks.step(again, optimizer, x.double(), y)


@pytest.mark.parametrize("early", [False, True])
def test_a_network_that_was_trained_in_a_group_is_ready_to_export(group, early):
    """What watches for old wrappers goes with the last step, and never comes along to copies."""
    model = ranks.plain()
    optimizer = ranks.wrap(model, model)
    for x, y in batches(ranks.STEPS):
        ranks.step(model, optimizer, x.double(), y)
        if early and optimizer.removable:
            optimizer.compress()
            assert len(model._forward_pre_hooks) == 1
            torch.jit.script(optimizer.compress(inplace=False))
    torch.jit.script(optimizer.compress())
    assert not model._forward_pre_hooks


@pytest.mark.parametrize("projection", ["timed", "halfspace"])
def test_fully_sharded_with_two_processes(two, projection):
    """Rank by rank the same, resumed twice, and what one process does; the cut comes as a whole copy."""
    assert_all_ranks_agree(two[projection])
    result = two[projection][0]
    assert result["turns"] >= 5
    assert result["apart"] < 1e-10
    model, optimizer = assert_equals_one_process(result, projection)
    torch.testing.assert_close(result["small"], dict(optimizer.compress().state_dict()), rtol=1e-7, atol=1e-9)


def test_what_is_refused_under_fully_shard(two):
    assert len(two["half"]) == 2  # the assertions ran on the ranks


def test_ranks_that_have_built_other_atos_are_refused(two):
    assert len(two["otherwise"]) == 2
