"""The benchmark script: every method runs, and a killed run goes on as if it had not been."""

import json
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parent.parent / "benchmarks" / "train.py"
pytest.importorskip("sklearn")
pytest.importorskip("tqdm")


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


@pytest.mark.parametrize("early", [(), ("--early",)])
def test_a_killed_run_goes_on_to_the_same_result(early, tmp_path):
    whole = run(tmp_path / "whole", *early)
    assert 0.44 <= whole["macs_kept"] <= 0.45
    assert whole["at_cut"]["largest_logit_difference"] < 1e-5 * whole["at_cut"]["largest_logit"]
    assert (tmp_path / "whole" / "digits-resnet20-ato-0.png").exists()

    folder = tmp_path / "killed"
    folder.mkdir()
    checkpoint = folder / "digits-resnet20-ato-0.ckpt"
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
