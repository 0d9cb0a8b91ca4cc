"""Small networks that hold, between them, every connection that ATO promises to prune exactly."""

import torch
from torch import Tensor, nn

from ato_optim.conditions import randomise

SHORT = (0.1, 0.3, 0.32)
"""Phases for runs of some dozen steps, with a long end after the cut."""


class Block(nn.Sequential):
    def __init__(self, inputs: int, outputs: int, kernel: int = 3, groups: int = 1, stride: int = 1):
        super().__init__(
            nn.Conv2d(inputs, outputs, kernel, stride, kernel // 2, groups=groups, bias=False),
            nn.BatchNorm2d(outputs),
            nn.ReLU(),
        )


class Residual(nn.Module):
    """A residual stream with a projection shortcut."""

    def __init__(self):
        super().__init__()
        self.stem, self.one, self.two = Block(3, 8), Block(8, 12), nn.Conv2d(12, 8, 3, 1, 1)
        self.norm, self.wider = nn.BatchNorm2d(8), Block(8, 16, stride=2)
        self.short, self.fc = nn.Conv2d(8, 16, 1, 2), nn.Linear(16, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        x = torch.relu(x + self.norm(self.two(self.one(x))))
        x = self.wider(x) + self.short(x)
        return self.fc(x.mean((2, 3)))


class Concat(nn.Module):
    """Dense connections: each layer reads all before it."""

    def __init__(self):
        super().__init__()
        self.a, self.b, self.c = Block(3, 8), Block(8, 6), Block(14, 10)
        self.fc = nn.Linear(24, 5)

    def forward(self, x: Tensor) -> Tensor:
        a = self.a(x)
        ab = torch.cat([a, self.b(a)], 1)
        return self.fc(torch.cat([ab, self.c(ab)], 1).mean((2, 3)))


class Depthwise(nn.Module):
    """An inverted bottleneck, with SiLU, whose slope at zero is not zero."""

    def __init__(self):
        super().__init__()
        self.stem, self.expand, self.depthwise = Block(3, 8), Block(8, 24, 1), Block(24, 24, groups=24)
        self.project, self.fc = nn.Sequential(nn.Conv2d(24, 8, 1, bias=False), nn.BatchNorm2d(8)), nn.Linear(8, 5)
        self.act = nn.SiLU()

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        x = x + self.project(self.act(self.depthwise(self.act(self.expand(x)))))
        return self.fc(x.mean((2, 3)))


class SqueezeExcitation(nn.Module):
    def __init__(self):
        super().__init__()
        self.stem, self.body = Block(3, 8), Block(8, 16)
        self.squeeze, self.excite = nn.Conv2d(16, 6, 1), nn.Conv2d(6, 16, 1)
        self.last, self.fc = Block(16, 8), nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.body(self.stem(x))
        gate = torch.sigmoid(self.excite(torch.relu(self.squeeze(x.mean((2, 3), keepdim=True)))))
        return self.fc(self.last(x * gate).mean((2, 3)))


class Flatten(nn.Module):
    """A plain network with biases, no norms, flattened into linear layers."""

    def __init__(self):
        super().__init__()
        self.features = nn.Sequential(
            nn.Conv2d(3, 8, 3, 1, 1), nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(8, 10, 3, 1, 1), nn.ReLU(), nn.MaxPool2d(2)
        )
        self.head = nn.Sequential(nn.Flatten(), nn.Linear(10 * 4 * 4, 20), nn.ReLU(), nn.Dropout(0.3), nn.Linear(20, 5))

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.features(x))


NETWORKS = [Residual, Concat, Depthwise, SqueezeExcitation, Flatten]


class Waves(nn.Module):
    """A complex layer between real ones."""

    def __init__(self):
        super().__init__()
        self.one, self.two = nn.Linear(3, 8), nn.Linear(8, 6, dtype=torch.complex64)
        self.three, self.fc = nn.Linear(6, 8), nn.Linear(8, 5)

    def forward(self, x):
        x = torch.relu(self.one(x.mean(2).transpose(1, 2)))
        x = torch.relu(self.three(self.two(torch.complex(x, x / 2)).abs()))
        return self.fc(x.mean(1))


def example(batch: int = 4, seed: int = 0) -> Tensor:
    return torch.randn(batch, 3, 16, 16, generator=torch.Generator().manual_seed(seed))


def batches(steps: int, batch: int = 8):
    generator = torch.Generator().manual_seed(1)
    for _ in range(steps):
        yield torch.randn(batch, 3, 16, 16, generator=generator), torch.randint(5, (batch,), generator=generator)


def randomised(model: nn.Module) -> nn.Module:
    """`model` in eval mode, without the zeros of a fresh one."""
    randomise(model)
    return model
