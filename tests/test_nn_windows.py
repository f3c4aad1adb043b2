"""vitkern.nn's modules of windows beyond Swin: published modules with the same weights, or the formula where no library has one."""

import libraries  # noqa: F401
import patch_cases
import pytest
import torch
from module_cases import compare

from vitkern.nn import CascadedGroupAttention


def first(module, x):
    """A module that takes its channels first, on a map with its channels last."""
    return module(x.permute(0, 3, 1, 2))


# EfficientViT of MSRA ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("train", [False, True])
@pytest.mark.parametrize("size", [(4, 4), (8, 12), (9, 6)])
def test_cascaded_group_attention_is_timms(size, train):
    module = pytest.importorskip("timm.models.efficientvit_msra")
    theirs = patch_cases.randomize(module.LocalWindowAttention(24, 4, 3, 2, 9, 4, kernels=(3, 5, 7))).train(train)
    for name, p in theirs.named_parameters():
        if name.endswith(("bn.weight", "attention_biases")):
            p.detach().normal_(generator=torch.Generator().manual_seed(8))
        elif "bn.bias" in name:  # or a channel is positive everywhere, and its bias without gradient
            p.detach().mul_(0.1)
    ours = CascadedGroupAttention(24, 4, 3, 2, 4, kernels=(3, 5, 7)).train(train)
    assert {f"attn.{n}" for n in ours.state_dict()} == set(theirs.state_dict())
    compare(Inner(ours), theirs, first, size, strict=True, mine=first)


class Inner(torch.nn.Module):
    """A module under the name attn."""

    def __init__(self, attn):
        super().__init__()
        self.attn, self.dim = attn, attn.dim

    def forward(self, x):
        return self.attn(x)


def test_cascaded_group_attention_says_what_it_refuses():
    with pytest.raises(ValueError, match=r"attn_ratio \* key_dim must be dim / num_heads \(8\), got 12"):
        CascadedGroupAttention(24, 4, 3, 3)
    with pytest.raises(ValueError, match=r"kernels must have 3 sides, got \[5, 5\]"):
        CascadedGroupAttention(24, 4, 3, 2, kernels=(5, 5))
    with pytest.raises(ValueError, match=r"x must have shape \[B, 24, H, W\], got \[1, 5, 5, 24\]"):
        CascadedGroupAttention(24, 4, 3, 2)(torch.zeros(1, 5, 5, 24))
