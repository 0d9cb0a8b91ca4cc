"""What is measured of a network: MACs, accuracy, latency."""

import platform
import subprocess
import time
from pathlib import Path

import numpy as np
import torch
from data import Batches, Split
from torch import Tensor, nn

from ato_optim.cost import count_macs


@torch.compiler.set_stance("force_eager")
def macs(model: nn.Module, example: Tensor) -> int:
    """Multiply-accumulates of one forward, as ATO counts them, in eager mode where the model is compiled."""
    return count_macs(model, example)


@torch.compiler.set_stance("force_eager")
@torch.no_grad()
def evaluate(model: nn.Module, batches: Batches, test: Split) -> tuple[float, Tensor]:
    """Test accuracy in percent and the logits (N, classes), float32."""
    model.eval()
    logits = torch.cat([model(batches.normalise(images)) for images in test.images.split(500)])
    model.train()
    return 100 * (logits.argmax(1) == test.labels).float().mean().item(), logits


@torch.compiler.set_stance("force_eager")
@torch.no_grad()
def latency(networks: dict[str, nn.Module], x: Tensor, repeats: int = 30) -> dict[str, float]:
    """Median milliseconds of one forward on the batch `x`, the networks taking turns."""
    times: dict[str, list[float]] = {name: [] for name in networks}
    for model in networks.values():
        model.eval()
    for _ in range(repeats):
        for name, model in networks.items():
            start = time.perf_counter()
            model(x)
            if x.is_cuda:
                torch.cuda.synchronize()
            times[name].append(1e3 * (time.perf_counter() - start))
    return {name: float(np.median(t)) for name, t in times.items()}


def commit() -> str | None:
    """The commit of this checkout, None outside of one."""
    call = ["git", "rev-parse", "--short", "--verify", "-q", "HEAD"]
    done = subprocess.run(call, capture_output=True, text=True, cwd=Path(__file__).parent, check=False)
    return done.stdout.strip() or None


def hardware(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{torch.cpu.get_capabilities().get('cpu_name', platform.processor())}, {torch.get_num_threads()} thread(s)"
