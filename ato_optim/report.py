"""What was found, what was pruned and what it buys: text, plain data, and a figure."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from itertools import pairwise
from typing import TYPE_CHECKING, Any

from .budget import least_mask

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from .optimizer import ATO


@dataclass(frozen=True)
class Width:
    """Channels of one group of layers that are pruned together."""

    layers: tuple[str, ...]
    before: int
    least: int
    """What it keeps under any mask of this run."""
    after: int


@dataclass(frozen=True)
class Report:
    """The state of a run; `str()` gives a table.

    Attributes:
        phase: warmup, search, commit, zero or compressed.
        step, total_steps: optimizer steps done and planned.
        target_flops: the budget, as a share of the dense MACs.
        least_flops: the least budget that the model could reach.
        prunable_flops: share of the dense MACs that the gates have a say in.
        macs_before, macs_after: MACs of one forward on the example inputs, dense and with the present mask.
        parameters_before, parameters_after: likewise.
        widths: of every group of layers, dense, at the least, and with the present mask.
        left_out: (layers, reason) of what is not pruned.
        history: (step, share of MACs kept by the mask) at each controller turn and at commit.
        boundaries: first steps of search, commit and zero.
    """

    phase: str
    step: int
    total_steps: int
    target_flops: float
    least_flops: float
    prunable_flops: float
    macs_before: int
    macs_after: int
    parameters_before: int
    parameters_after: int
    widths: tuple[Width, ...]
    left_out: tuple[tuple[tuple[str, ...], str], ...]
    history: tuple[tuple[int, float], ...]
    boundaries: tuple[int, ...]

    def as_dict(self) -> dict[str, Any]:
        """The report as plain data, fit for json.dumps."""
        return asdict(self)

    def __str__(self) -> str:
        gates = sum(width.before for width in self.widths)
        macs, parameters = self.macs_after / max(1, self.macs_before), self.parameters_after / self.parameters_before
        kept = f"{macs:7.1%} (budget {self.target_flops:.1%})"
        doing = f"phase {self.phase}" if self.target_flops < 1 else "nothing is pruned at this budget"
        rows = [
            f"step {self.step} of {self.total_steps}, {doing}",
            f"{len(self.widths)} prunable groups of layers with {gates:,} channels; "
            f"{self.prunable_flops:.1%} of the MACs can be pruned, the least budget is {self.least_flops:.3f}",
            f"MACs       {self.macs_before:>15,} -> {self.macs_after:>15,} {kept}",
            f"parameters {self.parameters_before:>15,} -> {self.parameters_after:>15,} {parameters:7.1%}",
            "",
            "width before  least  after  layers",
        ]
        rows += [f"{w.before:12d} {w.least:6d} {w.after:6d}  {', '.join(w.layers)}" for w in self.widths]
        if self.left_out:
            rows += ["", "left alone"]
            rows += [f"{', '.join(layers)}: {reason}" for layers, reason in self.left_out]
        return "\n".join(rows)

    def figure(self) -> Figure:
        """Widths per layer and the budget over time, as a matplotlib figure (extra: ato_optim[bench])."""
        try:
            from matplotlib.figure import Figure
        except ImportError as error:
            raise ImportError(
                "report().figure() draws with matplotlib: install it, or ato_optim with the extra 'bench'"
            ) from error
        figure = Figure(figsize=(11, 4.2), layout="constrained")
        widths, budget = figure.subplots(1, 2, width_ratios=(3, 2))

        places = range(len(self.widths))
        widths.bar(places, [w.before for w in self.widths], color="#d5d8dc", label="dense")
        widths.bar(places, [w.after for w in self.widths], color="#2166ac", label="kept")
        names = [w.layers[0] + (f" +{len(w.layers) - 1}" if len(w.layers) > 1 else "") for w in self.widths]
        every = max(1, len(names) // 30)
        widths.set_xticks(list(places)[::every], names[::every], rotation=90, fontsize=7)
        widths.set_ylabel("channels")
        widths.set_title("Width per group of layers", loc="left", fontsize=10)
        widths.legend(frameon=False, fontsize=8)

        steps, shares = zip(
            *((0, 1.0), *self.history, (self.step, self.history[-1][1] if self.history else 1.0)), strict=True
        )
        budget.step(steps, [100 * share for share in shares], where="post", color="#2166ac", label="MACs of the mask")
        search, commit, _ = self.boundaries
        end, kept = max(self.total_steps, self.step), 100 * self.target_flops
        falling = [100, 100, kept, kept]
        budget.plot([0, search, commit, end], falling, color="#b2182b", linewidth=1, linestyle="--", label="budget")
        spans = {"search": "#e6eaee", "commit": "#bcc5ce"}
        for (name, shade), span in zip(spans.items(), pairwise(self.boundaries), strict=True):
            budget.axvspan(*span, color=shade, linewidth=0, zorder=0, label=name)
        budget.set_ylim(0, 105)
        budget.set_xlim(0, end)
        budget.set_xlabel("step")
        budget.set_ylabel("% of dense MACs")
        budget.set_title("Budget over time", loc="left", fontsize=10)
        budget.legend(frameon=False, fontsize=8, loc="upper right")
        for axes in (widths, budget):
            axes.spines[["top", "right"]].set_visible(False)
        return figure


def report_of(ato: ATO) -> Report:
    """The report of a run at its present step."""
    facts = ato.plan.facts(ato.mask, least_mask(ato.plan.layer_of_gate, ato.least))
    if ato.cut is not None:
        facts["parameters_after"] = sum(p.numel() for p in ato.model.parameters())
    schedule = ato.schedule
    return Report(
        phase=ato.phase,
        step=ato.step_count,
        total_steps=ato.total_steps,
        target_flops=ato.target_flops,
        least_flops=ato.least_flops,
        history=tuple(ato.history),
        boundaries=(schedule.search, schedule.commit, schedule.zero),
        **facts,
    )
