"""A pruned network as a file: read without code, by a fresh process, refused by what it does not fit."""

import copy
import subprocess
import sys

import numpy as np
import pytest
import torch
import torchvision
from networks import SHORT, Depthwise, Residual, batches, example
from test_optimizer import make, train
from torch import nn

from ato_optim import ATO, load_pruned, save_pruned

FRESH = """
import sys, torch, torchvision
from ato_optim import load_pruned
torch.set_num_threads(1)  # as in this process: the order of sums depends on it
model = load_pruned(torchvision.models.get_model(sys.argv[1], weights=None), sys.argv[2]).eval()
x = torch.load(sys.argv[3], weights_only=True)
with torch.no_grad():
    torch.save(model(x), sys.argv[3])
"""


@pytest.mark.parametrize("name", ["mobilenet_v3_small", "resnet18"])
def test_a_fresh_dense_model_in_a_new_process_becomes_the_pruned_one_bit_for_bit(name, tmp_path):
    model = torchvision.models.get_model(name, weights=None)
    x = torch.randn(2, 3, 64, 64)
    optimizer = ATO(torch.optim.SGD(model.parameters(), lr=0.01), model, x, target_flops=0.5, total_steps=3)
    for _ in range(3):
        optimizer.zero_grad()
        model(x).square().mean().backward()
        optimizer.step()
    small = optimizer.compress().eval()
    save_pruned(small, tmp_path / "small.pt")
    with torch.no_grad():
        expected = small(x)
    torch.save(x, tmp_path / "x.pt")
    call = [sys.executable, "-c", FRESH, name, str(tmp_path / "small.pt"), str(tmp_path / "x.pt")]
    subprocess.run(call, check=True)
    assert torch.equal(torch.load(tmp_path / "x.pt", weights_only=True), expected)


@pytest.fixture
def saved(tmp_path):
    model, optimizer = make()
    train(model, optimizer, 60)
    save_pruned(optimizer.compress(), tmp_path / "small.pt")
    return model, tmp_path / "small.pt"


def test_a_loaded_network_trains_and_is_saved_again(saved, tmp_path):
    model, path = saved
    loaded = load_pruned(Residual(), path)
    assert loaded.training
    x, y = next(iter(batches(1)))
    torch.nn.functional.cross_entropy(loaded(x), y).backward()
    save_pruned(loaded, tmp_path / "again.pt")
    again = load_pruned(Residual(), tmp_path / "again.pt")
    with torch.no_grad():
        assert torch.equal(again.eval()(example()), loaded.eval()(example()))


def wider():
    model = Residual()
    model.one[0] = torch.nn.Conv2d(8, 14, 3, 1, 1, bias=False)
    return model


def strided():
    """Other arithmetic with tensors of the same shapes."""
    model = Residual()
    model.one[0].stride, model.two.padding = (2, 2), (2, 2)
    return model


@pytest.mark.parametrize(
    ("network", "named"),
    [
        (wider, "'one.0' has out_channels 14, expected 12"),
        (strided, "'one.0' has stride"),
        (Depthwise, "the model itself has class Depthwise"),
    ],
)
def test_another_architecture_is_refused_with_the_first_module_that_differs(saved, network, named):
    model = network()
    before = {key: value.clone() for key, value in model.state_dict().items()}
    with pytest.raises(ValueError, match=named):
        load_pruned(model, saved[1])
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


def test_other_files_and_models_are_refused(saved, tmp_path):
    torch.save({"state_dict": {}}, tmp_path / "other.pt")
    with pytest.raises(ValueError, match="no pruned network"):
        load_pruned(Residual(), tmp_path / "other.pt")
    with pytest.raises(ValueError, match="holds no cut"):
        save_pruned(Residual(), tmp_path / "dense.pt")
    with pytest.raises(ValueError, match="cut already: pass a fresh dense model"):
        load_pruned(copy.deepcopy(saved[0]), saved[1])
    with torch.device("meta"):
        bare = Residual()
    with pytest.raises(ValueError, match=r"meta device.*to_empty"):
        load_pruned(bare, saved[1])


@pytest.mark.parametrize("damage", ["version", "cut", "weights", "kept", "far away", "nowhere"])
def test_a_damaged_file_is_refused_and_nothing_is_changed(saved, damage, tmp_path):
    content = torch.load(saved[1], weights_only=True)
    name = next(iter(content["cut"]["kept"]))
    if damage in content:
        del content[damage]
    elif damage == "kept":
        del content["cut"]["kept"]
    elif damage == "far away":
        content["cut"]["kept"][name] = {dim: [10**6] * len(kept) for dim, kept in content["cut"]["kept"][name].items()}
    else:
        content["cut"]["attributes"]["nowhere"] = {"out_channels": 3}
    torch.save(content, tmp_path / "damaged.pt")
    model = Residual()
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(ValueError, match=r"damaged\.pt"):
        load_pruned(model, tmp_path / "damaged.pt")
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


def test_a_network_that_an_optimizer_holds_already_is_refused(saved):
    """Its parameters would be others after loading, and training would go on with the old ones, in silence."""
    model, _optimizer = make()
    before = {key: value.clone() for key, value in model.state_dict().items()}
    with pytest.raises(ValueError, match="load first, then build the optimizers"):
        load_pruned(model, saved[1])
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    with pytest.raises(TypeError, match=r"dense_model is a PosixPath: pass a torch\.nn\.Module"):
        load_pruned(saved[1], model)
    with pytest.raises(TypeError, match="model is a OrderedDict"):
        save_pruned(model.state_dict(), saved[1])


def test_a_file_of_another_device_loads_where_that_is_not(saved, tmp_path, monkeypatch):
    with monkeypatch.context() as written_on:
        written_on.setattr(torch.serialization, "location_tag", lambda storage: "cuda:7")
        save_pruned(saved[0], tmp_path / "small.pt")
    assert not next(load_pruned(Residual(), tmp_path / "small.pt").parameters()).is_cuda


def test_what_changes_no_evaluation_may_differ(tmp_path):
    """Synchronised norms, and a schedule of their momentum."""

    def synchronised():
        return torch.nn.SyncBatchNorm.convert_sync_batchnorm(Residual())

    model, optimizer = make(synchronised)
    train(model, optimizer, 60)
    for module in model.modules():
        if isinstance(module, torch.nn.SyncBatchNorm):
            module.momentum = 0.01
    save_pruned(optimizer.compress(), tmp_path / "small.pt")
    loaded = load_pruned(Residual(), tmp_path / "small.pt")
    resumed, again = make(synchronised)
    again.load_state_dict(optimizer.state_dict())
    resumed.load_state_dict(model.state_dict())
    with torch.no_grad():
        expected = model.eval()(example())
        assert torch.equal(loaded.eval()(example()), expected)
        assert torch.equal(resumed.eval()(example()), expected)


def with_head(outputs, activation=torch.nn.ReLU):
    torch.manual_seed(outputs)
    model = Residual()
    model.fc, model.one[2] = torch.nn.Linear(16, outputs), activation()
    return model


@pytest.mark.parametrize("again", [False, True])
def test_layers_that_were_replaced_after_the_cut_belong_to_the_network(saved, again, tmp_path):
    """Another head and activation, trained on as it is or pruned once more."""
    model = load_pruned(Residual(), saved[1])
    model.fc, model.one[2] = torch.nn.Linear(model.fc.in_features, 3), torch.nn.SiLU()
    if again:
        base = torch.optim.SGD(model.parameters(), lr=0.05)
        optimizer = ATO(base, model, example(), target_flops=0.5, total_steps=9, phases=SHORT)
        for k in range(9):
            optimizer.zero_grad()
            model(example(seed=k)).square().mean().backward()
            optimizer.step()
        optimizer.compress()
    save_pruned(model, tmp_path / "new.pt")
    loaded = load_pruned(with_head(3, torch.nn.SiLU), tmp_path / "new.pt")
    with torch.no_grad():
        assert torch.equal(loaded.eval()(example()), model.eval()(example()))
    for other, named in (
        (with_head(3), "'one.2' has class ReLU, expected SiLU"),
        (with_head(5, torch.nn.SiLU), "'fc'"),
    ):
        with pytest.raises(ValueError, match=f"{named}.*the same layers replaced"):
            load_pruned(other, tmp_path / "new.pt")


def test_sizes_may_be_numbers_of_numpy(tmp_path):
    """Attributes follow the cut, and the file is plain data."""

    def network(number):
        torch.manual_seed(0)
        channels = number(8)
        norm = torch.nn.BatchNorm2d(channels, eps=np.float64(1e-3) if number is np.int64 else 1e-3)
        head = torch.nn.Sequential(torch.nn.AdaptiveAvgPool2d(1), torch.nn.Flatten(), torch.nn.Linear(channels, 5))
        return torch.nn.Sequential(torch.nn.Conv2d(3, channels, 3), norm, torch.nn.ReLU(), *head)

    model = network(np.int64)
    optimizer = ATO(
        torch.optim.SGD(model.parameters(), lr=0.1), model, example(), target_flops=0.5, total_steps=60, phases=SHORT
    )
    train(model, optimizer, 60)
    small = optimizer.compress()
    torch.save(optimizer.state_dict(), tmp_path / "state.pt")
    torch.load(tmp_path / "state.pt", weights_only=True)
    assert small[0].out_channels == small[1].num_features == small[5].in_features == len(small[0].weight) < 8
    save_pruned(small, tmp_path / "small.pt")
    loaded = load_pruned(network(int), tmp_path / "small.pt")
    with torch.no_grad():
        assert torch.equal(loaded.eval()(example()), small.eval()(example()))


class Rule:
    """What a module might keep in its extra state."""

    def __init__(self, name):
        self.name = name


def with_extra_state(monkeypatch, extra):
    """All convolutions keep `extra`; what they are given on loading is in the list that is returned."""
    read = []
    monkeypatch.setattr(torch.nn.Conv2d, "get_extra_state", lambda self: extra)
    monkeypatch.setattr(torch.nn.Conv2d, "set_extra_state", lambda self, state: read.append(state))
    return read


def test_an_extra_state_of_plain_data_is_kept(saved, tmp_path, monkeypatch):
    read = with_extra_state(monkeypatch, {"rules": ["a", 2]})
    save_pruned(saved[0], tmp_path / "extra.pt")
    load_pruned(Residual(), tmp_path / "extra.pt")
    assert read and all(state == {"rules": ["a", 2]} for state in read)


def test_an_extra_state_that_could_not_be_read_is_not_written(saved, tmp_path, monkeypatch):
    read = with_extra_state(monkeypatch, Rule("a"))
    with pytest.raises(ValueError, match=r"stem\.0\._extra_state of test_checkpoint\.Rule.*add_safe_globals"):
        save_pruned(saved[0], tmp_path / "extra.pt")
    assert not (tmp_path / "extra.pt").exists()
    with torch.serialization.safe_globals([Rule]):
        save_pruned(saved[0], tmp_path / "extra.pt")
        load_pruned(Residual(), tmp_path / "extra.pt")
    assert read and all(state.name == "a" for state in read)


def test_a_pruned_network_that_is_pruned_again_loads_into_the_dense_one(saved, tmp_path):
    model, _ = saved
    optimizer = ATO(
        torch.optim.SGD(model.parameters(), lr=0.05), model, example(), target_flops=0.5, total_steps=20, phases=SHORT
    )
    train(model, optimizer, 20)
    small = optimizer.compress()
    save_pruned(torch.compile(small), tmp_path / "twice.pt")  # a wrapper makes no difference
    loaded = load_pruned(Residual(), tmp_path / "twice.pt")
    with torch.no_grad():
        assert torch.equal(loaded.eval()(example()), small.eval()(example()))


class Caching(nn.Module):
    """Makes a mask when it first runs, larger ones later, and does not save the statistics of its norm."""

    def __init__(self):
        super().__init__()
        self.one, self.two, self.fc = nn.Linear(6, 16), nn.Linear(16, 16), nn.Linear(16, 3)
        self.register_buffer("mask", None, persistent=False)
        self.norm = nn.BatchNorm1d(16)
        self.norm._non_persistent_buffers_set |= {"running_mean", "running_var", "num_batches_tracked"}

    def forward(self, x):
        length = x.shape[1]
        if self.mask is None or len(self.mask) < length:
            self.register_buffer("mask", torch.ones(length, length).tril(), persistent=False)
        mask = self.mask[:length, :length]
        x = torch.relu(self.norm(self.one(x).flatten(0, 1))).view(len(x), length, -1)
        return self.fc(torch.relu(self.two((mask / mask.sum(1, keepdim=True)) @ x)))


def train_caching(model, optimizer):
    for step in range(40):
        optimizer.zero_grad()
        model(torch.randn(2, 7 + step % 5, 6)).square().mean().backward()
        optimizer.step()


def build_caching(**options):
    torch.manual_seed(0)
    model = Caching()
    options = {"target_flops": 0.4, "total_steps": 40, "phases": SHORT, **options}
    return model, ATO(torch.optim.SGD(model.parameters(), lr=0.05), model, torch.randn(2, 7, 6), **options)


def pruned_caching(**options):
    model, optimizer = build_caching(**options)
    train_caching(model, optimizer)
    return optimizer.compress(), optimizer


def test_buffers_that_a_forward_makes_or_lets_grow_are_no_part_of_the_architecture(tmp_path):
    average = Caching()
    model, optimizer = pruned_caching(min_width=0.4)
    assert len(model.norm.running_mean) == model.one.out_features < 16
    save_pruned(model, tmp_path / "small.pt")
    again, other = build_caching(min_width=0.4)
    other.load_state_dict(optimizer.state_dict())
    again.load_state_dict(model.state_dict())
    optimizer.compress(model=average).load_state_dict(model.state_dict())
    x = torch.randn(2, 9, 6)
    expected = model.train()(x)
    for copied in (load_pruned(Caching(), tmp_path / "small.pt"), again, average):
        assert torch.equal(copied.train()(x), expected)


class Around(nn.Module):
    """A pruned network inside of another, as a backbone."""

    def __init__(self, backbone):
        super().__init__()
        self.backbone, self.head = backbone, nn.Linear(5, 5)

    def forward(self, x):
        return self.head(torch.relu(self.backbone(x)))


@pytest.mark.parametrize("again", [False, True])
def test_a_pruned_network_inside_of_another_is_saved_with_it(again, tmp_path):
    model, optimizer = make()
    train(model, optimizer, 60)
    whole = Around(optimizer.compress())
    if again:
        base = torch.optim.SGD(whole.parameters(), lr=0.05)
        second = ATO(base, whole, example(), target_flops=0.7, total_steps=60, phases=SHORT, streams=0)
        train(whole, second, 60)
        second.compress()
    save_pruned(whole, tmp_path / "whole.pt")
    loaded = load_pruned(Around(Residual()), tmp_path / "whole.pt")
    assert torch.equal(loaded.eval()(example()), whole.eval()(example()))
    with pytest.raises(ValueError, match="or a part of the pruned one"):
        save_pruned(loaded.backbone, tmp_path / "part.pt")
    assert hasattr(whole.backbone, "ato_cut") != again


def test_files_that_name_buffers_which_pass_are_read(tmp_path):
    """Those that were written when all buffers were compared."""
    small, _ = pruned_caching(min_width=0.4)
    save_pruned(small, tmp_path / "small.pt")
    content = torch.load(tmp_path / "small.pt", weights_only=True)
    content["cut"]["dense"]["mask"] = [7, 7]
    torch.save(content, tmp_path / "small.pt")
    loaded = load_pruned(Caching(), tmp_path / "small.pt")
    x = torch.randn(2, 9, 6)
    assert torch.equal(loaded.train()(x), small.train()(x))


def test_statistics_that_are_not_saved_are_cut_by_the_first_of_two_cuts(tmp_path):
    small, _ = pruned_caching(min_width=0.4)
    width = small.one.out_features
    base = torch.optim.SGD(small.parameters(), lr=0.05)
    options = {"target_flops": 0.8, "total_steps": 40, "phases": SHORT, "ignored_layers": ["one"]}
    second = ATO(base, small, torch.randn(2, 7, 6), **options)
    train_caching(small, second)
    second.compress()
    assert width == small.one.out_features < 16
    save_pruned(small, tmp_path / "small.pt")
    loaded = load_pruned(Caching(), tmp_path / "small.pt")
    x = torch.randn(2, 9, 6)
    assert torch.equal(loaded.train()(x), small.train()(x))


def test_a_pruned_network_under_two_names_is_saved(tmp_path):
    model, optimizer = make()
    train(model, optimizer, 60)

    def twice(net):
        both = nn.Module()
        both.one = both.two = net
        both.forward = lambda x: net(x) + net(x)
        return both

    whole = twice(optimizer.compress())
    save_pruned(whole, tmp_path / "whole.pt")
    loaded = load_pruned(twice(Residual()), tmp_path / "whole.pt")
    assert torch.equal(loaded.eval()(example()), whole.eval()(example()))
