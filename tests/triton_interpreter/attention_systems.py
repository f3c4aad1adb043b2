"""attention in Triton, interpreted on the CPU: published systems against their formulas. Run by tests/test_triton.py."""

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import masked_systems as systems
from attention_op import FULL, HALF, small_tiles
from composed_systems import SYSTEMS
from gpu_path import tokens_on_gpu

from vitkern.triton_kernels import _host


@pytest.fixture(autouse=True)
def tuned(monkeypatch):
    yield small_tiles(monkeypatch)
    _host.config.cache_clear()


@pytest.mark.parametrize("name", SYSTEMS)
def test_kernels_compute_the_formula(name):
    with tokens_on_gpu("triton"):
        systems.holds(systems.of(name), (FULL, HALF)[len(name) % 2], "triton")
