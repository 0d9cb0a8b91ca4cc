"""The tables of docs/models.md, from what zoo.py measured."""

import json
import re
import statistics
from collections import defaultdict
from typing import Any

from pages import table
from runs import ROOT


def load_zoo() -> dict[str, Any]:
    """What zoo.py measured."""
    return json.loads((ROOT / "benchmarks" / "results" / "zoo.json").read_text())


def zoo(models: dict[str, dict[str, Any]]) -> str:
    """One row a model."""
    columns = [
        *("model", "groups", "prunable MACs", "least budget", "kept of asked", "largest difference"),
        *("MACs as predicted", "exports", "construction, s"),
    ]
    rows = []
    for name, found in models.items():
        if "difference" not in found:
            refused = f"not pruned: {found.get('refused') or found['error']}"
            rows.append([name, refused, *[""] * (len(columns) - 2)])
            continue
        rows.append(
            [
                name,
                f"{found['groups']}",
                f"{found['covered']:.1%}",
                f"{found['least']:.3f}",
                f"{found['kept']:.4f} of {found['budget']:.4f}",
                f"{found['difference']:.0e}",
                "yes" if found["predicted_macs"] == found["measured_macs"] else "**no**",
                "yes" if found["exports"] else "**no**" if found["dense_exports"] else "nor does the dense one",
                f"{found['seconds']:.1f}",
            ]
        )
    return table(columns, rows)


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
    most = sorted(found.items(), key=lambda item: -len(item[1]))
    rows = [[reason, f"{len(layers)}", f"{sum(layers)}"] for reason, layers in most]
    return table(["the layer ...", "models", "layers"], rows)


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
