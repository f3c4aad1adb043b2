"""vitkern.nn on published modules with the same weights, on torch's own arithmetic, and on the names of checkpoints."""

import copy

import libraries  # noqa: F401
import patch_cases
import pytest
import torch
from module_cases import compare
from torch import nn

from vitkern.nn import WindowAttention, WindowAttentionV2
from vitkern.testing import assert_close_to_oracle

MAPS = [(8, 12), (9, 7), (3, 10)]  # whole windows, padded, smaller than the window on one axis


def timm_block(module, generation, size, window, shift, **options):
    """timm's attention inside a block that shifts as asked on a map of this size."""
    block = getattr(module, f"SwinTransformer{generation}Block")
    block = block(16, size, num_heads=2, window_size=window, shift_size=shift, always_partition=True, **options)
    return lambda attn, x: (setattr(block, "attn", attn), block.to(x.dtype)._attn(x))[1]


@pytest.mark.parametrize("shift", [0, 2, (0, 1)])
@pytest.mark.parametrize("size", MAPS)
def test_swin_is_timms(size, shift):
    module = pytest.importorskip("timm.models.swin_transformer")
    ours = WindowAttention(16, (4, 3), 2, shift_size=shift, pad_order="roll_pad")
    theirs = patch_cases.randomize(module.WindowAttention(16, 2, window_size=(4, 3)))
    compare(ours, theirs, timm_block(module, "", size, (4, 3), shift), size)


@pytest.mark.parametrize("shift", [0, 2, (0, 1)])
@pytest.mark.parametrize("size", MAPS)
def test_swin_v2_is_timms(size, shift):
    module = pytest.importorskip("timm.models.swin_transformer_v2")
    ours = WindowAttentionV2(16, (4, 3), 2, shift_size=shift, pad_order="roll_pad", pretrained_window_size=(6, 5))
    theirs = patch_cases.randomize(module.WindowAttention(16, (4, 3), 2, pretrained_window_size=(6, 5)))
    torch.testing.assert_close(ours.relative_coords_table, theirs.relative_coords_table, rtol=1e-6, atol=1e-6)
    compare(ours, theirs, timm_block(module, "V2", size, (4, 3), shift), size)


@pytest.mark.parametrize("size", MAPS[:2])
def test_swin_is_torchvisions(size):
    module = pytest.importorskip("torchvision.models.swin_transformer")
    theirs = patch_cases.randomize(module.ShiftedWindowAttention(16, [4, 3], [2, 1], 2))
    theirs._non_persistent_buffers_set.add("relative_position_index")  # flattened there
    compare(WindowAttention(16, (4, 3), 2, shift_size=(2, 1)), theirs, lambda attn, x: attn(x), size)


@pytest.mark.parametrize("size", MAPS[:2])
def test_swin_is_transformers(size):
    swin = pytest.importorskip("transformers.models.swin.modeling_swin")
    config = swin.SwinConfig(window_size=4, drop_path_rate=0.0)
    layer = patch_cases.randomize(swin.SwinLayer(config, 16, size, 2, shift_size=2)).eval()
    layer.layernorm_before, layer.layernorm_after = nn.Identity(), nn.Identity()
    layer.mlp = nn.Module()
    layer.mlp.forward = torch.zeros_like
    attention, ours = layer.attention, WindowAttention(16, 4, 2, shift_size=2)
    inputs = [attention.q_proj, attention.k_proj, attention.v_proj]
    with torch.no_grad():
        ours.qkv.weight.copy_(torch.cat([p.weight for p in inputs]))
        ours.qkv.bias.copy_(torch.cat([p.bias for p in inputs]))
        ours.proj.load_state_dict(attention.o_proj.state_dict())
        ours.relative_position_bias_table.copy_(attention.relative_position_bias.relative_position_bias_table)
    x = torch.randn(2, *size, 16, generator=torch.Generator().manual_seed(4))

    def theirs(x):
        return (layer.to(x.dtype)(x.flatten(1, 2), size)[0] - x.flatten(1, 2)).unflatten(1, size)

    with torch.no_grad():
        assert_close_to_oracle("output", ours(x), theirs(x.double()), theirs(x))


def test_one_window_is_torchs_attention():
    ours = patch_cases.randomize(WindowAttention(24, (2, 3, 5), 3, qk_scale=0.3))
    x = torch.randn(2, 2, 3, 5, 24, generator=torch.Generator().manual_seed(4))

    def torchs(module, x):
        q, k, v = module.qkv(x).view(2, 30, 3, 3, 8).permute(2, 0, 3, 1, 4)
        bias = module.relative_position_bias_table[module.relative_position_index].permute(2, 0, 1)
        out = nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=bias[None], scale=0.3)
        return module.proj(out.transpose(1, 2).reshape(2, 2, 3, 5, 24))

    with torch.no_grad():
        exact = torchs(copy.deepcopy(ours).double(), x.double())
        assert_close_to_oracle("output", ours(x), exact, torchs(ours, x))


def test_a_scale_of_zero_weighs_all_keys_alike():
    ours = patch_cases.randomize(WindowAttention(8, 2, 2, qk_scale=0.0))
    with torch.no_grad():
        ours.relative_position_bias_table.zero_()
        x = torch.randn(1, 2, 2, 8)
        mean = ours.proj(ours.qkv(x)[..., 16:].mean((1, 2), keepdim=True)).expand(1, 2, 2, 8)
        torch.testing.assert_close(ours(x), mean)


def test_names_shapes_and_dtypes_are_those_of_the_original_repository():
    def entries(module):
        return {n: (list(t.shape), t.dtype) for n, t in module.state_dict().items()}

    real, integer = torch.float32, torch.int64
    assert entries(WindowAttention(16, (4, 7), 2)) == {
        "relative_position_bias_table": ([91, 2], real),
        "relative_position_index": ([28, 28], integer),
        "qkv.weight": ([48, 16], real),
        "qkv.bias": ([48], real),
        "proj.weight": ([16, 16], real),
        "proj.bias": ([16], real),
    }
    assert entries(WindowAttentionV2(16, (4, 7), 2)) == {
        "logit_scale": ([2, 1, 1], real),
        "q_bias": ([16], real),
        "v_bias": ([16], real),
        "relative_coords_table": ([1, 7, 13, 2], real),
        "relative_position_index": ([28, 28], integer),
        "cpb_mlp.0.weight": ([512, 2], real),
        "cpb_mlp.0.bias": ([512], real),
        "cpb_mlp.2.weight": ([2, 512], real),
        "qkv.weight": ([48, 16], real),
        "proj.weight": ([16, 16], real),
        "proj.bias": ([16], real),
    }
    assert "qkv.bias" not in entries(WindowAttention(16, 4, 2, qkv_bias=False))
    assert "q_bias" not in entries(WindowAttentionV2(16, 4, 2, qkv_bias=False))


@pytest.mark.parametrize(("generation", "name"), [("", "swin_transformer"), ("V2", "swin_transformer_v2")])
def test_a_checkpoint_loads_strictly_and_its_index_is_ours(generation, name):
    """timm keeps the buffers that the original repository saves, under the same names, but does not save them."""
    theirs = pytest.importorskip(f"timm.models.{name}").WindowAttention(16, num_heads=2, window_size=(4, 7))
    kept = {n: b for n, b in theirs.named_buffers() if n != "k_bias"}
    ours = {"": WindowAttention, "V2": WindowAttentionV2}[generation](16, (4, 7), 2)
    assert torch.equal(ours.relative_position_index, kept["relative_position_index"])
    ours.load_state_dict(theirs.state_dict() | kept, strict=True)


def test_a_side_of_one_token_has_finite_offsets():
    ours = WindowAttentionV2(16, (1, 8), 2)
    assert ours.relative_coords_table.isfinite().all() and (ours.relative_coords_table[..., 0] == 0).all()
    assert ours(torch.randn(1, 3, 9, 16)).isfinite().all()


def test_no_bias_and_dropout():
    for kind in (WindowAttention, WindowAttentionV2):
        ours = kind(16, 4, 2, qkv_bias=False, attn_drop=0.5, proj_drop=0.1)
        x = torch.randn(2, 5, 6, 16)
        assert not torch.equal(ours(x), ours(x))
        assert torch.equal(ours.eval()(x), ours(x))


def test_refusals_name_what_they_got():
    with pytest.raises(ValueError, match="num_heads must divide dim .16., got 3"):
        WindowAttention(16, 4, 3)
    with pytest.raises(ValueError, match="shift_size must be at least 0 and less than window_size .4, 4., got 4"):
        WindowAttentionV2(16, 4, 2, shift_size=4)
