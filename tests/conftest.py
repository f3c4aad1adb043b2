"""What holds for every test: the same random numbers whichever tests ran before, and the longest first."""

import pytest
import torch


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


LONGEST = ("test_triton.py", "test_cpu_internals.py", "test_registration.py")


def pytest_collection_modifyitems(items):
    """Tests of minutes (whole files and builds in processes of their own): at the end one worker would wait for them alone."""
    items.sort(key=lambda item: LONGEST.index(item.path.name) if item.path.name in LONGEST else len(LONGEST))
