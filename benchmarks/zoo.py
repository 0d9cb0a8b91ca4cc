"""Can every model of torchvision be pruned, exactly and to its budget? One process a model, small inputs.

    python benchmarks/zoo.py                        # all models, about two hours on two cores
    python benchmarks/zoo.py --only '^resnet' --out zoo.json

A model with random weights trains for a few steps through all phases of ATO, at a budget halfway between 1 and the
least it can reach; it is compressed, compared with its masked self, trained one step more, and exported. Models
that are in the output file already are not run again. benchmarks/tables.py writes docs/models.md from it.
"""

import argparse
import inspect
import json
import platform
import re
import resource
import subprocess
import sys
import time
import warnings
from concurrent.futures import ThreadPoolExecutor
from importlib.metadata import version
from pathlib import Path

import torch
import torchvision
from measure import commit
from torch import Tensor, nn

from ato_optim import ATO
from ato_optim.conditions import randomise
from ato_optim.cost import count_macs
from ato_optim.graph import call
from ato_optim.nests import tensors_in
from ato_optim.proof import difference

STEPS = 10
# Where two images of 64 x 64 pixels, or two clips of 4 frames of them, will not do: (samples, frames, side).
SIZES = {
    "inception": (2, 0, 299),
    "maxvit": (1, 0, 224),
    "mvit": (1, 16, 224),
    "s3d": (1, 16, 224),
    "raft": (1, 0, 128),
}


def detect(model: nn.Module, images: list[Tensor]) -> list:
    """A detector's heads on its features, at one fixed box where it has a second stage, without the choice of boxes."""
    batch, _ = model.transform(images)
    features = model.backbone(batch.tensors)
    features = {"0": features} if isinstance(features, Tensor) else features
    maps = list(features.values())
    if not hasattr(model, "rpn"):
        return model.head(maps)
    outputs, heads = [model.rpn.head(maps)], model.roi_heads
    boxes = [torch.tensor([[4.0, 4.0, 40.0, 48.0]])] * len(images)
    for kind in ("box", "mask", "keypoint"):
        if getattr(heads, f"{kind}_head", None) is not None:
            pooled = getattr(heads, f"{kind}_roi_pool")(features, boxes, batch.image_sizes)
            outputs.append(getattr(heads, f"{kind}_predictor")(getattr(heads, f"{kind}_head")(pooled)))
    return outputs


def build(name: str) -> tuple[str, nn.Module, tuple]:
    """The family, the model with random weights, and its arguments."""
    builder = torchvision.models.get_model_builder(name)
    family = builder.__module__.split(".")[2]
    options = {"weights": None}
    if "weights_backbone" in inspect.signature(builder).parameters:
        options["weights_backbone"] = None
    if "googlenet" in name or "inception" in name:
        options["init_weights"] = False  # minutes of truncated normals
    key = name.removeprefix("quantized_")
    samples, frames, side = next((size for start, size in SIZES.items() if key.startswith(start)), (2, 4, 64))
    if key.startswith("vit_"):
        side = options["image_size"] = 4 * int(key.rsplit("_", 1)[1])
    if family == "detection" and not key.startswith("ssd"):
        options |= {"min_size": side, "max_size": side}
    model = builder(**options)
    if family == "detection":
        return family, model, ([torch.rand(3, side, side), torch.rand(3, side, side)],)
    shape = (samples, 3, frames, side, side) if family == "video" else (samples, 3, side, side)
    return family, model, tuple(torch.rand(shape) for _ in range(1 + (family == "optical_flow")))


def run_detector(model: nn.Module, inputs: tuple) -> list:
    return detect(model, *inputs)


def loss_of(family: str, model: nn.Module, inputs: tuple) -> Tensor:
    """A loss of one training forward: a detector's own, else the squares of all outputs."""
    if family == "detection":
        target = {
            "boxes": torch.tensor([[4.0, 4.0, 40.0, 48.0]]),
            "labels": torch.tensor([1]),
            "masks": torch.ones(1, 64, 64, dtype=torch.uint8),
            "keypoints": torch.tensor([[[20.0, 20.0, 1.0]] * 17]),
        }
        return sum(model(*inputs, [dict(target) for _ in inputs[0]]).values())
    return sum(t.pow(2).mean() for t in tensors_in(model(*inputs)) if t.requires_grad)


def exports(model: nn.Module, inputs: tuple) -> bool:
    try:
        torch.export.export(model.eval(), inputs, strict=False)
    except Exception:
        return False
    return True


def train(family: str, model: nn.Module, inputs: tuple, optimizer: torch.optim.Optimizer, steps: int) -> float:
    model.train()
    for _ in range(steps):
        optimizer.zero_grad()
        loss = loss_of(family, model, inputs)
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
    return float(loss)


def one(name: str) -> dict:
    """All that is measured of one model."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    warnings.simplefilter("ignore")
    family, model, inputs = build(name)
    randomise(model)  # heads of zeros and scales of 1e-6 would hide every wrong cut
    forward = run_detector if family == "detection" else call
    result = {"name": name, "family": family, "parameters": sum(p.numel() for p in model.parameters())}
    arguments = {"total_steps": STEPS, "forward_fn": forward, "streams": 0}  # all that can be cut shall be

    def base() -> torch.optim.Optimizer:
        return torch.optim.SGD(model.parameters(), lr=1e-3)

    begin, cpu = time.perf_counter(), time.process_time()
    try:
        least = ATO(base(), model, inputs, target_flops=1, **arguments)
    except (TypeError, ValueError) as error:
        return result | {"refused": str(error)}
    result |= {"seconds": time.perf_counter() - begin, "cpu_seconds": time.process_time() - cpu}
    report = least.report()
    budget = (1 + least.least_flops) / 2
    reasons = {reason: len(layers) for layers, reason in report.left_out}
    result |= {"groups": len(report.widths), "covered": report.prunable_flops, "left_out": reasons}
    result |= {"least": least.least_flops, "budget": budget, "macs": report.macs_before}
    if not report.widths:
        return result | {"refused": "nothing to prune: " + "; ".join(reasons)}
    del least
    optimizer = ATO(base(), model, inputs, target_flops=budget, **arguments)
    train(family, model, inputs, optimizer, STEPS)
    model.eval()
    with torch.no_grad():
        masked = forward(model, inputs)
    predicted = optimizer.report().macs_after
    small = optimizer.compress().eval()
    with torch.no_grad():
        result["difference"] = difference(masked, forward(small, inputs))
    measured = count_macs(small, inputs, forward)
    result |= {"predicted_macs": predicted, "measured_macs": measured, "kept": measured / report.macs_before}
    result["next_loss"] = train(family, small, inputs, optimizer, 1)
    result["exports"] = exports(small, inputs)
    if not result["exports"]:
        result["dense_exports"] = exports(build(name)[1], inputs)
    result["memory_mib"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024
    return result


def in_process(name: str, limit: int) -> dict:
    begin = time.perf_counter()
    try:
        done = subprocess.run(
            [sys.executable, __file__, "--one", name], capture_output=True, text=True, timeout=limit, check=False
        )
    except subprocess.TimeoutExpired:
        return {"name": name, "error": f"no end after {limit} s"}
    if done.returncode:
        return {"name": name, "error": (done.stderr.strip().splitlines() or [f"exit {done.returncode}"])[-1]}
    seconds = time.perf_counter() - begin
    return json.loads(done.stdout.splitlines()[-1]) | {"total_seconds": seconds, "commit": commit()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "zoo.json")
    parser.add_argument("--only", default="", help="regular expression on the names")
    parser.add_argument("--limit", type=int, default=900, help="seconds a model")
    parser.add_argument("--jobs", type=int, default=2)
    parser.add_argument("--one", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.one:
        print(json.dumps(one(args.one)))
        return
    known = json.loads(args.out.read_text())["models"] if args.out.exists() else {}
    names = [name for name in torchvision.models.list_models() if re.search(args.only, name) and name not in known]
    facts = {
        "command": "python benchmarks/zoo.py",
        "machine": platform.machine(),
        "versions": {package: version(package) for package in ("torch", "torchvision", "torch-pruning")},
    }
    with ThreadPoolExecutor(args.jobs) as pool:
        for result in pool.map(lambda name: in_process(name, args.limit), names):
            known[result["name"]] = result
            print(json.dumps(result), flush=True)
            args.out.write_text(json.dumps(facts | {"models": dict(sorted(known.items()))}, indent=1) + "\n")


if __name__ == "__main__":
    main()
