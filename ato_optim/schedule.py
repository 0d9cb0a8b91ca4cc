"""When things happen in a run: pure functions of the number of optimizer steps that are done."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Phase = Literal["warmup", "search", "commit", "zero"]

MANY_TURNS = 500
"""Controller turns that suffice: longer runs space them out, up to LARGEST_INTERVAL."""
LARGEST_INTERVAL = 20
SMALLEST_INTERVAL = 2
MOST_LR = 1e-2
TRAVEL = 0.2
"""Sum of the controller's learning rates over all turns: it bounds how far AdamW takes a weight."""
FEWEST_TURNS = round(TRAVEL / MOST_LR)
"""With fewer turns the controller does not get as far."""


@dataclass(frozen=True)
class Schedule:
    """The phases of a run of `total_steps` steps.

    warm-up [0, search), search [search, commit), commit [commit, zero), zero from `zero` on. A boundary is the number
    of steps done when its phase begins.
    """

    total_steps: int
    search: int
    commit: int
    zero: int
    interval: int
    pull_steps: float
    """Time constant, in steps, of the timed pull while searching."""

    @classmethod
    def over(
        cls, total_steps: int, phases: tuple[float, ...], pull_time: float, interval: int | None = None
    ) -> Schedule:
        """Boundaries at the shares `phases` of the run.

        `interval` steps lie between controller turns; by default as many as leave about MANY_TURNS turns,
        within [SMALLEST_INTERVAL, LARGEST_INTERVAL].
        """
        search, commit, zero = (int(share * total_steps) for share in phases)
        if interval is None:
            interval = min(max((commit - search) // MANY_TURNS, SMALLEST_INTERVAL), LARGEST_INTERVAL)
        return cls(total_steps, search, commit, max(zero, commit + 1), interval, pull_time * total_steps)

    def phase(self, step: int) -> Phase:
        """The phase after `step` steps."""
        if step < self.search:
            return "warmup"
        if step < self.commit:
            return "search"
        return "commit" if step < self.zero else "zero"

    def turn_due(self, step: int, last_turn: int) -> bool:
        """Whether the training forward after `step` steps is a controller turn, the last one being at `last_turn`."""
        return self.phase(step) == "search" and step - max(last_turn, self.search - 1) >= self.interval

    def budget(self, step: int, target: float) -> float:
        """Share of the MACs that the controller shall keep at `step`: from 1 to `target` while it searches.

        A straight line, so that the loss, and not the start of the controller, says which channels close first, and the
        network shrinks no faster than it can follow.
        """
        return target + (1 - target) * max(0.0, (self.commit - step) / max(1, self.commit - self.search))

    @property
    def turns(self) -> int:
        """Controller turns of the whole run, if each comes as soon as it is due."""
        return (self.commit - self.search) // self.interval

    @property
    def controller_lr(self) -> float:
        """Learning rate with which the controller gets equally far in few turns and in many, at most MOST_LR."""
        return min(TRAVEL / max(1, self.turns), MOST_LR)

    def pulls(self, step: int) -> bool:
        """Whether masked groups are pulled after the update that makes `step` steps done."""
        return step > self.search

    def steps_left(self, step: int) -> float:
        """Steps that a masked group has until it is zero, at the pull of the update that makes `step` steps done."""
        return self.pull_steps if step <= self.commit else self.zero - step + 1

    def grown(self, step: int, penalty: tuple[float, float]) -> float:
        """The penalty lambda at `step`: penalty[0] while searching, geometrically to penalty[1] while committing."""
        share = min(max(0.0, (step - self.commit) / (self.zero - self.commit)), 1.0)
        return penalty[0] * (penalty[1] / penalty[0]) ** share
