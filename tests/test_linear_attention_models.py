"""linear_attention: every preset against the published module, or the arithmetic of its code."""

import copy
import math

import libraries  # noqa: F401
import pytest
import torch
from agreement import agree
from linear_cases import heads, mixed, weights

import vitkern
from vitkern import feature_map as maps
from vitkern import testing
from vitkern.testing import assert_close_to_oracle

BACKENDS = ["reference", *testing.backends()]
ON = pytest.mark.parametrize("backend", BACKENDS)
F = torch.nn.functional
pytestmark = pytest.mark.filterwarnings("ignore:Importing from timm")


def hold(module, x, got):
    """The output and the gradient of x of a published module, by the oracle rule; in float64 it still divides in float32."""
    results = []
    for dtype in (torch.float64, torch.float32):
        leaf = x.detach().to(dtype).requires_grad_()
        results.append((leaf, copy.deepcopy(module).to(dtype)(leaf)))
    results.append((x, got))
    upstream = torch.randn(got.shape, generator=torch.Generator().manual_seed(0))
    exact, eager, ours = ((out.detach(), *torch.autograd.grad((out * upstream).sum(), leaf)) for leaf, out in results)
    for name, a, b, c in zip(("out", "grad of x"), ours, exact, eager, strict=True):
        assert_close_to_oracle(name, a, b, c, gradient=name != "out")


@ON
def test_litemla_of_timm(backend):
    """Channel-first q, k, v in one map, ReLU, eps 1e-5: the projection before and after is timm's."""
    from timm.models.efficientvit_mit import LiteMLA

    module = LiteMLA(24, 24, dim=8, scales=(5,), norm_layer=(None, None))
    x = torch.randn(2, 24, 5, 7, requires_grad=True)
    first = module.qkv(x)
    many = (
        torch.cat([first, *(op(first) for op in module.aggreg)], 1).flatten(2).unflatten(1, (-1, 24))
    )  # [B, H, 3 D, N]
    q, k, v = many.permute(0, 3, 1, 2).chunk(3, -1)
    out = vitkern.linear_attention(q, k, v, preset="timm", backend=backend)
    hold(module, x, module.proj(out.flatten(2).mT.reshape(2, -1, 5, 7)))


@ON
def test_sana_of_diffusers(backend):
    from diffusers.models.attention_processor import Attention, SanaLinearAttnProcessor2_0

    module = Attention(24, heads=3, dim_head=8, processor=SanaLinearAttnProcessor2_0())
    x = torch.randn(2, 35, 24, requires_grad=True)
    q, k, v = (f(x).unflatten(-1, (3, 8)) for f in (module.to_q, module.to_k, module.to_v))
    got = module.to_out[0](vitkern.linear_attention(q, k, v, preset="sana", backend=backend).flatten(2))
    hold(module, x, got)


@ON
@pytest.mark.parametrize("preset", ["linear_transformer", "loftr"])
def test_linear_transformer_and_loftr(backend, preset):
    """LoFTR divides the values by Nk before the sums and multiplies after, which cancels; both mask after the map."""
    q, k, v = heads()
    mask = torch.rand(2, 35) < 0.6
    a, b = F.elu(q) + 1, (F.elu(k) + 1) * mask[..., None, None]
    kv = torch.einsum("bnhf,bnhe->bhfe", b, v / 35)
    want = torch.einsum("bnhf,bhfe->bnhe", a, kv) / (torch.einsum("bnhf,bhf->bnh", a, b.sum(1)) + 1e-6)[..., None] * 35
    agree(vitkern.linear_attention(q, k, v, preset=preset, key_mask=mask, backend=backend), want, (q, k, v))


@ON
def test_mlla(backend):
    """Tables over all channels, so angles per head; the numerator alone turns; the means of k and kv are taken over n."""
    q, k, v = heads(h=4, n=6 * 10)
    lepe = torch.randn(32, 1, 3, 3, dtype=torch.float64)
    angles = torch.randn(1, 60, 4, 4, dtype=torch.float64)
    a, b = F.elu(q) + 1, F.elu(k) + 1

    def turned(x):
        z = torch.view_as_complex(x.unflatten(-1, (4, 2)).contiguous()) * torch.polar(torch.ones_like(angles), angles)
        return torch.view_as_real(z).flatten(-2)

    z = 1 / (torch.einsum("bnhf,bhf->bnh", a, b.mean(1)) + 1e-6)[..., None]
    kv = torch.einsum("bnhf,bnhe->bhfe", turned(b) * 60**-0.5, v * 60**-0.5)
    local = (
        F.conv2d(v.flatten(2).mT.unflatten(2, (6, 10)), lepe, padding=1, groups=32).flatten(2).mT.unflatten(2, (4, 8))
    )
    want = torch.einsum("bnhf,bhfe->bnhe", turned(a), kv) * z + local
    rope = vitkern.Rope(angles.cos(), angles.sin())
    got = vitkern.linear_attention(
        q, k, v, preset="mlla", rope=rope, lepe=vitkern.DepthwiseValue(lepe, None, (6, 10)), backend=backend
    )
    agree(got, want, (q, k, v))


@ON
def test_rala(backend):
    q, k, v = heads()
    a, b = F.elu(q) + 1, F.elu(k) + 1
    effective = torch.softmax(torch.einsum("bhf,bnhf->bnh", a.mean(1), b) * 8**-0.5, 1) * 35
    kv = torch.einsum("bnhf,bnhe->bhfe", b * effective[..., None] / 35, v)
    den = torch.einsum("bnhf,bhf->bnh", a, (b * effective[..., None]).mean(1))[..., None]
    want = torch.einsum("bnhf,bhfe->bnhe", a, kv) / (den + 1e-6)
    agree(vitkern.linear_attention(q, k, v, preset="rala", backend=backend), want, (q, k, v))


@ON
def test_linfusion(backend):
    q, k, v = heads()
    a, b = F.elu(q) + 1, F.elu(k) + 1
    want = mixed(weights(a, b), v) / 35 / (torch.einsum("bnhf,bhf->bnh", a, b.mean(1)) + 1e-4)[..., None]
    agree(vitkern.linear_attention(q, k, v, preset="linfusion", backend=backend), want, (q, k, v))


def focused(x, scale, power):
    """As released: norms over all channels, the heads split after."""
    x = (x.flatten(2).relu() + 1e-6) / F.softplus(scale)
    norm, x = x.norm(dim=-1, keepdim=True), x**power
    return x / x.norm(dim=-1, keepdim=True) * norm


@ON
def test_flatten(backend):
    q, k, v = heads()
    scale = torch.randn(1, 1, 24, dtype=torch.float64, requires_grad=True)
    a, b = (focused(t, scale, 3).unflatten(-1, (3, 8)) for t in (q, k))
    z = 1 / (torch.einsum("bnhf,bhf->bnh", a, b.mean(1)) + 1e-6)[..., None]
    want = torch.einsum("bnhf,bhfe->bnhe", a, torch.einsum("bnhf,bnhe->bhfe", b / 35, v)) * z
    got = vitkern.linear_attention(q, k, v, preset="flatten", feature_map=maps.Focused(scale), backend=backend)
    agree(got, want, (q, k, v, scale))
    single = vitkern.linear_attention(
        q, k, v, preset="flatten", feature_map=maps.Focused(scale, norm="head"), backend=backend
    )
    assert (single - got).abs().max() > 1e-3  # the norm runs over all heads


@ON
@pytest.mark.parametrize("power", [3.0, 8.0, 12.0])
def test_the_focused_power_of_a_dead_token_is_finite(backend, power):
    q, k, v = (t.detach().float().requires_grad_() for t in heads())
    with torch.no_grad():
        q[:, 3] = -1.0
        k[:, 5] = -2.0
    scale = torch.zeros(24)
    got, exact, eager = (
        vitkern.linear_attention(
            *(t.to(dtype) for t in (q, k, v)),
            preset="flatten",
            feature_map=maps.Focused(scale.to(dtype), power),
            backend=which,
        )
        for dtype, which in ((torch.float32, backend), (torch.float64, "reference"), (torch.float32, "reference"))
    )
    assert_close_to_oracle("out", got, exact, eager)
    assert all(g.isfinite().all() for g in torch.autograd.grad(got.sum(), (q, k, v)))


@ON
def test_slab(backend):
    """Sums without a mean; one 5x5 kernel for all heads."""
    q, k, v = heads(n=30)
    kernel = torch.randn(8, 1, 5, 5, dtype=torch.float64)
    a, b = q.relu(), k.relu()
    local = F.conv2d(v.flatten(2).mT.reshape(6, 8, 5, 6), kernel, padding=2, groups=8)
    local = local.reshape(2, 24, 30).mT.unflatten(2, (3, 8))
    want = mixed(weights(a, b), v) / (weights(a, b).sum(-1).mT[..., None] + 1e-6) + local
    lepe = vitkern.DepthwiseValue(kernel, None, (5, 6))
    agree(vitkern.linear_attention(q, k, v, preset="slab", lepe=lepe, backend=backend), want, (q, k, v))


@ON
def test_polaformer(backend):
    q, k, v = heads()
    scale = torch.randn(1, 1, 24, dtype=torch.float64, requires_grad=True)
    p = torch.randn(1, 3, 1, 8, dtype=torch.float64, requires_grad=True)
    power = 1 + 4 * torch.sigmoid(p)
    qs, ks = ((t.flatten(2) / F.softplus(scale)).unflatten(-1, (3, 8)).transpose(1, 2) for t in (q, k))  # [B, H, N, D]
    up, down = (lambda x: x.relu() ** power), (lambda x: (-x).relu() ** power)
    same, other = torch.cat((up(qs), down(qs)), -1), torch.cat((down(qs), up(qs)), -1)
    keys, halves = torch.cat((up(ks), down(ks)), -1), v.transpose(1, 2).chunk(2, -1)
    parts = []
    for a, values in ((same, halves[0]), (other, halves[1])):
        z = 1 / (a @ keys.mean(-2, keepdim=True).mT + 1e-6)
        parts.append(a @ ((keys.mT * 35**-0.5) @ (values * 35**-0.5)) * z)
    want = torch.cat(parts, -1).transpose(1, 2)
    got = vitkern.linear_attention(q, k, v, preset="polaformer", feature_map=maps.Polar(scale, power), backend=backend)
    agree(got, want, (q, k, v, scale, p))


@ON
@pytest.mark.parametrize("name", ["identity", "relu", "leaky_relu", maps.Exp(0.2)], ids=str)
def test_inline(backend, name):
    """Subtracted scores: their sum over the keys is 1, and a negative weight leaves the hull of the values."""
    q, k, v = heads()
    phi = {"identity": lambda x: x, "relu": F.relu, "leaky_relu": F.leaky_relu}.get(name, lambda x: (0.2 * x).exp())
    a, b = phi(q), phi(k)
    scores = weights(a * 8**-0.5, b) / 35
    want = mixed(scores, v) + (1 - scores.sum(-1).mT[..., None]) * v.mean(1, keepdim=True)
    got = vitkern.linear_attention(q, k, v, preset="inline", feature_map=name, backend=backend)
    agree(got, want, (q, k, v))
    assert vitkern.linear_attention(3 * q, k, v.abs(), preset="inline", backend=backend).min() < 0


@ON
@pytest.mark.parametrize("preset", ["efficient_attention", "lucidrains"])
def test_softmax_over_channels_and_tokens(backend, preset):
    q, k, v = heads()
    mask = torch.rand(2, 35) < 0.6
    logits = k.masked_fill(~mask[..., None, None], -math.inf)
    want = mixed(weights(q.softmax(-1), logits.softmax(1)), v) * (8**-0.5 if preset == "lucidrains" else 1)
    agree(vitkern.linear_attention(q, k, v, preset=preset, key_mask=mask, backend=backend), want, (q, k, v))
    rows = weights(q.softmax(-1), logits.softmax(1)).sum(-1)
    torch.testing.assert_close(rows, torch.ones_like(rows))


@ON
@pytest.mark.parametrize("preset", ["lion_lit", "lion_d"])
def test_lion(backend, preset):
    q, k, v = heads()

    def phi(x):
        if preset == "lion_lit":
            return F.elu(x) + 1
        y = F.silu(x) + 0.5
        return y / y.norm(dim=-1, keepdim=True)

    scores = weights(phi(q) * 8**-0.5, phi(k))
    want = mixed(scores, v) / (scores.sum(-1).mT[..., None] + 1e-6)
    agree(vitkern.linear_attention(q, k, v, preset=preset, backend=backend), want, (q, k, v))


@ON
def test_vssd_shares_its_one_group_and_reads_groups_modulo(backend):
    """Head h of VSSD reads group h mod G; here it reads h // (H / G): heads are laid out [G, H / G] before and after."""
    c, b = (torch.randn(2, 35, 2, 8, dtype=torch.float64, requires_grad=True) for _ in "cb")  # 2 groups
    v = torch.randn(2, 35, 6, 5, dtype=torch.float64, requires_grad=True)  # 6 heads
    state = torch.einsum("bnhf,bnhe->bhfe", b.repeat(1, 1, 3, 1), v)
    want = torch.einsum("bnhf,bhfe->bnhe", c.repeat(1, 1, 3, 1), state)
    order = [0, 2, 4, 1, 3, 5]  # by group
    q, k = (t.repeat(1, 1, 3, 1)[:, :, order] for t in (c, b))
    got = vitkern.linear_attention(q, k, v[:, :, order], preset="vssd", backend=backend)
    agree(got, want[:, :, order], (c, b, v))


@ON
def test_retnet_does_not_differentiate_its_divisor(backend):
    q, k, v = heads()
    scores = weights(q * 8**-0.5, k)
    want = mixed(scores / scores.detach().sum(-1, keepdim=True).abs().clamp(min=1), v)
    agree(vitkern.linear_attention(q, k, v, preset="retnet", backend=backend), want, (q, k, v))


@ON
def test_performer(backend):
    """Random features approach the softmax kernel; the arithmetic is that of the released code."""
    q, k, v = heads()
    omega = torch.randn(20, 8, dtype=torch.float64)

    def features(x, query):
        data = x * 8**-0.25
        dash = data @ omega.mT
        diag = (data**2).sum(-1, keepdim=True) / 2
        top = dash.amax(-1, keepdim=True) if query else dash.amax((1, 3), keepdim=True)
        return 20**-0.5 * ((dash - diag - top.detach()).exp() + 1e-4)

    scores = weights(features(q, True), features(k, False))
    want = mixed(scores / scores.sum(-1, keepdim=True), v)
    got = vitkern.linear_attention(q, k, v, preset="performer", feature_map=maps.Favor(omega), backend=backend)
    agree(got, want, (q, k, v))
    many = maps.Favor(torch.randn(20000, 8, dtype=torch.float64), eps=0.0)
    near = vitkern.linear_attention(q / 2, k / 2, v, preset="performer", feature_map=many, backend="reference")
    soft = F.scaled_dot_product_attention(*(t.transpose(1, 2) for t in (q / 2, k / 2, v))).transpose(1, 2)
    assert (near - soft).abs().mean() < 0.1 * soft.abs().mean()


@ON
def test_the_three_hedgehogs(backend):
    q, k, v = heads()
    w, bias = torch.randn(3, 8, 8, dtype=torch.float64, requires_grad=True), torch.randn(3, 8, dtype=torch.float64)

    def scored(phi):
        y, z = (torch.einsum("bnhd,hfd->bnhf", t, w) + bias for t in (q, k))
        scores = weights(phi(y) * 8**-0.5, phi(z))
        return scores

    forms = {
        "joint": (lambda y: torch.cat((2 * y, -2 * y), -1).softmax(-1), 1e-10, "hedgehog_fla"),
        "split": (
            lambda y: torch.cat((y.softmax(-1), (-y).softmax(-1)), -1).clamp(min=1e-6),
            1e-6,
            "hedgehog_split",
        ),
        "exp": (
            lambda y: torch.cat((y, -y), -1).exp() / y.abs().amax(-1, keepdim=True).exp(),
            1e-6,
            "hedgehog_exp",
        ),
    }
    for form, (phi, eps, preset) in forms.items():
        scores = scored(phi)
        want = mixed(scores, v) / (scores.sum(-1).mT[..., None] + eps)
        got = vitkern.linear_attention(
            q, k, v, preset=preset, feature_map=maps.Hedgehog(w, bias, form), backend=backend
        )
        agree(got, want, (q, k, v, w))


@ON
def test_codes_of_ecoformer_and_shiftaddvit(backend):
    q, k, v = heads()
    anchors, matrix = torch.randn(1, 25, 8, dtype=torch.float64), torch.randn(1, 25, 16, dtype=torch.float64)
    mean = torch.rand(1, 25, dtype=torch.float64)

    def code(x):
        far = torch.cdist(x, anchors[0]) ** 2  # [B, N, H, M]
        kappa = (-far / (2 * far.mean((1, 3), keepdim=True))).exp() - mean
        return (kappa @ matrix[0]).sign()

    scores = weights(code(q), code(k)) + 17
    want = mixed(scores, v) / scores.sum(-1).mT[..., None]
    got = vitkern.linear_attention(
        q, k, v, preset="ecoformer", feature_map=maps.Hash(anchors, matrix, mean), backend=backend
    )
    torch.testing.assert_close(got, want)
    scores = weights(q.sign(), k.sign())
    got = vitkern.linear_attention(q, k, v, feature_map=maps.Sign(), normalizer="none", backend=backend)
    torch.testing.assert_close(got, mixed(scores, v))
    (dq,) = torch.autograd.grad(got.sum(), q)
    through = torch.einsum("bhfe->bhf", torch.einsum("bnhf,bnhe->bhfe", k.sign(), v))[:, None] * (q.abs() < 1)
    torch.testing.assert_close(dq, through)


@ON
def test_cosformer_by_concatenation(backend):
    """ReLU scores times cos(pi / 2 (i - j) / M) factor into cosines and sines."""
    q, k, v = heads()
    t = (torch.arange(35, dtype=torch.float64) / 35 * math.pi / 2)[:, None, None]
    a, b = (torch.cat((x.relu() * t.cos(), x.relu() * t.sin()), -1) for x in (q, k))
    scores = weights(q.relu(), k.relu()) * (t[:, 0] - t[:, 0].T).cos()
    want = mixed(scores, v) / (scores.sum(-1).mT[..., None] + 1e-6)
    agree(vitkern.linear_attention(a, b, v, feature_map="identity", backend=backend), want, (q, k, v))
