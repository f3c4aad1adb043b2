"""Modules of RMT, PPMA and Agent attention against their formulas, written out here."""

from collections.abc import Callable
from functools import partial

import patch_cases
import torch
from module_cases import by_formula
from torch.nn import functional as F

from vitkern.nn import AgentAttention, PolylinePathAttention, RetentionAttention2d

GRID, HEADS, WIDTH = (3, 5), 3, 12


def turned(x, angle):
    """Channels 2i and 2i + 1 as a complex number, turned by index * angle_i."""
    index = torch.arange(x.shape[1], dtype=x.dtype)[:, None, None]
    pairs = torch.view_as_complex(x.unflatten(-1, (-1, 2)).contiguous())
    return torch.view_as_real(pairs * torch.polar(torch.ones_like(angle), angle * index)).flatten(-2)


def projected(m, x):
    tokens = x.flatten(1, 2)
    q, k, v = (p(tokens).unflatten(-1, (HEADS, -1)) for p in (m.q_proj, m.k_proj, m.v_proj))
    angle = 1 / 10000 ** torch.linspace(0, 1, q.shape[-1] // 2, dtype=x.dtype)
    q, k = turned(q, angle), turned(k * q.shape[-1] ** -0.5, angle)
    conv = m.lepe["conv"](v.flatten(2).mT.unflatten(2, GRID)).flatten(2).mT
    return q, k, v, conv


def scores(q, k):
    return torch.einsum("bihd,bjhd->bhij", q, k)


def rows_and_columns():
    at = torch.arange(GRID[0] * GRID[1])
    return at // GRID[1], at % GRID[1]


def along(p, v):
    return torch.einsum("bhij,bjhe->bihe", p, v)


def retention_is_that_of_rmt(compat, decomposed, factor):
    module = patch_cases.randomize(RetentionAttention2d(WIDTH, HEADS, factor, 2, 6, decomposed, compat))
    y, x = rows_and_columns()

    def formula(m, maps):
        q, k, v, conv = projected(m, maps)
        exponent = 2 + 6 * torch.arange(HEADS, dtype=torch.float64) / HEADS
        rate = torch.log(1 - 2.0**-exponent).float().to(maps.dtype)[:, None, None]
        s = scores(q, k)

        def weights(distance, seen):
            decay = rate * distance
            if compat == "code":
                return (s + decay).masked_fill(~seen, -torch.inf).softmax(-1)
            return s.masked_fill(~seen, -torch.inf).softmax(-1) * decay.exp()

        dy, dx = (y[:, None] - y).abs(), (x[:, None] - x).abs()
        out = v
        for distance, seen in ((dx, dy == 0), (dy, dx == 0)) if decomposed else ((dy + dx, dy >= 0),):
            out = along(weights(distance, seen), out)
        return m.out_proj(out.flatten(2) + conv).unflatten(1, GRID)

    by_formula(module, formula, torch.randn(2, *GRID, WIDTH))


def polyline_is_that_of_ppma(decomposed):
    module = patch_cases.randomize(PolylinePathAttention(WIDTH, HEADS, 1, decomposed))
    assert {n for n in module.state_dict() if "path" in n} == {
        "path_embed.dt_linear.weight",
        "path_embed.dt_bias",
        "path_embed.A_log",
    }
    y, x = rows_and_columns()

    def formula(m, maps):
        q, k, v, conv = projected(m, maps)
        path = dict(m.path_embed.named_modules())["dt_linear"](maps.unflatten(-1, (HEADS, -1)))
        rates = -F.softplus(path + m.path_embed["dt_bias"][:, None]) * m.path_embed["A_log"].exp()[:, None]
        cw, ch = rates[..., 0].cumsum(2), rates[..., 1].cumsum(1)  # [B, H, W, heads]
        of_row = -(cw[:, y[:, None], x[:, None]] - cw[:, y[:, None], x]).abs()  # along the query's row
        of_column = -(ch[:, y[:, None], x] - ch[:, y, x][:, None]).abs()  # down the key's column
        s = scores(q, k)
        if not decomposed:
            paths = (of_row + of_column).permute(0, 3, 1, 2)
            out = along(((s + paths).softmax(-1) + (s + paths.mT).softmax(-1)) / 2, v)
        else:
            w, h = (
                (s + t.permute(0, 3, 1, 2)).masked_fill(~same, -torch.inf).softmax(-1)
                for t, same in ((of_row, y[:, None] == y), (of_column, x[:, None] == x))
            )
            out = (along(h, along(w, v)) + along(w, along(h, v))) / 2
        return m.out_proj(out.flatten(2) + conv).unflatten(1, GRID)

    by_formula(module, formula, torch.randn(2, *GRID, WIDTH))


def agents_are_those_of_the_paper(prefix):
    """softmax(q A^T + b2) (softmax(A k^T + b1) v), the biases element by element."""
    window = (6, 8)
    module = patch_cases.randomize(AgentAttention(WIDTH, HEADS, agent_num=4, window=window, class_token=bool(prefix)))
    assert ("ac_bias" in module.state_dict()) == bool(prefix)

    def formula(m, x):
        q, k, v = m.qkv(x).unflatten(-1, (3, HEADS, -1)).unbind(2)
        maps = q[:, prefix:].unflatten(1, window)  # [B, 6, 8, heads, D]
        agents = torch.stack([maps[:, i : i + 3, j : j + 4].mean((1, 2)) for i in (0, 3) for j in (0, 4)], 1)
        first = F.interpolate(m.an_bias, window, mode="bilinear") + m.ah_bias[0] + m.aw_bias[0]  # [heads, 4, 6, 8]
        second = F.interpolate(m.na_bias, window, mode="bilinear").permute(0, 2, 3, 1) + m.ha_bias[0] + m.wa_bias[0]
        first, second = first.flatten(2), second.flatten(1, 2)
        if prefix:
            first, second = torch.cat((m.ac_bias[0], first), -1), torch.cat((m.ca_bias[0], second), -2)
        scale = q.shape[-1] ** -0.5
        read = along((scores(agents, k) * scale + first).softmax(-1), v)
        out = along((scores(q, agents) * scale + second).softmax(-1), read).flatten(2)
        conv = m.dwc(v[:, prefix:].flatten(2).mT.unflatten(2, window)).flatten(2).mT
        return m.proj(out + F.pad(conv, (0, 0, prefix, 0)))

    by_formula(module, formula, torch.randn(2, prefix + 48, WIDTH))


MODULES: dict[str, Callable[[], None]] = {}
for factor in (1, 2):
    for decomposed in (False, True):
        for compat in ("code", "paper"):
            name = f"rmt of the {compat}, values x{factor}{', axis by axis' if decomposed else ''}"
            MODULES[name] = partial(retention_is_that_of_rmt, compat, decomposed, factor)
for decomposed in (False, True):
    MODULES[f"ppma{', axis by axis' if decomposed else ''}"] = partial(polyline_is_that_of_ppma, decomposed)
for prefix in (0, 1):
    MODULES[f"agents beside {prefix} class tokens"] = partial(agents_are_those_of_the_paper, prefix)
