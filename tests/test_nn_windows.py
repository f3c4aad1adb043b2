"""vitkern.nn's modules of windows beyond Swin: published modules with the same weights, or the formula where no library has one."""

import libraries  # noqa: F401
import patch_cases
import pytest
import torch
from module_cases import Applied, by_formula, compare, ours_alone
from torch import nn

from vitkern.nn import (
    CascadedGroupAttention,
    CrossShapedWindowAttention,
    GlobalContextWindowAttention,
    MultiAxisAttention,
    OverlappingCrossAttention,
)


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


class Inner(nn.Module):
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


# CSWin ---------------------------------------------------------------------------------------------------------------------


def cut(x, height, width):
    """Windows [B, n, m, height, width, C] of a map."""
    return x.unflatten(2, (-1, width)).unflatten(1, (-1, height)).transpose(2, 3)


def cswin(module, x):
    """One stripe after the other; zeros after the projection on both sides of a map, half of them in front."""
    found = []
    parts = module.qkv(x).unflatten(-1, (3, module.num_heads, -1)).chunk(len(module.attns), -2)
    for branch, part in enumerate(parts):
        size = list(x.shape[1:3])
        sides = [n if len(parts) == 1 or axis == branch else module.split_size for axis, n in enumerate(size)]
        missing = [-n % w for n, w in zip(size, sides, strict=True)]
        before = [m // 2 for m in missing]
        part = nn.functional.pad(
            part.flatten(3), (0, 0, before[1], missing[1] - before[1], before[0], missing[0] - before[0])
        )
        q, k, v = (
            cut(part, *sides).unflatten(-1, (3, -1, module.dim // module.num_heads)).unbind(-3)
        )  # [B, n, m, h, w, H, D]
        flat = [t.flatten(3, 4).transpose(3, 4) for t in (q, k, v)]  # [B, n, m, H, N, D]
        out = ((flat[0] @ flat[1].mT) * module.scale).softmax(-1) @ flat[2]
        conv = module.attns[branch].get_v
        near = conv(v.flatten(5).flatten(0, 2).permute(0, 3, 1, 2)).permute(0, 2, 3, 1).view_as(v)
        out = out.transpose(3, 4).reshape(v.shape) + near
        out = out.transpose(2, 3).flatten(3, 4).flatten(1, 2)  # [B, H', W', heads, D]
        found.append(out[:, before[0] : before[0] + size[0], before[1] : before[1] + size[1]])
    return module.proj(torch.cat(found, -2).flatten(-2))


@pytest.mark.parametrize("size", [(8, 8), (9, 7), (2, 5)])
@pytest.mark.parametrize(
    "options", [{"split_size": 4}, {"split_size": 1, "qkv_bias": True}, {"last_stage": True}, {"qk_scale": 0.2}]
)
def test_cross_shaped_window_attention_is_the_formula(options, size):
    x = torch.randn(2, *size, 16, generator=torch.Generator().manual_seed(1))
    by_formula(patch_cases.randomize(CrossShapedWindowAttention(16, 4, **options)), cswin, x)


def test_a_scale_of_zero_is_not_the_default():
    module, x = patch_cases.randomize(CrossShapedWindowAttention(8, 2, 2, qk_scale=0.0)), torch.randn(1, 4, 4, 8)
    for branch in module.attns:
        nn.init.zeros_(branch.get_v.weight)
    with torch.no_grad():
        v = module.qkv(x)[..., 16:]
        columns, rows = v.unflatten(2, (2, 2)).mean((1, 3)), v.unflatten(1, (2, 2)).mean((2, 3))  # [B, 2, C]
        bias = torch.cat([b.get_v.bias for b in module.attns])
        first = columns.repeat_interleave(2, 1)[:, None].expand(-1, 4, -1, -1)[..., :4]
        second = rows.repeat_interleave(2, 1)[:, :, None].expand(-1, -1, 4, -1)[..., 4:]
        torch.testing.assert_close(module(x), module.proj(torch.cat((first, second), -1) + bias))


def test_names_of_cswin():
    names = {"qkv.weight", "attns.0.get_v.weight", "attns.0.get_v.bias", "proj.weight", "proj.bias"}
    assert set(CrossShapedWindowAttention(8, 1, last_stage=True).state_dict()) == names
    both = CrossShapedWindowAttention(8, 2, qkv_bias=True).state_dict()
    assert set(both) == names | {"qkv.bias", "attns.1.get_v.weight", "attns.1.get_v.bias"}
    assert both["attns.1.get_v.weight"].shape == (4, 1, 3, 3)


# HAT -----------------------------------------------------------------------------------------------------------------------


def overlapping(module, x):
    """Every window's keys cut from the map with zeros around it; rows of the table as HAT counts them."""
    side, wide, heads = module.window_size, module.overlap_win_size, module.num_heads
    height, width = x.shape[1:3]
    qkv = nn.functional.pad(module.qkv(x), (0, 0, 0, -width % side, 0, -height % side))
    halo = (wide - side) // 2
    around = nn.functional.pad(qkv, (0, 0, halo, halo, halo, halo))
    across = range(side), range(wide)
    rows = [
        (ky - qy + side - wide + 1) * (side + wide - 1) + kx - qx + side - wide + 1
        for qy in across[0] for qx in across[0] for ky in across[1] for kx in across[1]
    ]  # fmt: skip
    assert wide == side or min(rows) < 0
    bias = module.relative_position_bias_table[torch.tensor(rows)].view(side**2, wide**2, heads).permute(2, 0, 1)
    out = torch.zeros_like(qkv[..., : module.dim])
    for top in range(0, qkv.shape[1], side):
        for left in range(0, qkv.shape[2], side):
            q = qkv[:, top : top + side, left : left + side, : module.dim]
            k, v = around[:, top : top + wide, left : left + wide, module.dim :].chunk(2, -1)
            q, k, v = (t.flatten(1, 2).unflatten(-1, (heads, -1)).transpose(1, 2) for t in (q, k, v))
            o = ((q @ k.mT) * module.scale + bias).softmax(-1) @ v
            out[:, top : top + side, left : left + side] = o.transpose(1, 2).flatten(2).unflatten(1, (side, side))
    return module.proj(out[:, :height, :width])


@pytest.mark.parametrize("size", [(8, 12), (4, 4), (7, 9)])
@pytest.mark.parametrize(
    "options", [{}, {"overlap_ratio": 1.5, "qk_scale": 0.3}, {"overlap_ratio": 0.1, "qkv_bias": False}]
)
def test_overlapping_cross_attention_is_the_formula(options, size):
    module = OverlappingCrossAttention(15, 4, num_heads=3, **{"overlap_ratio": 0.5} | options)
    patch_cases.randomize(module)
    nn.init.normal_(module.relative_position_bias_table, std=3.0, generator=torch.Generator().manual_seed(2))
    by_formula(module, overlapping, torch.randn(2, *size, 15, generator=torch.Generator().manual_seed(1)))


def test_overlapping_cross_attention_names_and_refusals():
    module = OverlappingCrossAttention(12, 16, 0.5, 2)
    names = {"qkv.weight", "qkv.bias", "relative_position_bias_table", "proj.weight", "proj.bias"}
    assert set(module.state_dict()) == names and module.relative_position_bias_table.shape == (1521, 2)
    with pytest.raises(ValueError, match=r"int\(window_size \* overlap_ratio\) must be even, got 3"):
        OverlappingCrossAttention(12, 6, 0.5, 2)


# GC ViT --------------------------------------------------------------------------------------------------------------------


def with_queries(module, x):
    """A module whose queries are those of the image: its mean in every place of a window, each with a factor."""
    n = 4 * 3
    q = nn.functional.adaptive_avg_pool2d(x.permute(0, 3, 1, 2), (4, 3)).permute(0, 2, 3, 1)
    return module(x, q * torch.arange(1, n + 1, dtype=x.dtype).view(1, 4, 3, 1) / 3)


def without_queries(module, x):
    return module(x)


@pytest.mark.parametrize("size", [(4, 3), (8, 9)])
@pytest.mark.parametrize("use_global", [False, True])
def test_global_context_window_attention_is_timms(use_global, size):
    module = pytest.importorskip("timm.models.gcvit")
    theirs = patch_cases.randomize(module.WindowAttentionGlobal(12, 3, (4, 3), use_global=use_global))
    block = module.GlobalContextVitBlock(12, size, 3, (4, 3), use_global=use_global)

    def call(attn, x):
        block.attn = attn
        return (with_queries if use_global else without_queries)(block.to(x.dtype)._window_attn, x)

    ours = GlobalContextWindowAttention(12, 3, (4, 3), use_global)
    compare(ours, theirs, call, size, strict=True, mine=with_queries if use_global else without_queries)


def test_global_context_window_attention_says_what_it_refuses():
    module = GlobalContextWindowAttention(12, 3, (4, 3))
    with pytest.raises(ValueError, match=r"windows \[4, 3\] must divide the map, got \[8, 8\]"):
        module(torch.zeros(1, 8, 8, 12))
    with pytest.raises(ValueError, match="q_global must be given with use_global"):
        module(torch.zeros(1, 8, 9, 12))
    with pytest.raises(ValueError, match=r"q_global must have shape \[2, 4, 3, 12\], got \[1, 4, 3, 12\]"):
        module(torch.zeros(2, 8, 9, 12), torch.zeros(1, 4, 3, 12))


# MaxViT --------------------------------------------------------------------------------------------------------------------


class Two(nn.Module):
    """timm's two partitions in a row."""

    def __init__(self, module, cfg):
        super().__init__()
        self.attn_block, self.attn_grid = (module.PartitionAttentionCl(12, kind, cfg) for kind in ("block", "grid"))

    def forward(self, x):
        return self.attn_grid(self.attn_block(x))


@pytest.mark.parametrize("size", [(4, 6), (8, 9)])
@pytest.mark.parametrize(("rel_pos", "head_first"), [("bias_tf", False), ("bias", True)])
def test_multi_axis_attention_is_timms(rel_pos, head_first, size):
    module = pytest.importorskip("timm.models.maxxvit")
    sizes = {"window_size": (4, 3), "grid_size": (2, 3), "dim_head": 4}
    cfg = module.MaxxVitTransformerCfg(rel_pos_type=rel_pos, head_first=head_first, norm_eps=1e-5, **sizes)
    ours = MultiAxisAttention(12, rel_pos=rel_pos, head_first=head_first, **sizes)
    compare(ours, patch_cases.randomize(Two(module, cfg)), without_queries, size, strict=True)


def test_multi_axis_attention_says_what_it_refuses():
    with pytest.raises(ValueError, match=r"dim_head must divide dim \(12\), got 32"):
        MultiAxisAttention(12)
    with pytest.raises(ValueError, match=r"windows \[2, 2\] must divide the map, got \[3, 6\]"):
        MultiAxisAttention(12, 3, 2, dim_head=4)(torch.zeros(1, 3, 6, 12))


def test_dropout_draws_in_training_only():
    for module in (
        CrossShapedWindowAttention(8, 2, 2, attn_drop=0.5),
        MultiAxisAttention(8, 2, dim_head=4, attn_drop=0.5),
        GlobalContextWindowAttention(8, 2, 2, False, attn_drop=0.5),
    ):
        x = torch.randn(2, 4, 4, 8)
        assert not torch.equal(module(x), module(x))
        assert torch.equal(module.eval()(x), module(x))


@pytest.mark.parametrize("size", [(8, 8), (7, 9)])
@pytest.mark.parametrize(
    ("module", "formula"),
    [
        (lambda: CrossShapedWindowAttention(16, 4, 4), cswin),
        (lambda: OverlappingCrossAttention(16, 4, 0.5, 2), overlapping),
    ],
)
def test_under_autocast_a_module_is_as_close_as_the_formula(module, formula, size):
    module, x = patch_cases.randomize(module()), torch.randn(2, *size, 16, generator=torch.Generator().manual_seed(4))
    got = patch_cases.run(Applied(module, ours_alone), x, torch.float32, True, autocast=True)
    patch_cases.Yardstick(Applied(module, formula), x, autocast=True).hold(str(size), got)
