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
METHODS = {"dense": "#555b61", "narrow": "#e08214", "magnitude": "#7b3294", "ato": "#2166ac"}

Runs = list[dict[str, Any]]


def load(prefix: str) -> Runs:
    """Finished runs of train.py whose file name begins with `prefix`."""
    paths = sorted((ROOT / "benchmarks" / "results").glob(f"{prefix}*.json"))
    return [json.loads(path.read_text()) for path in paths]


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


def comparison(runs: Runs) -> str:
    """One row a method: accuracy, change against dense, what is kept, time."""
    groups = grouped(runs, "method")
    dense = statistics.mean(run["accuracy"] for run in groups[("dense",)])
    rows = [
        "| method | test accuracy, % | change | MACs kept | parameters kept | training, s | n |",
        "| --- | --- | --- | --- | --- | --- | --- |",
    ]
    for (method,), members in groups.items():
        accuracy = [run["accuracy"] for run in members]
        change = "" if method == "dense" else f"{statistics.mean(accuracy) - dense:+.2f}"
        macs = mean([100 * run["macs_kept"] for run in members], "{:.1f}")
        parameters = mean([100 * run["parameters"] / run["dense_parameters"] for run in members], "{:.1f}")
        seconds = mean([run["seconds"] for run in members], "{:.0f}")
        rows.append(
            f"| {method} | {mean(accuracy)} | {change} | {macs} % | {parameters} % | {seconds} | {len(members)} |"
        )
    return "\n".join(rows)


def removal(runs: Runs) -> str:
    """What the cut changed, of the runs of ATO."""
    rows = [
        "| run | step of the cut | accuracy before, % | after, % | largest logit | largest difference | "
        "latency before, ms | after, ms |",
        "| --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    for run in runs:
        cut = run["at_cut"]
        if cut:
            a, ms = run["arguments"], cut["latency_ms"]
            rows.append(
                f"| {a['data']} {a['model']} seed {a['seed']} | {cut['step']} | {cut['accuracy_before']:.2f} | "
                f"{cut['accuracy_after']:.2f} | {cut['largest_logit']:.1f} | {cut['largest_logit_difference']:.1e} | "
                f"{ms['before']:.1f} | {ms['after']:.1f} |"
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


def commands(runs: Runs) -> str:
    """The commands that made `runs`, with hardware and versions."""
    lines = [f"- `{run['command']}`" for run in runs]
    seen = {
        f"{run['hardware']}, {run['precision']}, torch {run['versions']['torch']}, "
        f"torchvision {run['versions']['torchvision']}, torch-pruning {run['versions']['torch_pruning']}"
        for run in runs
    }
    return "\n".join([*lines, "", *(f"On {line}." for line in sorted(seen))])


def draw_accuracy(runs: Runs, path: Path) -> None:
    """Accuracy against the share of MACs that is kept, a point a run."""
    figure = Figure(figsize=(6, 3.8), layout="constrained")
    axes = figure.subplots()
    for (method,), members in grouped(runs, "method").items():
        macs, accuracy = zip(*((100 * run["macs_kept"], run["accuracy"]) for run in members), strict=True)
        axes.scatter(macs, accuracy, color=METHODS[method], s=40, zorder=2)
        axes.annotate(
            method, (macs[0], accuracy[0]), xytext=(7, 0), textcoords="offset points", va="center", fontsize=9
        )
    axes.set_xlim(0, 115)
    axes.set_xlabel("% of dense MACs")
    axes.set_ylabel("test accuracy, %")
    axes.grid(color="#e5e7e9", linewidth=0.6)
    axes.spines[["top", "right"]].set_visible(False)
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
    cifar, digits = load("cifar10-resnet20-"), load("digits-")
    ato = [run for run in cifar if run["arguments"]["method"] == "ato"]
    tables = {
        "comparison": comparison(cifar),
        "removal": removal(ato),
        "commands": commands(cifar),
        "projections": projections(digits),
        "projection commands": commands(digits[:1]),
        "step cost": step_cost(),
    }
    fill(ROOT / "docs" / "results.md", tables)
    fill(ROOT / "README.md", {"comparison": tables["comparison"]})
    draw_accuracy(cifar, FIGURES / "accuracy.png")
    draw_report(ato[0], FIGURES / "widths.png")


if __name__ == "__main__":
    main()
