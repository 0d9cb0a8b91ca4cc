"""A training process that may be killed at any moment: `python interrupted.py FOLDER EARLY` goes on where it stood.

In each step it writes one checkpoint, between backward and step or after the step, and a line with a checksum of
all that the run consists of. A folder without a checkpoint is a run from the beginning.
"""

import hashlib
import os
import random
import sys
from pathlib import Path

import torch
import torch.nn.functional as F
from networks import SHORT, Residual, batches, example
from torch.optim.lr_scheduler import OneCycleLR
from torch.utils import _pytree

from ato_optim import ATO

STEPS = 60


def build():
    model = Residual()
    base = torch.optim.AdamW(model.parameters(), lr=3e-3)
    optimizer = ATO(base, model, example(), target_flops=0.5, total_steps=STEPS, phases=SHORT, interval=2)
    return model, optimizer, OneCycleLR(optimizer, 3e-3, total_steps=STEPS)


def checksum(model, optimizer, scheduler) -> str:
    """Of weights, momenta, controller, masks and schedule."""
    digest = hashlib.sha256()
    for leaf in _pytree.tree_leaves([thing.state_dict() for thing in (model, optimizer, scheduler)]):
        digest.update(leaf.numpy().tobytes() if isinstance(leaf, torch.Tensor) else repr(leaf).encode())
    return digest.hexdigest()


def run(folder: Path, early: bool) -> None:
    torch.set_num_threads(1)
    # A new process begins with other weights: all must come from the checkpoint, if there is one.
    path, start, backward_done = folder / "checkpoint.pt", 0, False
    torch.manual_seed(os.getpid() if path.exists() else 0)
    model, optimizer, scheduler = build()
    if path.exists():
        saved = torch.load(path, weights_only=True)
        optimizer.load_state_dict(saved["optimizer"])
        model.load_state_dict(saved["model"])
        scheduler.load_state_dict(saved["scheduler"])
        start, backward_done = saved["step"], saved["gradients"] is not None
        if backward_done:
            for parameter, gradient in zip(model.parameters(), saved["gradients"], strict=True):
                parameter.grad = gradient

    def save(step, gradients=None):
        content = {"step": step, "gradients": gradients}
        things = {"model": model, "optimizer": optimizer, "scheduler": scheduler}
        torch.save(content | {name: thing.state_dict() for name, thing in things.items()}, folder / "new.pt")
        os.replace(folder / "new.pt", path)

    with (folder / "log.txt").open("a") as log:
        for step, (x, y) in enumerate(batches(STEPS)):
            if step < start:
                continue
            if not (backward_done and step == start):
                optimizer.zero_grad()
                F.cross_entropy(model(x), y).backward()
                if random.Random(step).random() < 0.5:
                    save(step, [p.grad for p in model.parameters()])
            optimizer.step()
            scheduler.step()
            if early and optimizer.removable:
                optimizer.compress()
            # Before the checkpoint: a process that is killed between the two does the step, and the line, again.
            log.write(f"{step} {optimizer.phase} {checksum(model, optimizer, scheduler)}\n")
            log.flush()
            if random.Random(-step).random() < 0.5:
                save(step + 1)


if __name__ == "__main__":
    run(Path(sys.argv[1]), sys.argv[2] == "early")
