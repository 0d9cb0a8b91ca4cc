"""Train one network with one method and write what came out as one JSON file.

    python benchmarks/train.py                                        # digits, ResNet-20, ATO: half a minute
    python benchmarks/train.py --data cifar10 --data-dir DIR --method dense --epochs 16
    python benchmarks/train.py --data cifar10 --data-dir DIR --method ato --epochs 16 --early --resume

Methods, all with the same epochs, recipe, seed and order of the data:
    ato        the optimizer of this package around SGD
    random     the same with scores drawn by chance instead of the controller's logits (searches.py)
    norms      the same with a controller that is told nothing of the loss, so that norms and costs decide
    dense      SGD alone
    narrow     every layer thinned by the same factor before the first step, then SGD; with --widths, to the widths
               that another run ended with
    magnitude  torch-pruning's one-shot global group magnitude (L2) at half time, then SGD goes on; --cut-at moves the
               cut, --cuts makes several of it, --pruner changes what torch-pruning does at it; with --widths, the
               magnitude only says which channels of each layer stay
"""

import argparse
import copy
import json
import math
import platform
import shlex
import subprocess
import sys
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
import torchvision
from torch import nn
from tqdm import tqdm

from ato_optim import ATO, load_pruned, save_pruned

sys.path.insert(0, str(Path(__file__).parent))
import data
import models
from controls import MAGNITUDE, narrow, of_widths, prune_by_magnitude
from measure import commit, evaluate, hardware, latency, macs
from runs import show
from searches import SEARCHES, knowing_less

RECORDED = (
    "model",
    "data",
    "method",
    "target_flops",
    "epochs",
    "batch",
    "lr",
    "warmup_epochs",
    "seed",
    "early",
    "compile",
    "ato",
    "cut_at",
    "cuts",
    "pruner",
    "widths",
)
PRUNING = ("ato", *SEARCHES)
"""Methods that ATO carries out."""
RECIPE = {"momentum": 0.9, "nesterov": True, "weight_decay": 5e-4}


def arguments(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--model", default="resnet20", help="resnet20, resnet56 or a torchvision classification model")
    add("--data", default="digits", choices=["digits", "cifar10", "cifar100", "imagefolder"])
    add("--data-dir", type=Path, help="folder that holds the data set: required, but for digits")
    add("--method", default="ato", choices=[*PRUNING, "dense", "narrow", "magnitude"])
    add("--target-flops", type=float, default=0.45, help="share of the dense network's MACs that is kept (0.45)")
    add("--epochs", type=int, help="default: 64 on digits, 16 elsewhere")
    add("--batch", type=int, default=128, help="samples a step (128)")
    add("--lr", type=float, default=0.2, help="peak learning rate (0.2)")
    add("--warmup-epochs", type=float, default=1.5, help="epochs of linear warm-up (1.5)")
    add("--seed", type=int, default=0, help="of weights, data order, augmentation and controller (0)")
    add("--size", type=int, default=224, help="side that images of an ImageFolder tree are resized to (224)")
    add("--early", action="store_true", help="remove the channels as soon as they are zero, not at the end")
    add("--ato", type=json.loads, default={}, help='further arguments of ATO as JSON: {"round_to": 8}')
    add("--widths", metavar="JSON", help="for narrow and magnitude: file of the run whose widths they take")
    add("--cut-at", type=float, default=0.5, help="for magnitude: share of the run at which it cuts (0.5)")
    add(
        "--cuts",
        type=int,
        default=1,
        help="for magnitude: number of equal cuts, evenly up to that share of the run (1)",
    )
    add("--pruner", type=json.loads, default={}, help="for magnitude: further arguments of torch-pruning's BasePruner")
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    add("--precision", choices=["bfloat16", "float32"], help="of autocast; default: bfloat16 where the hardware has it")
    add("--compile", action="store_true", help="train through torch.compile; evaluation stays eager")
    add("--threads", type=int, help="CPU threads; default: torch's")
    add("--out", type=Path, default=Path("runs"), help="folder of checkpoint, JSON and figure (runs)")
    add("--name", help="name of the run; default: data-model-method-percent-seed")
    add("--resume", action="store_true", help="go on from the run's own checkpoint, if there is one")
    add("--evaluate", type=Path, metavar="FILE", help="train nothing: print accuracy and MACs of the network in FILE")
    add("--save-every", type=float, default=60, metavar="S", help="seconds between checkpoints (60)")
    args = parser.parse_args(argv)
    # As it was called, but for the names of folders, which are nobody else's.
    folders = {str(args.data_dir): "DIR", str(args.out): "OUT"}
    args.argv = [folders.get(word, word) for word in (sys.argv[1:] if argv is None else argv)]
    args.precision = args.precision or ("bfloat16" if has_bfloat16(torch.device(args.device)) else "float32")
    args.epochs = args.epochs or (64 if args.data == "digits" else 16)
    # Runs of different budgets in one folder must not go on from each other's checkpoints.
    budget = "" if args.method == "dense" else f"-{100 * args.target_flops:g}"
    args.name = args.name or f"{args.data}-{args.model}-{args.method}{budget}-{args.seed}"
    return args


def reread(args: argparse.Namespace, path: Path) -> dict[str, float]:
    """Accuracy and MACs of the compressed network in the file `path`, found out by a new process."""
    call = [sys.executable, __file__, "--model", args.model, "--data", args.data, "--size", str(args.size)]
    call += ["--device", args.device, "--evaluate", str(path)]
    call += ["--threads", str(torch.get_num_threads())]
    if args.data_dir:
        call += ["--data-dir", str(args.data_dir)]
    return json.loads(subprocess.run(call, check=True, stdout=subprocess.PIPE, text=True).stdout)


def has_bfloat16(device: torch.device) -> bool:
    """Whether the hardware computes in bfloat16: emulated it is ten times slower than float32."""
    has = torch.cpu.get_capabilities()
    return device.type == "cuda" or bool(has.get("avx512_bf16") or has.get("amx_bf16"))


def learning_rate(args: argparse.Namespace, step: int, per_epoch: int) -> float:
    """Linear warm-up, then half a cosine to zero."""
    warmup, total = args.warmup_epochs * per_epoch, args.epochs * per_epoch
    if step < warmup:
        return args.lr * (step + 1) / warmup
    return args.lr * 0.5 * (1 + math.cos(math.pi * (step - warmup) / (total - warmup)))


def setting(args: argparse.Namespace) -> tuple[data.Batches, data.Split, nn.Module]:
    """Training batches, test split and the dense network at its start, on the device."""
    train, test, classes = data.load(args.data, args.data_dir, args.size)
    train, test = train.to(args.device), test.to(args.device)
    image = tuple(train.images.shape[1:])
    batches = data.Batches(train, args.batch, args.seed, pad=max(1, image[1] // 8), flip=args.data != "digits")
    torch.manual_seed(args.seed)
    model = models.build(args.model, classes, image)
    return batches, test, model.to(args.device, memory_format=torch.channels_last)


def evaluated(args: argparse.Namespace) -> dict[str, float]:
    """Accuracy and MACs of the compressed network in a file."""
    batches, test, dense = setting(args)
    model = load_pruned(dense, args.evaluate)
    accuracy, _ = evaluate(model, batches, test)
    example = batches.normalise(test.images[:1])
    return {"accuracy": accuracy, "macs": macs(model, example)}


class Run:
    """One training run: what it holds, one step of it, its checkpoint."""

    def __init__(self, args: argparse.Namespace):
        self.args, self.commit = args, commit()
        self.device = torch.device(args.device)
        self.batches, self.test, dense = setting(args)
        self.total = args.epochs * self.batches.per_epoch
        self.example = self.batches.normalise(self.batches.split.images[:2])
        self.model = dense.train()
        self.dense_macs = macs(self.model, self.example)
        self.dense_parameters = sum(p.numel() for p in self.model.parameters())
        self.widths = json.loads(Path(args.widths).read_text())["widths"] if args.widths else None
        if args.method == "narrow" and self.widths:
            self.model = of_widths(self.model, self.example, self.widths)
        elif args.method == "narrow":
            self.model = narrow(self.model, self.example, args.target_flops * self.dense_macs)
        self._compile()
        self.optimizer = self._optimizer()
        self.step, self.seconds = 0, 0.0
        self.at_cut: dict[str, Any] = {}

    def _compile(self) -> None:
        if self.args.compile:
            self.model.compile()

    def _optimizer(self) -> torch.optim.Optimizer:
        sgd = torch.optim.SGD(self.model.parameters(), lr=self.args.lr, **RECIPE)
        if self.args.method not in PRUNING:
            return sgd
        optimizer = ATO(
            sgd, self.model, self.example,
            target_flops=self.args.target_flops, total_steps=self.total, **{"seed": self.args.seed, **self.args.ato},
        )  # fmt: skip
        return optimizer if self.args.method == "ato" else knowing_less(optimizer, self.args.method)

    @property
    def cuts(self) -> dict[int, float]:
        """Step of each cut by magnitude -> share of the dense MACs that it leaves."""
        done = [cut / self.args.cuts for cut in range(1, self.args.cuts + 1)]
        return {int(share * self.args.cut_at * self.total): 1 - share * (1 - self.args.target_flops) for share in done}

    def train_step(self) -> float:
        if self.args.method == "magnitude" and self.step in self.cuts:
            self.cut()
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate(self.args, self.step, self.batches.per_epoch)
        images, labels = self.batches(self.step)
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.args.precision == "bfloat16"):
            loss = F.cross_entropy(self.model(images), labels)
        self.optimizer.zero_grad()
        loss.backward()
        self.optimizer.step()
        self.step += 1
        at_the_end = self.step == self.total
        if self.args.method in PRUNING and (at_the_end or self.args.early) and self.optimizer.removable:
            self.remove()
        return loss.item()

    def cut(self) -> None:
        """By magnitude: to the budget of the step, or, with --widths, to those of another run."""
        if self.widths:
            self.model = of_widths(self.model, self.example, self.widths, MAGNITUDE)
            self._compile()
        else:
            wanted = self.cuts[self.step] * self.dense_macs
            prune_by_magnitude(self.model, self.example, wanted, **self.args.pruner)
        self.optimizer = self._optimizer()

    def remove(self) -> None:
        """Compress, and measure the network on both sides of the cut."""
        if self.at_cut:
            return
        trained = copy.deepcopy(self.model)
        self.optimizer.compress()
        accuracy, logits = evaluate(trained, self.batches, self.test)
        accuracy_after, logits_after = evaluate(self.model, self.batches, self.test)
        batch = self.batches.normalise(self.test.images[:64])
        self.at_cut = {
            "step": self.step,
            "accuracy_before": accuracy,
            "accuracy_after": accuracy_after,
            "largest_logit": logits.abs().max().item(),
            "largest_logit_difference": (logits - logits_after).abs().max().item(),
            "latency_ms": latency({"before": trained, "after": self.model}, batch),
        }
        self.model.train()

    @property
    def checkpoint(self) -> Path:
        return self.args.out / f"{self.args.name}.ckpt"

    def save(self) -> None:
        state = {
            "step": self.step,
            "seconds": self.seconds,
            "at_cut": self.at_cut,
            "optimizer": self.optimizer.state_dict(),
        }
        # A network that torch-pruning cut is kept as an object; ATO's checkpoint knows how to cut it again.
        state["model"] = self.model.state_dict() if self.args.method in PRUNING else self.model
        temporary = self.checkpoint.with_suffix(".tmp")
        torch.save(state, temporary)
        temporary.replace(self.checkpoint)

    def load(self) -> None:
        state = torch.load(self.checkpoint, weights_only=self.args.method in PRUNING)
        if self.args.method not in PRUNING:
            self.model = state["model"]
            self._compile()
            self.optimizer = self._optimizer()
        self.optimizer.load_state_dict(state["optimizer"])
        if self.args.method in PRUNING:
            self.model.load_state_dict(state["model"])
        self.step, self.seconds, self.at_cut = state["step"], state["seconds"], state["at_cut"]

    def result(self) -> dict[str, Any]:
        accuracy, _ = evaluate(self.model, self.batches, self.test)
        kept = macs(self.model, self.example)
        if self.args.method in PRUNING:
            path = self.args.out / f"{self.args.name}.pt"
            save_pruned(self.model, path)
            accuracy = reread(self.args, path)["accuracy"]
        layers = {name: m for name, m in self.model.named_modules() if isinstance(m, (nn.Conv2d, nn.Linear))}
        return {
            "command": "python benchmarks/train.py " + shlex.join(self.args.argv),
            "arguments": {k: v for k, v in vars(self.args).items() if k in RECORDED},
            "recipe": {"optimizer": "SGD", **RECIPE, "schedule": "linear warm-up, cosine to zero"},
            "versions": {"python": platform.python_version(), "torch": torch.__version__, "commit": self.commit,
                         "torchvision": torchvision.__version__, "torch_pruning": version("torch-pruning")},
            "hardware": hardware(self.device),
            "precision": f"torch.{self.args.precision}",
            "accuracy": accuracy,
            "at_cut": self.at_cut,
            "macs": kept // len(self.example),
            "dense_macs": self.dense_macs // len(self.example),
            "macs_kept": kept / self.dense_macs,
            "parameters": sum(p.numel() for p in self.model.parameters()),
            "dense_parameters": self.dense_parameters,
            "widths": {name: layer.weight.shape[0] for name, layer in layers.items()},
            "seconds": round(self.seconds, 1),
            "report": self.optimizer.report().as_dict() if self.args.method in PRUNING else None,
        }  # fmt: skip


def main(argv: list[str] | None = None) -> None:
    args = arguments(argv)
    if args.threads:
        torch.set_num_threads(args.threads)
    if args.evaluate:
        print(json.dumps(evaluated(args)))
        return
    args.out.mkdir(parents=True, exist_ok=True)
    run = Run(args)
    if args.resume and run.checkpoint.exists():
        run.load()
    start = saved = time.perf_counter()
    before = run.seconds
    with tqdm(total=run.total, initial=run.step, desc=args.name, mininterval=1) as bar:
        while run.step < run.total:
            loss = run.train_step()
            bar.update()
            bar.set_postfix(loss=f"{loss:.3f}", refresh=False)
            now = time.perf_counter()
            run.seconds = before + now - start
            if now - saved > args.save_every:
                run.save()
                saved = now
    result = run.result()
    path = args.out / f"{args.name}.json"
    path.write_text(json.dumps(result, indent=1) + "\n")
    run.checkpoint.unlink(missing_ok=True)
    print(show(result))
    print(f"written: {path}")
    if args.method in PRUNING:
        figure = path.with_suffix(".png")
        run.optimizer.report().figure().savefig(figure, dpi=150)
        print(f"written: {figure}  (widths per layer, budget over time)")


if __name__ == "__main__":
    main()
