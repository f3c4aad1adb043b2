"""Linear attention in modules and patched models: published modules with the same weights, or the arithmetic of their code."""

import libraries  # noqa: F401
import patch_cases
import pytest
import timm
import torch
from torch import nn

import vitkern
from vitkern.nn import FocusedLinearAttention, LinearAttention, LiteMLA, SimplifiedLinearAttention
from vitkern.testing import assert_close_to_oracle

F = torch.nn.functional


def hold(ours, formula, x):
    """A module and a formula of it, outputs and gradients of every parameter."""
    x = x.double()
    module = patch_cases.randomize(ours).double()
    got, want = module(x), formula(module, x)
    torch.testing.assert_close(got, want)
    upstream = torch.randn(want.shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    parameters = list(module.parameters())
    pairs = (torch.autograd.grad((t * upstream).sum(), parameters) for t in (got, want))
    for a, b in zip(*pairs, strict=True):
        torch.testing.assert_close(a, b)


def test_lite_mla_is_timms():
    from timm.models.efficientvit_mit import LiteMLA as Theirs

    theirs = patch_cases.randomize(Theirs(24, 16, dim=8, scales=(3, 5))).eval()
    ours = LiteMLA(24, 16, dim=8, scales=(3, 5), eps=1e-5).eval()
    ours.load_state_dict(theirs.state_dict())
    x = torch.randn(2, 24, 6, 9)
    exact = theirs.double()(x.double())
    assert_close_to_oracle("LiteMLA", ours(x), exact, theirs.float()(x))


def published_mlla(module, x):
    """models/mlla.py: a complex rotation of the whole map, means of keys and of kv."""
    rows, columns = module.input_resolution
    b, n, c = x.shape
    q, k = (F.elu(t) + 1 for t in module.qk(x).chunk(2, -1))
    theta = 1 / 10000 ** (torch.arange(c // 4, dtype=torch.float64) / (c // 4))
    y, z = torch.meshgrid(torch.arange(rows), torch.arange(columns), indexing="ij")
    angles = torch.cat([y[..., None] * theta, z[..., None] * theta], -1).flatten(0, 1)  # [N, C / 2]
    turn = torch.polar(torch.ones_like(angles), angles)

    def heads(t):
        return t.unflatten(-1, (module.num_heads, -1)).transpose(1, 2)

    def rotated(t):
        return torch.view_as_real(torch.view_as_complex(t.unflatten(-1, (-1, 2)).contiguous()) * turn).flatten(-2)

    q_rope, k_rope, v = heads(rotated(q)), heads(rotated(k)), heads(x)
    z = 1 / (heads(q) @ heads(k).mean(2, keepdim=True).mT + 1e-6)
    out = q_rope @ ((k_rope.mT * n**-0.5) @ (v * n**-0.5)) * z
    local = module.lepe(x.mT.unflatten(2, (rows, columns))).flatten(2).mT
    return out.transpose(1, 2).flatten(2) + local


@pytest.mark.parametrize("bias", [True, False])
def test_linear_attention_is_mllas(bias):
    hold(LinearAttention(24, (4, 6), 3, bias), published_mlla, torch.randn(2, 24, 24))


def published_flatten(module, x):
    """FLatten and SLAB: position on the keys, features over all channels, one depthwise kernel for all heads."""
    rows, columns = module.input_resolution
    q, k, v = module.qkv(x).chunk(3, -1)
    k = k + module.positional_encoding
    focused = hasattr(module, "scale")
    if focused:
        scale = F.softplus(module.scale)
        q, k = (F.relu(t) + 1e-6 for t in (q, k))
        q, k = q / scale, k / scale
        q_norm, k_norm = q.norm(dim=-1, keepdim=True), k.norm(dim=-1, keepdim=True)
        q, k = q**module.focusing_factor, k**module.focusing_factor
        q, k = q / q.norm(dim=-1, keepdim=True) * q_norm, k / k.norm(dim=-1, keepdim=True) * k_norm
    else:
        q, k = F.relu(q), F.relu(k)
    q, k, v = (t.unflatten(-1, (module.num_heads, -1)).transpose(1, 2) for t in (q, k, v))
    of_keys = k.mean(2, keepdim=True) if focused else k.sum(2, keepdim=True)
    out = (q @ (k.mT @ v)) / (q @ of_keys.mT + 1e-6) / (x.shape[1] if focused else 1)
    maps = v.flatten(0, 1).mT.unflatten(2, (rows, columns))
    out = out + module.dwc(maps).flatten(2).mT.unflatten(0, (len(x), -1))
    return module.proj(out.transpose(1, 2).flatten(2))


@pytest.mark.parametrize("kind", [FocusedLinearAttention, SimplifiedLinearAttention])
def test_focused_and_simplified_are_the_published(kind):
    module = kind(24, (4, 6), 3)
    with torch.no_grad():
        module.positional_encoding.normal_(generator=torch.Generator().manual_seed(3))
        if hasattr(module, "scale"):
            module.scale.normal_(generator=torch.Generator().manual_seed(4))
    hold(module, published_flatten, torch.randn(2, 24, 24))


@pytest.mark.parametrize(
    ("make", "x", "text"),
    [
        (lambda: LiteMLA(16, 16), (2, 8, 4, 4), r"LiteMLA: x must have shape \[B, 16, H, W\], got \[2, 8, 4, 4\]"),
        (lambda: LinearAttention(16, (4, 4), 2), (2, 15, 16), r"LinearAttention: x must have shape \[B, 16, 16\]"),
        (lambda: SimplifiedLinearAttention(16, (4, 4), 2), (2, 16, 8), "SimplifiedLinearAttention: x must have shape"),
        (lambda: FocusedLinearAttention(16, (4, 4), 3), None, r"num_heads must divide dim \(16\), got 3"),
        (lambda: LinearAttention(18, (4, 4), 3), None, "dim must be a multiple of 4, got 18"),
    ],
)
def test_refusals_are_sentences(make, x, text):
    with pytest.raises(ValueError, match=text):
        make()(torch.zeros(x))


# patched models -------------------------------------------------------------------------------------------------------


def test_efficientvit_of_timm():
    from timm.models.efficientvit_mit import EfficientVit

    model = EfficientVit(
        3, widths=(8, 16, 16, 16, 16), depths=(1, 1, 1, 1, 1), head_dim=8, head_widths=(16, 16), num_classes=5
    )
    patch_cases.check(patch_cases.randomize(model), (64, 96), replaced=2)


def test_other_features_of_timms_module_are_kept():
    from timm.models.efficientvit_mit import LiteMLA as Theirs

    model = nn.Sequential(Theirs(16, 16))
    model[0].kernel_func = nn.GELU()
    (kept,) = vitkern.patch(model).kept
    assert kept.reason == "kernel_func is GELU, the op's preset has ReLU"


@pytest.mark.parametrize("train", [False, True])
def test_mobilevitv2_of_timm(train):
    model = timm.create_model("mobilevitv2_050", num_classes=0)
    report = patch_cases.check(patch_cases.randomize(model), (64, 96), replaced=9, train=train)
    assert {r.op for r in report.replaced} == {"soft_merge"}


def test_mobilevitv2_that_drops_weights_or_looks_at_another_map_keeps_its_forward():
    from timm.models.mobilevit import LinearSelfAttention

    model, x = patch_cases.randomize(nn.Sequential(LinearSelfAttention(6, attn_drop=0.5))), torch.randn(2, 6, 4, 5)
    assert (
        vitkern.patch(model.train()).kept[0].reason == "attn_drop is 0.5 in training, and soft_merge drops no weights"
    )
    with vitkern.patched(model.eval()) as report:
        assert len(report.replaced) == 1
        model.train()
        assert not torch.equal(model(x), model(x)), "its own forward drops"


def test_the_transformer_of_sana():
    diffusers = pytest.importorskip("diffusers")
    model = diffusers.SanaTransformer2DModel(
        in_channels=4, out_channels=4, num_attention_heads=2, attention_head_dim=8, num_layers=2, num_cross_attention_heads=2,
        cross_attention_head_dim=8, cross_attention_dim=16, caption_channels=12, mlp_ratio=1.0, sample_size=8, patch_size=1,
    )  # fmt: skip
    model = patch_cases.randomize(model).eval()
    inputs = (torch.randn(2, 4, 8, 8), torch.randn(2, 5, 12), torch.tensor([3, 5]))
    with torch.no_grad():
        eager = model(*inputs).sample
        exact = model.double()(*(t.double() if t.is_floating_point() else t for t in inputs)).sample
        report = vitkern.patch(model.float())
        got = model(*inputs).sample
    assert [r.op for r in report.replaced] == ["linear_attention"] * 2, report
    assert len(report.kept) == 2 and "processor" in report.kept[0].reason
    assert_close_to_oracle("SANA", got, exact, eager)


@pytest.mark.parametrize("norm", ["batch_norm", "rms_norm"])
def test_the_multiscale_module_of_sanas_autoencoder(norm):
    module = pytest.importorskip("diffusers.models.attention_processor").SanaMultiscaleLinearAttention(
        16, 16, attention_head_dim=8, norm_type=norm, residual_connection=True
    )
    module = nn.Sequential(patch_cases.randomize(module)).eval()
    x = torch.randn(2, 16, 5, 7)
    with torch.no_grad():
        eager, exact = module(x), module.double()(x.double())
        assert len(vitkern.patch(module.float()).replaced) == 1
        assert_close_to_oracle("multiscale", module(x), exact, eager)
