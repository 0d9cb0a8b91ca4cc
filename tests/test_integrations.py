"""Other people's loops, run for real: Lightning, Accelerate, Trainer, and one like torchvision's references."""

import copy
import warnings

import pytest
import torch
import torch.nn.functional as F
from networks import SHORT, Residual, batches, example
from torch import nn
from torch.optim.lr_scheduler import LinearLR, OneCycleLR
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from torch.utils.data import DataLoader, TensorDataset
from torchvision.transforms import v2

from ato_optim import ATO
from ato_optim.proof import difference

STEPS, EPOCH = 48, 8


def data():
    pairs = list(batches(EPOCH))
    return DataLoader(TensorDataset(*map(torch.cat, zip(*pairs, strict=True))), batch_size=8)


def build(model, total_steps=STEPS):
    base = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9, weight_decay=1e-3)
    optimizer = ATO(base, model, example(), target_flops=0.5, total_steps=total_steps, phases=SHORT, interval=1)
    return optimizer, OneCycleLR(optimizer, 0.1, total_steps=total_steps)


def network():
    torch.manual_seed(0)
    return Residual()


def plain_loop(early=False, accumulate=1):
    """What every framework below must do, bit for bit: clipping at 1, one schedule step a step."""
    model = network()
    optimizer, scheduler = build(model, STEPS // accumulate)
    for k in range(STEPS):
        x, y = list(data())[k % EPOCH]
        (F.cross_entropy(model(x), y) / accumulate).backward()
        if (k + 1) % accumulate == 0:
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
            scheduler.step()
            if early and optimizer.removable:
                optimizer.compress()
    assert len(optimizer.history) > 4
    return model, optimizer


def assert_same(model, optimizer, plain):
    other, expected = plain
    assert torch.equal(optimizer.mask, expected.mask)
    assert optimizer.history == expected.history and optimizer.step_count == expected.step_count
    for name, value in other.state_dict().items():
        assert torch.equal(value, model.state_dict()[name]), name
    for mine, theirs in zip(optimizer.state.values(), expected.state.values(), strict=True):
        assert torch.equal(mine["momentum_buffer"], theirs["momentum_buffer"])


def lightning_module(lightning, early=False):
    class Module(lightning.LightningModule):
        def __init__(self):
            super().__init__()
            self.net = network()
            self.optimizer = None

        def training_step(self, batch):
            x, y = batch
            return F.cross_entropy(self.net(x), y)

        def test_step(self, batch):
            x, y = batch
            self.log("loss", F.cross_entropy(self.net(x), y))

        def configure_optimizers(self):
            if self.optimizer is None:
                self.optimizer, self.scheduler = build(self.net, int(self.trainer.estimated_stepping_batches))
            return [self.optimizer], [{"scheduler": self.scheduler, "interval": "step"}]

        def on_train_batch_end(self, *_):
            if early and self.optimizer.removable:
                self.optimizer.compress()

        def on_load_checkpoint(self, checkpoint):
            if early:  # Lightning loads weights first: the net must have been cut by then
                if self.optimizer is None:
                    self.optimizer, self.scheduler = build(self.net)
                self.optimizer.load_state_dict(checkpoint["optimizer_states"][0])

    return Module()


def fit(lightning, module, epochs, path, resume=False, **options):
    trainer = lightning.Trainer(
        accelerator="cpu", max_epochs=STEPS // EPOCH, gradient_clip_val=1.0, logger=False, enable_progress_bar=False,
        enable_checkpointing=False, enable_model_summary=False, default_root_dir=path, **options,
    )  # fmt: skip

    class Stop(lightning.Callback):  # as a time limit would
        def on_train_epoch_end(self, trainer, module):
            trainer.should_stop = trainer.current_epoch + 1 >= epochs

    trainer.callbacks.append(Stop())
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        trainer.fit(module, data(), ckpt_path=path / "run.ckpt" if resume else None, weights_only=True)
    if not resume:
        trainer.save_checkpoint(path / "run.ckpt")
    return module.net, module.optimizer


@pytest.mark.parametrize("early", [False, True])
@pytest.mark.parametrize("stop", [2, 5])
def test_lightning_resumed(stop, early, tmp_path):
    """Stopped in the search, and after the cut if there is an early one: the plain loop, bit for bit."""
    lightning = pytest.importorskip("lightning", reason="lightning is not installed: ato_optim[integrations]")
    fit(lightning, lightning_module(lightning, early), stop, tmp_path)
    resumed = lightning_module(lightning, early)
    with torch.no_grad():
        resumed.net.fc.weight.zero_()  # all must come from the checkpoint
    model, optimizer = fit(lightning, resumed, STEPS // EPOCH, tmp_path, resume=True)
    assert_same(model, optimizer, plain_loop(early))


def test_lightning_tests_the_checkpoint_of_a_run_that_was_cut(tmp_path):
    lightning = pytest.importorskip("lightning", reason="lightning is not installed: ato_optim[integrations]")
    module = lightning_module(lightning, early=True)
    fit(lightning, module, STEPS // EPOCH, tmp_path)
    quiet = {"logger": False, "enable_progress_bar": False, "enable_checkpointing": False}
    for tested in (module, module, lightning_module(lightning, early=True)):
        trainer = lightning.Trainer(accelerator="cpu", default_root_dir=tmp_path, **quiet)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            trainer.test(tested, data(), ckpt_path=tmp_path / "run.ckpt", weights_only=True, verbose=False)
        assert all(
            torch.equal(mine, its) for mine, its in zip(module.net.parameters(), tested.net.parameters(), strict=True)
        )


def test_lightning_accumulates(tmp_path):
    lightning = pytest.importorskip("lightning", reason="lightning is not installed: ato_optim[integrations]")
    module = lightning_module(lightning)
    model, optimizer = fit(lightning, module, STEPS // EPOCH, tmp_path, accumulate_grad_batches=2)
    assert_same(model, optimizer, plain_loop(accumulate=2))


def accelerated(accelerate, accumulate=1, precision="no"):
    accelerate.state.AcceleratorState._reset_state(reset_partial_state=True)  # one a process, says Accelerate
    accelerator = accelerate.Accelerator(
        cpu=True, gradient_accumulation_steps=accumulate, mixed_precision=precision, rng_types=[]
    )
    net = network()
    ato, scheduler = build(net, STEPS // accumulate)
    return accelerator, ato, accelerator.prepare(net, ato, data(), scheduler)


def accelerated_loop(accelerator, ato, prepared, first, last, early=False):
    model, optimizer, loader, scheduler = prepared
    for _ in range(first, last):
        for x, y in loader:
            with accelerator.accumulate(model):
                accelerator.backward(F.cross_entropy(model(x), y))
                if accelerator.sync_gradients:
                    accelerator.clip_grad_norm_(model.parameters(), 1.0)
                optimizer.step()
                scheduler.step()
                optimizer.zero_grad()
            if early and ato.removable:
                ato.compress()


@pytest.mark.parametrize("early", [False, True])
@pytest.mark.parametrize("stop", [2, 5])
def test_accelerate_resumed(stop, early, tmp_path):
    """save_state and load_state in the search, and after the cut if there is an early one: the plain loop."""
    accelerate = pytest.importorskip("accelerate", reason="accelerate is not installed: ato_optim[integrations]")
    accelerator, ato, prepared = accelerated(accelerate)
    accelerated_loop(accelerator, ato, prepared, 0, stop, early)
    accelerator.save_state(tmp_path)
    accelerator, ato, prepared = accelerated(accelerate)

    def cut_first(models, folder):  # Accelerate loads weights first: the net must have been cut by then
        ato.load_state_dict(torch.load(f"{folder}/optimizer.bin", weights_only=True))

    accelerator.register_load_state_pre_hook(cut_first)
    accelerator.load_state(tmp_path)
    accelerated_loop(accelerator, ato, prepared, stop, STEPS // EPOCH, early)
    assert_same(accelerator.unwrap_model(prepared[0]), ato, plain_loop(early))


def test_accelerate_accumulates():
    accelerate = pytest.importorskip("accelerate", reason="accelerate is not installed: ato_optim[integrations]")
    accelerator, ato, prepared = accelerated(accelerate, accumulate=2)
    accelerated_loop(accelerator, ato, prepared, 0, STEPS // EPOCH)
    assert_same(accelerator.unwrap_model(prepared[0]), ato, plain_loop(accumulate=2))


def test_accelerate_in_mixed_precision():
    """Accelerate replaces the forward of the model by one under autocast; the cut works on copies of it."""
    accelerate = pytest.importorskip("accelerate", reason="accelerate is not installed: ato_optim[integrations]")
    accelerator, ato, prepared = accelerated(accelerate, precision="bf16")
    accelerated_loop(accelerator, ato, prepared, 0, STEPS // EPOCH)
    model = prepared[0].eval()
    expected = model(example()).detach()
    copied = ato.compress(inplace=False)
    small = ato.compress()
    assert small is model
    for network in (copied, small):
        assert difference(expected, network(example())) < 2e-2
        assert sum(p.numel() for p in network.parameters()) == ato.report().parameters_after
    bare = accelerator.unwrap_model(small, keep_fp32_wrapper=False)
    assert difference(expected, bare(example())) < 5e-2


class Classifier(nn.Module):
    """Computes the loss itself, as models for Trainer do."""

    def __init__(self):
        super().__init__()
        self.net = network()

    def forward(self, images, labels):
        return {"loss": F.cross_entropy(self.net(images), labels)}


def trained(transformers, folder, early=False, accumulate=1, resume=None):
    """A run of Trainer, whose checkpoints after 12 and 36 steps stay in `folder`; gives network and ATO."""

    class Trainer(transformers.Trainer):
        def get_train_dataloader(self):  # in order
            loader = data()
            loader.collate_fn = lambda samples: dict(
                zip(("images", "labels"), map(torch.stack, zip(*samples, strict=True)), strict=True)
            )
            return self.accelerator.prepare(loader)

    class Cut(transformers.TrainerCallback):
        def on_step_end(self, *_, **__):
            if early and ato.removable:
                ato.compress()

    model = Classifier()
    ato, scheduler = build(model.net, STEPS // accumulate)
    if resume:
        ato.load_state_dict(torch.load(f"{resume}/optimizer.pt", weights_only=True))
    settings = transformers.TrainingArguments(
        folder, max_steps=STEPS // accumulate, gradient_accumulation_steps=accumulate, save_strategy="steps",
        save_steps=12, use_cpu=True, report_to=[], disable_tqdm=True,
    )  # fmt: skip
    trainer = Trainer(model, settings, optimizers=(ato, scheduler), callbacks=[Cut()])
    trainer.train(resume_from_checkpoint=resume)
    return model.net, ato


@pytest.mark.parametrize("early", [False, True])
def test_trainer_resumed(early, tmp_path):
    """From checkpoints in the search and, if there is an early cut, after it: the plain loop."""
    transformers = pytest.importorskip("transformers", reason="transformers is not installed: ato_optim[integrations]")
    expected = plain_loop(early)
    assert_same(*trained(transformers, tmp_path / "whole", early), expected)
    for step in (12, 36):
        checkpoint = str(tmp_path / "whole" / f"checkpoint-{step}")
        assert_same(*trained(transformers, tmp_path / str(step), early, resume=checkpoint), expected)


def test_trainer_accumulates(tmp_path):
    transformers = pytest.importorskip("transformers", reason="transformers is not installed: ato_optim[integrations]")
    assert_same(*trained(transformers, tmp_path, accumulate=2), plain_loop(accumulate=2))


def test_a_loop_like_torchvisions_references(tmp_path):
    """Warm-up, label smoothing, mixup and cutmix, clipping, an average, parameter groups, and a resume."""

    def start():
        model = network()
        norms = [p for m in model.modules() if isinstance(m, nn.BatchNorm2d) for p in m.parameters()]
        others = [p for p in model.parameters() if all(p is not norm for norm in norms)]
        base = torch.optim.SGD(
            [{"params": others, "weight_decay": 1e-3}, {"params": norms, "weight_decay": 0.0}], lr=0.05, momentum=0.9,
            nesterov=True,
        )  # fmt: skip
        optimizer = ATO(base, model, example(), target_flops=0.5, total_steps=STEPS, phases=SHORT, interval=2)
        scheduler = LinearLR(optimizer, 0.1, total_iters=2)
        average = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.5), use_buffers=True)
        return model, optimizer, scheduler, average

    def train(model, optimizer, scheduler, average, first, last):
        mix = v2.RandomChoice([v2.MixUp(num_classes=5), v2.CutMix(num_classes=5)])
        criterion = nn.CrossEntropyLoss(label_smoothing=0.1)
        for epoch in range(first, last):
            torch.manual_seed(epoch)
            model.train()
            for images, target in data():
                images, target = mix(images, target)
                loss = criterion(model(images), target)
                optimizer.zero_grad()
                loss.backward()
                nn.utils.clip_grad_norm_(model.parameters(), 1.0)
                optimizer.step()
                average.update_parameters(model)
            scheduler.step()
            for network in (model, average):
                network.eval()
                with torch.inference_mode():
                    assert network(example()).isfinite().all()

    whole = start()
    train(*whole, 0, 6)
    broken = start()
    train(*broken, 0, 3)
    torch.save([thing.state_dict() for thing in broken], tmp_path / "checkpoint.pth")
    resumed = start()
    states = torch.load(tmp_path / "checkpoint.pth", weights_only=True)
    for thing, state in zip(resumed, states, strict=True):
        thing.load_state_dict(state)
    train(*resumed, 3, 6)
    assert_same(resumed[0], resumed[1], (whole[0], whole[1]))
    for mine, theirs in zip(resumed[3].parameters(), whole[3].parameters(), strict=True):
        assert torch.equal(mine, theirs)
    model, optimizer, _, average = whole
    expected = copy.deepcopy(average.module).eval()(example()).detach()
    small, averaged = optimizer.compress(), optimizer.compress(model=average)
    assert difference(expected, averaged.eval()(example())) < 1e-3
    assert [p.shape for p in small.parameters()] == [p.shape for p in averaged.parameters()]
