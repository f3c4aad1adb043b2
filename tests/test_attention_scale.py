"""attention: the gradient of a learned scale, which cancels: it must not be summed from rounded gradients of the scores."""

import pytest
import torch

from vitkern import testing
from vitkern.testing import attention as calls


@pytest.mark.parametrize("masks", ["none", "dense"], ids=["plain", "masked"])
@pytest.mark.parametrize("keys", [33, 64, 200])
def test_the_gradient_of_a_scale_keeps_the_rule_in_bfloat16(masks, keys):
    for seed in range(3):
        call = calls.make(seed, 2, 64, keys, d=32, heads=4, scale="heads", masks=masks)
        testing.assert_matches(testing.entries()["attention"], call, torch.bfloat16, "cpu")
