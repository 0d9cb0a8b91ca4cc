"""A device that is not the CPU: what a run comes to, what it refuses, and how often it is waited for.

There need be none: second_device.cpp is one, which refuses what an accelerator refuses.
"""

import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import second_device
import torch

pytestmark = pytest.mark.skipif(
    not (shutil.which("c++") and shutil.which("ninja")), reason="no C++ compiler and ninja to build a device with"
)
runs = pytest.mark.parametrize("run", second_device.RUNS, ids=" ".join)


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    path = tmp_path_factory.mktemp("device") / "found.pt"
    process = subprocess.run(
        [sys.executable, Path(second_device.__file__), path], stderr=subprocess.PIPE, text=True, check=False
    )
    assert process.returncode == 0, process.stderr
    return torch.load(path, weights_only=True)


@runs
def test_a_run_comes_to_the_same_on_every_device(found, run):
    cpu, other = found[run]["cpu"], found[run]["ghost"]
    assert torch.equal(cpu["mask"], other["mask"]) and not cpu["mask"].all()
    assert other["report"] == cpu["report"]
    torch.testing.assert_close(other["history"], cpu["history"])
    apart = 2e-2 if run[1] == "bfloat16" else 1e-6  # gradients in bfloat16 differ in their last digit
    torch.testing.assert_close(other["weights"], cpu["weights"], rtol=1e-5, atol=apart)


@runs
def test_the_cut_is_exact_on_every_device_and_its_file_belongs_to_none(found, run):
    here = found[run]["ghost"]
    torch.testing.assert_close(here["outputs"]["removed"], here["outputs"]["zeroed"])
    torch.testing.assert_close(here["loaded"]["here"], here["loaded"]["there"])


@runs
def test_no_step_but_a_turn_or_the_commit_waits_for_the_device(found, run):
    _, *waits = found[run]["ghost"]["waits"]  # the first step looks at whether the base's state can be cut
    assert len(waits) > second_device.STEPS // 2 and not any(waits)


def test_planning_leaves_the_random_state_of_the_device(found):
    before, after = found["random state"]
    assert torch.equal(before, after)
