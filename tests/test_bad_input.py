"""Every mistake is met before training, by an error that names the argument, its value and the way out."""

import copy
import gc
import re
import warnings

import numpy as np
import pytest
import torch
from networks import SHORT, Residual, example
from test_optimizer import make, train
from torch import nn
from torch.distributed.fsdp import FullyShardedDataParallel

from ato_optim import ATO


def build(model=None, base=None, inputs=None, **options):
    model = Residual() if model is None else model
    base = torch.optim.SGD(model.parameters(), lr=0.1) if base is None else base
    inputs = example() if inputs is None else inputs
    return ATO(base, model, inputs, **{"target_flops": 0.5, "total_steps": 10, "phases": SHORT, **options})


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"target_flops": 0}, ["target_flops=0", "(0, 1]"]),
        ({"target_flops": 1.5}, ["target_flops=1.5", "(0, 1]"]),
        ({"target_flops": 45}, ["target_flops=45", "share"]),
        ({"target_flops": float("nan")}, ["target_flops=nan"]),
        ({"total_steps": 0}, ["total_steps=0", "epochs * len(loader)"]),
        ({"total_steps": 2.5}, ["total_steps=2.5"]),
        ({"min_width": 2}, ["min_width=2"]),
        ({"streams": -0.5}, ["streams=-0.5", "share of the budget"]),
        ({"round_to": 0}, ["round_to=0"]),
        ({"interval": 0}, ["interval=0"]),
        ({"total_steps": float("inf")}, ["total_steps=inf"]),
        ({"controller_lr": -1}, ["controller_lr=-1"]),
        ({"phases": 0.3}, ["phases=0.3"]),
        ({"phases": (0.1, 1, 1)}, ["phases=", "commit earlier"]),
        ({"phases": (0.5, 0.2, 0.6)}, ["phases="]),
        ({"pull_time": 0}, ["pull_time=0"]),
        ({"epsilon": 1}, ["epsilon=1"]),
        ({"gamma": -1}, ["gamma=-1"]),
        ({"beta": -1}, ["beta=-1"]),
        ({"penalty": (1000, 10)}, ["penalty=(1000, 10)"]),
        ({"projection": "hard"}, ["projection='hard'", "timed"]),
        ({"ignored_layers": ["stem.9"]}, ["ignored_layers", "stem.9"]),
    ],
)
def test_arguments(options, words):
    with pytest.raises(ValueError, match=re.escape(words[0])) as error:
        build(**options)
    assert all(word in str(error.value) for word in words), str(error.value)


def test_a_budget_below_the_least_names_the_least():
    for min_width in (0.3, 0.4, 0.5):
        with pytest.raises(ValueError, match=r"target_flops=0.0005.*least budget of this model is") as error:
            build(target_flops=0.0005, min_width=min_width)
        named = float(re.search(r"model is ([\d.]+)", str(error.value))[1])
        build(target_flops=named, min_width=min_width)
        with pytest.raises(ValueError, match="least budget"):
            build(target_flops=named - 2e-4, min_width=min_width)


def test_a_base_optimizer_of_other_parameters():
    with pytest.raises(ValueError, match="not the model's.*group 0"):
        build(base=torch.optim.SGD(Residual().parameters(), lr=0.1))


def test_types():
    for name in ("target_flops", "total_steps", "round_to", "interval", "seed"):
        with pytest.raises(TypeError, match=f"{name}='1'"):
            build(**{name: "1"})
    with pytest.raises(TypeError, match="base_optimizer is a dict"):
        build(base={})
    with pytest.raises(TypeError, match="model is a str"):
        ATO(torch.optim.SGD(Residual().parameters(), lr=0.1), "resnet18", example(), target_flops=0.5, total_steps=1)
    with pytest.raises(TypeError, match="forward_fn is a int"):
        build(forward_fn=3)
    for layers in ("one", nn.Linear(1, 1)):
        with pytest.raises(TypeError, match=r"ignored_layers=.*pass a list"):
            build(ignored_layers=layers)
    model = Residual()
    with pytest.raises(TypeError, match="ATO already"):
        build(model, base=build(model))


def test_nothing_to_prune():
    with pytest.raises(ValueError, match="nothing to prune.*0 is an output of the model"):
        build(nn.Sequential(nn.Linear(4, 2)), inputs=torch.randn(1, 4))
    model = Residual()
    with pytest.raises(
        ValueError, match="not reached by example_inputs. A forward_fn has to run the model that it is given"
    ):
        build(model, forward_fn=lambda _, x: model(x))


def test_refused_example_inputs_keep_the_models_own_error_as_the_cause():
    with pytest.raises(ValueError, match=r"example_inputs.*\(2, 5, 16, 16\)") as error:
        build(inputs=torch.randn(2, 5, 16, 16))
    assert "channels" in str(error.value.__cause__)


@pytest.mark.parametrize("inputs", [example(), (example(),), [example()], {"x": example()}])
def test_example_inputs_of_every_form(inputs):
    assert build(inputs=inputs).report().macs_before == build().report().macs_before


def test_a_model_that_has_an_ato():
    model = Residual()
    optimizer = build(model)
    with pytest.raises(ValueError, match="already has an ATO"):
        build(model)
    assert optimizer.model is model


def test_a_part_and_a_whole_of_a_model_that_has_an_ato():
    """Both would mask the same layers; one that is left in its search would do so in every step."""
    whole = nn.Sequential(Residual(), nn.ReLU(), nn.Linear(5, 3))
    first = build(whole)
    with pytest.raises(ValueError, match="Residual. already has an ATO for its whole Sequential, at step 0"):
        build(whole[0])
    del first
    part = build(whole[0])
    with pytest.raises(ValueError, match="Sequential. already has an ATO for its part Residual, at step 0"):
        build(whole)
    head = torch.optim.SGD(whole[2].parameters(), lr=0.1)  # what trains other parameters is another matter
    ATO(head, whole, example(), target_flops=1, total_steps=1)
    assert part.model is whole[0]


def test_a_model_whose_ato_was_dropped_is_taken():
    model = Residual()
    optimizer = build(model)
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 5)
    cycle = [optimizer, scheduler]
    cycle.append(cycle)  # as tracebacks are, too
    gc.disable()
    try:
        del optimizer, scheduler, cycle
        build(model)
    finally:
        gc.enable()


def test_inputs_of_another_dtype_are_named_with_what_the_model_said():
    with pytest.raises(ValueError, match=r"torch\.float64.*on cpu.*RuntimeError"):
        build(inputs=example().double())


def test_a_run_too_short_to_learn_from_warns():
    with pytest.warns(UserWarning, match="total_steps=60 leaves 6 controller turn.*every 2 steps.*fewer than 20"):
        make()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        build(total_steps=200)
        build(total_steps=60, target_flops=1)


def test_a_model_whose_ato_has_committed_or_prunes_nothing_is_taken_too():
    model, optimizer = make()
    train(model, optimizer, 40)
    with pytest.raises(ValueError, match="already has an ATO, at step 40"):
        build(model)
    optimizer.compress()
    build(model, target_flops=0.9)
    whole = Residual()
    first = build(whole, target_flops=1)
    with pytest.raises(ValueError, match="already has an ATO"):
        build(whole)
    assert first.model is whole


def test_weights_from_before_the_commit_are_not_compressed():
    model, optimizer = make()
    train(model, optimizer, 10)
    best = copy.deepcopy(model.state_dict())
    train(model, optimizer, 50, skip=10)
    model.load_state_dict(best)
    with pytest.raises(ValueError, match=r"not zero.* from before step 19 hold channels that were to go"):
        optimizer.compress()


def test_the_papers_pulls_need_a_learning_rate():
    for projection in ("proximal", "halfspace"):
        model = Residual()
        base = torch.optim.SGD(
            [{"params": model.stem.parameters()}, {"params": model.fc.parameters(), "lr": 0.1}], lr=0.1
        )
        base.param_groups[1]["lr"] = None  # Adafactor finds its own
        with pytest.raises(ValueError, match=f"projection='{projection}'.*group 1.*projection='timed'"):
            build(model, base, projection=projection)
        with pytest.raises(ValueError, match="nothing to prune"):  # which comes later
            build(model, base)


def test_numbers_of_numpy_are_taken_and_leave_plain_checkpoints(tmp_path):
    options = {
        "target_flops": np.float32(0.5), "total_steps": np.int64(200), "interval": np.int64(2), "seed": np.int32(1),
        "pull_time": np.float64(0.1), "controller_lr": np.float32(1e-2), "controller_weight_decay": np.float32(1e-2),
        "min_width": np.float64(0.1), "streams": np.float32(0.5), "round_to": np.int8(2), "gamma": np.float64(8),
        "beta": np.float32(0.25), "epsilon": np.float64(0.1), "penalty": np.array([10.0, 1000.0]),
        "phases": np.array([0.1, 0.3, 0.32]),
    }  # fmt: skip
    optimizer = build(**options)
    torch.save(optimizer.state_dict(), tmp_path / "state.pt")
    build(**options).load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True))


def test_a_checkpoint_of_another_cut_is_refused_and_nothing_is_changed():
    states = []
    for skip in (0, 7):
        model, optimizer = make()
        with torch.no_grad():
            optimizer.search.controller.head.mul_(1 + skip)
        train(model, optimizer, 60, skip=skip)
        optimizer.compress()
        states.append((model, optimizer))
    (_, one), (_, other) = states
    assert one.cut != other.cut
    with pytest.raises(ValueError, match="another cut"):
        one.load_state_dict(other.state_dict())


def test_compress_before_its_time_says_how_many_steps_are_missing():
    model, optimizer = make()
    train(model, optimizer, 7)
    with pytest.raises(ValueError, match="12 step.*step 7 of total_steps=60"):
        optimizer.compress()


def test_a_frozen_layer_is_left_alone():
    model = Residual()
    model.one[0].weight.requires_grad_(False)
    report = build(model, target_flops=0.9).report()
    assert any("frozen" in reason for _, reason in report.left_out)


def test_ignored_layers_by_name_and_by_module():
    model = Residual()
    for layer in ("one", model.one[0]):
        report = build(copy.deepcopy(model) if layer == "one" else model, ignored_layers=[layer]).report()
        assert (("one.0",), "is named in ignored_layers") in report.left_out


class Routed(torch.nn.Module):
    """Takes another layer for some inputs."""

    def __init__(self):
        super().__init__()
        self.stem, self.one, self.two = torch.nn.Conv2d(3, 8, 1), torch.nn.Conv2d(8, 4, 1), torch.nn.Conv2d(8, 4, 1)

    def forward(self, x):
        return (self.one if x.mean() > 0 else self.two)(self.stem(x).relu())


class Detached(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b = torch.nn.Conv2d(3, 8, 1), torch.nn.Conv2d(8, 4, 1)

    def forward(self, x):
        return self.b(self.a(x)).detach()


class Lazy(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b = torch.nn.LazyConv2d(8, 1), torch.nn.Conv2d(8, 4, 1)

    def forward(self, x):
        return self.b(self.a(x))


def scattered():
    model = Routed()
    model.two.to("meta")
    return model


def quantized():
    return torch.nn.Sequential(torch.nn.Conv2d(3, 8, 1), torch.ao.nn.quantized.Linear(8, 4))


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (Routed, "'(one|two)' for some inputs only.*forward_fn"),
        (Detached, "no output with a gradient.*forward_fn"),
        (Lazy, "'a' .LazyConv2d. is lazy: run one forward"),
        (scattered, "stem on cpu, two on meta"),
        (quantized, "'1' .Linear. is quantized"),
        (lambda: torch.jit.script(torch.nn.Sequential(torch.nn.Conv2d(3, 8, 1))), "torch.jit"),
    ],
)
@pytest.mark.filterwarnings("ignore")
def test_models_that_cannot_be_followed_are_refused_by_module(model, message):
    model = model()
    base = torch.optim.SGD(model.parameters(), lr=0.1)
    with pytest.raises((TypeError, ValueError), match=message):
        ATO(base, model, torch.randn(2, 3, 16, 16), target_flops=0.5, total_steps=10)
    assert not model._forward_pre_hooks and not model._forward_hooks


def test_a_model_that_was_moved_after_is_refused_in_the_first_step():
    model, optimizer = make()
    model.to("meta")
    with pytest.raises(ValueError, match="model was moved after ATO was built, from cpu.*to meta: move it before"):
        optimizer.step()
    model, optimizer = make(target_flops=1)  # which has no masks
    model.to("meta")
    optimizer.step()


def test_an_average_in_the_model_is_cut_as_another_instance():
    """Closed channels have decayed in it, and are not zero."""
    model, optimizer = make()
    average = torch.optim.swa_utils.AveragedModel(model, avg_fn=lambda mean, now, _: 0.9 * mean + 0.1 * now)
    for _ in range(60):
        train(model, optimizer, 1)
        average.update_parameters(model)
    model.load_state_dict(average.module.state_dict())
    with pytest.raises(ValueError, match=r"an average.*is cut by compress\(model=copy\.deepcopy\(model\)\)"):
        optimizer.compress()
    small = optimizer.compress(model=copy.deepcopy(model))
    assert [p.shape for p in small.parameters()] == [p.shape for p in optimizer.compress(average).parameters()]


def test_fully_sharded_data_parallel_is_named():
    """It is built on an accelerator alone: here its shell."""
    inner = Residual()
    model = FullyShardedDataParallel.__new__(FullyShardedDataParallel)
    nn.Module.__init__(model)
    model._fsdp_wrapped_module = inner
    with pytest.raises(
        ValueError, match=r"by FullyShardedDataParallel, which.*use torch\.distributed\.fsdp\.fully_shard"
    ):
        build(model, torch.optim.SGD(inner.parameters(), lr=0.1))


def test_walks_of_the_graph_are_limited(monkeypatch):
    monkeypatch.setattr("ato_optim.graph.MOST_PLACES", 3)
    model = Residual()
    base = torch.optim.SGD(model.parameters(), lr=0.1)
    with pytest.raises(ValueError, match=r"more than is followed \(3 places\), up to \w+"):
        ATO(base, model, torch.randn(2, 3, 16, 16), target_flops=0.5, total_steps=10)
