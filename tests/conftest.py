"""What holds for every test: the same random numbers whichever tests ran before."""

import pytest
import torch


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)
