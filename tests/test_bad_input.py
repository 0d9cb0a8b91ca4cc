"""Every mistake is met before training, by an error that names the argument, its value and the way out."""

import copy
import re

import pytest
import torch
from networks import Residual, example
from test_optimizer import make, train
from torch import nn

from ato_optim import ATO


def build(model=None, base=None, inputs=None, **options):
    model = Residual() if model is None else model
    base = torch.optim.SGD(model.parameters(), lr=0.1) if base is None else base
    inputs = example() if inputs is None else inputs
    return ATO(base, model, inputs, **{"target_flops": 0.5, "total_steps": 10, **options})


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
        ({"round_to": 0}, ["round_to=0"]),
        ({"interval": 0}, ["interval=0"]),
        ({"phases": (0.5, 0.1, 0.2, 0.6)}, ["phases="]),
        ({"pull_time": 0}, ["pull_time=0"]),
        ({"epsilon": 1}, ["epsilon=1"]),
        ({"gamma": -1}, ["gamma=-1"]),
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
    least = build(min_width=0.5).least_flops
    with pytest.raises(ValueError, match=f"target_flops=0.05.*{least:.4f}"):
        build(target_flops=0.05, min_width=0.5)
    build(target_flops=least + 1e-9, min_width=0.5)


def test_a_base_optimizer_of_other_parameters():
    with pytest.raises(ValueError, match="not the model's.*group 0"):
        build(base=torch.optim.SGD(Residual().parameters(), lr=0.1))


def test_types():
    for name in ("target_flops", "total_steps", "round_to"):
        with pytest.raises(TypeError, match=f"{name}='1'"):
            build(**{name: "1"})
    with pytest.raises(TypeError, match="base_optimizer is a dict"):
        build(base={})
    with pytest.raises(TypeError, match="model is a str"):
        ATO(torch.optim.SGD(Residual().parameters(), lr=0.1), "resnet18", example(), target_flops=0.5, total_steps=1)
    model = Residual()
    with pytest.raises(TypeError, match="ATO already"):
        build(model, base=build(model))


def test_nothing_to_prune():
    with pytest.raises(ValueError, match="nothing to prune.*0 is an output of the model"):
        build(nn.Sequential(nn.Linear(4, 2)), inputs=torch.randn(1, 4))


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


def test_compress_before_its_time_says_how_many_steps_are_missing():
    model, optimizer = make()
    train(model, optimizer, 7)
    with pytest.raises(ValueError, match="29 step.*step 7 of total_steps=60"):
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


def test_checkpoints_of_others():
    model, optimizer = make()
    state = optimizer.state_dict()
    for other, words in (
        (make(target_flops=0.6), "target_flops=0.5"),
        (make(total_steps=61), "total_steps=60"),
        (make(network=__import__("networks").Concat), "another model"),
    ):
        with pytest.raises(ValueError, match=words):
            other[1].load_state_dict(state)
    with pytest.raises(ValueError, match="ato"):
        optimizer.load_state_dict(optimizer.base.state_dict())
    state["ato"]["version"] = 0
    with pytest.raises(ValueError, match="version 0"):
        optimizer.load_state_dict(state)
