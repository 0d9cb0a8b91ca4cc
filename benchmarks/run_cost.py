"""What whole runs of ATO(SGD) cost over the same runs of SGD, with the channels removed early and at the end.

    python benchmarks/run_cost.py OUT/cifar10-resnet20-ato-0.json OUT/cifar10-resnet20-ato-1.json

Takes the JSON files of finished runs of train.py on images of 3 x 32 x 32. Steps of every kind are measured in one
process, taking turns, and added up as often as the run made them: what else the machine did while it trained does not
enter.
"""

import json
import shlex
import sys
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).parent))
import models
from controls import of_widths
from runs import phases
from step_cost import cases, measure, parser, publish, sgd

IMAGE = (3, 32, 32)


def run_cost(report: dict[str, Any], ratio: dict[str, float]) -> dict[str, float]:
    """Time of a run over that of the same run of SGD, from what its steps cost over one of SGD.

    Args:
        report: the run's own, with the steps of its turns.
        ratio: of a step of each of step_cost's cases, and of the compressed network ("compressed").
    """
    search, commit, zero = phases(report)
    turns = [step for step, _ in report["history"] if step < commit]
    pulled = zero - search - len(turns)
    searched = search + pulled * ratio["pull on masked channels"] + len(turns) * ratio["controller turn"]
    total, rest = report["total_steps"], report["total_steps"] - zero
    return {
        "early": (searched + rest * ratio["compressed"]) / total,
        "at the end": (searched + rest * ratio["masked channels held at zero"]) / total,
    }


def measured(path: Path, rounds: int) -> dict[str, Any]:
    """The cost of the run whose JSON file is `path`."""
    run = json.loads(path.read_text())
    arguments, classes = run["arguments"], list(run["widths"].values())[-1]
    dense = models.build(arguments["model"], classes, IMAGE).to(memory_format=torch.channels_last)
    images = torch.randn(arguments["batch"], *IMAGE).to(memory_format=torch.channels_last)
    # What a step takes is a matter of widths, not of weights. torch-pruning, unlike ATO, loses the memory format.
    small = of_widths(dense, images[:2], run["widths"]).to(memory_format=torch.channels_last)
    labels = torch.randint(classes, (len(images),))
    runs = {**cases(dense.train(), images, rounds), "compressed": (small, sgd(small))}
    found = measure(runs, images, labels, rounds)
    return {**found, "run": run_cost(run["report"], found["ratio_to_SGD"])}


def main() -> None:
    arguments = parser(__doc__, rounds=20)
    arguments.add_argument("runs", nargs="+", type=Path, help="JSON files that train.py wrote")
    args = arguments.parse_args()
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    costs = {path.stem: measured(path, args.rounds) for path in args.runs}
    # As it was called, but for the names of folders, which are nobody else's.
    words = [f"OUT/{Path(word).name}" if word.endswith(".json") else word for word in sys.argv[1:]]
    publish("python benchmarks/run_cost.py " + shlex.join(words), {"runs": costs}, args.out)


if __name__ == "__main__":
    main()
