"""Runs the Triton kernels' tests where Triton interprets them, in other processes: it decides when it decorates."""

import os
import pathlib
import subprocess
import sys

import pytest

pytest.importorskip("triton")
FOLDER = pathlib.Path(__file__).parent / "triton_interpreter"
FILES = sorted(set(FOLDER.glob("*.py")) - {FOLDER / "conftest.py"})
PROCESSES = 6  # each imports torch and Triton for three seconds


@pytest.mark.parametrize(
    "files", [FILES[i::PROCESSES] for i in range(PROCESSES)], ids=lambda x: "+".join(p.stem for p in x)
)
def test_under_the_interpreter(files):
    command = [sys.executable, "-m", "pytest", "-q", "--no-header", "-p", "no:cacheprovider", *map(str, files)]
    done = subprocess.run(command, env=os.environ | {"TRITON_INTERPRET": "1"}, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-8000:] + done.stderr[-2000:]
