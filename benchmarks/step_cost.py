"""What a step of ATO(SGD) costs over a step of SGD: the whole training step, both in the same run, taking turns.

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
from pathlib import Path

import torch
import torch.nn.functional as F
import torchvision
from tqdm import tqdm

from ato_optim import ATO

# Phases that put every measured step into the part of a run that is looked at.
CASES = {
    "pull on masked channels": {"phases": (0, 0, 0, 1)},
    "masked channels held at zero": {"phases": (0, 0, 0, 0)},
    "controller turn": {"phases": (0, 0, 0.9, 1), "interval": 1},
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="resnet50")
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--size", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=30, help="measured steps of each optimizer")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    images, labels = torch.randn(args.batch, 3, args.size, args.size), torch.randint(1000, (args.batch,))
    dense = torchvision.models.get_model(args.model, weights=None)

    def sgd(model):
        return torch.optim.SGD(model.parameters(), lr=1e-3, momentum=0.9, weight_decay=1e-4)

    runs = {"SGD": (dense, sgd(dense))}
    for name, options in CASES.items():
        model = copy.deepcopy(dense)
        runs[name] = model, ATO(sgd(model), model, images, target_flops=0.45, total_steps=10 * args.rounds, **options)

    def seconds(model, optimizer) -> float:
        start = time.perf_counter()
        optimizer.zero_grad()
        F.cross_entropy(model(images), labels).backward()
        optimizer.step()
        return time.perf_counter() - start

    times = {name: [] for name in runs}
    for k in tqdm(range(args.rounds + 3), desc="rounds"):
        for name, run in runs.items():
            spent = seconds(*run)
            if k >= 3:  # the first steps allocate
                times[name].append(spent)

    result = {
        "command": "python benchmarks/step_cost.py " + shlex.join(sys.argv[1:]),
        "model": args.model,
        "batch": args.batch,
        "size": args.size,
        "hardware": f"{torch.cpu.get_capabilities().get('cpu_name')}, {args.threads} thread(s)",
        "versions": {"python": platform.python_version(), "torch": torch.__version__},
        "n": args.rounds,
        "milliseconds": {name: round(1e3 * statistics.median(t), 1) for name, t in times.items()},
        # Each round's step over SGD's step of the same round: what else the machine does cancels out.
        "ratio_to_SGD": {
            name: round(statistics.median(a / b for a, b in zip(t, times["SGD"], strict=True)), 4)
            for name, t in times.items()
        },
    }
    print(json.dumps(result, indent=1))
    if args.out:
        args.out.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
