import os
import sys
from pathlib import Path

import pytest
import torch

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE))
# Processes that tests start import this checkout, too, whatever is installed.
others = [os.environ["PYTHONPATH"]] if os.environ.get("PYTHONPATH") else []
os.environ["PYTHONPATH"] = os.pathsep.join([str(HERE.parent), str(HERE), *others])
torch.set_num_threads(1)


def pytest_addoption(parser):
    parser.addoption("--kills", type=int, default=4, help="how often test_interruption.py kills a training process")


@pytest.fixture
def kills(request):
    return request.config.getoption("--kills")


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)
