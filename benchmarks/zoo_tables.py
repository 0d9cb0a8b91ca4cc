"""The tables of docs/models.md, from what zoo.py measured."""

import json
import re
import statistics
from collections import defaultdict
from typing import Any

from runs import ROOT


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


def zoo_tables(measured: dict[str, Any]) -> dict[str, str]:
    """All of docs/models.md from what zoo.py measured."""
    models, versions = measured["models"], measured["versions"].items()
    return {
        "zoo": zoo(models),
        "zoo reasons": zoo_reasons(models),
        "zoo summary": zoo_summary(models),
        "zoo command": ", ".join(
            [f"`{measured['command']}`", *(f"{package} {number}" for package, number in versions)]
        ),
    }
