"""Published systems on attention against the code of libraries, on the same weights. As masked_systems.py."""

import math
from collections.abc import Callable
from functools import partial
from typing import Any

import libraries  # noqa: F401
import patch_cases
import pytest
import torch
import torch.nn.functional as F
from masked_systems import System, normal
from module_cases import Applied
from torch import Tensor, nn

import vitkern
from vitkern import bias


def on_weights(
    module: nn.Module,
    x: Tensor,
    theirs: Callable[[Any, Tensor], Tensor],
    ours: Callable[[Any, Tensor, str | None], Tensor],
) -> System:
    """theirs(module, x) and ours(module, x, backend), which draw the weights of the module too."""
    weights = {n: t.detach().double() for n, t in patch_cases.randomize(module).named_parameters()}

    def on(t, run):
        return torch.func.functional_call(Applied(module, run), {f"attn.{n}": t[n] for n in weights}, (t["x"],))

    return System(
        weights | {"x": x}, lambda t, backend: on(t, lambda m, y: ours(m, y, backend)), lambda t: on(t, theirs)
    )


def pvt() -> System:
    """Keys pooled by a strided convolution."""
    timms = pytest.importorskip("timm.models.pvt_v2")
    module = timms.Attention(16, 2, sr_ratio=2)
    size = (4, 6)

    def ours(m, x, backend):
        pooled = m.norm(m.sr(x.mT.unflatten(2, size)).flatten(2).mT)
        k, v = m.kv(pooled).unflatten(-1, (2, 2, 8)).unbind(2)
        return m.proj(vitkern.attention(m.q(x).unflatten(-1, (2, 8)), k, v, backend=backend).flatten(2))

    return on_weights(module, normal(2, 24, 16), lambda m, x: m(x, size), ours)


def crossvit() -> System:
    """One query."""
    timms = pytest.importorskip("timm.models.crossvit")

    def ours(m, x, backend):
        q, k, v = (w(t).unflatten(-1, (2, 8)) for w, t in ((m.wq, x[:, :1]), (m.wk, x), (m.wv, x)))
        return m.proj(vitkern.attention(q, k, v, backend=backend).flatten(2))

    return on_weights(timms.CrossAttention(16, 2), normal(2, 38, 16), lambda m, x: m(x), ours)


def convit() -> System:
    """w . (dx, dy, d^2) is, but for what a row shares, -2 w_2 p_i . p_j + w . (x_j, y_j, |p_j|^2): two channels and KeyBias."""
    timms = pytest.importorskip("timm.models.convit")
    module, side = timms.GPSA(18, num_heads=3), 5
    steps = module.get_rel_indices(side**2)

    def theirs(m, x):
        m.rel_indices = steps.to(x.dtype)
        return m(x)

    def ours(m, x, backend):
        q, k = m.qk(x).unflatten(-1, (2, 3, 6)).unbind(2)
        v, w = m.v(x).unflatten(-1, (3, 6)), m.pos_proj.weight  # [H, 3]: x, y, square
        p = torch.arange(side**2)
        p = torch.stack((p % side, p // side), -1).to(x.dtype)  # [N, 2]
        far = torch.cat((p, p.square().sum(-1, keepdim=True)), -1) @ w.t()  # [N, H]
        places = p[None, :, None].expand(len(x), -1, 3, -1)
        content = vitkern.attention(q, k, v, backend=backend)
        place = vitkern.attention(
            places * (-2 * w[:, 2:]), places, v, scale=1.0, bias=bias.KeyBias(far.t()[None]), backend=backend
        )
        gate = m.gating_param.sigmoid()[:, None]
        return m.proj(((1 - gate) * content + gate * place).flatten(2))

    return on_weights(module, normal(2, side**2, 18), theirs, ours)


def mvit(of_q: int, of_k: int) -> System:
    """The class key stands behind the pooled ones, where no bias is; the class query has rows of zeros."""
    timms = pytest.importorskip("timm.models.mvitv2")
    options = {"kernel_q": (3, 3), "kernel_kv": (3, 3), "stride_q": (of_q,) * 2, "stride_kv": (of_k,) * 2}
    module = timms.MultiScaleAttention(16, 16, (8, 8), num_heads=2, **options)
    size = (8, 8)

    def pooled(t, pool, norm):
        t, first = timms.reshape_pre_pool(t, size, True)
        t, grid = timms.reshape_post_pool(pool(t), 2, first)
        return norm(t).transpose(1, 2), tuple(grid)

    def ours(m, x, backend):
        q, k, v = m.qkv(x).unflatten(-1, (3, 2, 8)).permute(2, 0, 3, 1, 4)
        (q, q_grid), (k, k_grid), (v, _) = (
            pooled(t, getattr(m, f"pool_{n}"), getattr(m, f"norm_{n}")) for t, n in ((q, "q"), (k, "k"), (v, "v"))
        )
        axes = bias.DecomposedRelativePosition(m.rel_pos_h, m.rel_pos_w, q_grid, k_grid).per_query(q[:, 1:])
        rows, columns = (F.pad(t, (0, 0, 0, 0, 1, 0)) for t in axes)
        out = vitkern.attention(
            q, k[:, 1:], v[:, 1:], bias=bias.DecomposedRelativePosition(rows, columns, None, k_grid),
            extra_kv=(k[:, :1], v[:, :1]), backend=backend,
        )  # fmt: skip
        return m.proj((out + q).flatten(2))

    return on_weights(module, normal(2, 65, 16), lambda m, x: m(x, size)[0], ours)


def conditional_detr() -> System:
    """Keys twice as wide as values."""
    detr = pytest.importorskip("transformers.models.conditional_detr.modeling_conditional_detr")
    config = detr.ConditionalDetrConfig(attn_implementation="eager")
    module = detr.ConditionalDetrDecoderCrossAttention(config, 16, 2)
    hidden = torch.arange(20) >= torch.tensor([[20], [13]])

    def parts(x):
        return x[:, :6], x[:, 6:26], x[:, 26:32], x[:, 32:52], x[:, 52:]

    def theirs(m, x):
        added = torch.zeros(2, 1, 1, 20, dtype=x.dtype).masked_fill(hidden[:, None, None], -math.inf)
        return m(*parts(x), attention_mask=added)[0]

    def ours(m, x, backend):
        queries, cells, sine, places, boxes = parts(x)
        at = m.k_pos_proj(places)
        q, k, v = m.q_content_proj(queries) + m.q_pos_proj(boxes), m.k_content_proj(cells) + at, m.v_proj(cells)
        q, sine, k, at, v = (t.unflatten(-1, (2, 8)) for t in (q, m.q_pos_sine_proj(sine), k, at, v))
        both = torch.cat((q, sine), -1), torch.cat((k, at), -1)
        return m.o_proj(vitkern.attention(*both, v, mask=~hidden[:, None, None], backend=backend).flatten(2))

    return on_weights(module, normal(2, 58, 16), theirs, ours)


LIBRARIES = {f.__name__: f for f in (pvt, crossvit, convit, conditional_detr)}
LIBRARIES |= {f"mvit {s}": partial(mvit, *s) for s in ((1, 2), (2, 1), (2, 4))}  # strides of queries and of keys
