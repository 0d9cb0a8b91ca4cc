"""The search for a mask: the controller, its own optimizer, and what it proposes."""

from __future__ import annotations

import copy
import math
from typing import Any

import torch
from torch import Tensor

from .budget import keep_minimum, solve
from .capacity import capacity, find_chains
from .controller import EVEN, Controller, binarise, controller_loss, gumbel_noise
from .groups import segment_sums
from .plan import Plan


class Search:
    """A controller that learns, turn by turn, which gates of `plan` to open.

    It has a say in the layer groups that can lose a channel at all. All of it is on the CPU, wherever the model is: it
    is small, its turns are few, and it comes to the same there on every rank, and beside every accelerator.

    Args:
        least: fewest open gates (layers,) int64 of every layer group.
        target: share of the dense MACs that may be kept.
        gamma, beta: weights of the budget and of the capacity (capacity.py) in the controller's loss.
        lr, weight_decay: of its AdamW.
        seed: of its weights and noise.
    """

    def __init__(
        self,
        plan: Plan,
        least: Tensor,
        target: float,
        gamma: float,
        beta: float,
        lr: float,
        weight_decay: float,
        seed: int,
    ):
        self.plan, self.least, self.target = plan, least, target
        self.gamma, self.beta, self.seed = gamma, beta, seed
        self.settings = {"gamma": float(gamma), "beta": float(beta), "controller_lr": lr,
                         "controller_weight_decay": weight_decay, "seed": seed}  # fmt: skip
        closable = least < plan.sizes
        self.free = closable[plan.layer_of_gate].nonzero().flatten()
        self.sizes = plan.sizes[closable]
        chain = find_chains(plan.cost, plan.layer_of_gate, plan.summed)[closable]
        self.chain = chain.unique(return_inverse=True)[1]
        layer_of_gate = torch.arange(len(self.sizes), device="cpu").repeat_interleave(self.sizes)
        self.controller = Controller(layer_of_gate, seed)
        self.optimizer = torch.optim.AdamW(self.controller.parameters(), lr=lr, weight_decay=weight_decay)

    def _of_all(self, values: Tensor) -> Tensor:
        """`values` of the controller's gates as one a gate (gates,): infinite for those that are always open."""
        return values.new_full(self.plan.layer_of_gate.shape, math.inf).index_copy(0, self.free, values)

    def _by_layer(self, values: Tensor) -> Tensor:
        """Sums (closable layers,) of `values` (gates,) over each layer group in which the controller has a say."""
        return segment_sums(values[self.free], self.sizes)

    def gates(self, step: int) -> Tensor:
        """Gates (gates,) in {0., 1.} of the turn at `step`, differentiable in the controller's weights."""
        logits = self.controller()
        noise = self._of_all(gumbel_noise(len(logits), self.seed, step))
        logits = self._of_all(logits)
        gates = binarise(logits, noise)
        kept = keep_minimum(gates > 0.5, logits + noise, self.plan.layer_of_gate, self.least)
        return gates + (kept.to(gates.dtype) - gates).detach()

    def learn(self, step: int, gate_gradient: Tensor, weights: Tensor, budget: float) -> None:
        """One update of the controller from dL/dw (gates,) of the network masked by `gates(step)`.

        `weights` (gates,) are those of the channels in the capacity, `budget` is the share of the dense MACs that it
        shall keep at `step`.
        """
        with torch.enable_grad(), torch.autocast("cpu", enabled=False):
            gates = self.gates(step)
            share = self.plan.cost(gates) / self.plan.cost.dense
            left = capacity(self._by_layer(gates * weights), self._by_layer(weights), self.chain)
            loss = controller_loss(gates, gate_gradient, share, budget, self.gamma, left, self.beta)
            self.optimizer.zero_grad()
            loss.backward()
        self.optimizer.step()

    @torch.no_grad()
    def proposal(self) -> Tensor:
        """The mask (gates,) bool of what the controller opens more often than not: near the budget, not within it."""
        logits = self._of_all(self.controller())
        return keep_minimum(logits >= EVEN, logits, self.plan.layer_of_gate, self.least)

    @torch.no_grad()
    def settle(self, lots: Tensor) -> Tensor:
        """The mask (gates,) bool within the budget that opens the controller's best gates, in lots (layers,)."""
        logits = self._of_all(self.controller())
        return solve(logits, self.plan.layer_of_gate, self.plan.cost, self.target, self.least, lots)

    def state_dict(self) -> dict[str, Any]:
        """A copy of the controller's weights and of its optimizer's state."""
        return copy.deepcopy({"controller": self.controller.state_dict(), "optimizer": self.optimizer.state_dict()})

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take over what `state_dict` gave."""
        self.controller.load_state_dict(state["controller"])
        self.optimizer.load_state_dict(copy.deepcopy(state["optimizer"]))  # AdamW goes on in what it is given
