"""Masking a network by its consumers' columns, for a controller turn.

Zeroing the columns that read channel g gives W' = W * w, the masked network. By the chain rule dL/dw_g is
the sum over those columns of W . dL/dW', so that the weight gradients which the user's backward leaves
behind hold the gate gradients. Weights are masked during forward and backward alone, in place and unseen by
autograd's version counters; between the two they are what they were.
"""

from __future__ import annotations

import math
import sys
import weakref
from collections import Counter
from collections.abc import Callable, Collection, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from .groups import GateTable
from .nests import tensors_in
from .sharding import cloned, is_sharded, like, local, reshard
from .unwrap import wrappers


class Masking:
    """The masked columns of one model for the gates (gates,) float of one controller turn."""

    def __init__(self, model: nn.Module, table: GateTable, gates: Tensor):
        self.model, self.table, self.gates = model, table, gates
        self._masked: list[nn.Parameter] = []
        self._weights: list[Tensor] | None = None
        self._assigned: list[tuple[str, dict[str, Tensor | None], dict[str, Tensor | None]]] = []
        self._buffers: list[tuple[Tensor, Tensor]] = []

    @property
    def on(self) -> bool:
        """Whether the model is masked now."""
        return self._weights is not None

    @torch.no_grad()
    def apply(self) -> None:
        """Multiply the consumers' columns by the gates, once, and remember them and all buffers."""
        if self.on:
            return
        reshard(self.model)  # what fully_shard has gathered before is not masked
        # Put back into the same parameters: within a forward fully_shard shows others under their names.
        self._masked = [self.model.get_parameter(name) for name in self.table.names]
        self._weights = [local(p.data).clone() for p in self._masked]
        modules = self.model.named_modules(remove_duplicate=False)
        self._assigned = [(name, module._buffers, dict(module._buffers)) for name, module in modules]
        self._buffers = [(buffer, buffer.data.clone()) for buffer in self.model.buffers() if not _expanded(buffer)]
        self.table.scale(self.table.parameters(self.model), self.gates)
        # autocast keeps low-precision copies of weights, which are stale now.
        torch.clear_autocast_cache()

    @torch.no_grad()
    def undo(self) -> None:
        """Put columns and buffers (norm statistics among them) back, to the bit."""
        if self._weights is None:
            return
        # Looked up again: a forward may have assigned other data to a parameter.
        torch._foreach_copy_([local(p.data) for p in self._masked], self._weights)
        for _, buffers, same in self._assigned:  # a forward may have assigned others, which its graph or caller holds
            buffers.update(same)
        for buffer, before in self._buffers:
            buffer.data.copy_(before)
        self._masked, self._weights, self._assigned, self._buffers = [], None, [], []
        torch.clear_autocast_cache()

    @torch.no_grad()
    def unmasked(self) -> dict[str, Tensor]:
        """What masked parameters and all buffers hold without the mask, by all their names; {} where it is not on."""
        if self._weights is None:
            return {}
        kept: dict[int, Tensor] = {}
        for parameter, weight in zip(self._masked, self._weights, strict=True):
            kept[id(parameter)] = full = parameter.detach().clone()
            local(full).copy_(weight)
        named = self.model.named_parameters(remove_duplicate=False)
        found = {name: kept[id(parameter)] for name, parameter in named if id(parameter) in kept}
        before = {id(buffer): value for buffer, value in self._buffers}
        for module, _, same in self._assigned:
            names = (f"{module}.{name}" if module else name for name in same)
            found |= {name: before.get(id(b), b) for name, b in zip(names, same.values(), strict=True) if b is not None}
        return found

    @torch.no_grad()
    def mask_gradients(self) -> None:
        """Turn the gradients in the masked columns into those of the masked loss: dL/dW = w . dL/dW'."""
        gradients = [self.model.get_parameter(name).grad for name in self.table.names]
        pairs = [
            (g, like(part, g)) for g, part in zip(gradients, self.table.split(self.gates), strict=True) if g is not None
        ]
        if pairs:
            torch._foreach_mul_([g for g, _ in pairs], [part for _, part in pairs])


def _expanded(tensor: Tensor) -> bool:
    """Whether entries of `tensor` share their memory: nobody can write it in place, a forward neither."""
    strided = tensor.layout == torch.strided
    return strided and any(size > 1 and not step for size, step in zip(tensor.shape, tensor.stride(), strict=True))


@torch.no_grad()
def gate_gradient(model: nn.Module, table: GateTable, gates: Tensor, ascending: Collection[str] = ()) -> Tensor:
    """dL/dw (gates,) float32, from the unmasked weights and the gradients of a forward and backward masked by `gates`.

    Parameters named in `ascending` are trained to make what was differentiated larger: the loss is its negative.
    """
    times, parts = Counter(table.names), table.split(gates)

    def products() -> Iterator[Tensor]:
        for k, name in enumerate(table.names):
            parameter = model.get_parameter(name)
            gradient = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
            product = (parameter * (-gradient if name in ascending else gradient).conj()).real
            if times[name] > 1:  # a weight that is read along both dimensions was masked along the other, too
                others = (part for j, part in enumerate(parts) if j != k and table.names[j] == name)
                product = math.prod((like(part, product) for part in others), start=product)
            yield product

    # One after the other: the products of all weights at once would leave the caches before they are summed.
    return table.sum(products(), len(gates)).float()


def masked_closure(closure: Callable[[], Any], turn: Masking) -> Callable[[], Any]:
    """`closure`, which leaves the gradients of the masked loss behind."""

    def evaluate() -> Any:
        loss = closure()
        turn.mask_gradients()
        return loss

    return evaluate


def known_once(closure: Callable[[], Any], loss: Any, model: nn.Module) -> Callable[[], Any]:
    """`closure`, whose first call has been made already, and gave `loss` and the gradients that `model` has now.

    Who has let go of these since (SAM, after its step uphill) asks for new ones.
    """
    results, left = [loss], _gradients(model)
    return lambda: results.pop() if results and _gradients(model) == left else closure()


def _gradients(model: nn.Module) -> list[tuple[int, int]]:
    """Which gradients there are, and how often each was written."""
    return [(id(p.grad), p.grad._version) for p in model.parameters() if p.grad is not None]


class TurnHooks:
    """Hooks on the root module that run a controller turn's training forward and its backward masked.

    They ask `request` for the masking before each forward in training mode with gradients enabled; None means
    an ordinary one. Nothing else sees masked weights: weights and buffers are put back after the forward,
    masked again when the backward reaches the model's outputs, and put back when it ends, in an exception or
    not. An interrupt may leave them masked: then the next forward puts them back, and state_dict() gives what they
    are without the mask at any time. Copies of the model, by deepcopy or pickle, carry hooks that do nothing. The
    hooks go when the owner of `request` does.

    Args:
        model: the bare module.
        called: it, or the wrapper of it whose call the forward hooks go to (see unwrap.uncompiled_call).
        request: gives the masking.
    """

    def __init__(self, model: nn.Module, called: nn.Module, request: Callable[[], Masking | None]):
        self._called = weakref.ref(called)
        self._request: weakref.WeakMethod[Any] | None = weakref.WeakMethod(request, lambda _: self.remove())
        self._masking: Masking | None = None  # what is masked, or may be
        self._running: Masking | None = None  # of the forward that runs
        self._recomputing = self._ran_masked = False
        self._sharded = is_sharded(model)
        # Before fully_shard's own, which gather the parameters, in the forward and again in the backward.
        called.register_forward_pre_hook(self.before, prepend=True)
        called.register_forward_hook(self.after, always_call=True, prepend=True)
        model._register_state_dict_hook(self._show_unmasked)
        model.register_load_state_dict_pre_hook(self._recover)
        if self._sharded:
            called.register_forward_hook(self._forget_gathered)

    def _put_back(self, masking: Masking) -> None:
        masking.undo()
        self._masking = None

    def _recover(self, *_: Any) -> None:
        """Undo what an interrupt has left masked: for a KeyboardInterrupt no forward hook is called."""
        if self._masking is not None and torch._C._current_graph_task_id() == -1:
            self._put_back(self._masking)

    def _show_unmasked(self, module: nn.Module, state: dict[str, Any], prefix: str, _: Any) -> None:
        """State-dict hook: a signal's handler may save in the middle of a forward or a backward, or after its end."""
        found = self._masking.unmasked() if self._masking is not None else {}
        state.update({prefix + name: tensor for name, tensor in found.items() if prefix + name in state})

    def _forget_gathered(self, module: nn.Module, *_: Any) -> None:
        """Let go of masked parameters that fully_shard has gathered and would keep for the backward."""
        if self._ran_masked:
            reshard(module)

    def remove(self) -> None:
        """Take the hooks off the model."""
        self._recover()
        self._request = None
        called = self._called()
        if called is not None:
            forget_turns(called)

    @torch.compiler.disable
    def before(self, module: nn.Module, args: Any) -> None:
        """Forward pre-hook: mask the model if `request` says so."""
        self._recover()
        self._running = None
        request = self._request() if self._request is not None else None
        if request is None or not module.training or not torch.is_grad_enabled():
            return
        if getattr(module, "_is_replica", False):
            raise RuntimeError(
                "model is replicated by torch.nn.DataParallel, whose copies cannot be masked in a controller turn: use "
                "DistributedDataParallel, or one device"
            )
        masking = request()
        if masking is not None:
            # It is on already when a checkpointed forward is recomputed in the backward.
            self._recomputing = masking.on
            self._masking = self._running = masking
            masking.apply()

    @torch.compiler.disable
    def after(self, module: nn.Module, args: Any, output: Any) -> Any:
        """Forward hook: put the weights back, and have them masked again for the backward."""
        masking, self._running = self._running, None
        self._ran_masked = masking is not None and not self._recomputing
        if masking is None or self._recomputing:
            return output
        self._put_back(masking)
        if self._sharded:
            output = cloned(output)

        @torch.compiler.disable
        def backward_begins(_: Any) -> None:
            engine = torch.autograd.Variable._execution_engine
            engine.queue_callback(_interrupted)
            engine.queue_callback(_AtTheEnd(lambda: self._put_back(masking)))
            self._masking = masking
            masking.apply()

        found = list(tensors_in(output))
        for tensor in found:
            base = tensor._base
            if base is not None and base.grad_fn is not None:  # a view changed in place leaves its node for another
                base.grad_fn.register_prehook(backward_begins)
            elif tensor.grad_fn is not None:
                tensor.register_hook(backward_begins)
        if not found and sys.exc_info()[0] is None:  # no output either of a forward that raised
            raise TypeError(
                f"model returned a {type(output).__name__} in which ATO finds no tensor, so that its backward would "
                "not be that of the masked network: return tensors, or containers or objects that hold them"
            )
        return output

    def __deepcopy__(self, memo: dict[int, Any]) -> TurnHooks:
        return _inert()

    def __reduce__(self) -> tuple[Any, ...]:
        return _inert, ()


@torch.compiler.disable
def _interrupted() -> None:
    """Where Python raises a KeyboardInterrupt that came during the backward: not in what puts the weights back."""


class _AtTheEnd:
    """A callback of autograd's engine that also runs when the backward ends in an exception and drops it uncalled."""

    def __init__(self, action: Callable[[], None]):
        self._action: Callable[[], None] | None = action

    @torch.compiler.disable
    def __call__(self) -> None:
        action, self._action = self._action, None  # once: a forward may run masked when this is dropped
        if action is not None:
            action()

    __del__ = __call__


def _inert() -> TurnHooks:
    hooks = object.__new__(TurnHooks)
    hooks._request = hooks._masking = hooks._running = None
    hooks._recomputing = hooks._ran_masked = hooks._sharded = False
    return hooks


def forget_turns(model: nn.Module) -> None:
    """Take hooks that do nothing any more off `model` and what it wraps: those of removed TurnHooks, and of copies."""
    for module in wrappers(model):
        tables = [table for name, table in vars(module).items() if "_hooks" in name and isinstance(table, dict)]
        for key in {key for table in tables for key, hook in table.items() if _is_over(hook)}:
            for table in tables:  # what torch knows of a hook besides goes under its key, too
                table.pop(key, None)


def _is_over(hook: Any) -> bool:
    owner = getattr(getattr(hook, "hook", hook), "__self__", None)
    return isinstance(owner, TurnHooks) and owner._request is None
