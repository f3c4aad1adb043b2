"""VMamba's SS2D against its formula, with the routes as turned copies and the recurrence step by step."""

import copy

import pytest
import torch
from test_selective_scan import recurrence
from torch.nn import functional as F

from vitkern.nn import SS2D
from vitkern.testing import assert_close_to_oracle


def formula(m, x):
    """[B, H, W, C], in the order of routes of the published code: rows, columns, and both turned around."""
    high, wide = x.shape[1:3]
    x, z = m.in_proj(x).chunk(2, -1)
    x = F.silu(m.conv2d(x.permute(0, 3, 1, 2)))  # [B, C, H, W]
    lines = torch.stack((x.flatten(2), x.mT.flatten(2)), 1)
    lines = torch.cat((lines, lines.flip(-1)), 1)  # [B, 4, C, L]
    low = torch.einsum("bkcl,kdc->bkdl", lines, m.x_proj_weight)
    delta, b, c = low.split((m.dt_rank, m.d_state, m.d_state), 2)
    delta = torch.einsum("bkrl,kcr->bkcl", delta, m.dt_projs_weight)
    rates, skips = -m.A_logs.exp().view(4, m.d_inner, m.d_state), m.Ds.view(4, m.d_inner)
    ys = []
    for k in range(4):
        parts = [t[:, k].mT for t in (lines, delta, b, c)]
        ys.append(recurrence(parts[0], parts[1], rates[k], *parts[2:], skips[k], None, m.dt_projs_bias[k], True))
    ys = [*ys[:2], *(y.flip(1) for y in ys[2:])]  # [B, L, C]
    rows, columns = ys[0] + ys[2], ys[1] + ys[3]
    y = rows.unflatten(1, (high, wide)) + columns.unflatten(1, (wide, high)).transpose(1, 2)
    return m.out_proj(m.out_norm(y) * F.silu(z))


@pytest.mark.parametrize("options", [{}, {"d_state": 1, "ssm_ratio": 1.5, "dt_rank": 3, "bias": True, "d_conv": 5}])
@pytest.mark.parametrize("grid", [(3, 5), (1, 4)])
def test_ss2d_is_the_formula(options, grid):
    torch.manual_seed(0)
    module, x = SS2D(10, **{"d_state": 4} | options), torch.randn(2, *grid, 10)
    for p in (module.Ds, module.out_norm.weight, module.out_norm.bias):
        torch.nn.init.normal_(p)

    def results(run, dtype):
        own, given = copy.deepcopy(module).to(dtype), x.to(dtype).requires_grad_()
        out = run(own, given)
        weight = torch.randn(out.shape, generator=torch.Generator().manual_seed(2)).to(dtype)
        return [out.detach(), *torch.autograd.grad((out * weight).sum(), [given, *own.parameters()])]

    exact, eager = results(formula, torch.float64), results(formula, torch.float32)
    for i, got in enumerate(results(lambda m, x: m(x), torch.float32)):
        assert_close_to_oracle(str(i), got, exact[i], eager[i], gradient=i > 0)


def test_its_parameters_are_those_of_the_published_module():
    shapes = {n: tuple(t.shape) for n, t in SS2D(96, 16).state_dict().items()}
    assert shapes == {
        "x_proj_weight": (4, 38, 192), "dt_projs_weight": (4, 192, 6), "dt_projs_bias": (4, 192), "A_logs": (768, 16),
        "Ds": (768,), "in_proj.weight": (384, 96), "conv2d.weight": (192, 1, 3, 3), "conv2d.bias": (192,),
        "out_norm.weight": (192,), "out_norm.bias": (192,), "out_proj.weight": (96, 192),
    }  # fmt: skip
    start = F.softplus(SS2D(96).dt_projs_bias)
    assert start.min() > 0.00099 and start.max() < 0.1001


def test_refusals_are_sentences():
    with pytest.raises(ValueError, match="SS2D: d_conv must be odd, got 4"):
        SS2D(8, d_conv=4)
    with pytest.raises(ValueError, match=r"SS2D: x must have shape \[B, H, W, 8\], got \[2, 8, 3, 3\]"):
        SS2D(8)(torch.zeros(2, 8, 3, 3))
