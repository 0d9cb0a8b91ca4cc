"""ATO as an optimizer: equal to its base where it must be, committed in time, cut without loss."""

import collections
import copy
import io

import pytest
import torch
import torch.nn.functional as F
from networks import NETWORKS, SHORT, Depthwise, Flatten, Residual, batches, example

from ato_optim import ATO
from ato_optim.proof import difference

BASES = {
    "sgd": lambda p: torch.optim.SGD(p, lr=0.05, momentum=0.9, nesterov=True, weight_decay=1e-3),
    "adamw": lambda p: torch.optim.AdamW(p, lr=3e-3),
    "adagrad": lambda p: torch.optim.Adagrad(p, lr=0.01),
    "adafactor": lambda p: torch.optim.Adafactor(p, lr=0.01),
    "fused adam": lambda p: torch.optim.Adam(p, lr=3e-3, fused=True),
}


def make(network=Residual, base="sgd", target_flops=0.5, total_steps=60, **options):
    torch.manual_seed(0)
    model = network()
    options = {"streams": 0, "phases": SHORT, **options}  # so that all that can be cut is cut
    return model, ATO(
        BASES[base](model.parameters()),
        model,
        example(),
        target_flops=target_flops,
        total_steps=total_steps,
        **options,
    )


def train(model, optimizer, steps, skip=0):
    losses = []
    for k, (x, y) in enumerate(batches(skip + steps)):
        if k < skip:
            continue
        torch.manual_seed(k)  # dropout
        loss = F.cross_entropy(model(x), y)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


def masked_entries(model, optimizer, read=False):
    """Entries that produce masked channels (and that `read` them), and all others of these parameters, flat."""
    groups, closed = optimizer.plan.groups, {}
    for table in (groups.producers, groups.consumers) if read else (groups.producers,):
        for name, gates in zip(table.names, table.split(optimizer.mask), strict=True):
            closed[name] = closed.get(name, False) | ~gates.expand_as(model.get_parameter(name))
    data = [(model.get_parameter(name).data, entries) for name, entries in closed.items()]
    return torch.cat([p[entries] for p, entries in data]), torch.cat([p[~entries] for p, entries in data])


@pytest.mark.parametrize("network", [Residual, Flatten])
@pytest.mark.parametrize("base", BASES)
def test_with_the_whole_budget_it_is_its_base_optimizer_bit_for_bit(network, base):
    model, optimizer = make(network, base, target_flops=1, total_steps=50)
    torch.manual_seed(0)
    plain = network()
    bare = BASES[base](plain.parameters())
    assert train(model, optimizer, 50) == train(plain, bare, 50)
    for one, other in zip(model.state_dict().values(), plain.state_dict().values(), strict=True):
        assert torch.equal(one, other)
    mine, theirs = optimizer.state_dict()["state"], bare.state_dict()["state"]
    for index, state in theirs.items():
        for key, value in state.items():
            assert torch.equal(torch.as_tensor(mine[index][key]), torch.as_tensor(value))
    assert optimizer.compress() is model


@pytest.mark.parametrize("projection", ["timed", "proximal", "halfspace"])
@pytest.mark.parametrize("base", BASES)
def test_committed_groups_reach_zero_stay_there_and_the_budget_is_met(base, projection):
    model, optimizer = make(base=base, projection=projection)
    train(model, optimizer, optimizer.schedule.zero)
    assert optimizer.removable
    for extra in (0, 5):  # momentum and weight decay go on for five steps more
        train(model, optimizer, extra)
        masked, others = masked_entries(model, optimizer, read=True)
        assert len(masked) and (masked == 0.0).all()
        assert (others != 0.0).float().mean() > 0.9
    report = optimizer.report()
    assert 0.49 * report.macs_before <= report.macs_after <= 0.5 * report.macs_before
    train(model, optimizer, 60 - optimizer.schedule.zero - 5)
    x = example(seed=5)
    model.eval()
    with torch.no_grad():
        trained = model(x)
        small = optimizer.compress()
        assert difference(trained, small(x)) < 1e-5
    assert small is model and sum(p.numel() for p in small.parameters()) == report.parameters_after


def test_masked_groups_are_pulled_gently_while_searching():
    """A channel that is masked for the time constant of the pull is smaller, and not zero: it could come back."""
    model, optimizer = make(total_steps=1000)
    train(model, optimizer, optimizer.schedule.search + 1)
    optimizer.mask[:4] = False
    optimizer.search = None  # nobody changes the mask now
    before = masked_entries(model, optimizer)[0].norm()
    train(model, optimizer, round(optimizer.schedule.pull_steps))
    after = masked_entries(model, optimizer)[0]
    assert 0.1 * before < after.norm() < 0.8 * before
    assert (after != 0).float().mean() > 0.9


@pytest.mark.parametrize("projection", ["proximal", "halfspace"])
def test_each_group_of_channels_is_pulled_at_the_learning_rate_of_its_own_parameters(projection):
    def pulled(rate_of_first, rate_of_others):
        torch.manual_seed(0)
        model = Flatten()
        first = [p for name, p in model.named_parameters() if name in names_of_first]
        others = [p for name, p in model.named_parameters() if name not in names_of_first]
        rates = [{"params": others, "lr": rate_of_others}, {"params": first, "lr": rate_of_first}]
        optimizer = ATO(
            torch.optim.SGD(rates, lr=1.0),
            model,
            example(),
            target_flops=0.5,
            total_steps=60,
            phases=SHORT,
            projection=projection,
        )
        optimizer.mask[::2] = False
        optimizer._pull(optimizer.schedule.search + 1)
        return dict(model.named_parameters())

    producers = make(Flatten)[1].plan.groups.producers
    whose = [gates.unique() for gates in producers.gate.split(producers.sizes)]
    names_of_first = {name for name, gates in zip(producers.names, whose, strict=True) if 0 in gates}
    both, slow, fast = pulled(1e-3, 1e-2), pulled(1e-3, 1e-3), pulled(1e-2, 1e-2)
    for name, parameter in both.items():
        torch.testing.assert_close(parameter, (slow if name in names_of_first else fast)[name])
    assert any(not torch.allclose(slow[name], fast[name]) for name in names_of_first)
    assert any(not torch.allclose(slow[name], fast[name]) for name in both if name not in names_of_first)


@pytest.fixture
def in_double():
    """Rounding of another order of sums grows over the steps; in float64 it stays far below what is tested."""
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


@pytest.mark.usefixtures("in_double")
@pytest.mark.parametrize("network", NETWORKS)
def test_training_goes_on_after_an_early_compress_as_if_nothing_had_happened(network):
    """The small network with the carried momentum, and the big one with its zeros, take the same steps."""
    big, slow = make(network)
    small, fast = make(network)
    for model, optimizer in (big, slow), (small, fast):
        scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 20, 0.5)
        for step in range(60):
            train(model, optimizer, 1, skip=step)
            scheduler.step()
            if model is small and optimizer.removable:
                before = [group["lr"] for group in optimizer.param_groups]
                assert optimizer.compress() is small
                assert optimizer.param_groups is optimizer.base.param_groups
                assert [group["lr"] for group in optimizer.param_groups] == before
                assert {id(p) for g in optimizer.param_groups for p in g["params"]} == {
                    id(p) for p in small.parameters()
                }
        assert optimizer.param_groups[0]["lr"] == pytest.approx(0.05 * 0.125)
    assert sum(p.numel() for p in small.parameters()) < sum(p.numel() for p in big.parameters())
    slow.compress()
    for name, tensor in big.state_dict().items():
        torch.testing.assert_close(small.state_dict()[name], tensor, rtol=1e-7, atol=1e-9)
    for (_, mine), (_, theirs) in zip(fast.state.items(), slow.state.items(), strict=True):
        torch.testing.assert_close(mine["momentum_buffer"], theirs["momentum_buffer"], rtol=1e-7, atol=1e-9)


@pytest.mark.filterwarnings("error:compress")
@pytest.mark.parametrize("base", BASES)
def test_state_is_indexed_over_to_the_bit(base):
    model, optimizer = make(Depthwise, base)
    train(model, optimizer, 40)
    names = {p: name for name, p in model.named_parameters()}
    before = {names[p]: copy.deepcopy(state) for p, state in optimizer.state.items()}
    optimizer.compress()
    cut = optimizer.cut
    assert cut.kept
    for name, parameter in model.named_parameters():
        for key, value in optimizer.state[parameter].items():
            old = before[name][key]
            if isinstance(value, torch.Tensor) and value.ndim:
                for dim, kept in cut.kept.get(name, {}).items():
                    if old.shape[dim] == cut.dense[name][dim]:  # a factored state is 1 wide elsewhere
                        old = old[(slice(None),) * dim + (kept,)]
            assert torch.equal(torch.as_tensor(value), torch.as_tensor(old))
    assert train(model, optimizer, 3)


def test_compress_of_a_copy_leaves_training_alone():
    model, optimizer = make()
    averaged = torch.optim.swa_utils.AveragedModel(model)
    train(model, optimizer, 60)
    averaged.update_parameters(model)
    before = copy.deepcopy(model.state_dict())
    small = optimizer.compress(inplace=False)
    small_average = optimizer.compress(model=averaged)
    assert small is not model and not optimizer.cut
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    assert {k: v.shape for k, v in small.state_dict().items()} == {
        k: v.shape for k, v in small_average.state_dict().items()
    }
    train(model, optimizer, 2)
    optimizer.compress(model=averaged)  # a second call changes nothing, before and after the model's own
    optimizer.compress()
    assert {k: v.shape for k, v in small.state_dict().items()} == {k: v.shape for k, v in model.state_dict().items()}
    assert optimizer.compress() is model and optimizer.compress(model=averaged) is small_average
    train(model, optimizer, 2)


def test_a_run_may_be_longer_than_it_said():
    model, optimizer = make()
    train(model, optimizer, 75)
    assert (masked_entries(model, optimizer)[0] == 0).all()
    assert optimizer.report().step == 75
    optimizer.compress()


@pytest.mark.parametrize("total_steps", [1, 2, 3, 7])
def test_short_runs(total_steps):
    model, optimizer = make(total_steps=total_steps)
    train(model, optimizer, total_steps)
    model.eval()
    with torch.no_grad():
        trained = model(example())
        assert difference(trained, optimizer.compress()(example())) < 1e-5
    report = optimizer.report()
    assert report.macs_after <= 0.5 * report.macs_before


@pytest.mark.parametrize("stop", [3, 8, 20, 29, 33, 45])
@pytest.mark.parametrize("early", [False, True])
def test_a_resumed_run_is_the_uninterrupted_one_bit_for_bit(stop, early):
    def go_on(model, optimizer, first, last):
        for step in range(first, last):
            train(model, optimizer, 1, skip=step)
            if early and optimizer.removable:
                optimizer.compress()

    model, optimizer = make()
    go_on(model, optimizer, 0, 60)
    other, first = make()
    go_on(other, first, 0, stop)
    file = io.BytesIO()
    torch.save({"optimizer": first.state_dict(), "model": other.state_dict()}, file)
    file.seek(0)
    state = torch.load(file, weights_only=True)
    torch.manual_seed(123)
    resumed_model = Residual()
    base = BASES["sgd"](resumed_model.parameters())
    resumed = ATO(base, resumed_model, example(), target_flops=0.5, total_steps=60, phases=SHORT, streams=0)
    resumed.load_state_dict(state["optimizer"])
    resumed_model.load_state_dict(state["model"])
    go_on(resumed_model, resumed, stop, 60)
    for key, value in model.state_dict().items():
        assert torch.equal(value, resumed_model.state_dict()[key]), key
    assert torch.equal(optimizer.mask, resumed.mask)
    assert optimizer.history == resumed.history


def test_a_copy_of_model_and_optimizer_trains_like_the_original():
    model, optimizer = make()
    train(model, optimizer, 10)
    twin = copy.deepcopy(optimizer)
    assert twin.model is not model and twin.param_groups is twin.base.param_groups
    assert train(twin.model, twin, 30, skip=10) == train(model, optimizer, 30, skip=10)
    assert torch.equal(twin.mask, optimizer.mask)


def test_closures():
    model, optimizer = make(base="adamw")
    plain, other = make(base="adamw")
    for x, y in batches(60):
        torch.manual_seed(0)

        def closure(x=x, y=y):
            optimizer.zero_grad()
            loss = F.cross_entropy(model(x), y)
            loss.backward()
            return loss

        loss = optimizer.step(closure)
        torch.manual_seed(0)
        other.zero_grad()
        expected = F.cross_entropy(plain(x), y)
        expected.backward()
        other.step()
        assert loss.item() == expected.item()
    assert torch.equal(optimizer.mask, other.mask)


def test_state_over_all_parameters_is_refused_by_compress_and_nothing_is_lost():
    torch.manual_seed(0)
    model = Flatten()
    base = torch.optim.LBFGS(model.parameters(), lr=0.1, max_iter=2)
    optimizer = ATO(base, model, example(), target_flops=0.5, total_steps=20, phases=SHORT)
    for x, y in batches(20):

        def closure(x=x, y=y):
            optimizer.zero_grad()
            loss = F.cross_entropy(model(x), y)
            loss.backward()
            return loss

        optimizer.step(closure)
    assert (masked_entries(model, optimizer)[0] == 0).all()
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(ValueError, match="LBFGS.*inplace=False"):
        optimizer.compress()
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    small = optimizer.compress(inplace=False)
    assert difference(model.eval()(example()), small.eval()(example())) < 1e-5


@pytest.mark.parametrize("projection", ["proximal", "halfspace"])
def test_the_time_constant_is_the_timed_pulls_alone(projection):
    runs = []
    for pull_time in (0.1, 1e-3):
        model, optimizer = make(projection=projection, pull_time=pull_time, total_steps=200)
        train(model, optimizer, 55)
        assert optimizer.phase == "search" and not optimizer.mask.all()
        runs.append(model.state_dict())
    assert all(torch.equal(value, runs[1][name]) for name, value in runs[0].items())


def test_the_pull_does_not_depend_on_the_default_dtype():
    ends = []
    for dtype in (torch.float32, torch.bfloat16):
        model, optimizer = make(total_steps=2000)
        optimizer.mask[::2] = False
        optimizer.step_count = optimizer.schedule.search + 1
        torch.set_default_dtype(dtype)
        try:
            optimizer._pull(optimizer.schedule.search + 1)
        finally:
            torch.set_default_dtype(torch.float32)
        ends.append(model.state_dict())
    assert all(torch.equal(value, ends[1][name]) for name, value in ends[0].items())
    assert not torch.equal(make()[0].state_dict()["stem.0.weight"], ends[0]["stem.0.weight"])


def test_groups_and_state_are_the_bases_own_also_after_it_has_loaded_others():
    """Else a scheduler moves learning rates that nobody reads."""
    model, optimizer = make()
    train(model, optimizer, 3)
    optimizer.base.load_state_dict(copy.deepcopy(optimizer.base.state_dict()))
    assert optimizer.param_groups is optimizer.base.param_groups and optimizer.state is optimizer.base.state
    torch.optim.lr_scheduler.LambdaLR(optimizer, lambda _: 0.0)
    before = copy.deepcopy(model.state_dict())
    train(model, optimizer, 1)
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())
    optimizer.state = state = collections.defaultdict(dict)  # momenta are forgotten like this
    optimizer.param_groups = optimizer.param_groups[:]
    assert optimizer.base.state is state and optimizer.param_groups is optimizer.base.param_groups


class Preconditioned(torch.optim.SGD):
    """Holds a matrix of the size of each weight's first dimension, as Shampoo does."""

    def step(self, closure=None):
        for group in self.param_groups:
            for p in group["params"]:
                if p.ndim > 1:
                    self.state[p]["preconditioner"] = torch.eye(len(p)).expand(*[1] * (p.ndim - 2), -1, -1)
        return super().step(closure)


def test_state_of_another_shape_than_its_parameter_is_not_cut():
    torch.manual_seed(0)
    model = Residual()
    base = Preconditioned(model.parameters(), lr=0.01)
    optimizer = ATO(base, model, example(), target_flops=0.5, total_steps=20, phases=SHORT, interval=1)
    with pytest.warns(UserWarning, match=r"compress\(\) in place will fail: the state 'preconditioner'") as seen:
        train(model, optimizer, 20)
    assert [w.filename for w in seen] == [train.__code__.co_filename]  # once, where the loop calls step()
    shapes = [p.shape for p in model.parameters()]
    with pytest.raises(ValueError, match=r"the state 'preconditioner' .* cannot follow the cut"):
        optimizer.compress()
    assert [p.shape for p in model.parameters()] == shapes


class Expanded(Flatten):
    """A buffer whose entries share their memory."""

    def __init__(self):
        super().__init__()
        self.register_buffer("offset", torch.ones(1).expand(5))

    def forward(self, x):
        return super().forward(x) + self.offset


def test_a_buffer_that_is_expanded_survives_turns():
    model, optimizer = make(Expanded)
    train(model, optimizer, 60)
    assert len(optimizer.history) > 2
    expected = model.eval()(example())
    assert difference(expected, optimizer.compress()(example())) < 1e-5


def test_the_figure_shades_each_phase_from_its_boundary_to_the_next():
    pytest.importorskip("matplotlib")
    report = make()[1].report()
    patches = {patch.get_label(): patch for patch in report.figure().axes[1].patches}
    spans = {
        name: patch.get_path().transformed(patch.get_patch_transform()).get_extents().intervalx.tolist()
        for name, patch in patches.items()
    }
    search, commit, zero = report.boundaries
    assert search < commit < zero
    assert spans == {"search": [search, commit], "commit": [commit, zero]}


def test_checkpoints_from_after_the_search_do_not_hold_the_controller():
    model, optimizer = make()
    train(model, optimizer, optimizer.schedule.commit - 1)
    before = optimizer.state_dict()
    train(model, optimizer, 1, skip=optimizer.schedule.commit - 1)
    after = optimizer.state_dict()
    assert before["ato"]["search"] is not None and after["ato"]["search"] is None
    optimizer.load_state_dict(copy.deepcopy(after))
    optimizer.load_state_dict(copy.deepcopy(before))  # back into the search
    logits = optimizer.search.state_dict()["controller"]["head"]
    assert torch.equal(logits, before["ato"]["search"]["controller"]["head"])


def test_the_controller_learns_the_same_if_step_is_called_under_autocast():
    """A loop that has all of its body under it."""
    heads = []
    for inside in (False, True):
        model, optimizer = make(interval=1)
        for x, y in batches(optimizer.schedule.search + 2):
            loss = F.cross_entropy(model(x), y)
            optimizer.zero_grad()
            loss.backward()
            with torch.autocast("cpu", torch.bfloat16, enabled=inside):
                optimizer.step()
        assert optimizer.history
        heads.append(optimizer.search.controller.head.detach())
    assert torch.equal(*heads)


def test_a_network_that_is_cut_in_inference_mode_trains_on():
    model, optimizer = make()
    train(model, optimizer, 30)
    with torch.inference_mode():
        optimizer.compress()
    train(model, optimizer, 2)
