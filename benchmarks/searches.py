"""The controls of the controller: ATO as it is, but for a search that knows less."""

from typing import Any

import torch
from torch import Tensor

from ato_optim import ATO
from ato_optim.budget import solve
from ato_optim.search import Search


class Chance(Search):
    """Opens the gates of highest score within the budget of the moment; the scores are drawn once and never learn.

    It takes the place of an ATO's own search: turns, training of the masked network, pull, commit, and the cost of
    the mask are the same, and only what the controller knows is missing.
    """

    def __init__(self, own: Search):
        self.plan, self.least, self.target = own.plan, own.least, own.target
        self.settings = own.settings
        generator = torch.Generator().manual_seed(own.seed)
        self.scores = torch.rand(own.plan.groups.num_gates, generator=generator)
        self.budget = 1.0

    def _mask(self, budget: float, lots: Tensor | int = 1) -> Tensor:
        return solve(self.scores, self.plan.layer_of_gate, self.plan.cost, budget, self.least, lots)

    def gates(self, step: int) -> Tensor:
        return self._mask(self.budget).float()

    def learn(self, step: int, gate_gradient: Tensor, weights: Tensor, budget: float) -> None:
        self.budget = budget

    def proposal(self) -> Tensor:
        return self._mask(self.budget)

    def settle(self, lots: Tensor) -> Tensor:
        return self._mask(self.target, lots)

    def state_dict(self) -> dict[str, Any]:
        return {"budget": self.budget}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.budget = state["budget"]


class Norms(Search):
    """The controller without the loss: it learns from the capacity, and so from norms, and from the budget alone."""

    def __init__(self, own: Search):
        super().__init__(own.plan, own.least, own.target, *own.settings.values())

    def learn(self, step: int, gate_gradient: Tensor, weights: Tensor, budget: float) -> None:
        super().learn(step, torch.zeros_like(gate_gradient), weights, budget)


SEARCHES = {"random": Chance, "norms": Norms}
"""By the name of the method in train.py."""


def knowing_less(optimizer: ATO, method: str) -> ATO:
    """`optimizer`, before its first step, with the search of `method` instead of its own."""
    if optimizer.search is not None:
        optimizer.search = SEARCHES[method](optimizer.search)
    return optimizer
