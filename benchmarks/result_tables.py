"""Rows of the tables of docs/: one function a table, from finished runs to Markdown."""

import json
import statistics
import textwrap
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from pages import percent, table
from runs import ROOT, Runs, budgets, by_seed, grouped, lead, load, mean, training, with_error

PAPER = (
    ("resnet56", 0.45, "+0.24"),
    ("resnet56", 0.35, "-0.02"),
    ("mobilenet_v2", 0.54, "+0.33"),
    ("resnet18", 0.2, "+0.10"),
)
"""Networks and budgets of Wu et al. 2024 on CIFAR-10, and the change of accuracy that they report."""


COMPARED = (
    "test accuracy, %", "change", "ato is ahead by", "MACs kept", "parameters kept", "MACs of training", "n",
)  # fmt: skip
"""Columns of a method in a comparison, after its name."""

WHOLE = "magnitude, streams whole"
OTHERS = ("dense", "narrow", "magnitude", WHOLE, "random")
"""What ato stands beside in a summary."""


def comparison(runs: Runs) -> str:
    """One row a budget and method: accuracy, change against dense, lead of ato, what is kept, cost of training."""
    rows = [
        [percent(float(budget)), method, *compared(method, methods)]
        for budget, methods in budgets(runs).items()
        for method in methods
    ]
    return table(["budget", "method", *COMPARED], rows)


def compared(method: str, methods: dict[str, Runs]) -> list[str]:
    """The cells COMPARED of a method; `methods` are all that have the same budget."""
    members = methods[method]
    return [
        mean(list(by_seed(members).values())),
        "" if method == "dense" else with_error(lead(members, methods.get("dense", []))),
        "" if method in ("dense", "ato") else with_error(lead(methods.get("ato", []), members)),
        mean([100 * run["macs_kept"] for run in members], "{:.1f}") + " %",
        parameters(members),
        training_cost(members),
        f"{len(by_seed(members))}",
    ]


def summary(settings: dict[str, dict[str, Runs]]) -> str:
    """One row a setting, whose runs are given by method: what ato is ahead of the others, and with how many seeds."""
    rows = []
    for setting, methods in settings.items():
        ahead = [lead(methods["ato"], methods.get(other, [])) for other in OTHERS]
        rows.append([setting, *(f"{with_error(points)} ({len(points)})" if points else "" for points in ahead)])
    return table(["ato against", *OTHERS], rows)


def parameters(runs: Runs) -> str:
    """The parameters that are kept."""
    return mean([100 * run["parameters"] / run["dense_parameters"] for run in runs], "{:.1f}") + " %"


def training_cost(runs: Runs) -> str:
    """The MACs of the training, over a dense run's."""
    return percent(statistics.mean(training(run) for run in runs))


def short(arguments: dict[str, Any]) -> str:
    """Further arguments of a run, for a cell."""
    return f"`{textwrap.shorten(json.dumps(arguments), 50, placeholder=' ...')}`" if arguments else ""


def other_cuts(controls: Runs, runs: Runs) -> str:
    """The comparison's row for each other way to cut by magnitude; `runs` are those that the comparison shows."""
    rows = []
    for budget, methods in budgets(runs).items():
        same = [run for run in controls if str(run["arguments"]["target_flops"]) == budget]
        for (cut_at, cuts, _), members in grouped(same, "cut_at", "cuts", "pruner").items():
            when = f"up to {cut_at}, {cuts} times" if cuts != "1" else cut_at
            pruner = short(members[0]["arguments"]["pruner"])
            found = compared("magnitude", {**methods, "magnitude": members})
            rows.append([percent(float(budget)), when, pruner, *found])
    return table(["budget", "cut at", "torch-pruning's arguments", *COMPARED], rows)


def streams(pruned: Runs, whole: Runs) -> str:
    """One row a budget and method that was run both ways: with residual streams pruned like the rest, and whole."""
    keys = "target_flops", "method"
    others, rows = grouped(pruned, *keys), []
    for (budget, method), members in sorted(grouped(whole, *keys).items(), reverse=True):
        before = others[budget, method]
        both = by_seed(members).keys() & by_seed(before).keys()
        ways = [mean([value for seed, value in by_seed(runs).items() if seed in both]) for runs in (before, members)]
        rows.append([percent(float(budget)), method, *ways, with_error(lead(members, before)), f"{len(both)}"])
    return table(["budget", "method", "streams pruned", "streams whole", "gain", "n"], rows)


def by_value(runs: Runs) -> dict[str, Runs]:
    """Runs by the value, or the change, that their name says: SETTING-VALUE-..."""
    groups: dict[str, Runs] = defaultdict(list)
    for run in runs:
        groups[run["name"].split("-")[1]].append(run)
    return groups


def equal_cost(pairs: Sequence[tuple[str, Runs, Runs]]) -> str:
    """One row a control: its runs beside those of ato that cost as much, in epochs of the dense network's training."""
    rows = []
    for name, *both in pairs:
        seeds = set.intersection(*(set(by_seed(runs)) for runs in both))
        control, ato = ([run for run in runs if run["arguments"]["seed"] in seeds] for runs in both)
        found = [
            [
                f"{members[0]['arguments']['epochs']}",
                f"{statistics.mean(run['arguments']['epochs'] * training(run) for run in members):.1f}",
                mean(list(by_seed(members).values())),
            ]
            for members in (control, ato)
        ]
        ahead = lead(ato, control)
        rows.append([name, *found[0], *found[1], with_error(ahead), f"{len(ahead)}"])
    measured = ["cost", "test accuracy, %"]
    return table(["control", "epochs", *measured, "ato's epochs", *measured, "ato is ahead by", "n"], rows)


def by_length(methods: dict[str, Runs], seed: int) -> str:
    """One row a method: what its training costs, and the accuracy of the run with `seed` in each number of epochs."""
    lengths = sorted({run["arguments"]["epochs"] for runs in methods.values() for run in runs})
    rows = []
    for name, runs in methods.items():
        found = [by_seed([run for run in runs if run["arguments"]["epochs"] == epochs]) for epochs in lengths]
        rows.append([name, training_cost(runs), *(mean([seeds[seed]]) if seed in seeds else "" for seeds in found)])
    return table(["method", "MACs of training", *(f"{epochs} epochs" for epochs in lengths)], rows)


def from_scratch(runs: Runs) -> str:
    """One row a model, budget and method whose widths were trained from the start: the choice without the process."""
    found: dict[tuple[str, float, str], tuple[Runs, Runs]] = defaultdict(lambda: ([], []))
    for run in runs:
        (source,) = load(Path(run["arguments"]["widths"]).stem)
        asked = source["arguments"]
        sources, members = found[asked["model"], asked["target_flops"], asked["method"]]
        sources.append(source)
        members.append(run)
    rows = []
    for (model, budget, method), pair in sorted(found.items(), key=lambda item: (item[0][0], -item[0][1], item[0][2])):
        accuracies = [mean(list(by_seed(members).values())) for members in pair]
        costs = [training_cost(members) for members in pair]
        rows.append([model, percent(budget), method, *accuracies, with_error(lead(*pair)), *costs, f"{len(pair[0])}"])
    columns = ["model", "budget", "widths of", "test accuracy of that run, %", "of its widths from scratch"]
    return table([*columns, "the run is ahead by", "MACs of its training", "of theirs", "n"], rows)


def by_widths(runs: Runs) -> dict[str, Runs]:
    """Runs by the widths inside of their blocks."""
    groups: dict[str, Runs] = defaultdict(list)
    for run in runs:
        inner = [str(width) for name, width in run["widths"].items() if name.endswith("conv1")]
        groups[f"{' '.join(inner)}, {100 * run['macs_kept']:.1f} %"].append(run)
    return groups


def variants(setting: str, groups: dict[str, Runs], default: str) -> str:
    """One row a value of `setting`, of which `default` is the one that the others stand beside."""
    rows = []
    for value, members in sorted(groups.items()):
        ahead = "" if value == default else with_error(lead(groups[default], members))
        accuracy = list(by_seed(members).values())
        rows.append([value, mean(accuracy), ahead, parameters(members), training_cost(members), f"{len(accuracy)}"])
    columns = ["test accuracy, %", "the default is ahead by", "parameters kept", "MACs of training", "n"]
    return table([setting, *columns], rows)


def removal(runs: Runs, costs: dict[str, Any]) -> str:
    """What the cut changed and what it saves, of the runs of ATO; `costs` are those of run_cost.py, by name."""
    rows = []
    for run in runs:
        cut, a, ms = run["at_cut"], run["arguments"], run["at_cut"]["latency_ms"]
        time = costs.get(run["name"], {}).get("run", {})
        precision = run["precision"].removeprefix("torch.")
        rows.append(
            [
                f"{a['model']}, {percent(a['target_flops'])}, seed {a['seed']}, {precision}",
                f"{cut['step']}",
                *(f"{cut[key]:.2f}" for key in ("accuracy_before", "accuracy_after")),
                f"{cut['largest_logit']:.1f}",
                f"{cut['largest_logit_difference']:.1e}",
                *(f"{ms[key]:.1f}" for key in ("before", "after")),
                *(f"{time[key]:.2f}" if time else "" for key in ("early", "at the end")),
            ]
        )
    measured = ["accuracy before, %", "after, %", "largest logit", "largest difference"]
    times = ["latency before, ms", "after, ms", "time over SGD's, removed at once", "at the end"]
    return table(["run", "step of the cut", *measured, *times], rows)


def run_costs(made: Runs) -> dict[str, Any]:
    """What run_cost.py measured, by the name of the run."""
    return {name: cost for one in made for name, cost in one["runs"].items()}


def run_commands(made: Runs) -> str:
    """The commands of run_cost.py."""
    return "\n".join(f"- `{one['command']}`, {one['hardware']}, torch {one['versions']['torch']}" for one in made)


def setting(run: dict[str, Any]) -> str:
    """Hardware, precision and versions of a run."""
    versions = run["versions"]
    return (
        f"{run['hardware']}, {run['precision'].removeprefix('torch.')}, torch {versions['torch']}, "
        f"torchvision {versions['torchvision']}, torch-pruning {versions['torch_pruning']}"
    )


def commands(runs: Runs) -> str:
    """The files of `runs`, what made them, and of which commit: folded, by hardware, precision and versions."""
    which = "The command of this run" if len(runs) == 1 else f"The commands of these {len(runs)} runs"
    parts = [f'<details markdown="1"><summary>{which}</summary>']
    for found in sorted({setting(run) for run in runs}):
        lines = [
            f"- `{run['name']}.json`, commit {run['versions']['commit']}: `{run['command']}`"
            for run in runs
            if setting(run) == found
        ]
        parts.append("\n".join([f"On {found}:", "", *lines]))
    return "\n\n".join([*parts, "</details>"])


def paper_scale(runs: dict[str, Runs]) -> str:
    """The comparison for the networks of the paper's CIFAR-10 table, by model; cells without runs stay empty."""
    rows = []
    for model, budget, change in PAPER:
        methods = budgets(runs[model]).get(str(budget), {})
        for method in ("dense", "narrow", "magnitude", "ato"):
            found = compared(method, methods) if methods.get(method) else [""] * len(COMPARED)
            rows.append([model, percent(budget), change, method, *found])
    return table(["model", "budget", "paper's change", "method", *COMPARED], rows)


def step_cost() -> str:
    """The ratios of step_cost.py."""
    result = json.loads((ROOT / "benchmarks" / "results" / "step_cost.json").read_text())
    rows = [[name, f"{ms}", f"{result['ratio_to_SGD'][name]:.3f}"] for name, ms in result["milliseconds"].items()]
    setting = f"{result['model']}, batch {result['batch']}, {result['size']} x {result['size']}, {result['hardware']}"
    return "\n".join(
        [table(["step", "median, ms", "over SGD"], rows), "", f"{setting}, n = {result['n']}: `{result['command']}`"]
    )
