"""VariedSizeWindowAttention against the formula of VSA and RVSA in normalised coordinates with torch's grid_sample."""

import module_cases
import pytest
import torch
import torch.nn.functional as F

from vitkern.nn import VariedSizeWindowAttention


def filled(**options):
    """A module whose every parameter is random: predictions that move windows by pixels."""
    torch.manual_seed(3)
    module = VariedSizeWindowAttention(**options)
    for p in module.parameters():
        torch.nn.init.normal_(p, std=0.3)
    return module


def published(m, x):
    """[B, H, W, C] -> [B, H, W, out]: every step on the padded map, as the two repositories have it."""
    height, width, w, heads, parts = *x.shape[1:3], m.window_size, m.num_heads, m.num_deform
    down, across = -height % w, -width % w
    top, left = (down // 2, across // 2) if m.rotated else (0, 0)
    pads = (left, across - left, top, down - top)
    padded = F.pad(x.permute(0, 3, 1, 2), pads)
    size_y, size_x = padded.shape[2:]
    ny, nx = size_y // w, size_x // w
    axis_x, axis_y = (torch.linspace(-1, 1, n, dtype=x.dtype) for n in (size_x, size_y))
    centre = torch.stack(
        (axis_x.view(nx, w).mean(1).expand(ny, nx), axis_y.view(ny, w).mean(1)[:, None].expand(ny, nx))
    )
    step = torch.arange(w, dtype=x.dtype) - (w - 1) / 2
    local = torch.stack((step.expand(w, w) * 2 / (size_x - 1), step[:, None].expand(w, w) * 2 / (size_y - 1)))
    pooled = F.leaky_relu(F.avg_pool2d(padded, w))

    def grid(suffix):
        found = [getattr(m, f"sampling_{kind}{suffix}")[2](pooled) for kind in ("offsets", "scales")]
        offset, scale = (t.reshape(-1, 2, ny, 1, nx, 1) for t in found)  # [B heads parts, ...]
        divisors = (height // w, width // w) if m.rotated and m.compat == "code" else (width // w, height // w)
        offset = torch.stack((offset[:, 0] / divisors[0], offset[:, 1] / divisors[1]), 1)
        moved = local[None, :, None, :, None] * (1 + scale)  # [B heads parts, 2, ny, w, nx, w]
        if m.rotated:
            angle = getattr(m, f"sampling_angles{suffix}")[2](pooled).reshape(-1, ny, 1, nx, 1)
            a, b = moved[:, 0], moved[:, 1]
            if m.compat == "paper":  # in pixels
                a, b = a * (size_x - 1), b * (size_y - 1)
            a, b = a * angle.cos() - b * angle.sin(), b * angle.cos() + a * angle.sin()
            if m.compat == "paper":
                a, b = a / (size_x - 1), b / (size_y - 1)
            moved = torch.stack((a, b), 1)
        places = centre[None, :, :, None, :, None] + moved + offset
        return places.permute(0, 2, 3, 4, 5, 1).reshape(-1, size_y, size_x, 2)

    q, k, v = F.pad(m.qkv(x).permute(0, 3, 1, 2), pads).unflatten(1, (3, -1)).unbind(1)  # [B, out, size_y, size_x]

    def windows(t):
        t = t.reshape(x.shape[0], heads, -1, ny, w, nx, w)
        return t.permute(0, 3, 5, 1, 4, 6, 2).reshape(-1, heads, w * w, t.shape[2])  # [B ny nx, heads, w w, head_dim]

    where = [grid(suffix) for suffix in (("_k", "_v") if m.kv_diff else ("", ""))]
    k, v = (
        F.grid_sample(t.reshape(len(g), -1, size_y, size_x), g, padding_mode="zeros", align_corners=True)
        for t, g in zip((k, v), where, strict=True)
    )
    q, k, v = windows(q), windows(k), windows(v)
    s = q @ k.mT * m.scale
    y, c = torch.arange(w * w) // w, torch.arange(w * w) % w
    dy, dx = y[:, None] - y[None] + w - 1, c[:, None] - c[None] + w - 1
    if m.rotated:
        s = s + torch.einsum("bhic,ijc->bhij", q, m.rel_pos_h[dy] + m.rel_pos_w[dx])
    if m.relative_position_bias_table is not None:
        s = s + m.relative_position_bias_table[dy * (2 * w - 1) + dx].permute(2, 0, 1)
    out = (s.softmax(-1) @ v).reshape(x.shape[0], ny, nx, heads, w, w, -1).permute(0, 1, 4, 2, 5, 3, 6)
    out = out.reshape(x.shape[0], size_y, size_x, -1)[:, top : top + height, left : left + width]
    assert parts == 1 or m.head_dim % parts == 0
    return m.proj(out)


FORMS = {
    "VSA": dict(dim=12, num_heads=3, window_size=4),
    "VSA, wider output": dict(dim=12, num_heads=2, window_size=3, out_dim=8, qkv_bias=False, qk_scale=0.7),
    "no table": dict(dim=8, num_heads=2, window_size=4, relative_position_bias=False),
    "RVSA": dict(dim=12, num_heads=3, window_size=4, rotated=True),
    "RVSA, paper": dict(dim=12, num_heads=3, window_size=4, rotated=True, compat="paper"),
    "RVSA, groups, own values": dict(dim=16, num_heads=2, window_size=5, rotated=True, num_deform=2, kv_diff=True),
    "VSA, own values, paper": dict(dim=8, num_heads=2, window_size=4, kv_diff=True, compat="paper"),
}


@pytest.mark.parametrize("size", [(8, 12), (9, 17), (14, 7)], ids=str)
@pytest.mark.parametrize("name", FORMS)
def test_the_module_is_the_published_formula(name, size):
    x = torch.randn(2, *size, FORMS[name]["dim"], generator=torch.Generator().manual_seed(1))
    module_cases.by_formula(filled(**FORMS[name]), published, x)


def test_the_two_readings_of_rvsa_differ_where_height_and_width_do():
    a, b = (filled(dim=8, num_heads=2, window_size=4, rotated=True, compat=compat) for compat in ("code", "paper"))
    square, wide = torch.randn(1, 8, 8, 8), torch.randn(1, 8, 16, 8)
    torch.testing.assert_close(a(square), b(square))
    assert (a(wide) - b(wide)).abs().max() > 1e-2


def test_it_begins_as_attention_in_windows():
    import vitkern

    module = VariedSizeWindowAttention(8, 2, 4)
    x = torch.randn(2, 8, 12, 8)
    q, k, v = module.qkv(x).unflatten(-1, (3, 2, 4)).unbind(-3)
    bias = vitkern.bias.RelativePosition(module.relative_position_bias_table)
    want = module.proj(vitkern.window_attention(q, k, v, 4, bias=bias).flatten(-2))
    torch.testing.assert_close(module(x), want)


def test_a_checkpoint_of_convolutions_is_loaded():
    module, other = filled(dim=8, num_heads=2, window_size=4), VariedSizeWindowAttention(8, 2, 4)
    names = {
        "relative_position_bias_table",
        "relative_position_index",
        "qkv.weight",
        "qkv.bias",
        "proj.weight",
        "proj.bias",
    }
    names |= {f"sampling_{kind}.2.{part}" for kind in ("offsets", "scales") for part in ("weight", "bias")}
    state = module.state_dict()
    assert set(state) == names
    other.load_state_dict(
        {n: t[..., None, None] if n in ("qkv.weight", "proj.weight") else t for n, t in state.items()}
    )
    x = torch.randn(1, 5, 9, 8)
    assert torch.equal(module(x), other(x))


def test_refusals_are_sentences():
    with pytest.raises(ValueError, match=r"num_deform must divide the channels of a head \(4\), got 3"):
        VariedSizeWindowAttention(8, 2, num_deform=3)
    with pytest.raises(ValueError, match="compat"):
        VariedSizeWindowAttention(8, 2, compat="both")
