"""The benchmarks: every method runs, a killed run goes on as if it had not been, and tables count right."""

import json
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from networks import SHORT, Residual, batches, example

from ato_optim import ATO
from ato_optim.capacity import channel_weights

SCRIPT = Path(__file__).parent.parent / "benchmarks" / "train.py"
sys.path.insert(0, str(SCRIPT.parent))
pytest.importorskip("sklearn")
pytest.importorskip("tqdm")
pytest.importorskip("matplotlib")

import figures
import models
import result_tables
from measure import macs
from run_cost import measured, run_cost
from runs import training
from searches import knowing_less
from train import Run, arguments


def command(folder, *options):
    return [sys.executable, str(SCRIPT), "--epochs", "3", "--threads", "1", "--out", str(folder), *options]


def run(folder, *options):
    subprocess.run(command(folder, *options), check=True, capture_output=True)
    (path,) = folder.glob("*.json")
    return json.loads(path.read_text())


@pytest.mark.parametrize("method", ["dense", "narrow", "magnitude", "random"])
def test_controls(method, tmp_path):
    result = run(tmp_path, "--method", method)
    assert result["macs_kept"] == 1 if method == "dense" else 0.43 < result["macs_kept"] < 0.46
    assert 0 < result["accuracy"] <= 100


def test_magnitude_cuts_when_and_how_it_is_told(tmp_path):
    floor = 0.7
    options = ["--pruner", json.dumps({"max_pruning_ratio": 1 - floor}), "--cut-at", "0.1", "--epochs", "2"]
    run = Run(arguments(["--method", "magnitude", "--target-flops", "0.6", "--out", str(tmp_path), *options]))
    dense = {name: len(p) for name, p in run.model.named_parameters()}
    for _ in range(int(0.1 * run.total)):
        run.train_step()
        assert {name: len(p) for name, p in run.model.named_parameters()} == dense
    run.train_step()
    kept = {name: len(p) / dense[name] for name, p in run.model.named_parameters()}
    assert floor - 1 / 16 <= min(kept.values()) < 0.9  # torch-pruning stops below the floor, so one channel less
    assert training(run.result()) == pytest.approx(0.1 + 0.9 * 0.6, abs=0.01)


def test_several_cuts_by_magnitude_are_equal_and_evenly_spaced(tmp_path):
    options = ["--cuts", "3", "--cut-at", "0.11", "--epochs", "10", "--target-flops", "0.4"]
    run = Run(arguments(["--method", "magnitude", "--out", str(tmp_path), *options]))
    dense, cost = run.dense_macs, 0
    last = int(0.11 * run.total)
    for step in range(last + 1):
        run.train_step()
        kept = macs(run.model, run.example) / dense
        assert kept == pytest.approx(1 - 0.6 * (3 * step // last) / 3, abs=0.02)
        cost += kept
    cost += (run.total - last - 1) * kept
    assert training(run.result()) == pytest.approx(cost / run.total, abs=0.01)


def test_a_cut_by_magnitude_that_misses_its_budget_is_no_control(tmp_path):
    options = ["--pruner", json.dumps({"max_pruning_ratio": 0.1}), "--target-flops", "0.3", "--cut-at", "0"]
    with pytest.raises(ValueError, match="more than.*max_pruning_ratio"):
        Run(arguments(["--method", "magnitude", "--out", str(tmp_path), *options])).train_step()


def test_a_thin_network_takes_the_widths_of_another_run(tmp_path):
    path = SCRIPT.parent / "results" / "epochs16-resnet56-ato-0.json"
    other = json.loads(path.read_text())
    options = ["--method", "narrow", "--model", "resnet56", "--widths", str(path), "--out", str(tmp_path)]
    result = Run(arguments(options)).result()
    assert result["widths"] == other["widths"]
    # The images differ in their channels, and the stem, whole in both, with them.
    removed = [run["dense_parameters"] - run["parameters"] for run in (result, other)]
    assert removed[0] == removed[1]


def test_a_cut_to_the_widths_of_another_run_leaves_the_channels_of_the_largest_norms(tmp_path):
    path = SCRIPT.parent / "results" / "gradual-epochs16-resnet20-ato-0.json"
    widths = json.loads(path.read_text())["widths"]
    options = ["--method", "magnitude", "--widths", str(path), "--cut-at", "0", "--lr", "0", "--out", str(tmp_path)]
    run = Run(arguments(options))
    dense = {name: p.detach().clone() for name, p in run.model.named_parameters()}
    run.train_step()
    assert run.result()["widths"] == widths
    for name, block in run.model.stages.named_children():
        out, read = (dense[f"stages.{name}.conv{k}.weight"] for k in (1, 2))
        norms = out.square().sum((1, 2, 3)) + read.square().sum((0, 2, 3))
        kept = norms.topk(widths[f"stages.{name}.conv1"]).indices.sort().values
        torch.testing.assert_close(block.conv1.weight, out[kept], rtol=0, atol=0)
        torch.testing.assert_close(block.conv2.weight, read[:, kept], rtol=0, atol=0)


@pytest.mark.parametrize("precision", ["bfloat16", "float32"])
def test_a_run_trains_in_the_precision_that_it_is_told_and_says_so(precision, tmp_path):
    run = Run(arguments(["--method", "dense", "--precision", precision, "--out", str(tmp_path)]))
    dtypes = []
    run.model.stem[0].register_forward_hook(lambda module, args, output: dtypes.append(output.dtype))
    run.train_step()
    assert dtypes == [getattr(torch, precision)]
    assert run.result()["precision"] == f"torch.{precision}"


@pytest.mark.parametrize("early", [(), ("--early",)])
def test_a_killed_run_goes_on_to_the_same_result(early, tmp_path):
    whole = run(tmp_path / "whole", *early)
    assert 0.44 <= whole["macs_kept"] <= 0.45
    assert whole["at_cut"]["largest_logit_difference"] < 1e-5 * whole["at_cut"]["largest_logit"]
    assert (tmp_path / "whole" / "digits-resnet20-ato-45-0.png").exists()

    folder = tmp_path / "killed"
    folder.mkdir()
    checkpoint = folder / "digits-resnet20-ato-45-0.ckpt"
    killed = 0
    for wait in (0.3, 2.0):  # once soon after the first checkpoint, once later
        options = (*early, "--resume", "--save-every", "0")
        process = subprocess.Popen(command(folder, *options), stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL)
        before = checkpoint.stat().st_mtime if checkpoint.exists() else 0.0
        while process.poll() is None and not (checkpoint.exists() and checkpoint.stat().st_mtime > before):
            time.sleep(0.02)
        time.sleep(wait)
        if process.poll() is None:
            process.send_signal(signal.SIGKILL)
            killed += 1
        process.wait()
    assert killed
    resumed = run(folder, *early, "--resume")
    for key in ("accuracy", "macs", "parameters", "report"):
        assert resumed[key] == whole[key], key


def test_widths_from_scratch_stand_beside_the_run_that_found_them(monkeypatch):
    sources = {f"ato-{seed}": finished("ato", seed, 87.0 + seed, model="resnet20") for seed in range(2)}
    runs = [
        finished("narrow", seed, 86.5, model="resnet20", widths=f"benchmarks/results/ato-{seed}.json")
        for seed in range(2)
    ]
    monkeypatch.setattr(result_tables, "load", lambda name: [sources[name]])
    (row,) = result_tables.from_scratch(runs).splitlines()[2:]
    assert [cell.strip() for cell in row.strip("| ").split("|")] == [
        "resnet20", "45 %", "ato", "87.50 ± 0.71", "86.50 ± 0.00", "+1.00 ± 0.50", "63 %", "45 %", "2",
    ]  # fmt: skip


def finished(method, seed, accuracy, budget=0.45, **more):
    arguments = {"method": method, "seed": seed, "target_flops": budget, "ato": {}, "early": True} | more
    kept = 1.0 if method == "dense" else budget
    widths = {"stem": 16, "fc": 10} if method == "dense" else {"stem": 7, "fc": 10}
    cut = {"at_cut": {"step": 32}, "report": {"total_steps": 100}} if method in ("ato", "random") else {"at_cut": {}}
    return {
        "arguments": arguments, "accuracy": accuracy, "macs_kept": kept, "parameters": 100 * kept,
        "dense_parameters": 100, "widths": widths, **cut,
    }  # fmt: skip


def test_tables_compare_seed_by_seed_and_budget_by_budget(tmp_path):
    runs = [finished("dense", seed, 90.0 + seed) for seed in range(3)]
    runs += [finished("ato", seed, 89.0 + seed + noise) for seed, noise in enumerate((0.1, 0.0, -0.1))]
    runs += [finished("narrow", seed, 87.0 + seed) for seed in range(2)]
    runs += [finished("ato", 0, 88.0, budget=0.3)]
    rows = [[cell.strip() for cell in row.split("|")[1:-1]] for row in result_tables.comparison(runs).splitlines()[2:]]
    assert [row[:2] for row in rows] == [
        ["45 %", "dense"], ["45 %", "narrow"], ["45 %", "ato"], ["30 %", "dense"], ["30 %", "ato"],
    ]  # fmt: skip
    assert rows[2][2:4] == ["90.00 ± 0.90", "-1.00 ± 0.06"]  # deviation over seeds; error of the paired change
    assert rows[1][4] == "+2.05 ± 0.05"  # over the two seeds that both have
    assert rows[4][2:] == ["88.00", "-2.00", "", "30.0 %", "30.0 %", "52 %", "1"]  # 0.32 dense, then 0.3
    assert [row[7] for row in rows] == ["100 %", "45 %", "63 %", "100 %", "52 %"]
    figures.draw_accuracy(runs, tmp_path / "accuracy.png")
    figures.draw_layers(runs, tmp_path / "layers.png")
    assert (tmp_path / "accuracy.png").stat().st_size and (tmp_path / "layers.png").stat().st_size


def test_other_cuts_by_magnitude_are_compared_with_the_same_budget_and_seeds():
    runs = [finished("dense", seed, 90.0) for seed in range(2)]
    runs += [finished("ato", seed, 88.0 + seed, budget) for seed in range(2) for budget in (0.45, 0.3)]
    floor = {"pruner": {"max_pruning_ratio": 0.7}}
    # The first is from before train.py could say when to cut, and how often.
    controls = [finished("magnitude", 0, 87.0, 0.3, **floor)]
    controls += [finished("magnitude", 1, 88.0, 0.3, cut_at=0.5, cuts=1, **floor)]
    controls += [finished("magnitude", 1, 86.0, 0.45, pruner={}, cut_at=0.32)]
    rows = [
        [cell.strip() for cell in row.split("|")[1:-1]]
        for row in result_tables.other_cuts(controls, runs).splitlines()[2:]
    ]
    assert rows == [
        ["45 %", "0.32", "", "86.00", "-4.00", "+3.00", "45.0 %", "45.0 %", "63 %", "1"],
        ["30 %", "0.5", '`{"max_pruning_ratio": 0.7}`', "87.50 ± 0.71", "-2.50 ± 0.50", "+1.00 ± 0.00",
         "30.0 ± 0.0 %", "30.0 ± 0.0 %", "65 %", "2"],
    ]  # fmt: skip


def test_runs_of_equal_cost_are_compared_in_epochs_of_the_dense_network_over_the_seeds_that_both_have():
    ato = [finished("ato", seed, 88.0 + seed, epochs=100) for seed in range(3)]
    narrow = [finished("narrow", seed, 87.5 + seed, epochs=140) for seed in (1, 2)]
    row = result_tables.equal_cost([("a thin network", narrow, ato)]).splitlines()[2]
    assert [cell.strip() for cell in row.split("|")[1:-1]] == [
        "a thin network", "140", "63.0", "89.00 ± 0.71", "100", "62.6", "89.50 ± 0.71", "+0.50 ± 0.00", "2",
    ]  # fmt: skip


def test_lengths_are_compared_by_one_seed_and_leave_out_what_was_not_run():
    dense = [finished("dense", seed, 90.0 + seed, epochs=epochs) for seed in (0, 1) for epochs in (16, 64)]
    narrow = [finished("narrow", 1, 88.0, epochs=16), finished("narrow", 0, 87.0, epochs=64)]
    rows = result_tables.by_length({"dense": dense, "narrow": narrow}, seed=1).splitlines()
    assert [[cell.strip() for cell in row.split("|")[1:-1]] for row in (rows[0], *rows[2:])] == [
        ["method", "MACs of training", "16 epochs", "64 epochs"],
        ["dense", "100 %", "91.00", "91.00"],
        ["narrow", "45 %", "88.00", ""],
    ]


def test_whole_streams_are_compared_over_the_seeds_that_were_run_both_ways():
    pruned = [finished(method, seed, 80.0 + seed) for method in ("ato", "magnitude") for seed in range(3)]
    whole = [finished("ato", seed, 81.0 + seed, budget) for seed in (0, 1) for budget in (0.45, 0.3)]
    whole += [finished("magnitude", 2, 81.5)]
    pruned += [finished("ato", 0, 79.0, 0.3)]
    rows = [
        [cell.strip() for cell in row.split("|")[1:-1]] for row in result_tables.streams(pruned, whole).splitlines()[2:]
    ]
    assert sorted(rows) == [
        ["30 %", "ato", "79.00", "81.00", "+2.00", "1"],
        ["45 %", "ato", "80.50 ± 0.71", "81.50 ± 0.71", "+1.00 ± 0.00", "2"],
        ["45 %", "magnitude", "82.00", "81.50", "-0.50", "1"],
    ]


def test_streams_of_resnet20_keep_what_the_page_on_the_method_says():
    page = " ".join((SCRIPT.parent.parent / "docs" / "method.md").read_text().split())
    kept = []
    for target in (0.3, 0.2, 0.1):
        model = models.build("resnet20", 10, (3, 32, 32))
        base = torch.optim.SGD(model.parameters(), lr=0.1)
        optimizer = ATO(base, model, torch.randn(2, 3, 32, 32), target_flops=target, total_steps=1000)
        kept.append((optimizer.least / optimizer.plan.sizes)[optimizer.plan.summed].min().item())
    assert kept[0] == 1
    assert f"at least {kept[1]:.2f} of their channels at 0.2 and {kept[2]:.2f} at 0.1" in page


def test_layers_that_magnitude_is_told_to_leave_stay_whole(tmp_path):
    options = ["--pruner", json.dumps({"ignored_layers": ["stem.0"]}), "--target-flops", "0.6", "--cut-at", "0"]
    run = Run(arguments(["--method", "magnitude", "--out", str(tmp_path), *options]))
    run.train_step()
    widths = run.result()["widths"]
    assert widths["stem.0"] == widths["stages.0.conv2"] == 16 and widths["fc"] == 10
    assert min(widths.values()) < 16 and run.result()["macs_kept"] <= 0.6


def test_rows_of_paper_scale_stay_empty_until_there_are_runs():
    runs = {model: [] for model, *_ in result_tables.PAPER} | {
        "resnet18": [finished("dense", 0, 94.0), finished("ato", 0, 94.5, budget=0.2)]
    }
    rows = [[cell.strip() for cell in row.split("|")[1:-1]] for row in result_tables.paper_scale(runs).splitlines()[2:]]
    filled = {(row[0], row[3]): row[4:6] for row in rows if any(row[4:])}
    assert filled == {("resnet18", "dense"): ["94.00", ""], ("resnet18", "ato"): ["94.50", "+0.50"]}
    assert len(rows) == 4 * len(result_tables.PAPER)


def test_a_run_costs_what_its_steps_cost():
    """Twenty steps, one by one: the pull after 1, turns at 2, 4 and 6, the cut after 8."""
    report = {
        "boundaries": [1, 7, 8], "total_steps": 20, "history": [[2, 0.9], [4, 0.7], [6, 0.5], [7, 0.45]],
    }  # fmt: skip
    ratio = {
        "SGD": 1.0, "pull on masked channels": 1.25, "masked channels held at zero": 1.125, "controller turn": 1.5,
        "compressed": 0.5,
    }  # fmt: skip
    searched = [1, 1.25, 1.5, 1.25, 1.5, 1.25, 1.5, 1.25]
    found = run_cost(report, ratio)
    assert found["early"] == sum(searched + 12 * [0.5]) / 20
    assert found["at the end"] == sum(searched + 12 * [1.125]) / 20


def test_what_a_run_costs_is_measured_on_a_network_of_the_widths_in_its_file(monkeypatch):
    path = SCRIPT.parent / "results" / "gradual-epochs16-resnet20-ato-0.json"
    finished = json.loads(path.read_text())
    measured_on = {}

    def measure(runs, images, labels, rounds):
        measured_on.update({name: network for name, (network, _) in runs.items()}, images=images)
        return {"ratio_to_SGD": dict.fromkeys(runs, 1.0)}

    monkeypatch.setattr("run_cost.measure", measure)
    assert measured(path, rounds=1)["run"] == {"early": 1, "at the end": 1}
    assert len(measured_on["images"]) == finished["arguments"]["batch"]
    for name, expected in (("SGD", "dense_parameters"), ("compressed", "parameters")):
        parameters = list(measured_on[name].parameters())
        assert sum(p.numel() for p in parameters) == finished[expected]
        assert all(p.is_contiguous(memory_format=torch.channels_last) for p in parameters if p.ndim == 4)


def test_runs_of_different_budgets_have_names_of_their_own():
    """Or --resume would take up the checkpoint of another budget."""
    names = {arguments(["--method", "magnitude", "--target-flops", share]).name for share in ("0.45", "0.35", "0.455")}
    assert len(names) == 3


def test_the_variants_of_a_setting_are_compared_with_the_default_seed_by_seed():
    groups = {
        "0.3": [finished("ato", seed, 80.0 + seed) for seed in range(2)],
        "0": [finished("ato", seed, 79.0 + seed) for seed in range(2)],
    }
    runs = [{"name": f"capacity-{value}-ato-{k}", **run} for value in groups for k, run in enumerate(groups[value])]
    table = result_tables.variants("beta", result_tables.by_value(runs), "0.3")
    rows = [[cell.strip() for cell in row.split("|")[1:-1]] for row in table.splitlines()[2:]]
    assert [(row[0], row[2], row[4]) for row in rows] == [("0", "+1.00 ± 0.00", "63 %"), ("0.3", "", "63 %")]


def test_a_seed_that_was_run_twice_counts_with_its_mean():
    runs = [finished("dense", seed, 90.0) for seed in range(2)]
    runs += [finished("narrow", 0, 86.0), finished("narrow", 0, 88.0), finished("narrow", 1, 88.0)]
    row = [cell.strip() for cell in result_tables.comparison(runs).splitlines()[-1].split("|")[1:-1]]
    assert row[2:4] == ["87.50 ± 0.71", "-2.50 ± 0.50"] and row[-1] == "2"


def test_chance_keeps_its_mask_within_every_budget_of_the_moment_and_resumes():
    torch.manual_seed(0)
    masks = []
    for seed in (0, 1):
        model = Residual()
        base = torch.optim.SGD(model.parameters(), lr=0.05)
        own = ATO(base, model, example(), target_flops=0.5, total_steps=60, phases=SHORT, seed=seed)
        optimizer = knowing_less(own, "random")
        for x, y in batches(60):
            optimizer.zero_grad()
            torch.nn.functional.cross_entropy(model(x), y).backward()
            optimizer.step()
            saved = optimizer.state_dict()
            optimizer.load_state_dict(saved)
        turns = [(step, share) for step, share in optimizer.history if step < optimizer.schedule.commit]
        assert turns and all(share <= optimizer.schedule.budget(step, 0.5) for step, share in turns)
        assert 0.4 < optimizer.history[-1][1] <= 0.5
        masks.append(optimizer.mask)
        optimizer.compress()
    assert not torch.equal(*masks)


def test_a_controller_of_norms_hears_nothing_of_the_loss_and_is_otherwise_the_same():
    def learned(method, gradient):
        torch.manual_seed(0)
        model = Residual()
        base = torch.optim.SGD(model.parameters(), lr=0.05)
        optimizer = ATO(base, model, example(), target_flops=0.5, total_steps=60, phases=SHORT)
        search = (knowing_less(optimizer, method) if method == "norms" else optimizer).search
        weights = channel_weights(optimizer.plan.groups, model)
        for step in range(5):
            search.learn(step, gradient * torch.linspace(-1, 1, len(weights)), weights, 0.5)
        return search.controller()

    unheard = learned("ato", 0.0)
    assert torch.equal(learned("norms", 100.0), unheard) and torch.equal(learned("norms", -100.0), unheard)
    assert not torch.equal(learned("ato", 100.0), unheard)
