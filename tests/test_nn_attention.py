"""vitkern.nn's modules on attention: as published (attention_modules.py), checkpoints, dropout and refusals."""

import libraries  # noqa: F401
import pytest
import torch
from attention_modules import MODULES, spread

from vitkern.nn import (
    Attention,
    BeitAttention,
    DecomposedRelPosAttention,
    GaussianMixtureAttention,
    LevitAttention,
    MaskedCrossAttention,
    MultiScaleAttention,
    SigmoidAttention,
    TalkingHeadAttention,
)


@pytest.mark.parametrize("name", MODULES)
def test_modules_are_the_published(name):
    MODULES[name]()


def test_mvit_v2_takes_maps_of_other_sizes():
    ours = MultiScaleAttention(12, 16, (8, 8), 2, kernel_q=(3, 3), stride_q=(2, 2), kernel_kv=(3, 3), stride_kv=(4, 4))
    out, size = ours(torch.randn(2, 1 + 9 * 13, 12), (9, 13))
    assert size == (5, 7) and out.shape == (2, 36, 16)
    with pytest.raises(ValueError, match=r"MultiScaleAttention: x must have shape \[B, 118, 12\]"):
        ours(torch.randn(2, 117, 12), (9, 13))


def test_a_beit_checkpoint_loads_strictly_and_its_index_is_ours():
    theirs = pytest.importorskip("timm.models.beit").Attention(12, 3, qkv_bias=True, window_size=(2, 5))
    ours = BeitAttention(12, (2, 5), 3)
    assert torch.equal(ours.relative_position_index, theirs.relative_position_index)
    ours.load_state_dict(theirs.state_dict() | {"relative_position_index": theirs.relative_position_index}, strict=True)
    assert "q_bias" not in BeitAttention(12, (2, 5), 3, qkv_bias=False).state_dict()


def test_no_gradient_goes_to_the_mask():
    ours, logits = MaskedCrossAttention(8, 2), torch.randn(1, 3, 2, 2, requires_grad=True)
    ours(torch.randn(1, 3, 8), torch.randn(1, 4, 8), mask_logits=logits, size=(2, 2)).sum().backward()
    assert logits.grad is None and ours.in_proj_weight.grad.abs().sum() > 0


def test_a_gaussian_mixture_loads_a_checkpoint_with_its_constant():
    ours = GaussianMixtureAttention(12, (3, 3), 2, 5)
    ours.load_state_dict(ours.state_dict() | {"mask.mask": torch.zeros(1, 1, 9, 9)}, strict=True)
    assert set(ours.state_dict()) == {"to_qkv.weight", "to_out.0.weight", "to_out.0.bias", "mask.sigma", "mask.alpha"}


# all -----------------------------------------------------------------------------------------------------------------------

X = {"tokens": (2, 6, 12), "map": (2, 2, 3, 12)}
DROPS = [Attention, TalkingHeadAttention, SigmoidAttention, lambda *a, **o: BeitAttention(12, None, 3, **o)]


@pytest.mark.parametrize("make", [*DROPS, lambda *a, **o: DecomposedRelPosAttention(12, (2, 3), 3, **o)])
def test_dropout_draws_in_training_only(make):
    for options in ({"attn_drop": 0.5}, {"proj_drop": 0.5}):
        ours = spread(make(12, 3, **options))
        x = torch.randn(X["map" if isinstance(ours, DecomposedRelPosAttention) else "tokens"])
        assert not torch.equal(ours(x), ours(x))
        assert torch.equal(ours.eval()(x), ours(x))


def test_refusals_name_what_they_got():
    with pytest.raises(ValueError, match="TalkingHeadAttention: num_heads must divide dim .16., got 3"):
        TalkingHeadAttention(16, 3)
    with pytest.raises(ValueError, match=r"Attention: x must have shape \[B, N, 12\], got \[2, 3, 4, 12\]"):
        Attention(12, 3)(torch.zeros(2, 3, 4, 12))
    with pytest.raises(ValueError, match=r"BeitAttention: x must have shape \[B, 7, 12\], got \[1, 6, 12\]"):
        BeitAttention(12, (2, 3), 3)(torch.zeros(1, 6, 12))
    with pytest.raises(ValueError, match=r"LevitAttention: x must have shape \[B, 15, 12\], got \[1, 9, 12\]"):
        LevitAttention(12, 4, resolution=(3, 5))(torch.zeros(1, 9, 12))
    with pytest.raises(ValueError, match="SigmoidAttention: compat must be one of paper, code, got 'book'"):
        SigmoidAttention(12, 3, compat="book")
    with pytest.raises(
        ValueError, match=r"MaskedCrossAttention: memory must have shape \[2, h w, 12\], got \[1, 9, 12\]"
    ):
        MaskedCrossAttention(12, 3)(torch.zeros(2, 4, 12), torch.zeros(1, 9, 12))
    with pytest.raises(
        ValueError, match=r"MaskedCrossAttention: size must be the \(h, w\) of memory with mask_logits, got None"
    ):
        MaskedCrossAttention(12, 3)(torch.zeros(1, 4, 12), torch.zeros(1, 9, 12), mask_logits=torch.zeros(1, 4, 2, 2))
