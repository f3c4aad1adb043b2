"""Runs the Triton kernels' tests where Triton interprets them, in other processes: it decides when it decorates."""

import os
import pathlib
import subprocess
import sys

import pytest

pytest.importorskip("triton")
FOLDER = pathlib.Path(__file__).parent / "triton_interpreter"
FILES = sorted(set(FOLDER.glob("*.py")) - {FOLDER / "conftest.py"})


@pytest.mark.parametrize("file", FILES, ids=lambda x: x.stem)
def test_under_the_interpreter(file):
    command = [sys.executable, "-m", "pytest", "-q", "--no-header", "-p", "no:cacheprovider", str(file)]
    done = subprocess.run(command, env=os.environ | {"TRITON_INTERPRET": "1"}, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-8000:] + done.stderr[-2000:]
