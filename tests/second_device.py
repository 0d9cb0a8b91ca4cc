"""What test_device.py runs in a process of its own: training on the CPU and on a device that is not the CPU.

The device is second_device.cpp's, which is built here. It is registered for the whole process: as torch's only
accelerator it would be chosen by other tests, too.
"""

import contextlib
import io
import sys
import types
from pathlib import Path

import networks
import torch
import torch.nn.functional as F
from networks import batches, example
from torch.utils.cpp_extension import load

from ato_optim import ATO, load_pruned, save_pruned

NETWORKS = ["Residual", "Concat", "Depthwise", "SqueezeExcitation"]
RUNS = [(name, how) for name in NETWORKS for how in ("float32", "bfloat16", "no float64")] + [("Residual", "halfspace")]
STEPS = 40


def ghost(folder: Path) -> types.ModuleType:
    """The device's module, torch.ghost, once the device is built in `folder` and registered."""
    torch.utils.rename_privateuse1_backend("ghost")
    source = str(Path(__file__).with_name("second_device.cpp"))
    built = load("second_device", [source], extra_cflags=["-O0"], build_directory=str(folder))
    module = types.ModuleType("torch.ghost")
    module.is_available = module.is_initialized = lambda: True
    module.device_count = lambda: 1
    module.current_device = lambda: 0
    module.device = lambda device: contextlib.nullcontext()
    module._is_in_bad_fork = lambda: False
    module.get_amp_supported_dtype = lambda: [torch.bfloat16]
    module.manual_seed_all = lambda seed: built.default_generator().manual_seed(seed)
    module.get_rng_state = lambda device=0: built.default_generator().get_state()
    module.set_rng_state = lambda state, device=0: built.default_generator().set_state(state)
    module.waits, module.set_float64 = built.waits, built.set_float64
    torch._register_device_module("ghost", module)
    return module


class Run:
    """A model that trains with ATO on `device`."""

    def __init__(self, network, device, how):
        torch.manual_seed(0)
        self.model, self.device, self.autocast = getattr(networks, network)().to(device), device, how == "bfloat16"
        base = torch.optim.SGD(self.model.parameters(), lr=0.05, momentum=0.9)
        options = {
            "target_flops": 0.5,
            "total_steps": STEPS,
            "projection": "halfspace" if how == "halfspace" else "timed",
        }
        self.optimizer = ATO(base, self.model, example(2).to(device), **options)

    def step(self, images, labels):
        with torch.autocast(self.device, torch.bfloat16, enabled=self.autocast):
            loss = F.cross_entropy(self.model(images), labels)
        self.optimizer.zero_grad()
        loss.backward()
        self.optimizer.step()


def trained(network, device, how):
    """What came out of a run that is interrupted after a third and is cut in the middle."""
    run, waits, data = Run(network, device, how), [], list(batches(STEPS))
    seen = getattr(torch, device).waits if device != "cpu" else lambda: 0
    for k, (images, labels) in enumerate(data):
        batch = images.to(device), labels.to(device)
        before, masks = seen(), len(run.optimizer.history)
        run.step(*batch)
        waits += [seen() - before] if len(run.optimizer.history) == masks else []
        if k == STEPS // 3:
            file = io.BytesIO()
            torch.save((run.model.state_dict(), run.optimizer.state_dict()), file)
            run = Run(network, device, how)
            model, optimizer = torch.load(io.BytesIO(file.getvalue()), weights_only=True)
            run.model.load_state_dict(model)
            run.optimizer.load_state_dict(optimizer)
        if run.optimizer.removable and k < STEPS - 5:
            zeroed = run.model.eval()(batch[0]).cpu()
            run.optimizer.compress()
            removed = run.model(batch[0]).cpu()
            run.model.train()
    file = io.BytesIO()
    save_pruned(run.model, file)
    x = example(2)
    loaded = load_pruned(getattr(networks, network)(), io.BytesIO(file.getvalue())).eval()
    return {
        "mask": run.optimizer.mask.cpu(),
        "history": run.optimizer.history,
        "report": str(run.optimizer.report()),
        "weights": {name: tensor.cpu() for name, tensor in run.model.state_dict().items()},
        "outputs": {"zeroed": zeroed, "removed": removed},
        "loaded": {"here": loaded(x), "there": run.model.eval()(x.to(device)).cpu()},
        "waits": waits,
    }


class Draws(networks.Residual):
    def forward(self, x):
        torch.rand(1, device=x.device)
        return super().forward(x)


def random_state(module):
    """The device's random state before and after a construction."""
    model = Draws().to("ghost")
    before = module.get_rng_state()
    base = torch.optim.SGD(model.parameters(), lr=0.05)
    ATO(base, model, example(2).to("ghost"), target_flops=0.5, total_steps=STEPS)
    return before, module.get_rng_state()


def main(path: Path):
    torch.set_num_threads(1)
    module = ghost(path.parent)
    found = {"random state": random_state(module)}
    for network, how in RUNS:
        module.set_float64(how != "no float64")
        found[network, how] = {device: trained(network, device, how) for device in ("cpu", "ghost")}
    torch.save(found, path)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
