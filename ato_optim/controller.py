"""The controller: a small recurrent network that proposes which gates are open, and its loss.

Wu et al. 2024, section 3.2; the constants are those of the authors' code.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from .default_device import on_cpu

EMBEDDING, HIDDEN = 64, 128
OFFSET = 3.0
"""Added to the logits, so that the controller starts with all gates open."""
EVEN = math.log(math.log(2))
"""The logit whose gate is open in half of the draws: P(logit + u >= 0) = 1 - exp(-exp(logit)) for Gumbel noise u."""
TEMPERATURE = 0.4
CLAMP = 0.005
"""The budget penalty is flat within this distance of the budget."""


class Controller(nn.Module):
    """Fixed orthogonal embeddings -> bidirectional GRU -> LayerNorm -> ReLU -> one linear head a layer group.

    The heads have no bias and are stored as one matrix, a row a gate.

    Args:
        layer_of_gate: (gates,) int64, the layer group of each gate.
        seed: of the initial weights. Global random states are not touched.
    """

    @on_cpu
    def __init__(self, layer_of_gate: Tensor, seed: int):
        super().__init__()
        num_layers = int(layer_of_gate.max()) + 1
        generator = torch.Generator().manual_seed(seed % 2**63)
        embedding = torch.empty(num_layers, EMBEDDING, dtype=torch.float32)
        nn.init.orthogonal_(embedding, generator=generator)
        # Without data first: an nn.GRU draws its weights from the global generator.
        self.gru = nn.GRU(EMBEDDING, HIDDEN, bidirectional=True, dtype=torch.float32, device="meta").to_empty(
            device="cpu"
        )
        for parameter in self.gru.parameters():
            nn.init.uniform_(parameter, -(HIDDEN**-0.5), HIDDEN**-0.5, generator=generator)
        head = torch.empty(len(layer_of_gate), 2 * HIDDEN, dtype=torch.float32)
        nn.init.kaiming_uniform_(head, a=math.sqrt(5), generator=generator)
        self.norm = nn.LayerNorm(2 * HIDDEN, dtype=torch.float32)
        self.head = nn.Parameter(head)
        self.embedding: Tensor
        self.layer_of_gate: Tensor
        self.register_buffer("embedding", embedding)
        self.register_buffer("layer_of_gate", layer_of_gate, persistent=False)

    def forward(self) -> Tensor:
        """Logits (gates,), the offset included: a gate is open where logit and noise are at least zero together.

        They are float32, whatever the default dtype or the autocast of the caller: a turn asks twice, in the model's
        forward and in step().
        """
        with torch.autocast(self.head.device.type, enabled=False):
            states, _ = self.gru(self.embedding)
            states = self.norm(states).relu()
            # The gradient of an index is summed in any order if there are several threads, that of an embedding is not.
            return (nn.functional.embedding(self.layer_of_gate, states) * self.head).sum(1) + OFFSET


@on_cpu
def gumbel_noise(num_gates: int, seed: int, step: int) -> Tensor:
    """Gumbel noise (gates,) that depends on the seed and the step alone: the same on every rank and after a resume."""
    generator = torch.Generator().manual_seed((seed * 1_000_003 + step) % 2**63)
    uniform = torch.rand(num_gates, generator=generator, dtype=torch.float64).clamp_min(1e-12)
    return -(-uniform.log()).log().float()


def binarise(logits: Tensor, noise: Tensor) -> Tensor:
    """Gates (gates,) in {0., 1.}: 1[s >= 0.5] of s = sigmoid((logits + noise) / temperature), straight-through."""
    soft = torch.sigmoid((logits + noise) / TEMPERATURE)
    return (soft >= 0.5).to(soft.dtype) + soft - soft.detach()


def budget_penalty(share: Tensor, target: float) -> Tensor:
    """R(r, p) = |log(r / p)| with r kept CLAMP away from p: zero gradient within, steep far outside."""
    away = torch.where(share > target, share.clamp_min(target + CLAMP), share.clamp_max(target - CLAMP))
    return (away.clamp_min(1e-6) / target).log().abs()


def controller_loss(
    gates: Tensor, gate_gradient: Tensor, share: Tensor, target: float, gamma: float, capacity: Tensor, beta: float
) -> Tensor:
    """A scalar whose gradient in the gates is that of L + gamma R - beta log(capacity).

    The last term is not the authors': it prefers, among masks that cost the same, those which leave more capacity.
    It weighs channels by what they have learned, of which the loss of one batch says little.

    Args:
        gates: (gates,), differentiable in the controller's weights.
        gate_gradient: dL/dw (gates,) of the task's loss, measured with these gates.
        share: MACs(gates) / MACs(1), differentiable in the gates.
        capacity: of these gates (see capacity.py), above 0, likewise.
    """
    return (gates * gate_gradient).sum() + gamma * budget_penalty(share, target) - beta * capacity.log()
