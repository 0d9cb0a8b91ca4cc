"""What a step of ATO(SGD) costs over a step of SGD: the whole training step, both in the same process, taking turns.

python benchmarks/step_cost.py                 # torchvision's resnet50, batch 8, 64 x 64
python benchmarks/step_cost.py --rounds 60 --out benchmarks/results/step_cost.json
"""

import argparse
import copy
import json
import platform
import shlex
import statistics
import sys
import time
import warnings
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
import torchvision
from torch import Tensor, nn
from tqdm import tqdm

from ato_optim import ATO

sys.path.insert(0, str(Path(__file__).parent))
from measure import commit, hardware

# Phases that put every measured step into the part of a run that is looked at.
CASES = {
    "pull on masked channels": {"phases": (0, 0, 1)},
    "masked channels held at zero": {"phases": (0, 0, 0)},
    "controller turn": {"phases": (0, 0.9, 1), "interval": 1},
}

Trained = tuple[nn.Module, torch.optim.Optimizer]


def sgd(model: nn.Module) -> torch.optim.SGD:
    return torch.optim.SGD(model.parameters(), lr=1e-3, momentum=0.9, weight_decay=1e-4)


def cases(dense: nn.Module, images: Tensor, rounds: int) -> dict[str, Trained]:
    """SGD on `dense`, and ATO(SGD) on copies of it in every case."""
    runs: dict[str, Trained] = {}
    for name, options in CASES.items():
        model = copy.deepcopy(dense)
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "total_steps=.* controller turn")  # some cases are without, on purpose
            optimizer = ATO(sgd(model), model, images[:2], target_flops=0.45, total_steps=10 * rounds, **options)
        runs[name] = model, optimizer
    return {"SGD": (dense, sgd(dense)), **runs}


def seconds(model: nn.Module, optimizer: torch.optim.Optimizer, images: Tensor, labels: Tensor) -> float:
    """Of one training step."""
    start = time.perf_counter()
    optimizer.zero_grad()
    F.cross_entropy(model(images), labels).backward()
    optimizer.step()
    return time.perf_counter() - start


def measure(runs: dict[str, Trained], images: Tensor, labels: Tensor, rounds: int) -> dict[str, Any]:
    """Median milliseconds of a step of each run, and the median of its ratio to SGD's step in the same round."""
    times: dict[str, list[float]] = {name: [] for name in runs}
    for k in tqdm(range(rounds + 3), desc="rounds"):
        for name, run in runs.items():
            spent = seconds(*run, images, labels)
            if k >= 3:  # the first steps allocate
                times[name].append(spent)
    return {
        "n": rounds,
        "milliseconds": {name: round(1e3 * statistics.median(t), 1) for name, t in times.items()},
        # Each round's step over SGD's step of the same round: what else the machine does cancels out.
        "ratio_to_SGD": {
            name: round(statistics.median(a / b for a, b in zip(t, times["SGD"], strict=True)), 4)
            for name, t in times.items()
        },
    }


def parser(doc: str | None, rounds: int) -> argparse.ArgumentParser:
    """A parser with what every measurement of times can be told."""
    made = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument("--rounds", type=int, default=rounds, help="measured steps of each kind")
    made.add_argument("--threads", type=int, default=torch.get_num_threads())
    made.add_argument("--out", type=Path)
    return made


def publish(command: str, found: dict[str, Any], out: Path | None) -> None:
    """Print what was `found` with command, hardware and versions, and write it to `out`."""
    result = {
        "command": command,
        "hardware": hardware(torch.device("cpu")),
        "versions": {"python": platform.python_version(), "torch": torch.__version__, "commit": commit()},
        **found,
    }
    text = json.dumps(result, indent=1)
    print(text)
    if out:
        out.write_text(text + "\n")


def main() -> None:
    arguments = parser(__doc__, rounds=30)
    arguments.add_argument("--model", default="resnet50")
    arguments.add_argument("--batch", type=int, default=8)
    arguments.add_argument("--size", type=int, default=64)
    args = arguments.parse_args()
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    images, labels = torch.randn(args.batch, 3, args.size, args.size), torch.randint(1000, (args.batch,))
    runs = cases(torchvision.models.get_model(args.model, weights=None), images, args.rounds)
    setting = {"model": args.model, "batch": args.batch, "size": args.size}
    command = "python benchmarks/step_cost.py " + shlex.join(sys.argv[1:])
    publish(command, {**setting, **measure(runs, images, labels, args.rounds)}, args.out)


if __name__ == "__main__":
    main()
