"""The networks of the benchmarks: CIFAR ResNets, and torchvision's models with stems for small images."""

import torch
import torchvision
from torch import Tensor, nn


class BasicBlock(nn.Module):
    """Two 3 x 3 convolutions and a shortcut (He et al. 2016, figure 2)."""

    def __init__(self, inputs: int, outputs: int, stride: int):
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(outputs)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(outputs)
        self.relu = nn.ReLU(inplace=True)
        self.shortcut = nn.Sequential()
        if stride != 1 or inputs != outputs:
            self.shortcut = nn.Sequential(nn.Conv2d(inputs, outputs, 1, stride, bias=False), nn.BatchNorm2d(outputs))

    def forward(self, x: Tensor) -> Tensor:
        y = self.relu(self.bn1(self.conv1(x)))
        return self.relu(self.bn2(self.conv2(y)) + self.shortcut(x))


class CifarResNet(nn.Module):
    """ResNet-(6n + 2) for 32 x 32 images (He et al. 2016, section 4.2), with projection shortcuts (option B)."""

    def __init__(self, depth: int, classes: int, channels: int = 3):
        super().__init__()
        blocks = (depth - 2) // 6
        self.stem = nn.Sequential(
            nn.Conv2d(channels, 16, 3, 1, 1, bias=False), nn.BatchNorm2d(16), nn.ReLU(inplace=True)
        )
        stages, inputs = [], 16
        for outputs, stride in (16, 1), (32, 2), (64, 2):
            for k in range(blocks):
                stages.append(BasicBlock(inputs, outputs, stride if k == 0 else 1))
                inputs = outputs
        self.stages = nn.Sequential(*stages)
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.fc = nn.Linear(64, classes)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(torch.flatten(self.pool(self.stages(self.stem(x))), 1))


def build(name: str, classes: int, image: tuple[int, int, int]) -> nn.Module:
    """The network `name` for images of shape (channels, height, width).

    Names are resnet20 and resnet56 (He et al. 2016) or any of torchvision's classification models. For
    images smaller than 64 pixels, resnet18 and mobilenet_v2 get the stems usual for CIFAR: strides of one
    where they would shrink the image first, no max-pooling.
    """
    channels, height, _ = image
    if name in ("resnet20", "resnet56"):
        return CifarResNet(int(name[6:]), classes, channels)
    model = torchvision.models.get_model(name, weights=None, num_classes=classes)
    if height < 64 and name.startswith("resnet"):
        model.conv1 = nn.Conv2d(channels, 64, 3, 1, 1, bias=False)
        model.maxpool = nn.Identity()
        nn.init.kaiming_normal_(model.conv1.weight, mode="fan_out", nonlinearity="relu")
    elif height < 64 and name == "mobilenet_v2":
        stem = model.features[0][0]
        model.features[0][0] = nn.Conv2d(channels, stem.out_channels, 3, 1, 1, bias=False)
        model.features[2].conv[1][0].stride = (1, 1)
    elif height < 64 and name.startswith("vgg"):
        model.avgpool = nn.AdaptiveAvgPool2d(1)
        model.classifier = nn.Linear(512, classes)
    return model
