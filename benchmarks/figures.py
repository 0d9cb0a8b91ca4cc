"""Figures of finished runs, for docs/results.md."""

import statistics
from collections import defaultdict
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure
from runs import METHODS, Runs, budgets, by_seed, grouped, phases

from ato_optim import Report, Width


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
    Report(**{**fields, "widths": widths, "boundaries": phases(fields)}).figure().savefig(path, dpi=150)
