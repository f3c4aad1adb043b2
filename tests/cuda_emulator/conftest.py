"""What the emulator's suites share: the library, and this process's part of the cases."""

import os
import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from emulated import emulated

torch.set_num_threads(1)


@pytest.fixture(scope="module")
def build():
    return emulated(sanitize="libasan" in os.environ.get("LD_PRELOAD", ""))
