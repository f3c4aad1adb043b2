"""Published systems on attention: their calls against their formulas, and against the code of libraries."""

import math

import libraries  # noqa: F401
import masked_systems
import patch_cases
import pytest
import torch
import torch.nn.functional as F
from agreement import agree
from composed_systems import SYSTEMS
from masked_systems import System, normal, qkv, scores, weigh
from module_cases import Applied

import vitkern
from vitkern import bias, mask


@pytest.mark.parametrize("name", SYSTEMS)
def test_the_definition_is_the_formula(name):
    found = SYSTEMS[name]()
    leaves = {n: t.requires_grad_() for n, t in found.drawn.items()}
    got, want = (f if isinstance(f, tuple) else (f,) for f in (found.ours(leaves, "reference"), found.formula(leaves)))
    for a, b in zip(got, want, strict=True):
        used = [
            t
            for t in leaves.values()
            if torch.autograd.grad(b.sum(), t, retain_graph=True, allow_unused=True)[0] is not None
        ]
        agree(a, b, used)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("name", SYSTEMS)
def test_kernels_compute_the_formula(name, dtype):
    masked_systems.holds(masked_systems.of(name), dtype, "cpu")


def test_the_weights_of_every_head_are_an_output():
    """INTR: class queries on an image; the weights learn too."""
    leaves = {n: t.requires_grad_() for n, t in qkv(20, 49, heads=4).items()}
    out, stats = vitkern.attention(*leaves.values(), return_stats=("probs",))
    p = scores(leaves["q"], leaves["k"]).softmax(-1)
    agree(out, weigh(p, leaves["v"]), [*leaves.values()])
    agree(stats.probs, p, [leaves["q"], leaves["k"]])
    agree(out.mean() + stats.probs.square().sum(), weigh(p, leaves["v"]).mean() + p.square().sum(), [*leaves.values()])


# the code of libraries -----------------------------------------------------------------------------------------------------


def holds(module, x, theirs, ours):
    """theirs(module, x) and ours(module, x, backend) on the same weights: outputs and gradients, of the weights too."""
    weights = {n: t.detach().double() for n, t in patch_cases.randomize(module).named_parameters()}

    def on(t, run):
        return torch.func.functional_call(Applied(module, run), {f"attn.{n}": t[n] for n in weights}, (t["x"],))

    found = System(
        weights | {"x": x},
        lambda t, backend: on(t, lambda m, y: ours(m, y, backend)),
        lambda t: on(t, theirs),
    )
    for dtype in (torch.float32, torch.float64):
        masked_systems.holds(masked_systems.call(type(module).__name__, found), dtype, "cpu")


def test_pvt_pools_keys_by_a_strided_convolution():
    pvt = pytest.importorskip("timm.models.pvt_v2")
    module = pvt.Attention(16, 2, sr_ratio=2)
    size = (4, 6)

    def ours(m, x, backend):
        pooled = m.norm(m.sr(x.mT.unflatten(2, size)).flatten(2).mT)
        k, v = m.kv(pooled).unflatten(-1, (2, 2, 8)).unbind(2)
        return m.proj(vitkern.attention(m.q(x).unflatten(-1, (2, 8)), k, v, backend=backend).flatten(2))

    holds(module, normal(2, 24, 16), lambda m, x: m(x, size), ours)


def test_crossvit_has_one_query():
    crossvit = pytest.importorskip("timm.models.crossvit")

    def ours(m, x, backend):
        q, k, v = (w(t).unflatten(-1, (2, 8)) for w, t in ((m.wq, x[:, :1]), (m.wk, x), (m.wv, x)))
        return m.proj(vitkern.attention(q, k, v, backend=backend).flatten(2))

    holds(crossvit.CrossAttention(16, 2), normal(2, 38, 16), lambda m, x: m(x), ours)


def test_convit_mixes_attention_of_content_and_of_place():
    """w . (dx, dy, d^2) is, but for what a row shares, -2 w_2 p_i . p_j + w . (x_j, y_j, |p_j|^2): two channels and KeyBias."""
    convit = pytest.importorskip("timm.models.convit")
    module, side = convit.GPSA(18, num_heads=3), 5
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

    holds(module, normal(2, side**2, 18), theirs, ours)


@pytest.mark.parametrize("strides", [(1, 2), (2, 1), (2, 4)], ids=str)
def test_mvit_exempts_the_class_token_from_its_positions(strides):
    """The class key stands behind the pooled ones, where no bias is; the class query has rows of zeros."""
    mvit = pytest.importorskip("timm.models.mvitv2")
    of_q, of_k = strides
    options = {"kernel_q": (3, 3), "kernel_kv": (3, 3), "stride_q": (of_q,) * 2, "stride_kv": (of_k,) * 2}
    module = mvit.MultiScaleAttention(16, 16, (8, 8), num_heads=2, **options)
    size = (8, 8)

    def pooled(t, pool, norm):
        t, first = mvit.reshape_pre_pool(t, size, True)
        t, grid = mvit.reshape_post_pool(pool(t), 2, first)
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

    holds(module, normal(2, 65, 16), lambda m, x: m(x, size)[0], ours)


def test_conditional_detr_has_keys_twice_as_wide_as_values():
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

    holds(module, normal(2, 58, 16), theirs, ours)


def test_the_denoising_mask_of_rt_detr_is_a_table():
    detr = pytest.importorskip("transformers.models.rt_detr.modeling_rt_detr")
    targets = [{"class_labels": torch.arange(n), "boxes": torch.rand(n, 4)} for n in (3, 1)]
    embedding = torch.nn.Embedding(6, 8)
    found = detr.get_contrastive_denoising_training_group(targets, 5, 7, embedding, num_denoising_queries=9)
    groups = found[3]["dn_num_group"]
    ids = torch.cat((torch.arange(1, groups + 1).repeat_interleave(6), torch.zeros(7, dtype=torch.long)))[None]
    allow = torch.eye(groups + 1, dtype=torch.bool)
    allow[:, 0] = True
    q, k, v = qkv(ids.shape[1]).values()
    assert groups == 3 and torch.equal(mask.Segments(ids, ids, allow).dense(q, k)[0, 0], found[2] == 0)
    torch.testing.assert_close(
        vitkern.attention(q, k, v, mask=mask.Segments(ids, ids, allow)), vitkern.attention(q, k, v, bias=found[2])
    )
