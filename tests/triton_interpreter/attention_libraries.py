"""attention in Triton, interpreted on the CPU: systems, modules and patched models against the code of libraries, or the formula
where no library has one. Run by tests/test_triton.py."""

import sys
from contextlib import contextmanager
from pathlib import Path
from unittest import mock

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import attention_modules
import decay_modules
import masked_systems
import timm_patches
import transformers_patches
from attention_op import FULL, small_tiles
from gpu_path import tokens_on_gpu
from library_systems import LIBRARIES

import vitkern
from vitkern.triton_kernels import _host
from vitkern.triton_kernels import attention as kernels


@pytest.fixture(autouse=True)
def tuned(monkeypatch):
    yield small_tiles(monkeypatch)
    _host.config.cache_clear()


@contextmanager
def both_kernels_run():
    """Calls that name no back-end take Triton's; forward and backward must have."""
    launched = [mock.patch.object(kernels, name, wraps=getattr(kernels, name)) for name in ("fwd", "bwd")]
    with launched[0] as fwd, launched[1] as bwd, vitkern.use_backend("triton"), tokens_on_gpu("triton"):
        yield
    assert fwd.called and bwd.called


@pytest.mark.parametrize("name", LIBRARIES)
def test_kernels_compute_what_the_code_of_libraries_does(name):
    with both_kernels_run():
        masked_systems.holds(masked_systems.call(name, LIBRARIES[name]()), FULL, "triton")


TWICE = ("values x1", "levit in training")  # differ from their neighbours in no kernel
COMPARISONS = {
    f"{module.__name__}: {name}": run
    for module, cases in (
        (attention_modules, attention_modules.MODULES),
        (decay_modules, decay_modules.MODULES),
        (timm_patches, timm_patches.PATCHED),
        (transformers_patches, transformers_patches.PATCHED),
    )
    for name, run in cases.items()
    if not any(part in name for part in TWICE)
}


@pytest.mark.parametrize("name", COMPARISONS)
def test_modules_and_patched_models_compute_what_they_stand_for(name):
    with both_kernels_run():
        COMPARISONS[name]()
