"""attention where rare options meet: hidden NaN, very many keys, scratch that serves sequence after sequence, rows of a policy."""

import math

import pytest
import torch
import torch.nn.functional as F
from test_attention import qkv
from test_attention_varlen import one_by_one, packed

import vitkern
from vitkern import CosineScore, bias, mask, modulation, testing
from vitkern.mask import FromLogits
from vitkern.ops.mask_from_logits import mask_from_logits

D = torch.float64


def drawn(*shape, seed=0, dtype=D):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=D).to(dtype)


def test_more_keys_than_the_square_root_of_two_to_the_31_times_64():
    q, k, v = (drawn(1, n, 1, 4, seed=n, dtype=torch.float32) for n in (2, 400_000, 400_001))
    v = v[:, :-1]
    want = F.scaled_dot_product_attention(*(t.double().transpose(1, 2) for t in (q, k, v))).transpose(1, 2)
    eager = F.scaled_dot_product_attention(*(t.transpose(1, 2) for t in (q, k, v))).transpose(1, 2)
    vitkern.testing.assert_close_to_oracle("many keys", vitkern.attention(q, k, v), want, eager)


@pytest.mark.parametrize("lengths", [(257, 256, 3, 255), (5, 1, 4, 2)])
def test_a_sequence_never_sees_what_the_one_before_left(lengths):
    """A length that needs wider rows than the longest; padding of each in the arrays of another."""
    arguments = packed([(n, n) for n in lengths], heads=2, kv_heads=2, d=6, grad=True)
    arguments[2].data[7 % lengths[0], 0, 0] = (
        math.inf
    )  # the marks of what is not finite stand at the end of the scratch
    weight = drawn(sum(lengths)).abs().requires_grad_()
    heads = modulation.TalkingHeads(drawn(2, 2).requires_grad_(), None, drawn(2, 2, seed=1).requires_grad_(), None)
    mine = (*arguments[:3], weight, heads.pre_weight, heads.post_weight)
    options = {"modulation": heads, "return_stats": ("key_mean",)}
    out, stats = vitkern.attention_varlen(*arguments, query_weight=weight, **options)
    found = torch.autograd.grad(out.nan_to_num(0.0).sin().sum() + stats.key_mean.sin().sum(), mine, allow_unused=True)
    assert all(g.isfinite().all() for g in found)
    alone = one_by_one(arguments, modulation=heads)
    torch.testing.assert_close(out, alone, equal_nan=True)
    hard = vitkern.attention_varlen(
        *arguments, normalizer="argmax_k", modulation=modulation.ElementwiseMask(drawn(1, max(lengths), 1), "prob")
    )
    assert hard.nan_to_num(0.0).isfinite().all()


@pytest.mark.parametrize(
    "options", [{}, {"cosine": CosineScore(torch.zeros(4, dtype=D))}, {"return_stats": "logits_mean"}]
)
def test_a_hidden_key_that_is_nan_gives_no_gradient_a_nan(options):
    q, k, v = qkv(5, 9, grad=True)
    k.data[:, 4] = torch.nan
    v.data[:, 4] = torch.nan
    seen = torch.arange(9) != 4
    out = vitkern.attention(q, k, v, mask=seen, **options)
    loss = out.sum() if isinstance(out, torch.Tensor) else out[0].sum() + out[1].logits_mean.nan_to_num(0.0).sum()
    assert all(g.isfinite().all() for g in torch.autograd.grad(loss, (q, k, v)))


HEADS = modulation.TalkingHeads(*(drawn(4, 4, seed=i) if i % 2 == 0 else drawn(4, seed=i) for i in range(4)))
GAIN, WEIGHT = (
    modulation.ElementwiseMask(drawn(1, 4, 5, 9, seed=i), place) for i, place in enumerate(("logit", "prob"))
)
TABLES = [drawn(6, h, d, seed=d) for h, d in ((4, 8), (1, 8), (4, 6))]


@pytest.mark.parametrize(
    "options",
    [
        {"bias": bias.RelativePosition(drawn(17, 4), grid=(9,), q_stride=2), "modulation": modulation.SoftCausal(0.3)},
        {"bias": bias.ContextualPosition(*TABLES, torch.arange(45).view(5, 9) % 6)},
        {"modulation": [GAIN, WEIGHT, HEADS, modulation.SoftCausal(0.3)]},
        {"modulation": [HEADS, GAIN, WEIGHT], "topk": 5},
        {"modulation": [GAIN, HEADS], "normalizer": "argmax_k"},
        {"modulation": [HEADS, WEIGHT], "normalizer": "argmax_q", "topk": 3},
    ],
)
def test_what_nobody_sees_changes_nothing(options):
    """A key hidden from all, and the query of an empty row."""
    found = []
    for spoiled in (0.5, torch.nan, torch.inf):
        q, k, v = qkv(5, 9, grad=True)
        k.data[:, 4], v.data[:, 4], q.data[:, 2] = spoiled, spoiled, spoiled
        seen = (torch.arange(9) != 4) & (torch.arange(5) != 2)[:, None]
        out = vitkern.attention(q, k, v, mask=seen, **options)
        grads = torch.autograd.grad(out.sin().sum(), (q, k, v), allow_unused=True)
        found.append((out, *(g for g in grads if g is not None)))
    for other in found[1:]:
        for a, b in zip(found[0], other, strict=True):
            torch.testing.assert_close(a, b)


@pytest.mark.parametrize("normalizer", ["argmax_k", "argmax_q"])
def test_a_value_that_is_seen_but_not_chosen_may_be_nan_where_heads_mix(normalizer):
    q, k, v = qkv(5, 9, heads=4, kv_heads=4)
    heads, found = modulation.TalkingHeads(drawn(4, 4)), []
    chosen = vitkern.attention(q, k, v, modulation=heads, normalizer=normalizer, return_stats="key_mean")[1].key_mean
    v[:, :, :, 0] = torch.where(chosen[:, :, :] == 0, torch.nan, v[:, :, :, 0])
    for backend in (None, "reference"):
        found.append(vitkern.attention(q, k, v, modulation=heads, normalizer=normalizer, backend=backend))
    assert normalizer == "argmax_q" or found[0].isfinite().all()
    torch.testing.assert_close(*found, equal_nan=True)


def test_heads_that_mix_keep_a_hidden_nan_to_themselves():
    """Masks that differ by head: the clean pairs that one head hides still enter the others."""
    q, k, v = qkv(4, 6, heads=2, kv_heads=2)
    k[:, 5] = torch.nan
    seen = torch.ones(1, 2, 1, 6, dtype=torch.bool)
    seen[..., 5], seen[:, 0, :, 1] = False, False
    heads = modulation.TalkingHeads(drawn(2, 2))
    clean = torch.where(k.isnan(), 0.0, k)
    got, want = (vitkern.attention(q, x, v, mask=seen, modulation=heads) for x in (k, clean))
    torch.testing.assert_close(got, want)
    q[:, :, 0] = torch.nan
    alone = vitkern.attention(q, clean, v, modulation=modulation.TalkingHeads(pre_bias=drawn(2)))
    assert alone[:, :, 0].isnan().all() and alone[:, :, 1].isfinite().all()


@pytest.mark.parametrize("channel", [0, 1, 47])
@pytest.mark.parametrize("poison", [torch.nan, torch.inf])
def test_one_number_that_is_not_finite_stays_where_it_is_in_bfloat16(channel, poison):
    """A hidden one shows nowhere; in a query it spoils its row, in a value that is seen its channel."""
    q, k, v = qkv(40, 70, heads=2, kv_heads=2, d=48, dv=48, dtype=torch.bfloat16)
    seen = torch.arange(70) < 69
    for i in (1, 2):
        leaves = [t.clone().requires_grad_() for t in (q, k, v)]
        leaves[i].data[:, 69, :, channel] = poison
        out = vitkern.attention(*leaves, mask=seen)
        assert out.isfinite().all()
        assert all(g.isfinite().all() for g in torch.autograd.grad(out.sum(), leaves))
    query, value = q.clone(), v.clone()
    query[:, 3, 1, channel] = value[:, 5, 1, channel] = poison
    got = vitkern.attention(query, k, v, mask=seen)
    assert got[:, 3, 1].isnan().all() and got.isnan().sum() == got[:, 3, 1].numel()
    got = vitkern.attention(q, k, value, mask=seen)
    assert got[:, :, 1, channel].isnan().all() and got.isnan().sum() == got[:, :, 1, channel].numel()


@pytest.mark.parametrize("odd", ["q", "k", "v", "gradient", "expanded", "none"])
def test_rows_at_odd_places_in_bfloat16(odd):
    """Weights that are whole numbers: every product is exact, however it is made."""
    shapes = {"q": (2, 16, 3, 16), "k": (2, 37, 1, 16), "v": (2, 37, 1, 16), "gradient": (2, 16, 3, 16)}
    g = torch.Generator().manual_seed(0)
    given = {name: torch.randint(-1, 2, shape, generator=g).bfloat16() for name, shape in shapes.items()}
    if odd in ("expanded", "none"):
        given["gradient"].fill_(odd == "expanded")
    found = []
    for moved in ("", odd):
        t = {name: torch.cat((x, x[..., :1]), -1)[..., :-1] if name == moved else x for name, x in given.items()}
        leaves = [t[name].detach().requires_grad_() for name in "qkv"]
        out, stats = vitkern.attention(*leaves, normalizer="relu", scale=1.0, return_stats=("key_mean",))
        if moved == "expanded":
            t["gradient"] = torch.ones((), dtype=torch.bfloat16).expand(out.shape)
        loss = 0.0 if moved == "none" else (out * t["gradient"]).sum()
        if odd == "none":
            loss = loss + stats.key_mean.sum()
        found.append((out, *torch.autograd.grad(loss, leaves, allow_unused=True)))
    assert all(torch.equal(a, torch.zeros_like(a) if b is None else b) for a, b in zip(*found, strict=True))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_a_bias_that_is_hidden_has_no_gradient(dtype):
    """Tiles of keys that are passed over, in the middle and at the end, of a bias of which every entry comes once."""
    leaves = [t.requires_grad_() for t in qkv(20, 80, heads=2, kv_heads=2, d=16, dv=16, dtype=dtype)]
    table = drawn(2, 2, 20, 80, dtype=dtype).requires_grad_()
    seen = (torch.arange(80) // 16 % 2 == 0) & (torch.arange(80) < 40)
    out = vitkern.attention(*leaves, bias=table, mask=seen, backend="cpu").square().sum()
    left = [torch.full_like(table, torch.nan) for _ in range(8)]
    del left  # where the gradient will lie
    found = torch.autograd.grad(out, table)[0]
    assert (found[..., ~seen] == 0).all() and (found[..., seen] != 0).all()


@pytest.mark.parametrize("eps", [0.0, 1e-6])
def test_a_key_that_a_policy_drops_still_learns(eps):
    q, k, v = qkv(6, 6, heads=2, kv_heads=2)
    keep = torch.tensor([[1.0, 0, 1, 0, 0, 1]], dtype=D).requires_grad_()
    policy = modulation.Policy(keep, eps)
    found = [
        torch.autograd.grad(vitkern.attention(q, k, v, modulation=policy, backend=name).sin().sum(), keep)[0]
        for name in ("cpu", "reference")
    ]
    torch.testing.assert_close(*found)
    assert found[0][0, 1] != 0


def test_rows_of_what_depends_on_all_queries():
    q, k, v = qkv(7, 7, heads=2, kv_heads=2)
    for options in ({"normalizer": "argmax_q"}, {"modulation": modulation.Policy(drawn(1, 7).abs())}):
        _, stats = vitkern.attention(q, k, v, return_stats=("row", "probs"), stat_rows=(5, 1), **options)
        assert torch.equal(stats.row, stats.probs[:, :, [5, 1]])
        row = vitkern.attention(q, k, v, return_stats="row", stat_rows=(5, 1), **options)[1].row
        torch.testing.assert_close(row, stats.row)


ROWS = {
    "policy": lambda: {"modulation": modulation.Policy(drawn(2, 33).abs().requires_grad_(), 1e-2), "mask": drawn(20, 33) < 1},
    "policy without its diagonal": lambda: {"modulation": modulation.Policy(drawn(1, 33).abs(), 1e-3, False), "topk": 9},
    "argmax_q": lambda: {"normalizer": "argmax_q", "mask": [drawn(2, 4, 20, 33) < 1, mask.Causal(13)]},
    "argmax_q of a NaN": lambda: {"normalizer": "argmax_q", "mask": mask.Segments(*(torch.arange(n)[None] // 9 for n in (20, 33)))},
    "argmax_q of heads that mix": lambda: {"normalizer": "argmax_q", "modulation": talking(4), "bias": drawn(1, 4, 20, 33)},
    "argmax_q of further keys": lambda: {"normalizer": "argmax_q", "extra_kv": (drawn(1, 3, 2, 8), drawn(1, 3, 2, 8))},
}  # fmt: skip


def talking(heads):
    shapes = ((heads, heads), (heads,)) * 2
    return modulation.TalkingHeads(*(drawn(*shape, seed=n) for n, shape in enumerate(shapes)))


@pytest.mark.parametrize("case", ROWS)
def test_rows_of_what_depends_on_all_queries_take_no_definition(case):
    """Alone, without values, and beside what else the op returns; the last row by its number from behind."""
    q, k, v = (drawn(2, n, h, 8, seed=s).requires_grad_() for s, (n, h) in enumerate(((20, 4), (33, 2), (33, 2))))
    if case.endswith("NaN"):
        with torch.no_grad():
            k[0, 4], q[1, 5] = math.nan, math.inf
    options, rows = ROWS[case](), (5, 0, -1)
    keep = getattr(options.get("modulation"), "keep", None)
    learned = [q, k] + [t for t in (keep,) if t is not None and t.requires_grad]
    others = ("key_mean",)
    assert "takes" not in vitkern.explain(vitkern.attention, q, k, v, return_stats="row", stat_rows=rows, **options)
    want = vitkern.attention(q, k, v, return_stats=("row", *others), stat_rows=rows, backend="reference", **options)
    for values, stats in ((v, ("row",)), (None, ("row",)), (v, ("row", *others))):
        if values is None and "extra_kv" in options:
            continue
        got = vitkern.attention(q, k, values, return_stats=stats, stat_rows=rows, backend="cpu", **options)
        if values is not None:
            torch.testing.assert_close(got[0], want[0], equal_nan=True)
        if "key_mean" in stats:
            torch.testing.assert_close(got[1].key_mean, want[1].key_mean, equal_nan=True)
        if case.startswith("argmax"):
            assert torch.equal(got[1].row, want[1].row) and got[1].row.any() and not got[1].row.requires_grad
            continue
        torch.testing.assert_close(got[1].row, want[1].row)
        grads = [torch.autograd.grad(s.row.sin().sum(), learned, retain_graph=True) for s in (got[1], want[1])]
        for a, b in zip(*grads, strict=True):
            assert b.any()
            torch.testing.assert_close(a, b)


def test_a_hard_choice_has_no_gradient_however_large_the_scale():
    q, k, v = (
        t.detach().requires_grad_() for t in (drawn(1, 2048, 1, 8), drawn(1, 16, 1, 8), drawn(1, 16, 1, 8, seed=1))
    )
    dq, dk, dv = torch.autograd.grad(vitkern.attention(q, k, v, normalizer="argmax_q", scale=100.0).sum(), (q, k, v))
    assert not dq.any() and not dk.any() and dv.eq(1).all()


@pytest.mark.parametrize("backend", ["reference", *testing.backends()])
@pytest.mark.parametrize("form", ["map", "keys"])
def test_additive_masks_of_the_least_finite_number_hide_what_they_do_not_cover_whole(form, backend):
    """Where a whole row has it, the row is the mean of all; what it covers of another row has no weight."""
    q, k, v = (drawn(2, 40, 2, 8, seed=n, dtype=torch.float32).requires_grad_() for n in range(3))
    least = torch.finfo(torch.float32).min
    added = torch.zeros(2, 1, 40 if form == "map" else 1, 40)
    added[..., :33] = least
    added[0, :, -1] = least
    added[1, :, 0] = least
    got, stats = vitkern.attention(q, k, v, bias=added, return_stats=("lse",), backend=backend)
    a, b, c = (t.transpose(1, 2) for t in (q, k, v))
    s = a @ b.mT * 8**-0.5 + added
    want = (s.softmax(-1) @ c).transpose(1, 2)
    torch.testing.assert_close(got, want)
    torch.testing.assert_close(stats.lse, s.logsumexp(-1).transpose(1, 2))
    grads = [torch.autograd.grad(t.sin().sum(), (q, k, v)) for t in (got, want)]
    for x, y in zip(*grads, strict=True):
        torch.testing.assert_close(x, y)


def test_biases_of_few_bits_are_added_in_float32():
    q, k, v = (t.half() for t in qkv(4, 5))
    low = torch.full((5,), torch.finfo(torch.float16).min, dtype=torch.float16)
    assert vitkern.attention(q, k, v, bias=[low, low]).abs().sum() > 0


def test_logits_of_minus_infinity_are_off():
    logits = torch.ones(1, 1, 4, 4)
    logits[..., 1:3] = -math.inf
    m = FromLogits(logits, (8, 8))
    with vitkern.use_backend("reference"):
        want = mask_from_logits(m, 1, 64)
    assert torch.equal(mask_from_logits(m, 1, 64), want)


def test_further_keys_are_cast_by_autocast():
    q, k, v = (t.float() for t in qkv())
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert vitkern.attention(q, k, v, extra_kv=(k[:1, :2], v[:1, :2])).dtype == torch.bfloat16


def test_decomposed_positions_of_packed_maps():
    arguments = packed(((6, 6), (6, 6)), heads=2, kv_heads=2)
    rel_h, rel_w = drawn(1, 12, 2, 2), drawn(1, 12, 1, 3)
    got = vitkern.attention_varlen(*arguments, bias=bias.DecomposedRelativePosition(rel_h, rel_w, None, (2, 3)))
    each = lambda s, rows, columns: {  # noqa: E731
        "bias": bias.DecomposedRelativePosition(rel_h[:, rows], rel_w[:, rows], None, (2, 3))
    }
    torch.testing.assert_close(got, one_by_one(arguments, each))


def test_explain_names_what_becomes_a_map_of_scores():
    q, k, v = qkv(16, 16)
    on_grid = bias.RelativePosition(drawn(49, 4), grid=(4, 4))
    listed = bias.RelativePosition(drawn(49, 4), torch.arange(256).view(16, 16) % 49)
    assert "map of scores" not in vitkern.explain(vitkern.attention, q, k, v, bias=on_grid)
    assert "RelativePosition takes its dense form" in vitkern.explain(
        vitkern.attention, q, k, v, bias=[on_grid, listed]
    )
    wide, cu, n = (t.flatten(0, 1) for t in (q, k, v)), torch.tensor([0, 16, 32], dtype=torch.int32), 16
    assert "takes its dense form" in vitkern.explain(vitkern.attention_varlen, *wide, cu, cu, n, n, bias=listed)


def test_modifiers_of_one_kind_are_joined_and_make_no_map():
    q, k, v = qkv(16, 16)
    rel_h, rel_w, rate, slope = drawn(7, 8), drawn(7, 8), drawn(4), drawn(4)
    rows, xy = bias.RowBias(drawn(1, 4, 16)), (drawn(1, 16, 2), drawn(1, 16, 2))
    axes, decay = bias.DecomposedRelativePosition(rel_h, rel_w, (4, 4), (4, 4)), bias.ManhattanDecay(rate, (4, 4))
    near = bias.EuclideanDistance(slope, *xy)
    given, other = drawn(1, 4, 16, 16), bias.ManhattanDecay(rate, (2, 8))
    lists = [rows], [rows, rows], [axes, rows], [rows, given, decay], [axes, axes, decay], [near, near, axes]
    for joined in (*lists, [axes, rows, given], [decay, other]):
        assert "map of scores" not in vitkern.explain(vitkern.attention, q, k, v, bias=joined)
        each = [b if isinstance(b, torch.Tensor) else b.dense(q, k).expand(2, 4, 16, 16) for b in joined]
        got, want = (vitkern.attention(q, k, v, bias=b, normalizer="sigmoid") for b in (joined, each))
        torch.testing.assert_close(got, want)
    other = bias.EuclideanDistance(slope, xy[0], xy[0].clone())
    for mapped in ([near, other], [rows, given]):
        kind = type(mapped[0]).__name__
        assert f"{kind} takes its dense form" in vitkern.explain(vitkern.attention, q, k, v, bias=mapped)


def test_one_number_is_a_bias_a_mask_or_a_factor_also_beside_further_keys():
    q, k, v = qkv()
    more = (k[:1, :2], v[:1, :2])
    one = torch.tensor(0.5, dtype=D)
    factor = modulation.ElementwiseMask(one)
    got = vitkern.attention(q, k, v, bias=one, mask=one > 0, modulation=factor, extra_kv=more)
    shape = (1, 1, q.shape[1], k.shape[1])
    factor = modulation.ElementwiseMask(one.expand(shape))
    want = vitkern.attention(q, k, v, bias=one.expand(shape), modulation=factor, extra_kv=more)
    torch.testing.assert_close(got, want)


def test_the_value_table_has_nothing_for_further_keys():
    q, k, v = qkv(heads=2, kv_heads=2)
    index = torch.zeros(q.shape[1], k.shape[1], dtype=torch.int64)
    more = (k[:1, :2], v[:1, :2])
    table = drawn(1, 2, v.shape[3])
    got = vitkern.attention(q, k, v, bias=bias.ContextualPosition(None, None, table, index), extra_kv=more)
    out, stats = vitkern.attention(q, k, v, extra_kv=more, return_stats="probs")
    torch.testing.assert_close(got, out + stats.probs[..., : k.shape[1]].sum(-1).mT[..., None] * table[0])


KEEP, ONES = torch.ones(1, 9), torch.ones(1, 9, dtype=torch.int64)
PAIRS = torch.zeros(7, 9, dtype=torch.int64)


def contextual(q_table=None, k_table=None, v_table=None, index=PAIRS):
    table = torch.ones(5, 1, 8) if q_table is k_table is v_table is None else q_table
    return bias.ContextualPosition(table, k_table, v_table, index)


@pytest.mark.parametrize(
    "options, message",
    [
        ({"modulation": [modulation.Policy(KEEP)] * 2}, "modulation must hold at most one Policy, got 2"),
        ({"modulation": modulation.Policy(KEEP), "sink": torch.zeros(4)}, "Policy goes neither with sink"),
        (
            {"modulation": modulation.Policy(KEEP.expand(3, 9))},
            r"Policy.keep must have shape \[B or 1, Nk = 9\], got \[3, 9\]",
        ),
        ({"modulation": modulation.Policy(KEEP.bool())}, "Policy.keep must be float32"),
        (
            {"bias": bias.DecomposedRelativePosition(torch.zeros(2, 7, 4, 3), torch.zeros(2, 7, 4, 5), None, (3, 3))},
            r"rel_w must have shape \['B or 1', 7, 'H or 1', 3\], got \[2, 7, 4, 5\]",
        ),
        ({"bias": bias.RowBias(torch.zeros(3, 1, 7))}, r"RowBias.vector must have shape .* got \[3, 1, 7\]"),
        (
            {"bias": bias.EuclideanDistance(torch.ones(1), KEEP, KEEP)},
            r"slope must have shape \[H\] = \[4\], got \[1\]",
        ),
        ({"mask": mask.Causal(0.5)}, "Causal.offset must be an int, got 0.5"),
        ({"mask": mask.Causal(2**40)}, r"Causal.offset must lie in \[-2\^31, 2\^31\), got 1099511627776"),
        ({"mask": mask.BlockCausal(ONES[:, :7] << 33, ONES)}, "q_levels must be numbers of 32 bits"),
        (
            {"modulation": modulation.SoftCausal(KEEP)},
            r"SoftCausal.ratio must be a float or one element, got shape \[1, 9\]",
        ),
        ({"modulation": modulation.SoftCausal("x")}, "SoftCausal.ratio must be a float or a tensor, got 'x'"),
        ({"modulation": modulation.ElementwiseMask(ONES)}, "ElementwiseMask.weight must be float32"),
        ({"modulation": modulation.ElementwiseMask(None)}, "ElementwiseMask.weight must be a tensor, got NoneType"),
        ({"mask": mask.FromLogits(torch.ones(2, 7, 2, 2), 9)}, "FromLogits.size must be two ints, got 9"),
        (
            {"mask": mask.FromLogits(torch.ones(2, 7, 2, 2), (3, 3), "x")},
            "FromLogits.threshold must be a float, got 'x'",
        ),
        ({"bias": bias.PolylinePath(KEEP, KEEP)}, r"row must have shape \[B or 1, Hs, Ws, H or 1\], got \[1, 9\]"),
        ({"return_stats": 3}, "return_stats must be names of lse, key_mean"),
        ({"bias": contextual(index=PAIRS[:5])}, r"index must have shape \[7, 9\] or \['B or 1', 7, 9\], got \[5, 9\]"),
        ({"bias": contextual(index=PAIRS.float())}, "ContextualPosition.index must hold integers"),
        ({"bias": contextual(index=PAIRS + 5)}, r"index must lie in \[0, 5\), the rows of the tables, got 5 to 5"),
        ({"bias": contextual(index=PAIRS - 1)}, r"index must lie in \[0, 5\), the rows of the tables, got -1 to -1"),
        (
            {"bias": contextual(k_table=torch.ones(5, 3, 8))},
            r"k_table must have shape \['n', 'H or 1', 8\], got \[5, 3, 8\]",
        ),
        (
            {"bias": contextual(v_table=torch.ones(5, 1, 7))},
            r"v_table must have shape \['n', 'H or 1', 6\], got \[5, 1, 7\]",
        ),
        ({"dropout_p": "x"}, "dropout_p must be a float, got 'x'"),
        ({"extra_kv": (torch.zeros(1, 1, 2, 8), None)}, "extra_kv must have values exactly where v is given"),
    ],
)
def test_bad_input_gets_a_sentence(options, message):
    with pytest.raises((ValueError, TypeError), match=message):
        vitkern.attention(*qkv(7, 9), **options)
