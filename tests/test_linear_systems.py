"""linear_attention: published systems that need no module of their own, each against the arithmetic of its code or paper."""

import pytest
import torch
from agreement import agree
from linear_cases import heads, mixed, weights

import vitkern
from vitkern import decay, testing
from vitkern import feature_map as maps

F = torch.nn.functional
ON = pytest.mark.parametrize("backend", ["reference", *testing.backends()])


def draw(*shape):
    return torch.randn(*shape, dtype=torch.float64)


def far(n):
    """|i - j|."""
    return (torch.arange(n)[:, None] - torch.arange(n)).abs().double()


def divided(scores, v, eps):
    return mixed(scores, v) / (scores.sum(-1).mT[..., None] + eps)


@ON
def test_efficientvit_of_mit(backend):
    q, k, v = heads()
    got = vitkern.linear_attention(q, k, v, preset="efficientvit", backend=backend)
    agree(got, divided(weights(q.relu(), k.relu()), v, 1e-15), (q, k, v))


@ON
def test_sana_turns_numerators_alone(backend):
    q, k, v = heads()
    angles = draw(1, 35, 1, 4)
    cos, sin = (t.repeat_interleave(2, -1) for t in (angles.cos(), angles.sin()))

    def turned(x):
        return x * cos + torch.stack((-x[..., 1::2], x[..., ::2]), -1).flatten(-2) * sin

    a, b = q.relu(), k.relu()
    want = mixed(weights(turned(a), turned(b)), v) / (weights(a, b).sum(-1).mT[..., None] + 1e-15)
    rope = vitkern.Rope(angles.cos(), angles.sin(), "interleaved")
    agree(vitkern.linear_attention(q, k, v, preset="sana_rope", rope=rope, backend=backend), want, (q, k, v))


def lion_features(x):
    y = F.silu(x) + 0.5
    return y / y.norm(dim=-1, keepdim=True)


@ON
def test_lion_d_decays_by_distance(backend):
    q, k, v = heads()
    a = draw(3).requires_grad_()
    mask = torch.sigmoid(a)[:, None, None] ** far(35)
    want = divided(weights(lion_features(q) * 8**-0.5, lion_features(k)) * mask, v, 1e-6)
    rate = decay.Retention(F.logsigmoid(a))
    agree(vitkern.linear_attention(q, k, v, preset="lion_d", decay=rate, backend=backend), want, (q, k, v, a))


@ON
def test_lion_s_decays_by_the_rate_of_the_source(backend):
    """Key j weighs exp(sum of the rates j ... i - 1) for a later query i, exp(sum of the rates i + 1 ... j) for an earlier one."""
    q, k, v = heads()
    rates = (-draw(2, 35, 3).abs()).requires_grad_()
    shifted = F.pad(rates, (0, 0, 1, -1))  # entry p holds the rate of token p - 1
    ahead, behind = shifted.cumsum(1).transpose(1, 2), rates.cumsum(1).transpose(1, 2)
    logs = [(t[..., :, None] - t[..., None, :]) for t in (ahead, behind)]
    mask = torch.where(far(35).new_ones(35, 35).tril().bool(), logs[0], -logs[1]).exp()
    want = divided(weights(lion_features(q) * 8**-0.5, lion_features(k)) * mask, v, 1e-6)
    gates = decay.Gated(shifted, rates)
    agree(vitkern.linear_attention(q, k, v, preset="lion_s", decay=gates, backend=backend), want, (q, k, v, rates))


@ON
def test_causal_layers_of_flash_linear_attention(backend):
    """S_t = S_(t-1) + k_t v_t^T; the sum of the keys so far divides, plus 1e-10; scale D^-1/2."""
    q, k, v = heads()
    a, b = F.elu(q) + 1, F.elu(k) + 1
    sums = torch.einsum("bnhf,bnhe->bnhfe", b, v).cumsum(1)
    want = torch.einsum("bnhf,bnhfe->bnhe", a * 8**-0.5, sums)
    want = want / ((a * 8**-0.5 * b.cumsum(1)).sum(-1, keepdim=True) + 1e-10)
    got = vitkern.linear_attention(q, k, v, preset="fla", feature_map="elu1", causal=True, backend=backend)
    agree(got, want, (q, k, v))


@ON
def test_spikes_are_counted(backend):
    """Spike-driven attention: q, k, v in {0, 1}, Q (K^T V) s without a normalizer, exactly."""
    q, k, v = (draw(2, 20, 3, 8).gt(0).float() for _ in "qkv")
    got = vitkern.linear_attention(q, k, v, feature_map="identity", normalizer="none", scale=0.125, backend=backend)
    assert torch.equal(got, mixed(weights(q, k), v) * 0.125)


@ON
def test_performer_of_t2t(backend):
    """One head, exp(w x - |x|^2 / 2) / sqrt(m), 1e-8 on the sum. Favor divides both by a common factor, and scales x by D^-1/4."""
    x, y, v = (draw(2, 49, 1, 16).mul(0.3).requires_grad_() for _ in "xyv")
    omega = draw(8, 16)

    def features(t):
        return (t @ omega.T - t.square().sum(-1, keepdim=True) / 2).exp() / 8**0.5

    want = divided(weights(features(x), features(y)), v, 1e-8)
    got = vitkern.linear_attention(
        2 * x, 2 * y, v, feature_map=maps.Favor(omega, eps=0.0), normalizer="sum", eps=0.0, backend=backend
    )
    agree(got, want, (x, y, v))


@ON
def test_supra_maps_turns_and_decays(backend):
    """phi(x) = ReLU(W x + b), rotated, decayed by head, causal, without a denominator."""
    q, k, v = heads()
    w, bias = draw(3, 8, 8), draw(3, 8)
    angles = draw(1, 35, 1, 4)
    a, b = ((torch.einsum("bnhd,hfd->bnhf", t, w) + bias).relu() for t in (q, k))
    c, s = angles.cos(), angles.sin()
    turned = [torch.cat((t[..., :4] * c - t[..., 4:] * s, t[..., 4:] * c + t[..., :4] * s), -1) for t in (a, b)]
    rate = -draw(3).abs()
    mask = (rate[:, None, None] * far(35)).exp().tril()
    want = mixed(weights(*turned) * mask, v)
    projected = [torch.einsum("bnhd,hfd->bnhf", t, w) + bias for t in (q, k)]
    rope = vitkern.Rope(c, s, "half")
    got = vitkern.linear_attention(
        *projected, v, feature_map="relu", normalizer="none", rope=rope, decay=decay.Retention(rate), causal=True,
        backend=backend,
    )  # fmt: skip
    agree(got, want, (q, k, v))
