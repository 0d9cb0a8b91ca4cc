"""ATO: a torch.optim.Optimizer that prunes the network which it trains."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict
from typing import Any

import torch
from torch import Tensor, nn

from . import checks
from .budget import keep_minimum, least_mask, minimum_widths, solve
from .checkpoint import CUT
from .compress import Cut, apply_cut, carry_state, derive_cut
from .controller import Controller, binarise, controller_loss, gumbel_noise
from .gating import Masking, TurnHooks, gate_gradient, hooks_of
from .groups import ForwardFn, call
from .plan import Plan, make_plan
from .projection import Projection, halfspace, masked_shares, proximal, timed
from .report import Report, Width
from .schedule import Schedule
from .unwrap import unwrap

VERSION = 1
"""Version of the format of state_dict()["ato"]."""


class ATO(torch.optim.Optimizer):
    """Trains a network with `base_optimizer` and prunes it to a budget in the same run.

    Auto-Train-Once (Wu, Gao et al., CVPR 2024, arXiv:2403.14729). Use it in place of the base optimizer, in the
    loop as it is, and call `compress()` at the end.

    Args:
        base_optimizer: any torch.optim optimizer over parameters of `model`. It goes on doing the updates;
            `param_groups` and `state` are shared with it.
        model: the network, bare or wrapped (DistributedDataParallel, torch.compile).
        example_inputs: inputs of one forward: a tensor, a tuple or list of arguments, a dict of keyword
            arguments. Their values do not matter, their shapes set the MACs.
        target_flops: share of the dense network's MACs that is kept, in (0, 1]; 1 prunes nothing.
        total_steps: length of the run in calls of step(). Longer runs go on with the committed network.
        ignored_layers: modules, or their names, whose output channels all stay.
        forward_fn: how to run the model, `forward_fn(model, example_inputs)`, where calling it will not do.
        min_width: share of the channels that every layer keeps at least, in [0, 1].
        round_to: widths are multiples of this (or the dense width).
        projection: what pulls masked channels to zero: "timed" (default), or "proximal" or "halfspace" as in
            the paper.
        pull_time: "timed": time constant of the pull while searching, as a share of the run.
        penalty: "proximal" and "halfspace": lambda while searching, and what it has grown to at the end of
            the commit phase.
        epsilon: "halfspace": in [0, 1), how early a shrinking group is set to zero.
        phases: shares of the run at which search, pull, commit and the exact zeros begin.
        interval: steps between controller turns; default: such that there are about 500, from 3 to 20 steps.
        gamma: weight of the budget in the controller's loss.
        controller_lr, controller_weight_decay: of the controller's AdamW.
        seed: of the controller's weights and noise; the same on every rank.

    Raises:
        TypeError, ValueError: for arguments that cannot work, naming them, before anything is changed: among
            them a budget below what can be reached, which names the least that can.
    """

    def __init__(
        self,
        base_optimizer: torch.optim.Optimizer,
        model: nn.Module,
        example_inputs: Any,
        *,
        target_flops: float,
        total_steps: int,
        ignored_layers: Iterable[nn.Module | str] = (),
        forward_fn: ForwardFn | None = None,
        min_width: float = 0.1,
        round_to: int = 1,
        projection: Projection = "timed",
        pull_time: float = 0.1,
        penalty: tuple[float, float] = (10.0, 1000.0),
        epsilon: float = 0.1,
        phases: Sequence[float] = (0.1, 0.2, 0.5, 0.6),
        interval: int | None = None,
        gamma: float = 8.0,
        controller_lr: float = 3e-3,
        controller_weight_decay: float = 1e-2,
        seed: int = 0,
    ):
        checks.base_and_model(base_optimizer, model)
        root = unwrap(model)
        checks.numbers(target_flops, total_steps, min_width, round_to, interval, phases, projection)
        checks.parameters(base_optimizer, root)
        if hooks_of(root) is not None:
            raise ValueError("model already has an ATO: use that one, or compress() it first")
        self.base = base_optimizer
        self.model = root
        self.target_flops, self.total_steps = float(target_flops), int(total_steps)
        self.projection, self.penalty, self.epsilon = projection, tuple(penalty), epsilon
        self.gamma, self.round_to, self.seed = gamma, int(round_to), int(seed)
        self.schedule = Schedule.over(total_steps, tuple(phases), pull_time, interval)
        self.example_inputs, self.forward_fn = example_inputs, forward_fn or call
        trained = {p for group in base_optimizer.param_groups for p in group["params"] if p.requires_grad}
        self.plan: Plan = make_plan(
            root, example_inputs, self.forward_fn, checks.modules(root, ignored_layers), trained
        )
        self.least = minimum_widths(self.plan.sizes, min_width, self.round_to)
        checks.budget(self.target_flops, self.plan, self.least_flops)
        self.mask = torch.ones(self.plan.groups.num_gates, dtype=torch.bool, device=self.plan.device)
        self.controller: Controller | None = None
        if self.target_flops < 1:
            self.controller = Controller(self.plan.layer_of_gate.cpu(), self.seed).to(self.plan.device)
            self.controller_optimizer = torch.optim.AdamW(
                self.controller.parameters(), lr=controller_lr, weight_decay=controller_weight_decay
            )
        self.step_count, self.last_turn = 0, -1
        self.history: list[tuple[int, float]] = []
        self.cut: Cut | None = None
        super().__init__(base_optimizer.param_groups, base_optimizer.defaults)
        self._attach()

    # --- a torch.optim.Optimizer ---------------------------------------------------------------------------

    def _attach(self) -> None:
        """Share the base optimizer's groups and state; hook the model."""
        self.param_groups, self.state = self.base.param_groups, self.base.state
        self._turn: Masking | None = None
        self._hooks = TurnHooks(self.model, self._request_masking) if self.searching else None

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group to the base optimizer. Its parameters are trained; what is prunable was settled before."""
        if "param_groups" in vars(self) and self.param_groups is self.base.param_groups:
            self.base.add_param_group(param_group)
        else:  # torch.optim.Optimizer.__init__ is collecting the base optimizer's groups
            super().add_param_group(param_group)

    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """One step: the base optimizer's and the pull on masked channels, or a turn of the controller.

        On a controller turn weights, momenta and buffers stay what they are.
        """
        loss = None
        if closure is not None and self._turn_due:
            with torch.enable_grad():
                loss = closure()
        if self._turn is not None:
            self._controller_turn(self._turn)
        else:
            loss = self.base.step(closure) if closure is not None else self.base.step()
            self._pull(self.step_count + 1)
        self._advance()
        return loss

    def __getstate__(self) -> dict[str, Any]:
        own = {key: value for key, value in vars(self).items() if key in _KEPT}
        return {**own, "defaults": self.defaults, "state": self.state, "param_groups": self.param_groups}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._attach()

    def state_dict(self) -> dict[str, Any]:
        """The base optimizer's state_dict and, under "ato", the pruning's: tensors and plain data only."""
        state = super().state_dict()
        state["ato"] = {
            "version": VERSION,
            "settings": self._settings(),
            "step_count": self.step_count,
            "last_turn": self.last_turn,
            "mask": self.mask.clone(),
            "history": [list(entry) for entry in self.history],
            "cut": None if self.cut is None else asdict(self.cut),
        }
        if self.controller is not None:
            state["ato"]["controller"] = copy.deepcopy(self.controller.state_dict())
            state["ato"]["controller_optimizer"] = copy.deepcopy(self.controller_optimizer.state_dict())
        return state

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on from `state_dict`. If it was taken after compress(), the model is cut first: load its weights after.

        Raises:
            ValueError: if the checkpoint is of another format, model, budget or length of run; nothing is changed.
        """
        saved = state_dict.get("ato")
        checks.checkpoint(saved, VERSION, self._settings(), self.cut is not None)
        if saved["cut"] is not None and self.cut is None:
            self._apply(Cut(**saved["cut"]))
        self.base.load_state_dict({key: state_dict[key] for key in ("state", "param_groups")})
        self.step_count, self.last_turn = saved["step_count"], saved["last_turn"]
        self.history = [tuple(entry) for entry in saved["history"]]
        self.mask = saved["mask"].to(self.plan.device)
        if self.controller is not None:
            self.controller.load_state_dict(saved["controller"])
            self.controller_optimizer.load_state_dict(saved["controller_optimizer"])
        self._detach()
        self._attach()

    def _settings(self) -> dict[str, Any]:
        """What a checkpoint must agree with."""
        return {
            "target_flops": self.target_flops,
            "total_steps": self.total_steps,
            "groups": [[layer.root, layer.size] for layer in self.plan.groups.layers],
        }

    # --- the order of events -------------------------------------------------------------------------------

    @property
    def phase(self) -> str:
        """warmup, search, commit, zero or compressed."""
        return "compressed" if self.cut is not None else self.schedule.phase(self.step_count)

    @property
    def searching(self) -> bool:
        """Whether controller turns are still to come."""
        return self.controller is not None and self.cut is None and self.step_count < self.schedule.commit

    @property
    def removable(self) -> bool:
        """Whether the masked channels are all zero and still there: compress() would make the network smaller."""
        return self.target_flops < 1 and self.phase == "zero"

    @property
    def _turn_due(self) -> bool:
        return self.searching and self.schedule.turn_due(self.step_count, self.last_turn)

    def _request_masking(self) -> Masking | None:
        """The masking of the coming training forward: the same for all forwards of one step."""
        if self._turn is None and self._turn_due:
            with torch.no_grad():
                gates = self._sample()
            self._turn = Masking(self.model, self.plan.groups.consumers, gates)
        return self._turn

    def _sample(self) -> Tensor:
        """Gates (gates,) of this step's controller turn, differentiable in the controller's weights."""
        assert self.controller is not None
        logits = self.controller()
        noise = gumbel_noise(len(logits), self.seed, self.step_count).to(logits)
        gates = binarise(logits, noise)
        kept = keep_minimum(gates > 0.5, logits + noise, self.plan.layer_of_gate, self.least)
        return gates + (kept.to(gates.dtype) - gates).detach()

    def _controller_turn(self, turn: Masking) -> None:
        """Learn from the gradients that the user's backward through the masked network left."""
        assert self.controller is not None
        turn.undo()
        plan = self.plan
        gradient = gate_gradient(self.model, plan.groups.consumers, plan.groups.num_gates)
        with torch.enable_grad():
            gates = self._sample()
            share = plan.cost(gates) / plan.cost.dense
            loss = controller_loss(gates, gradient, share, self.target_flops, self.gamma)
            self.controller_optimizer.zero_grad()
            loss.backward()
        self.controller_optimizer.step()
        with torch.no_grad():
            logits = self.controller()
        self.mask = keep_minimum(logits >= 0, logits, plan.layer_of_gate, self.least)
        self._note_share()
        self.last_turn, self._turn = self.step_count, None

    @torch.no_grad()
    def _pull(self, step: int) -> None:
        """Pull the masked groups toward zero, after the update that makes `step` steps done."""
        if self.target_flops == 1 or self.cut is not None or not self.schedule.pulls(step):
            return
        left = self.schedule.steps_left(step)
        producers = self.plan.groups.producers
        parameters = producers.parameters(self.model)
        if self.projection == "timed" or left <= 1:
            factor: Tensor | float = timed(left)
        else:
            rate = float(self.param_groups[0]["lr"]) * self.schedule.grown(step, self.penalty)
            squares = producers.sum(torch._foreach_mul(parameters, parameters), len(self.mask))
            shares = masked_shares(self.mask, self.plan.layer_of_gate, len(self.least))
            norm, threshold = squares.sqrt(), rate * shares
            by_norm = self.projection == "proximal"
            factor = proximal(norm, threshold) if by_norm else halfspace(norm, threshold, self.epsilon)
        factors = torch.where(self.mask, 1.0, factor)
        torch._foreach_mul_(parameters, producers.split(factors))

    def _advance(self) -> None:
        """Count the step; commit when its time has come."""
        self.step_count += 1
        if self.controller is not None and self.step_count == max(1, self.schedule.commit):
            with torch.no_grad():
                logits = self.controller()
            self.mask = solve(
                logits, self.plan.layer_of_gate, self.plan.cost, self.target_flops, self.least, self.round_to
            )
            self._note_share()
            self._detach()

    def _note_share(self) -> None:
        self.history.append((self.step_count, self.plan.cost(self.mask).item() / self.plan.cost.dense))

    def _detach(self) -> None:
        if self._hooks is not None:
            self._hooks.remove()
        self._hooks = self._turn = None

    # --- the smaller network -------------------------------------------------------------------------------

    def compress(self, model: nn.Module | None = None, inplace: bool = True) -> nn.Module:
        """Remove the zeroed channels for good and return the smaller network.

        Call it at the end, or in the middle of training as soon as `removable` is true: then the parameters
        of the model are replaced by smaller ones, the optimizer's groups and state follow in place, and
        training goes on. Once compressed, a second call changes nothing.

        Args:
            model: another instance of the network to cut the same way, an averaged copy say; default: the
                one that is trained.
            inplace: False leaves model and optimizer alone and returns a pruned copy.

        Raises:
            ValueError: before the masked channels are zero, saying how many steps are missing; or if `model`
                is another architecture.
        """
        if self.target_flops < 1 and self.cut is None and self.phase != "zero":
            missing = self.schedule.zero - self.step_count
            raise ValueError(
                f"compress() came {missing} step(s) too early: step {self.step_count} of total_steps="
                f"{self.total_steps}, masked channels are zero from step {self.schedule.zero} on; train on, or "
                "give a smaller total_steps to ATO if the run is shorter"
            )
        cut = self.cut or derive_cut(
            self.model, self.plan.groups, self.mask, self.example_inputs, self.forward_fn
        )
        own = model is None or unwrap(model) is self.model
        target = self.model if model is None else unwrap(model)
        if own and inplace:
            if self.cut is None:
                self._apply(cut)
            return target
        if not inplace:
            target = copy.deepcopy(target)
        if not (own and self.cut is not None):
            apply_cut(cut, target)
        setattr(target, CUT, cut)
        return target

    def _apply(self, cut: Cut) -> None:
        """Cut the trained model and carry the base optimizer's state over."""
        names = {p: name for name, p in self.model.named_parameters()}
        replaced = apply_cut(cut, self.model)
        carry_state(self.base, cut, names, replaced)
        setattr(self.model, CUT, cut)
        self.cut = cut
        self._detach()

    # --- what was found and done ---------------------------------------------------------------------------

    @property
    def least_flops(self) -> float:
        """The least budget that the model can reach with min_width and round_to."""
        least = least_mask(self.plan.layer_of_gate, self.least)
        return self.plan.cost(least).item() / self.plan.cost.dense

    def report(self) -> Report:
        """What was found, what is left out and why, widths, MACs and parameters before and after."""
        plan, schedule = self.plan, self.schedule
        kept = torch.zeros(len(self.least), dtype=torch.long, device=plan.device)
        kept.index_add_(0, plan.layer_of_gate, self.mask.long())
        closed = torch.zeros(len(self.mask), device=plan.device)
        return Report(
            phase=self.phase,
            step=self.step_count,
            total_steps=self.total_steps,
            target_flops=self.target_flops,
            least_flops=self.least_flops,
            prunable_flops=1 - plan.cost(closed).item() / plan.cost.dense,
            macs_before=round(plan.cost.dense),
            macs_after=round(plan.cost(self.mask).item()),
            parameters_before=plan.count_parameters(torch.ones_like(self.mask)),
            parameters_after=plan.count_parameters(self.mask),
            widths=tuple(
                Width(layer.layers, layer.size, after)
                for layer, after in zip(plan.groups.layers, kept.tolist(), strict=True)
            ),
            left_out=tuple((entry.layers, entry.reason) for entry in plan.groups.left_out),
            history=tuple(self.history),
            boundaries=(schedule.search, schedule.pull, schedule.commit, schedule.zero),
        )


_KEPT = frozenset(
    (
        "base model target_flops total_steps projection penalty epsilon gamma round_to seed schedule example_inputs "
        "forward_fn plan least mask controller controller_optimizer step_count last_turn history cut"
    ).split()
)
