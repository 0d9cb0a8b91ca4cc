"""Figures of finished runs, for docs/results.md."""

import statistics
from collections import defaultdict
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure
from runs import METHODS, Runs, budgets, by_seed, grouped, phases

from ato_optim import Report, Width


def offset(method: str, methods: Iterable[str]) -> float:
    """How far right of its place a method is drawn, in (-0.4, 0.4), so that none hides another."""
    names = list(methods)
    return 0.8 * (names.index(method) + 0.5) / len(names) - 0.4


def draw_accuracy(runs: Runs, path: Path) -> None:
    """Accuracy at each budget, and the dense network's: means over seeds, with the standard deviation."""
    figure = Figure(figsize=(6, 3.8), layout="constrained")
    axes = figure.subplots()
    points: dict[str, list[Runs]] = defaultdict(list)
    for methods in budgets(runs).values():
        for method, members in methods.items():
            points[method].append(members)
    dense = statistics.mean(by_seed(points.pop("dense")[0]).values())
    axes.axhline(dense, color=METHODS["dense"], linewidth=1, linestyle="--", label="dense")
    for method, settings in points.items():
        macs = [100 * statistics.mean(run["macs_kept"] for run in members) for members in settings]
        accuracy = [list(by_seed(members).values()) for members in settings]
        means = [statistics.mean(values) for values in accuracy]
        deviations = [statistics.stdev(values) if len(values) > 1 else 0.0 for values in accuracy]
        style = {"color": METHODS[method], "marker": "o", "capsize": 3, "linewidth": 1, "label": method}
        axes.errorbar([share + 2 * offset(method, points) for share in macs], means, deviations, **style)
    axes.set_xticks([100 * float(budget) for budget in budgets(runs)])
    axes.set_xlabel("budget, % of dense MACs")
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
    whole = groups.pop("dense")[0]["widths"]
    for method, members in groups.items():
        shares = [statistics.mean(run["widths"][name] for run in members) / width for name, width in whole.items()]
        places = [place + offset(method, groups) for place in range(len(whole))]
        axes.bar(places, [100 * share for share in shares], 0.8 / len(groups), color=METHODS[method], label=method)
    axes.set_xticks(range(len(whole)), list(whole), rotation=90, fontsize=7)
    axes.set_ylabel("% of the channels kept")
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False, fontsize=9, ncols=len(groups), loc="lower left", bbox_to_anchor=(0, 1))
    figure.savefig(path, dpi=150)


def draw_report(run: dict[str, Any], path: Path) -> None:
    """The figure of a run's own report."""
    fields = run["report"]
    widths = tuple(Width(**width) for width in fields["widths"])
    Report(**{**fields, "widths": widths, "boundaries": phases(fields)}).figure().savefig(path, dpi=150)
