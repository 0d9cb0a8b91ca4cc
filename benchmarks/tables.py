"""Turn the JSON files of benchmarks/results/ into the tables and figures of docs/results.md and README.md.

    python benchmarks/tables.py

What stands in a page between <!-- NAME --> and <!-- end --> is written anew; the rest is prose.
"""

import json
import re
import statistics
from collections import defaultdict
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from ato_optim import Report, Width

ROOT = Path(__file__).parent.parent
FIGURES = ROOT / "docs" / "figures"
METHODS = {"dense": "#555b61", "narrow": "#e08214", "magnitude": "#7b3294", "random": "#4d9221", "ato": "#2166ac"}

PAPER = (
    ("resnet56", 0.45, "+0.24"),
    ("resnet56", 0.35, "-0.02"),
    ("mobilenet_v2", 0.54, "+0.33"),
    ("resnet18", 0.2, "+0.10"),
)
"""Networks and budgets of Wu et al. 2024 on CIFAR-10, and the change of accuracy that they report."""
DENSE_UNTIL = {"dense": 1.0, "narrow": 0.0, "magnitude": 0.5}
"""Share of the run in which the whole network is trained; ATO's runs say it themselves."""

Runs = list[dict[str, Any]]


def load(prefix: str) -> Runs:
    """Finished runs of train.py whose file name begins with `prefix`, with their name."""
    paths = sorted((ROOT / "benchmarks" / "results").glob(f"{prefix}*.json"))
    return [{"name": path.stem, **json.loads(path.read_text())} for path in paths]


def mean(values: list[float], form: str = "{:.2f}") -> str:
    """The mean, with the standard deviation where there is more than one value."""
    text = form.format(statistics.mean(values))
    return f"{text} ± {form.format(statistics.stdev(values))}" if len(values) > 1 else text


def grouped(runs: Runs, *keys: str) -> dict[tuple[str, ...], Runs]:
    """`runs` by the values of some of their arguments, in the order of METHODS."""
    groups: dict[tuple[str, ...], Runs] = defaultdict(list)
    for run in sorted(runs, key=lambda run: list(METHODS).index(run["arguments"]["method"])):
        groups[tuple(str(run["arguments"][key]) for key in keys)].append(run)
    return groups


def by_seed(runs: Runs) -> dict[int, float]:
    """The accuracy of each seed; one that was run more than once, in other precisions say, counts with its mean."""
    found: dict[int, list[float]] = defaultdict(list)
    for run in runs:
        found[run["arguments"]["seed"]].append(run["accuracy"])
    return {seed: statistics.mean(values) for seed, values in found.items()}


def lead(runs: Runs, others: Runs) -> list[float]:
    """What `runs` are ahead of `others` in accuracy, seed by seed: both saw the same data in the same order."""
    mine, theirs = by_seed(runs), by_seed(others)
    return [mine[seed] - theirs[seed] for seed in sorted(mine.keys() & theirs.keys())]


def with_error(values: list[float]) -> str:
    """The mean with its sign, and its standard error where there is more than one value."""
    if not values:
        return ""
    error = f" ± {statistics.stdev(values) / len(values) ** 0.5:.2f}" if len(values) > 1 else ""
    return f"{statistics.mean(values):+.2f}{error}"


def training(run: dict[str, Any]) -> float:
    """MACs of the training over those of a dense run: the whole network up to the cut, what is kept after it."""
    method = run["arguments"]["method"]
    dense = DENSE_UNTIL[method] if method in DENSE_UNTIL else run["at_cut"]["step"] / run["report"]["total_steps"]
    return dense + (1 - dense) * run["macs_kept"]


def budgets(runs: Runs) -> dict[str, dict[str, Runs]]:
    """Budget -> method -> runs; the dense network, which has none, is found under every budget."""
    dense = [run for run in runs if run["arguments"]["method"] == "dense"]
    found: dict[str, dict[str, Runs]] = {}
    for (budget, method), members in grouped(runs, "target_flops", "method").items():
        if method != "dense":
            found.setdefault(budget, {"dense": dense})[method] = members
    return dict(sorted(found.items(), reverse=True))


def comparison(runs: Runs) -> str:
    """One row a budget and method: accuracy, change against dense, lead of ato, what is kept, cost of training."""
    rows = [
        "| budget | method | test accuracy, % | change | ato is ahead by | MACs kept | parameters kept | "
        "MACs of training | n |",
        "| --- | --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    for budget, methods in budgets(runs).items():
        rows += [f"| {100 * float(budget):.0f} % | {' | '.join(cells(method, methods))} |" for method in methods]
    return "\n".join(rows)


def cells(method: str, methods: dict[str, Runs]) -> list[str]:
    """A method's row of the comparison, without the budget; `methods` are all that have the same budget."""
    members = methods[method]
    return [
        method,
        mean(list(by_seed(members).values())),
        "" if method == "dense" else with_error(lead(members, methods["dense"])),
        "" if method in ("dense", "ato") else with_error(lead(methods.get("ato", []), members)),
        mean([100 * run["macs_kept"] for run in members], "{:.1f}") + " %",
        mean([100 * run["parameters"] / run["dense_parameters"] for run in members], "{:.1f}") + " %",
        f"{100 * statistics.mean(training(run) for run in members):.0f} %",
        f"{len(by_seed(members))}",
    ]


def paper_scale(runs: dict[str, Runs]) -> str:
    """The comparison for the networks of the paper's CIFAR-10 table, by model; cells without runs stay empty."""
    rows = [
        "| model | budget | paper's change | method | test accuracy, % | change | ato is ahead by | MACs kept | "
        "parameters kept | MACs of training | n |",
        "| --- | --- | --- | --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    for model, budget, change in PAPER:
        methods = budgets(runs[model]).get(str(budget), {})
        for method in ("dense", "narrow", "magnitude", "ato"):
            found = cells(method, methods) if methods.get(method) else [method, *[""] * 7]
            rows.append(f"| {model} | {100 * budget:.0f} % | {change} | {' | '.join(found)} |")
    return "\n".join(rows)


def ablation(runs: Runs) -> str:
    """One row a change of the default: accuracy, and what the default is ahead, seed by seed."""
    rows = ["| change of the default | test accuracy, % | the default is ahead by | n |", "| --- | --- | --- | --- |"]
    groups = grouped(runs, "method", "early", "ato")
    default = groups[("ato", "True", "{}")]
    for (method, early, ato), members in groups.items():
        changes = [*(["random"] if method == "random" else []), *(["removed at the end"] if early == "False" else [])]
        changes += [f"`{json.dumps(members[0]['arguments']['ato'])}`"] if ato != "{}" else []
        ahead = "" if members is default else with_error(lead(default, members))
        accuracy = mean([run["accuracy"] for run in members])
        rows.append(f"| {', '.join(changes) or 'none'} | {accuracy} | {ahead} | {len(members)} |")
    return "\n".join(rows)


def removal(runs: Runs, costs: dict[str, Any]) -> str:
    """What the cut changed and what it saves, of the runs of ATO; `costs` are those of run_cost.py, by name."""
    rows = [
        "| run | step of the cut | accuracy before, % | after, % | largest logit | largest difference | "
        "latency before, ms | after, ms | time over SGD's, cut early | cut at the end |",
        "| --- | --- | --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    for run in runs:
        cut, a, ms = run["at_cut"], run["arguments"], run["at_cut"]["latency_ms"]
        time = costs.get(run["name"], {}).get("run", {})
        early, late = (f"{time[key]:.2f}" if time else "" for key in ("early", "at the end"))
        rows.append(
            f"| {a['model']}, {100 * a['target_flops']:.0f} %, {a['method']}, seed {a['seed']} | {cut['step']} | "
            f"{cut['accuracy_before']:.2f} | {cut['accuracy_after']:.2f} | {cut['largest_logit']:.1f} | "
            f"{cut['largest_logit_difference']:.1e} | {ms['before']:.1f} | {ms['after']:.1f} | {early} | {late} |"
        )
    return "\n".join(rows)


def projections(runs: Runs) -> str:
    """One row a projection operator."""
    rows = ["| projection | test accuracy, % | n |", "| --- | --- | --- |"]
    for name in ("timed", "proximal", "halfspace"):
        accuracy = [run["accuracy"] for run in runs if run["arguments"]["ato"].get("projection", "timed") == name]
        rows.append(f"| {name} | {mean(accuracy)} | {len(accuracy)} |")
    return "\n".join(rows)


def step_cost() -> str:
    """The ratios of step_cost.py."""
    result = json.loads((ROOT / "benchmarks" / "results" / "step_cost.json").read_text())
    rows = ["| step | median, ms | over SGD |", "| --- | --- | --- |"]
    rows += [f"| {name} | {ms} | {result['ratio_to_SGD'][name]:.3f} |" for name, ms in result["milliseconds"].items()]
    setting = f"{result['model']}, batch {result['batch']}, {result['size']} x {result['size']}, {result['hardware']}"
    return "\n".join([*rows, "", f"{setting}, n = {result['n']}: `{result['command']}`"])


def setting(run: dict[str, Any]) -> str:
    """Hardware, precision and versions of a run."""
    versions = run["versions"]
    return (
        f"{run['hardware']}, {run['precision'].removeprefix('torch.')}, torch {versions['torch']}, "
        f"torchvision {versions['torchvision']}, torch-pruning {versions['torch_pruning']}"
    )


def commands(runs: Runs) -> str:
    """The commands that made `runs`, under the hardware, precision and versions that they ran with."""
    parts = []
    for found in sorted({setting(run) for run in runs}):
        lines = [f"- `{run['command']}`" for run in runs if setting(run) == found]
        parts.append("\n".join([f"On {found}:", "", *lines]))
    return "\n\n".join(parts)


def load_zoo() -> dict[str, Any]:
    """What zoo.py measured."""
    return json.loads((ROOT / "benchmarks" / "results" / "zoo.json").read_text())


def zoo(models: dict[str, dict[str, Any]]) -> str:
    """One row a model."""
    rows = [
        "| model | groups | prunable MACs | least budget | kept of asked | largest difference | MACs as predicted | "
        "exports | construction, s |",
        "| --- | --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    for name, found in models.items():
        if "difference" not in found:
            rows.append(f"| {name} | not pruned: {found.get('refused') or found['error']} |  |  |  |  |  |  |  |")
            continue
        exports = "yes" if found["exports"] else "**no**" if found["dense_exports"] else "nor does the dense one"
        rows.append(
            f"| {name} | {found['groups']} | {found['covered']:.1%} | {found['least']:.3f} | "
            f"{found['kept']:.4f} of {found['budget']:.4f} | {found['difference']:.0e} | "
            f"{'yes' if found['predicted_macs'] == found['measured_macs'] else '**no**'} | {exports} | "
            f"{found['seconds']:.1f} |"
        )
    return "\n".join(rows)


def zoo_summary(models: dict[str, dict[str, Any]]) -> str:
    """What holds of how many models."""
    pruned = [found for found in models.values() if "difference" in found]
    exact = sum(found["difference"] <= 1e-4 for found in pruned)
    met = sum(0.99 * found["budget"] <= found["kept"] <= found["budget"] for found in pruned)
    predicted = sum(found["predicted_macs"] == found["measured_macs"] for found in pruned)
    lost = sum(not found["exports"] and found["dense_exports"] for found in pruned)
    apart = max(found["difference"] for found in pruned)
    least, seconds = ([found[key] for found in pruned] for key in ("least", "seconds"))
    lines = [
        f"{len(models)} models, {len(pruned)} pruned:",
        "",
        f"- {exact} exact to 1e-4 of the largest output; the largest difference is {apart:.0e};",
        f"- {met} at most at their budget and less than 1 % below it;",
        f"- {predicted} with the MACs that were predicted, to the unit;",
        f"- least budget {statistics.median(least):.3f} in the median, {max(least):.3f} at the most;",
        f"- planned (graph, groups, trial) in {statistics.median(seconds):.1f} s in the median, {max(seconds):.1f} at "
        "the longest (one thread of a busy machine);",
        f"- {lost} that cannot be exported although the dense model can.",
    ]
    return "\n".join(lines)


def zoo_reasons(models: dict[str, dict[str, Any]]) -> str:
    """Why layers are left alone, and in how many models and layers."""
    found: dict[str, list[int]] = defaultdict(list)
    for model in models.values():
        merged: dict[str, int] = defaultdict(int)
        for reason, layers in model.get("left_out", {}).items():
            merged[re.sub(r"\(.*\)$|(?<= at ).*|(?<=channels where ).*", "...", re.sub(r"\d+", "n", reason))] += layers
        for reason, layers in merged.items():
            found[reason].append(layers)
    rows = ["| the layer ... | models | layers |", "| --- | --- | --- |"]
    most = sorted(found.items(), key=lambda item: -len(item[1]))
    return "\n".join([*rows, *(f"| {reason} | {len(layers)} | {sum(layers)} |" for reason, layers in most)])


def draw_accuracy(runs: Runs, path: Path) -> None:
    """Accuracy against the share of MACs that is kept: means over seeds, with the standard deviation."""
    figure = Figure(figsize=(6, 3.8), layout="constrained")
    axes = figure.subplots()
    points: dict[str, list[Runs]] = defaultdict(list)
    for methods in budgets(runs).values():
        for method, members in methods.items():
            if members not in points[method]:
                points[method].append(members)
    for method, settings in points.items():
        macs = [100 * statistics.mean(run["macs_kept"] for run in members) for members in settings]
        accuracy = [list(by_seed(members).values()) for members in settings]
        means = [statistics.mean(values) for values in accuracy]
        deviations = [statistics.stdev(values) if len(values) > 1 else 0.0 for values in accuracy]
        axes.errorbar(macs, means, deviations, color=METHODS[method], marker="o", capsize=3, linewidth=1, label=method)
    axes.set_xlim(0, 105)
    axes.set_xlabel("% of dense MACs")
    axes.set_ylabel("test accuracy, %")
    axes.grid(color="#e5e7e9", linewidth=0.6)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False, fontsize=9)
    figure.savefig(path, dpi=150)


def draw_layers(runs: Runs, path: Path) -> None:
    """Share of each layer's channels that every method keeps, mean over seeds, from the stem to the classifier."""
    figure = Figure(figsize=(9, 3.8), layout="constrained")
    axes = figure.subplots()
    groups = {method: members for (method,), members in grouped(runs, "method").items()}
    whole = groups["dense"][0]["widths"]
    for method, members in groups.items():
        shares = [statistics.mean(run["widths"][name] for run in members) / width for name, width in whole.items()]
        axes.plot(range(len(whole)), [100 * share for share in shares], color=METHODS[method], marker=".", label=method)
    axes.set_xticks(range(len(whole)), list(whole), rotation=90, fontsize=7)
    axes.set_ylim(0, 105)
    axes.set_ylabel("% of the channels kept")
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False, fontsize=9)
    figure.savefig(path, dpi=150)


def draw_report(run: dict[str, Any], path: Path) -> None:
    """The figure of a run's own report."""
    fields = run["report"]
    widths = tuple(Width(**width) for width in fields["widths"])
    Report(**{**fields, "widths": widths}).figure().savefig(path, dpi=150)


def fill(page: Path, tables: dict[str, str]) -> None:
    """Write `tables` into their places in `page`."""
    text = page.read_text()
    for name, table in tables.items():
        pattern = re.compile(rf"(<!-- {name} -->\n).*?(<!-- end -->)", re.DOTALL)
        assert pattern.search(text), f"{page} has no place for: {name}"
        text = pattern.sub(lambda match, table=table: match[1] + table + "\n" + match[2], text)
    page.write_text(text)


def main() -> None:
    FIGURES.mkdir(exist_ok=True)
    cifar, digits, ablations = load("cifar10-resnet20-"), load("digits-"), load("ablation-")
    ato = [run for run in cifar if run["arguments"]["method"] == "ato"]
    costs = json.loads((ROOT / "benchmarks" / "results" / "run_cost.json").read_text())
    tables = {
        "comparison": comparison(cifar),
        "paper scale": paper_scale({model: load(f"cifar10-{model}-") for model, *_ in PAPER}),
        "removal": removal(ato, costs["runs"]),
        "run cost": f"`{costs['command']}`, {costs['hardware']}, torch {costs['versions']['torch']}",
        "commands": commands(cifar),
        "projections": projections(digits),
        "projection commands": commands(digits[:1]),
        "step cost": step_cost(),
    }
    if ablations:
        tables |= {"ablation": ablation(ablations), "ablation commands": commands(ablations)}
    fill(ROOT / "docs" / "results.md", tables)
    whole_zoo = load_zoo()
    models = whole_zoo["models"]
    made = f"`{whole_zoo['command']}`, " + ", ".join(
        f"{package} {number}" for package, number in whole_zoo["versions"].items()
    )
    zoo_tables = {
        "zoo": zoo(models),
        "zoo reasons": zoo_reasons(models),
        "zoo summary": zoo_summary(models),
        "zoo command": made,
    }
    fill(ROOT / "docs" / "models.md", zoo_tables)
    fill(ROOT / "README.md", {"comparison": tables["comparison"]})
    draw_accuracy(cifar, FIGURES / "accuracy.png")
    draw_report(ato[0], FIGURES / "widths.png")
    methods = next(iter(budgets(cifar).values()))
    # The first runs were made before widths were recorded.
    draw_layers([run for members in methods.values() for run in members if "widths" in run], FIGURES / "layers.png")


if __name__ == "__main__":
    main()
