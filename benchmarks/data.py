"""Image classification data, held in memory as bytes and augmented in batches on the device."""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
import torchvision
from torch import Tensor


@dataclass
class Split:
    """Images (N, C, H, W) uint8 and labels (N,) int64 of one split."""

    images: Tensor
    labels: Tensor

    def to(self, device: torch.device) -> "Split":
        return Split(self.images.to(device), self.labels.to(device))


def load(name: str, folder: Path | None, size: int) -> tuple[Split, Split, int]:
    """Training split, test split and the number of classes.

    `name` is digits (scikit-learn's, 8 x 8), cifar10 or cifar100 (torchvision's usual folder, or an
    ImageFolder tree DIR/{train,test}/<class>/*.png), or imagefolder (any DIR/{train,val or test} tree, its
    images resized to `size` x `size`).
    """
    if name == "digits":
        return _digits()
    if folder is None:
        raise SystemExit(f"--data {name} needs --data-dir, the folder that holds it")
    if name in ("cifar10", "cifar100") and not (folder / "train").is_dir():
        dataset = getattr(torchvision.datasets, name.upper())
        train, test = (dataset(folder, train=flag) for flag in (True, False))
        splits = [Split(_images(s.data), torch.as_tensor(s.targets)) for s in (train, test)]
        return splits[0], splits[1], len(train.classes)
    side = 32 if name.startswith("cifar") else size
    test_name = "val" if (folder / "val").is_dir() else "test"
    train, classes = _folder(folder / "train", side)
    test, _ = _folder(folder / test_name, side)
    return train, test, classes


def _images(array: np.ndarray) -> Tensor:
    return torch.from_numpy(np.ascontiguousarray(array.transpose(0, 3, 1, 2)))


def _digits() -> tuple[Split, Split, int]:
    from sklearn.datasets import load_digits

    digits = load_digits()
    images = torch.from_numpy(digits.images * (255 / 16)).to(torch.uint8).unsqueeze(1)
    labels = torch.from_numpy(digits.target).long()
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(0))
    test, train = order[:360], order[360:]
    return Split(images[train], labels[train]), Split(images[test], labels[test]), 10


def _folder(folder: Path, side: int) -> tuple[Split, int]:
    dataset = torchvision.datasets.ImageFolder(str(folder))
    images = np.empty((len(dataset), side, side, 3), np.uint8)
    for k, (image, _) in enumerate(dataset):
        images[k] = np.asarray(image if image.size == (side, side) else image.resize((side, side)))
    return Split(_images(images), torch.as_tensor(dataset.targets)), len(dataset.classes)


class Batches:
    """Batches of a training split: the order and the crops of step k depend on the seed and k alone.

    A run that goes on from a checkpoint therefore sees what an uninterrupted one would have seen, and every
    method sees the same images in the same order.
    """

    def __init__(self, split: Split, batch: int, seed: int, pad: int, flip: bool):
        self.split, self.batch, self.seed, self.pad, self.flip = split, batch, seed, pad, flip
        self.per_epoch = len(split.labels) // batch
        pixels = split.images[:: max(1, len(split.images) // 10_000)].float() / 255
        self.mean = pixels.mean((0, 2, 3), keepdim=True)
        self.std = pixels.std((0, 2, 3), keepdim=True)
        self._epoch, self._order = -1, torch.empty(0)

    def normalise(self, images: Tensor) -> Tensor:
        images = (images.float() / 255 - self.mean) / self.std
        return images.contiguous(memory_format=torch.channels_last)

    def __call__(self, step: int) -> tuple[Tensor, Tensor]:
        """Images (batch, C, H, W) float32, normalised and augmented, and labels (batch,) of one step."""
        device = self.split.labels.device
        epoch, k = divmod(step, self.per_epoch)
        if epoch != self._epoch:
            generator = torch.Generator().manual_seed(self.seed * 100_003 + epoch)
            self._order = torch.randperm(len(self.split.labels), generator=generator).to(device)
            self._epoch = epoch
        rows = self._order[k * self.batch : (k + 1) * self.batch]
        images, labels = self.split.images[rows], self.split.labels[rows]
        return self.normalise(self._augment(images, step)), labels

    def _augment(self, images: Tensor, step: int) -> Tensor:
        n, _, height, width = images.shape
        generator = torch.Generator().manual_seed(self.seed * 100_003 + step + 7_919)
        draw = torch.randint(0, 2 * self.pad + 1, (2, n, 1), generator=generator)
        flips = torch.rand(n, generator=generator) < (0.5 if self.flip else 0.0)
        rows = draw[0] + torch.arange(height)
        columns = draw[1] + torch.arange(width)
        columns = torch.where(flips[:, None], columns.flip(1), columns)
        padded = F.pad(images, (self.pad,) * 4)
        device = images.device
        which = torch.arange(n, device=device)[:, None, None]
        rows, columns = rows.to(device)[:, :, None], columns.to(device)[:, None, :]
        return padded.permute(0, 2, 3, 1)[which, rows, columns].permute(0, 3, 1, 2)
