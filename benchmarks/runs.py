"""Finished runs of train.py: reading them, showing one, grouping them, and statistics over their seeds."""

import json
import statistics
from collections import defaultdict
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent
METHODS = {
    "dense": "#555b61",
    "narrow": "#e08214",
    "magnitude": "#7b3294",
    "random": "#4d9221",
    "norms": "#c51b7d",
    "ato": "#2166ac",
}
"""Method of train.py -> its colour in figures."""

BEFORE = {"cut_at": 0.5, "cuts": 1}
"""What runs did that are older than the argument: their files do not name it."""

Runs = list[dict[str, Any]]


def load(prefix: str) -> Runs:
    """What the files hold whose name begins with `prefix`, with their name."""
    paths = sorted((ROOT / "benchmarks" / "results").glob(f"{prefix}*.json"))
    return [{"name": path.stem, **json.loads(path.read_text())} for path in paths]


def of(method: str, runs: Runs) -> Runs:
    """Those of `runs` that were trained by `method`."""
    return [run for run in runs if run["arguments"]["method"] == method]


def beside_controls(model: str, default: str) -> Runs:
    """Runs of `model` in 16 epochs: thin, cut by magnitude, and of ato with the default that its files begin with."""
    controls = load(f"epochs16-{model}-")
    return of("narrow", controls) + of("magnitude", controls) + load(f"{default}-{model}-")


def mean(values: list[float], form: str = "{:.2f}") -> str:
    """The mean, with the standard deviation where there is more than one value."""
    text = form.format(statistics.mean(values))
    return f"{text} ± {form.format(statistics.stdev(values))}" if len(values) > 1 else text


def argument(run: dict[str, Any], key: str) -> Any:
    """The value of an argument of train.py's; "" where it had no such yet and nothing went in its place."""
    return run["arguments"].get(key, BEFORE.get(key, ""))


def grouped(runs: Runs, *keys: str) -> dict[tuple[str, ...], Runs]:
    """`runs` by the values of some of their arguments, in the order of METHODS."""
    groups: dict[tuple[str, ...], Runs] = defaultdict(list)
    for run in sorted(runs, key=lambda run: list(METHODS).index(run["arguments"]["method"])):
        groups[tuple(str(argument(run, key)) for key in keys)].append(run)
    return groups


def by_seed(runs: Runs) -> dict[int, float]:
    """The accuracy of each seed; one that was run more than once counts with its mean."""
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


def show(result: dict[str, Any]) -> str:
    """The result as a table for a terminal."""
    at_cut = result["at_cut"]
    rows = [("", "trained", "compressed")]
    if at_cut:
        ms = at_cut["latency_ms"]
        rows.append(
            ("test accuracy at the cut, %", f"{at_cut['accuracy_before']:.2f}", f"{at_cut['accuracy_after']:.2f}")
        )
        rows.append(("latency of 64 images, ms", f"{ms['before']:.2f}", f"{ms['after']:.2f}"))
    rows.append(("MACs", f"{result['dense_macs']:,}", f"{result['macs']:,} ({result['macs_kept']:.1%})"))
    rows.append(("parameters", f"{result['dense_parameters']:,}", f"{result['parameters']:,}"))
    rows.append(("final test accuracy, %", "", f"{result['accuracy']:.2f}"))
    lines = [f"{name:28s} {before:>12s} {after:>20s}" for name, before, after in rows]
    if at_cut:
        lines.append(
            f"largest difference of their logits: {at_cut['largest_logit_difference']:.1e}"
            f" (largest logit {at_cut['largest_logit']:.1f})"
        )
    return "\n".join(lines)


def training(run: dict[str, Any]) -> float:
    """MACs of the training over those of a dense run: the whole network up to the cut, what is kept after it.

    Of several equal cuts each share of the network that goes counts up to its own, on the mean.
    """
    if run["at_cut"]:
        dense = run["at_cut"]["step"] / run["report"]["total_steps"]
    else:
        dense = {"dense": 1.0, "narrow": 0.0, "magnitude": argument(run, "cut_at")}[run["arguments"]["method"]]
        dense *= (1 + 1 / argument(run, "cuts")) / 2
    return dense + (1 - dense) * run["macs_kept"]


def phases(report: dict[str, Any]) -> tuple[int, ...]:
    """First steps of search, commit and zero; files by commit dbd4340 name the pull's, too, which is the search's."""
    return tuple(sorted({*report["boundaries"]}))


def budgets(runs: Runs) -> dict[str, dict[str, Runs]]:
    """Budget -> method -> runs; the dense network, which has none, is found under every budget, if it was trained."""
    dense = [run for run in runs if run["arguments"]["method"] == "dense"]
    found: dict[str, dict[str, Runs]] = {}
    for (budget, method), members in grouped(runs, "target_flops", "method").items():
        if method != "dense":
            found.setdefault(budget, {"dense": dense} if dense else {})[method] = members
    return dict(sorted(found.items(), reverse=True))
