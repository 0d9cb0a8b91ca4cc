"""Networks put together at random from a recipe: a list of operations, each on some of the values so far."""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

CONV = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}
TRANSPOSED = {1: nn.ConvTranspose1d, 2: nn.ConvTranspose2d, 3: nn.ConvTranspose3d}
BATCH_NORM = {1: nn.BatchNorm1d, 2: nn.BatchNorm2d, 3: nn.BatchNorm3d}
INSTANCE_NORM = {1: nn.InstanceNorm1d, 2: nn.InstanceNorm2d, 3: nn.InstanceNorm3d}
ACTIVATIONS = [nn.ReLU, nn.GELU, nn.SiLU, nn.Hardswish, nn.Sigmoid, nn.Tanh, nn.LeakyReLU, nn.Dropout, nn.Identity]
WIDTHS = [4, 6, 8, 12, 2, 16, 1]
OPERATIONS = [
    "conv", "conv", "grouped", "depthwise", "transposed", "shared", "act", "act", "prelu", "batchnorm", "instancenorm",
    "layernorm", "groupnorm", "sum", "product", "concat", "swap", "glu", "slice", "gate", "spatialgate", "shuffle",
    "attend", "token", "unused",
]  # fmt: skip


@dataclass(frozen=True)
class Recipe:
    rank: int
    """Spatial dimensions: 1, 2 or 3."""
    inputs: int
    steps: list[tuple[str, int, int]]
    """(operation, two numbers that choose its operands and its widths)."""
    head: str
    """pool, flatten or map: how the last value becomes the output."""
    outputs: int


class LastNorm(nn.LayerNorm):
    """LayerNorm over the channels of a feature map."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.movedim(1, -1)).movedim(-1, 1)


class TokenMLP(nn.Module):
    """Linear layers on the channels of a feature map, channels last."""

    def __init__(self, channels: int, hidden: int):
        super().__init__()
        self.one, self.two = nn.Linear(channels, hidden), nn.Linear(hidden, channels)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.two(torch.relu(self.one(x.movedim(1, -1)))).movedim(-1, 1)


class Attention(nn.Module):
    """Self-attention over positions with a fixed number of heads."""

    def __init__(self, channels: int):
        super().__init__()
        self.qkv, self.out = nn.Linear(channels, 3 * channels), nn.Linear(channels, channels)

    def forward(self, x: Tensor) -> Tensor:
        n, c = x.shape[:2]
        q, k, v = self.qkv(x.flatten(2).mT).chunk(3, -1)
        heads = [t.reshape(n, -1, 2, c // 2).transpose(1, 2) for t in (q, k, v)]
        mixed = (heads[0] @ heads[1].mT).softmax(-1) @ heads[2]
        return self.out(mixed.transpose(1, 2).reshape(n, -1, c)).mT.reshape(x.shape)


class RandomNetwork(nn.Module):
    """Runs its recipe: every operation appends a value."""

    def __init__(self, recipe: Recipe):
        super().__init__()
        self.recipe, self.layers = recipe, nn.ModuleList()
        self.program: list[tuple[str, list[nn.Module], list[int]]] = []
        self.widths = [3] * recipe.inputs
        self.shared: list[tuple[nn.Module, int, int]] = []
        for step in recipe.steps:
            self._add(*step)
        last = self.widths[-recipe.outputs :]
        grown = 4**recipe.rank if recipe.head == "flatten" else 1
        kind = nn.Linear if recipe.head != "map" else CONV[recipe.rank]
        kernel = () if recipe.head != "map" else (1,)
        self.heads = nn.ModuleList(kind(width * grown, 5, *kernel) for width in last)

    def _layer(self, layer: nn.Module) -> nn.Module:
        self.layers.append(layer)
        return layer

    def _put(self, operation: str, layers: list[nn.Module], operands: list[int], width: int) -> None:
        self.program.append((operation, layers, operands))
        self.widths.append(width)

    def _fit(self, value: int, width: int) -> int:
        """A value of `width` channels made from another."""
        if self.widths[value] == width:
            return value
        self._put("layer", [self._layer(CONV[self.recipe.rank](self.widths[value], width, 1))], [value], width)
        return len(self.widths) - 1

    def _add(self, operation: str, one: int, two: int) -> None:
        rank = self.recipe.rank
        b = two % len(self.widths)
        a = one % len(self.widths) if one % 3 == 0 else len(self.widths) - 1
        width, other = self.widths[a], WIDTHS[two % len(WIDTHS)]
        if operation == "conv":
            layer = CONV[rank](width, other, 3, padding=1, bias=bool(one % 2))
            self.shared.append((layer, width, other))
            self._put("layer", [self._layer(layer)], [a], other)
        elif operation in ("grouped", "depthwise"):
            groups = 2 if operation == "grouped" and width % 2 == 0 else width
            out = 2 * width if two % 3 == 0 else width
            self._put("layer", [self._layer(CONV[rank](width, out, 3, padding=1, groups=groups))], [a], out)
        elif operation == "transposed":
            groups = 2 if one % 3 == 0 and width % 2 == 0 else 1
            out = other if groups == 1 else 2 * other
            self._put("layer", [self._layer(TRANSPOSED[rank](width, out, 3, padding=1, groups=groups))], [a], out)
        elif operation == "shared" and self.shared:
            layer, inputs, outputs = self.shared[one % len(self.shared)]
            self._put("layer", [layer], [self._fit(b, inputs)], outputs)
        elif operation in ("act", "prelu"):
            layer = ACTIVATIONS[two % len(ACTIVATIONS)]() if operation == "act" else nn.PReLU(width if two % 2 else 1)
            self._put("layer", [self._layer(layer)], [a], width)
        elif operation == "batchnorm":
            self._put("layer", [self._layer(BATCH_NORM[rank](width, affine=bool(two % 4)))], [a], width)
        elif operation == "instancenorm":
            self._put("layer", [self._layer(INSTANCE_NORM[rank](width, affine=bool(two % 2)))], [a], width)
        elif operation == "layernorm":
            self._put("layer", [self._layer(LastNorm(width))], [a], width)
        elif operation == "groupnorm":
            self._put("layer", [self._layer(nn.GroupNorm(1 + width % 2 * (width - 1), width))], [a], width)
        elif operation in ("sum", "product"):
            self._put(operation, [], [a, self._fit(b, width)], width)
        elif operation == "concat":
            self._put("concat", [], [a, b], width + self.widths[b])
        elif operation in ("swap", "glu", "slice", "shuffle") and width % 2 == 0:
            self._put(operation, [], [a], width if operation in ("swap", "shuffle") else width // 2)
        elif operation in ("gate", "spatialgate"):
            squeeze = self._layer(CONV[rank](width, other, 1))
            excite = self._layer(CONV[rank](other, width if operation == "gate" else 1, 1))
            self._put(operation, [squeeze, excite], [a], width)
        elif operation == "attend" and width % 2 == 0:
            self._put("layer", [self._layer(Attention(width))], [a], width)
        elif operation == "token":
            self._put("layer", [self._layer(TokenMLP(width, 2 * other))], [a], width)
        elif operation == "unused":
            self._layer(CONV[rank](width, other, 1))
            self._put("sum", [], [a, a], width)

    def forward(self, *inputs: Tensor) -> Tensor | tuple[Tensor, ...] | dict[str, Tensor]:
        values = list(inputs)
        space = tuple(range(2, 2 + self.recipe.rank))
        for operation, layers, operands in self.program:
            x, y = values[operands[0]], values[operands[-1]]
            half = x.shape[1] // 2
            if operation == "layer":
                x = layers[0](x)
            elif operation == "sum":
                x = x + y
            elif operation == "product":
                x = x * y
            elif operation == "concat":
                x = torch.cat([x, y], 1)
            elif operation == "swap":
                x = torch.cat(x.chunk(2, 1)[::-1], 1)
            elif operation == "glu":
                one, two = x.split(half, 1)
                x = one * torch.sigmoid(two)
            elif operation == "slice":
                x = x[:, half:]
            elif operation == "shuffle":
                x = x.reshape(len(x), 2, half, *x.shape[2:]).transpose(1, 2).reshape(x.shape)
            else:
                pooled = x.mean(space, keepdim=True) if operation == "gate" else x
                x = x * torch.sigmoid(layers[1](torch.relu(layers[0](pooled))))
            values.append(x)
        ends = values[-len(self.heads) :]
        if self.recipe.head != "map":
            ends = [x.mean(space) if self.recipe.head == "pool" else x.flatten(1) for x in ends]
        found = [head(x) for head, x in zip(self.heads, ends, strict=True)]
        return found[0] if len(found) == 1 else {"outputs": tuple(found)}

    def example(self, batch: int = 3) -> tuple[Tensor, ...]:
        generator = torch.Generator().manual_seed(0)
        shape = (batch, 3, *[4] * self.recipe.rank)
        return tuple(torch.randn(shape, generator=generator) for _ in range(self.recipe.inputs))
