"""Ops over two and four processes, forward and backward, against one: each world is started once and runs every check."""

import subprocess
import sys

import distributed_checks as checks
import libraries  # noqa: F401
import pytest
import torch
import torch.multiprocessing as mp


@pytest.fixture(scope="module")
def failures(tmp_path_factory):
    """World -> what failed in it, by the name of the check, of the first process in which it did."""
    found = {}

    def of(world):
        if world not in found:
            folder = tmp_path_factory.mktemp(f"world{world}")
            mp.start_processes(checks.run, args=(world, folder), nprocs=world, start_method="spawn")
            each = [torch.load(folder / f"failures{rank}.pt") for rank in range(world)]
            found[world] = {name: text for failed in reversed(each) for name, text in failed.items()}
        return found[world]

    return of


@pytest.mark.parametrize("world, name", [(world, name) for world, names in checks.NAMES.items() for name in names])
def test_processes_agree_with_one(failures, world, name):
    assert name not in failures(world), failures(world)[name]


def test_an_import_leaves_dtensor_alone():
    code = "import sys, vitkern; print('torch.distributed.tensor' in sys.modules, 'vitkern.distributed' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout.split() == [
        "False",
        "False",
    ]
