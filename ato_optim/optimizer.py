"""ATO: a torch.optim.Optimizer that prunes the network which it trains."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from . import checks, resume
from .base import of_base, option
from .budget import least_mask, minimum_widths
from .capacity import channel_weights
from .carry import apply_cut_in_training, warn_of_obstacle
from .compress import Cut, apply_cut, cut_by, cut_of, derive_cut
from .copies import copy_model
from .default_device import as_now
from .gating import Masking, TurnHooks, forget_turns, gate_gradient, known_once, masked_closure
from .graph import ForwardFn, call
from .plan import make_plan
from .projection import Projection, halfspace, masked_shares, norms_and_rates, timed
from .report import Report, report_of
from .schedule import Schedule
from .search import Search
from .unwrap import uncompiled_call, unwatch_wrapper, unwrap, watch_wrapper


class ATO(torch.optim.Optimizer):
    """Trains a network with `base_optimizer` and prunes it to a budget in the same run.

    Auto-Train-Once (Wu, Gao et al., CVPR 2024, arXiv:2403.14729). Use it in place of the base optimizer, in the
    loop as it is, and call `compress()` at the end.

    Args:
        base_optimizer: any torch.optim optimizer but SparseAdam over parameters of `model`. It goes on doing the
            updates; `param_groups` and `state` are shared with it.
        model: the network, bare or wrapped (DistributedDataParallel, torch.compile).
        example_inputs: inputs of one forward: a tensor, a tuple or list of arguments, a dict of keyword
            arguments, or another object, which is the one argument. Their values hardly matter, their shapes set the
            MACs.
        target_flops: share of the dense network's MACs that is kept, in (0, 1]; 1 prunes nothing.
        total_steps: length of the run in calls of step(). Longer runs go on with the committed network.
        ignored_layers: modules, or their names, whose output channels all stay.
        forward_fn: how to run the model, `forward_fn(model, example_inputs)`, where `model(example_inputs)` will
            not do. It returns the outputs, and may call parts of `model` alone.
        min_width: share of the channels that every layer keeps at least, in [0, 1].
        streams: share of the budget, above the least network, that residual streams (what is summed) may take to
            stay whole, or as wide as that allows; in [0, 1], 0 prunes them like any other layer.
        round_to: widths are multiples of this (or the dense width).
        projection: what pulls masked channels to zero: "timed" (default), or "proximal" or "halfspace" as in
            the paper.
        pull_time: for "timed": time constant of the pull while searching, as a share of the run.
        penalty: for "proximal" and "halfspace": lambda while searching, and what it has grown to at the end of
            the commit phase.
        epsilon: for "halfspace": in [0, 1), how early a shrinking group is set to zero.
        phases: shares of the run at which search, commit and the exact zeros begin.
        interval: steps between controller turns; default: from 2 to 20, for 500 to 750 turns where they allow it.
        gamma: weight of the budget in the controller's loss.
        beta: weight of the capacity in it: how much more channels, by their norms, are worth at the same MACs.
        controller_lr: of the controller's AdamW; default: 0.2 over the number of its turns, at most 1e-2.
        controller_weight_decay: likewise of the controller's AdamW.
        seed: of the controller's weights and noise; the same on every rank.

    Raises:
        TypeError, ValueError: for arguments that cannot work, naming them, before anything is changed: among
            them a budget below what can be reached, which names the least that can.

    Warns:
        UserWarning: if the run leaves the controller fewer than 20 turns; if `example_inputs` do not reach all layers
            that are trained, or give layers more to do than others would; after the first step, if the state of
            `base_optimizer` cannot follow a cut; and, while the controller searches, if no turn comes, if layers that
            are pruned have been frozen, or if the gradients of a turn are not finite.
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
        streams: float = 0.5,
        round_to: int = 1,
        projection: Projection = "timed",
        pull_time: float = 0.02,
        penalty: tuple[float, float] = (10.0, 1000.0),
        epsilon: float = 0.1,
        phases: Sequence[float] = (0.05, 0.48, 0.5),
        interval: int | None = None,
        gamma: float = 8.0,
        beta: float = 1.5,
        controller_lr: float | None = None,
        controller_weight_decay: float = 1e-2,
        seed: int = 0,
    ):
        root = checks.base_and_model(base_optimizer, model)
        checks.unowned(base_optimizer, root)
        checks.arguments(
            phases, projection, penalty, interval, controller_lr, forward_fn, target_flops=target_flops,
            total_steps=total_steps, min_width=min_width, streams=streams, round_to=round_to, pull_time=pull_time,
            epsilon=epsilon, gamma=gamma, beta=beta, controller_weight_decay=controller_weight_decay, seed=seed,
        )  # fmt: skip
        self.base = base_optimizer
        self.model = root
        self.target_flops, self.total_steps = float(target_flops), int(total_steps)
        self.projection, self.penalty, self.epsilon = projection, penalty, epsilon
        self.round_to = int(round_to)
        self.schedule = Schedule.over(self.total_steps, tuple(phases), float(pull_time), interval and int(interval))
        checks.end(self.schedule.zero, self.total_steps, phases)
        checks.rates(base_optimizer, projection if self.target_flops < 1 else "timed")
        trained = {p for group in base_optimizer.param_groups for p in group["params"] if p.requires_grad}
        ignored = checks.modules(root, ignored_layers)
        self.plan = plan = make_plan(
            root, example_inputs, as_now(forward_fn or call), ignored, trained, float(min_width)
        )
        self.least = minimum_widths(plan.sizes, min_width, plan.lots(self.round_to))
        self.least_flops = plan.share(least_mask(plan.layer_of_gate, self.least))
        """The least budget that the model can reach with min_width and round_to."""
        checks.budget(self.target_flops, plan, self.least_flops)
        self.mask = torch.ones(plan.groups.num_gates, dtype=torch.bool, device=plan.device)
        self._layer_of_gate = plan.layer_of_gate.to(plan.device)  # for the pull, which is there every step
        self.search: Search | None = None
        if self.target_flops < 1:
            limit = self.least_flops + streams * (self.target_flops - self.least_flops)
            self.least = plan.stream_widths(min_width, self.round_to, limit)
            checks.turns(self.schedule)
            checks.reached(plan, root, trained)
            lr, decay = float(controller_lr or self.schedule.controller_lr), float(controller_weight_decay)
            self.search = Search(plan, self.least, self.target_flops, gamma, beta, lr, decay, int(seed))
        self.step_count, self.last_turn = 0, -1
        self.history: list[tuple[int, float]] = []
        self.cut: Cut | None = None
        self._own = (*vars(self), "_own")
        super().__init__(base_optimizer.param_groups, base_optimizer.defaults)
        self._called = uncompiled_call(model)
        resume.agreed(self, model)
        self._attach()

    # --- a torch.optim.Optimizer ---------------------------------------------------------------------------

    def _attach(self) -> None:
        """Own and hook the model."""
        checks.OWNERS[self.model] = weakref.ref(self)
        self._turn: Masking | None = None
        self._hooks = TurnHooks(self.model, self._called, self._request_masking) if self.searching else None

    param_groups, state = of_base("param_groups"), of_base("state")

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group to the base optimizer. Its parameters are trained; what is prunable was settled before."""
        if not any(param_group is group for group in self.param_groups):
            self.base.add_param_group(param_group)

    def zero_grad(self, set_to_none: bool = True) -> None:
        """The base optimizer's: it may do more there."""
        self.base.zero_grad() if set_to_none else self.base.zero_grad(set_to_none=False)

    @torch.compiler.disable
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """One step: the base optimizer's, and the pull on masked channels.

        On a controller turn the controller learns first, and the base optimizer trains the masked network: what
        the mask closes gets no gradient, and buffers stay what they were.
        """
        if self.search is not None and self.cut is None:
            checks.moved(self.model, self.plan.device)
        known = closure is not None and self._turn_due
        with torch.enable_grad():
            first = closure() if closure is not None and known else None
        turn, done = self._turn, self.step_count + 1
        if self.search is not None and turn is not None:
            turn.undo()
            if self.last_turn < self.step_count:  # else the base optimizer has raised since
                self._controller_turn(self.search, turn)
            turn.mask_gradients()
        if closure is not None:
            closure = known_once(closure, first, self.model) if known else closure
            closure = masked_closure(closure, turn) if turn is not None else closure
        loss = self.base.step(closure) if closure is not None else self.base.step()
        self._turn = None
        if self.search is not None:
            checks.learning(done, self.last_turn, self.schedule)
            if done == 1:
                warn_of_obstacle(self.base, self.model)
            if done == max(1, self.schedule.commit):
                self._set_mask(self.search.settle(self.plan.lots(self.round_to)), done)
                self._detach()
        self._pull(done)
        self.step_count = done
        return loss

    def __getstate__(self) -> dict[str, Any]:
        # Hooks stay behind, as do a compiled wrapper, what schedulers have put on the instance, and a turn that has
        # begun: copies of parameters come without gradients.
        own = {key: value for key, value in vars(self).items() if key in self._own}
        return {**own, "defaults": self.defaults, "_called": self.model}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._attach()

    def state_dict(self) -> dict[str, Any]:
        """The base optimizer's state_dict and, under "ato", the pruning's: tensors and plain data only."""
        for pre_hook in self._optimizer_state_dict_pre_hooks.values():
            pre_hook(self)
        state = {**self.base.state_dict(), "ato": resume.pack(self)}
        for post_hook in self._optimizer_state_dict_post_hooks.values():
            state = post_hook(self, state) or state
        return state

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on from `state_dict`. If it was taken after compress(), the model is cut first: load its weights after.

        Raises:
            ValueError: if the checkpoint is of another format, model, budget or length of run; nothing is changed.
        """
        state_dict = state_dict.copy()
        for pre_hook in self._optimizer_load_state_dict_pre_hooks.values():
            state_dict = pre_hook(self, state_dict) or state_dict
        saved = resume.entry(state_dict, self)
        if saved["cut"] is not None and self.cut is None:
            self._apply(Cut(**saved["cut"]))
        self.base.load_state_dict({key: value for key, value in state_dict.items() if key != "ato"})
        resume.unpack(self, saved)
        self._detach()
        self._attach()
        if saved["turn_begun"]:
            self._request_masking()
        for post_hook in self._optimizer_load_state_dict_post_hooks.values():
            post_hook(self)

    # --- the order of events -------------------------------------------------------------------------------

    @property
    def phase(self) -> str:
        """warmup, search, commit, zero or compressed."""
        return "compressed" if self.cut is not None else self.schedule.phase(self.step_count)

    @property
    def searching(self) -> bool:
        """Whether controller turns are still to come."""
        return self.search is not None and self.cut is None and self.step_count < self.schedule.commit

    @property
    def removable(self) -> bool:
        """Whether the masked channels are all zero and still there: compress() would make the network smaller."""
        return self.target_flops < 1 and self.phase == "zero"

    @property
    def turn_begun(self) -> bool:
        """Whether the gradients since the last step() come from a masked network: step() will be a controller turn."""
        return self._turn is not None

    @property
    def _turn_due(self) -> bool:
        return self.searching and self.schedule.turn_due(self.step_count, self.last_turn)

    def _request_masking(self) -> Masking | None:
        """The masking of the coming training forward: the same for all forwards of one step."""
        if self.search is not None and self._turn is None and self._turn_due:
            with torch.no_grad():
                gates = self.search.gates(self.step_count).to(self.plan.device)
            self._turn = Masking(self.model, self.plan.groups.consumers, gates)
        return self._turn

    def _controller_turn(self, search: Search, turn: Masking) -> None:
        """Learn from the gradients that the user's backward through the masked network left."""
        checks.trained(self.model, {*turn.table.names, *self.plan.groups.producers.names})
        ascending = {name for name, maximize in option(self.base, self.model, "maximize").items() if maximize}
        gradient = gate_gradient(self.model, turn.table, turn.gates, ascending).cpu()
        if checks.given(self.model, turn.table.names, self.step_count) and checks.finite(gradient, self.step_count):
            weights = channel_weights(self.plan.groups, self.model).cpu()
            budget = self.schedule.budget(self.step_count, self.target_flops)
            search.learn(self.step_count, gradient, weights, budget)
        self._set_mask(search.proposal(), self.step_count)
        self.last_turn = self.step_count

    @torch.no_grad()
    def _pull(self, step: int) -> None:
        """Pull the masked groups toward zero, after the update that makes `step` steps done."""
        if self.target_flops == 1 or self.cut is not None or not self.schedule.pulls(step):
            return
        left, zero = self.schedule.steps_left(step), step >= self.schedule.zero
        producers, consumers = self.plan.groups.producers, self.plan.groups.consumers
        if self.projection == "timed" or zero:
            factor = torch.full_like(self.mask, timed(left), dtype=torch.float32)  # there: a copy would wait for a GPU
        else:
            norm, rate = norms_and_rates(producers, self.model, option(self.base, self.model, "lr"), len(self.mask))
            shares = masked_shares(self.mask, self._layer_of_gate, len(self.least))
            threshold = self.schedule.grown(step, self.penalty) * rate * shares
            factor = halfspace(norm, threshold, self.epsilon if self.projection == "halfspace" else 0.0)
        gates = factor.masked_fill_(self.mask, 1.0)
        # Columns that read zeros do nothing but send gradients back; norms without a scale make them large for a clip.
        for table in (producers, consumers) if zero else (producers,):
            table.scale(table.parameters(self.model), gates)

    def _set_mask(self, mask: Tensor, step: int) -> None:
        self.mask = mask.to(self.plan.device)
        self.history.append((step, self.plan.share(mask)))

    def _detach(self) -> None:
        if self._hooks is not None:
            self._hooks.remove()
        self._hooks = self._turn = None

    # --- the smaller network -------------------------------------------------------------------------------

    @torch.inference_mode(False)
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
            TypeError: if `model` is no module.
            ValueError: before the masked channels are zero, saying how many steps are missing; if they are not
                zero any more; if `model` is another architecture, has an ATO of its own, or cannot be copied; or in
                place, if its parameters cannot be replaced (fully_shard), or what `base_optimizer` holds cannot
                follow. Nothing is changed then.

        Warns:
            UserWarning: if no controller turn has chosen what goes.
        """
        checks.module("model", self.model if model is None else model)
        target = self.model if model is None else unwrap(model)
        own = target is self.model
        if inplace:
            checks.replaceable(self.model) if own else checks.free(target)
        if self.target_flops < 1 and self.cut is None:
            left = self.plan.groups.producers.largest_closed(self.model, self.mask) if own else 0.0
            checks.zeroed(self.step_count, self.schedule, left)
            checks.chosen(self.last_turn)
        cut = self.cut or derive_cut(self.model, self.plan.groups, self.mask)
        cut_before = self.cut is not None
        done = cut_before if own else cut_of(target) == (cut_of(self.model) if cut_before else cut_by(cut, self.model))
        target = target if inplace else copy_model(target)
        if not done:
            self._apply(cut) if target is self.model else apply_cut(cut, target)
        if target is not self.model or self.step_count >= self.total_steps:  # neither turns nor old wrappers can come
            for forget in (forget_turns, unwatch_wrapper):
                forget(self._called if target is self.model else target)
        return target

    def _apply(self, cut: Cut) -> None:
        """Cut the trained model and carry the base optimizer's state over."""
        apply_cut_in_training(cut, self.model, self.base)
        self.cut = cut
        self._detach()
        watch_wrapper(self._called)

    # --- what was found and done ---------------------------------------------------------------------------

    def report(self) -> Report:
        """What was found, what is left out and why, widths, MACs and parameters before and after."""
        return report_of(self)
