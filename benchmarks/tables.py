"""Turn the JSON files of benchmarks/results/ into the tables and figures of docs/ and README.md.

    python benchmarks/tables.py

What stands in a page between <!-- NAME --> and <!-- end --> is written anew; the rest is prose.
"""

from typing import Any

from earlier_tables import at_once_tables, experiments_tables
from figures import draw_accuracy, draw_layers, draw_report
from pages import fill, percent
from result_tables import (
    PAPER,
    WHOLE,
    by_length,
    by_value,
    commands,
    comparison,
    equal_cost,
    other_cuts,
    paper_scale,
    removal,
    run_commands,
    run_costs,
    step_cost,
    summary,
    variants,
)
from runs import ROOT, Runs, beside_controls, budgets, load, of
from zoo_tables import load_zoo, zoo_tables

FIGURES = ROOT / "docs" / "figures"


def all_settings(cifar: Runs, float32: Runs) -> dict[str, dict[str, Runs]]:
    """What was trained, by setting and method; `cifar` and `float32` are the runs of ResNet-20 in 16 epochs."""
    settings: dict[str, dict[str, Runs]] = {}
    for budget, methods in budgets(cifar).items():
        share = percent(float(budget))
        whole = load(f"control-streams-{share.removesuffix(' %')}-")
        settings[f"ResNet-20, {share}, 16 epochs"] = {**methods, WHOLE: whole}
    settings["ResNet-20, 45 %, 16 epochs, float32"] = budgets(float32)["0.45"]
    for epochs in (32, 64):
        runs = load(f"epochs{epochs}-resnet20-") + load(f"gradual-epochs{epochs}-")
        settings[f"ResNet-20, 45 %, {epochs} epochs"] = budgets(runs)["0.45"]
    for name, model in (("ResNet-56", "resnet56"), ("VGG-11", "vgg11_bn")):
        settings[f"{name}, 45 %, 16 epochs"] = budgets(beside_controls(model, "gradual"))["0.45"]
    return settings


def length_tables(at_45: dict[str, Runs]) -> dict[str, str]:
    """What the methods come to in runs of several lengths; `at_45` are the runs of 16 epochs by method."""
    controls = {
        method: at_45[method] + [run for epochs in (32, 64, 128) for run in load(f"epochs{epochs}-resnet20-{method}-")]
        for method in ("dense", "narrow", "magnitude")
    }
    once, early = budgets(load("cut50-resnet20-"))["0.45"]["ato"], budgets(load("cut09-resnet20-"))["0.45"]["ato"]
    tried = {
        "ato": at_45["ato"] + load("gradual-epochs32-") + load("gradual-epochs64-"),
        "ato, until 0.7": load("gradual70-"),
        "narrow in its blocks": load("uniform-epochs64-"),
        "at once, at 0.7": load("cut70-epochs64-"),
        "at once, at 0.5": once + load("cut50-epochs"),
        "at once, at 0.3": load("cut30-epochs64-"),
        "at once, at 0.09": early + load("cut09-epochs32-") + load("cut09-epochs64-"),
        "at once, at 0.5, beta=0": load("beta0-cut50-epochs64-"),
        "at once, at 0.09, beta=0": load("beta0-epochs32-"),
    }
    methods = controls | tried
    made = [run for runs in methods.values() for run in runs if run["arguments"]["epochs"] > 16] + load("gradual70-")
    return {"lengths": by_length(methods, seed=0), "lengths commands": commands(made)}


def cost_tables(at_45: dict[str, Runs]) -> dict[str, str]:
    """What runs are worth at equal cost of training, and widths by themselves; `at_45` are those of 16 epochs."""
    longer, narrow = load("gradual-epochs22-"), load("epochs26-resnet20-narrow-")
    scratch, cut, found = load("gradual-scratch-"), load("gradual-widths-"), "ato's run, a few channels at a time"
    ways = {found: at_45["ato"], "small from the start": scratch, "whole until half time, cut by magnitude": cut}
    pairs = (
        ("dense", at_45["dense"], longer),
        ("narrow", narrow, at_45["ato"]),
        ("magnitude", at_45["magnitude"], at_45["ato"]),
    )
    return {
        "equal cost": equal_cost(pairs),
        "own widths": variants("how a network comes to these widths", ways, found),
        "cost commands": commands(longer + narrow + scratch + cut),
    }


def network_tables(costs: dict[str, Any], default: Runs) -> dict[str, str]:
    """Today's default on other networks, and one change of it at a time.

    `costs` are those of run_cost.py, `default` the runs of 16 epochs.
    """
    ablation, longer = load("gradual8-"), load("gradual16-")
    tables = {
        "ablation": variants("change", by_value(ablation), "default"),
        "ablation 16": variants("change", by_value(longer) | {"default": default}, "default"),
        "ablation commands": commands(ablation + longer),
    }
    for place, model in (("vgg", "vgg11_bn"), ("deeper", "resnet56")):
        runs = beside_controls(model, "gradual")
        found = {place: comparison(runs), f"{place} removal": removal(of("ato", runs), costs)}
        tables |= {**found, f"{place} commands": commands(runs)}
    return tables


def results_tables(cifar: Runs) -> dict[str, str]:
    """All of docs/results.md; `cifar` are the runs of ResNet-20 that the comparison shows."""
    controls, costs = load("control-") + load("steps-"), run_costs(load("gradual-run_cost"))
    float32 = load("float32-resnet20-")
    at_45 = budgets(cifar)["0.45"]
    return {
        "summary": summary(all_settings(cifar, float32)),
        "comparison": comparison(cifar),
        "commands": commands(cifar),
        "removal": removal(of("ato", cifar), costs),
        "run cost": run_commands(load("gradual-run_cost")),
        "float32": comparison(float32),
        "float32 commands": commands(float32),
        "controls": other_cuts(controls, cifar),
        "control commands": commands(controls),
        **length_tables(at_45),
        **cost_tables(at_45),
        **network_tables(costs, at_45["ato"]),
        "paper scale": paper_scale({model: load(f"cifar10-{model}-") for model, *_ in PAPER}),
        "step cost": step_cost(),
    }


def main() -> None:
    FIGURES.mkdir(exist_ok=True)
    before = load("cifar10-resnet20-")
    controls = [run for run in before if run["arguments"]["method"] not in ("random", "ato")]
    chance = load("gradual-random-resnet20-")
    cifar = controls + chance + load("gradual-epochs16-") + load("gradual-percent30-")
    tables = results_tables(cifar)
    fill(ROOT / "docs" / "results.md", tables)
    fill(ROOT / "docs" / "at_once.md", at_once_tables(controls))
    fill(ROOT / "docs" / "experiments.md", experiments_tables(before))
    fill(ROOT / "docs" / "models.md", zoo_tables(load_zoo()))
    fill(ROOT / "README.md", {name: tables[name] for name in ("comparison", "summary")})
    draw_accuracy(cifar, FIGURES / "accuracy.png")
    at_45 = budgets(cifar)["0.45"]
    draw_report(at_45["ato"][0], FIGURES / "widths.png")
    draw_layers([run for members in at_45.values() for run in members], FIGURES / "layers.png")


if __name__ == "__main__":
    main()
