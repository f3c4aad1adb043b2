"""What holds for every test: the same random numbers whichever tests ran before, and the longest first."""

import pytest
import torch


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


def pytest_collection_modifyitems(items):
    """Whole files in processes of their own take minutes: at the end one worker would wait for them alone."""
    items.sort(key=lambda item: item.path.name != "test_triton.py")
