"""What the processes of test_distributed.py run: each rank writes what it saw to FOLDER/NAME.RANK.pt."""

import hashlib
import io

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from networks import SHORT, Flatten, Residual, batches, example
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor, distribute_module
from torch.nn.parallel import DistributedDataParallel
from torch.utils import _pytree

from ato_optim import ATO, load_pruned, save_pruned
from ato_optim.copies import copy_model
from ato_optim.proof import difference

STEPS = 50


def plain():
    """Without anything that a part of a batch does otherwise than the whole: norms, dropout."""
    torch.manual_seed(0)
    model = Flatten()
    model.head[3].p = 0.0
    return model.double()


def wrap(model, named, projection="timed"):
    base = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    dtype = next(model.parameters()).dtype
    x = example(1).to(dtype)
    return ATO(
        base, named, x, target_flops=0.5, total_steps=STEPS, phases=SHORT, interval=2, projection=projection, streams=0
    )


def whole(tensor):
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def checksum(model, optimizer):
    """Of weights, momenta, controller and mask; buffers are each rank's own."""
    state = optimizer.state_dict()
    digest = hashlib.sha256()
    for leaf in _pytree.tree_leaves([dict(model.named_parameters()), state]):
        data = whole(leaf).detach().numpy().tobytes() if isinstance(leaf, torch.Tensor) else repr(leaf).encode()
        digest.update(data)
    return digest.hexdigest()


def share(batch, rank, world):
    return (part.chunk(world)[rank] for part in batch)


def step(model, optimizer, x, y):
    optimizer.zero_grad()
    loss = F.cross_entropy(model(x), y)
    loss.backward()
    optimizer.step()


def single(projection="timed"):
    """The same run in one process: the reference."""
    model = plain()
    optimizer = wrap(model, model, projection)
    for x, y in batches(STEPS):
        step(model, optimizer, x.double(), y)
    return model, optimizer


def data_parallel(rank, world, how):
    """The plain network; ATO gets the bare module or what is called."""
    model = sharded_model("root") if how == "compiled shards" else plain()
    called = model if how == "compiled shards" else DistributedDataParallel(model)
    if how.startswith("compiled"):
        called = torch.compile(called, backend="aot_eager")
    optimizer = wrap(model, model if how == "bare" else called)
    sums = []
    for batch in batches(STEPS):
        x, y = share(batch, rank, world)
        step(called, optimizer, x.double(), y)
        sums.append(checksum(model, optimizer))
    weights = {key: whole(value) for key, value in model.state_dict().items()}
    return {"sums": sums, "mask": optimizer.mask, "history": optimizer.history, "weights": weights}


def cut_data_parallel(rank, world):
    """A network with norms, accumulation without sync, and a cut in the middle."""
    torch.manual_seed(0)
    model = Residual()
    ddp = DistributedDataParallel(model)
    optimizer = wrap(model, model)
    sums, refused = [], ""
    for batch in batches(STEPS):
        x, y = share(batch, rank, world)
        optimizer.zero_grad()
        with ddp.no_sync():
            (F.cross_entropy(ddp(x[:2]), y[:2]) / 2).backward()
        (F.cross_entropy(ddp(x[2:]), y[2:]) / 2).backward()
        optimizer.step()
        if optimizer.removable:
            optimizer.compress()
            with torch.no_grad():
                ddp(x)  # an evaluation needs no averages
            try:
                ddp(x)
            except RuntimeError as error:
                refused = str(error)
            ddp = DistributedDataParallel(model)
        sums.append(checksum(model, optimizer))
    return {"sums": sums, "refused": refused, "phase": optimizer.phase}


def sharded_model(layout):
    """Consumers in groups of their own, one of which writes the output, or in the root's, which stays gathered."""
    model = plain()
    for part in (model.features[3], model.head) if layout == "parts" else (model.features[0], model.head[1]):
        fully_shard(part)
    return fully_shard(model)


def sharded(rank, world, projection, layout):
    """fully_shard, resumed in the search and in the commit phase."""
    model = sharded_model(layout)
    optimizer = wrap(model, model, projection)
    sums, turns = [], 0
    for k, batch in enumerate(batches(STEPS)):
        x, y = share(batch, rank, world)
        x = x.double()
        if k in (17, 27):
            file = io.BytesIO()
            torch.save([optimizer.state_dict(), model.state_dict()], file)
            file.seek(0)
            states = torch.load(file, weights_only=True)
            model = sharded_model(layout)
            optimizer = wrap(model, model, projection)
            optimizer.load_state_dict(states[0])
            model.load_state_dict(states[1])
        optimizer.zero_grad()
        state = {key: whole(value).clone() for key, value in model.state_dict().items()}
        with torch.no_grad():  # evaluations last: they leave parameters of the root gathered
            before = model.eval()(x)
        out = model.train()(x)
        if optimizer.turn_begun:  # masked weights are for the training forward and its backward alone
            turns += 1
            with torch.no_grad():
                assert torch.equal(model.eval()(x), before)
            assert all(torch.equal(whole(value), state[key]) for key, value in model.state_dict().items())
            masked, table = copy_model(model), optimizer.plan.groups.consumers
            table.scale(table.parameters(masked), optimizer._turn.gates.double())
            torch.testing.assert_close(masked(x), out, rtol=1e-9, atol=1e-9)
            with torch.no_grad():
                assert torch.equal(model.eval()(x), before)
            model.train()
        F.cross_entropy(out, y).backward()
        if optimizer.turn_begun:
            assert all(torch.equal(whole(value), state[key]) for key, value in model.state_dict().items())
        optimizer.step()
        sums.append(checksum(model, optimizer))
    weights = {key: whole(value) for key, value in model.state_dict().items()}
    with pytest.raises(ValueError, match=r"fully_shard.*compress\(inplace=False\), called on all ranks"):
        optimizer.compress()
    small = optimizer.compress(inplace=False)
    assert type(small) is Flatten and not any(isinstance(p, DTensor) for p in small.parameters())
    x = example().double()
    apart = difference(model.eval()(x), small.eval()(x))
    file = io.BytesIO()
    save_pruned(small, file)
    file.seek(0)
    assert torch.equal(load_pruned(plain(), file).eval()(x), small(x))
    again = fully_shard(optimizer.compress(inplace=False))  # to train on
    file = io.BytesIO()
    save_pruned(again, file)
    file.seek(0)
    assert torch.equal(load_pruned(plain(), file).eval()(x), small(x))
    return {
        "sums": sums,
        "turns": turns,
        "mask": optimizer.mask,
        "history": optimizer.history,
        "weights": weights,
        "small": small.state_dict(),
        "apart": apart,
    }


def half_sharded(rank, world):
    """What is refused: models that are split in part or by other means, a checkpoint without the pruning's entry."""
    split = distribute_module(plain(), init_device_mesh("cpu", (world,)))
    with pytest.raises(ValueError, match="by other means than fully_shard; apply fully_shard to the model itself too"):
        wrap(split, split)
    model = sharded_model("parts")
    optimizer = wrap(model, model)
    weights, state = get_state_dict(model, optimizer)
    with pytest.raises(ValueError, match='no entry "ato"'):
        set_state_dict(model, optimizer, model_state_dict=weights, optim_state_dict=state)
    model = plain()
    fully_shard(model.head)
    with pytest.raises(ValueError, match=r"features.0.weight is whole; apply fully_shard to the model itself too"):
        wrap(model, model)
    return {}


def built_otherwise(rank, world):
    """Ranks whose example inputs differ, as the first batches of their loaders may, are refused on all of them."""
    x = example(1 + rank).double()
    for model, called in ((plain(), DistributedDataParallel), (sharded_model("parts"), lambda model: model)):
        base = torch.optim.SGD(model.parameters(), lr=0.05)
        with pytest.raises(ValueError, match=r"with MACs of example_inputs=\d+ and \d+: build them alike on all ranks"):
            ATO(base, called(model), x, target_flops=0.5, total_steps=STEPS, phases=SHORT)
        assert not model._forward_hooks or isinstance(model, FSDPModule)
    return {}


RUNS = {
    "otherwise": (built_otherwise,),
    **{how: (data_parallel, how) for how in ("bare", "wrapper", "compiled", "compiled shards")},
    "cut": (cut_data_parallel,),
    "timed": (sharded, "timed", "parts"),
    "halfspace": (sharded, "halfspace", "root"),
    "half": (half_sharded,),
}


def main(rank, world, folder, names):
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=world)
    for name in names:
        function, *arguments = RUNS[name]
        torch.save(function(rank, world, *arguments), f"{folder}/{name}.{rank}.pt")
    dist.barrier()
    dist.destroy_process_group()
