"""linear_attention with decays, causality and states: the forms in linear time against dense masks, recurrences and each other."""

import pytest
import torch
from agreement import agree
from torch.testing import assert_close

import vitkern
from vitkern import decay
from vitkern.ops.chain_sum import chain_sum
from vitkern.ops.feature_rows import feature_rows
from vitkern.ops.grid_sum import LINKS
from vitkern.reference.grid_sum import grid_links
from vitkern.testing.oracle import assert_close_to_oracle

H, GRID = 3, (4, 5)


@pytest.fixture
def draw():
    generator = torch.Generator().manual_seed(5)
    return lambda *shape: torch.randn(*shape, generator=generator, dtype=torch.float64)


def decays(draw, batch=2):
    tokens = GRID[0] * GRID[1]
    order = torch.randperm(tokens, generator=torch.Generator().manual_seed(1)).to(torch.int32)
    rate, links = -draw(H).abs() / 4, -draw(batch, tokens, H).abs() / 4
    maps = [0.1 - draw(batch, *GRID, H).abs() / 4 for _ in range(2)]  # some links grow
    return {
        "retention": decay.Retention(rate),
        "ordered": decay.Retention(rate, order),
        "gated": decay.Gated(links, -draw(batch, tokens, H).abs() / 4),
        "gated ordered": decay.Gated(links, order=order),
        "manhattan": decay.Manhattan(rate, GRID),
        "two rates": decay.Manhattan((rate, -draw(H).abs() / 4), GRID),
        "row first": decay.Polyline(*maps, GRID, "row_first"),
        "col first": decay.Polyline(*maps, GRID, "col_first"),
        "both": decay.Polyline(*maps, GRID),
        "list": [decay.Retention(rate), decay.Manhattan(rate, GRID)],
    }


NAMES = (
    "retention",
    "ordered",
    "gated",
    "gated ordered",
    "manhattan",
    "two rates",
    "row first",
    "col first",
    "both",
    "list",
)


def tensors(d):
    each = d if isinstance(d, list) else [d]
    found = [t for one in each for t in vars(one).values() if isinstance(t, (torch.Tensor, tuple))]
    flat = [t for x in found for t in (x if isinstance(x, tuple) else (x,)) if isinstance(t, torch.Tensor)]
    return [t.requires_grad_() for t in dict.fromkeys(flat) if t.is_floating_point()]


def masked(draw, batch=2, tokens=20, d=4, e=3, kv_heads=H):
    q, k, v = draw(batch, tokens, H, d), draw(batch, tokens, kv_heads, d), draw(batch, tokens, kv_heads, e)
    mask = torch.rand(batch, tokens, generator=torch.Generator().manual_seed(2)) < 0.8
    return [t.requires_grad_() for t in (q, k, v)], mask


def both_agree(inputs, run, within=1e-12):
    """run(backend) on the CPU and by definition: values and gradients, in float64."""
    found = []
    for backend in ("cpu", "reference"):
        outs = run(backend)
        loss = sum((o * torch.linspace(-1, 1, o.numel(), dtype=o.dtype).reshape(o.shape)).sum() for o in outs)
        found.append([*outs, *torch.autograd.grad(loss, inputs, materialize_grads=True)])
    for got, want in zip(*found, strict=True):
        assert_close(got, want, rtol=within, atol=within)


@pytest.mark.parametrize("name", NAMES)
def test_linear_time_is_the_dense_mask(draw, name):
    (q, k, v), mask = masked(draw)
    d = decays(draw)[name]
    both_agree(
        [q, k, v, *tensors(d)],
        lambda backend: [
            vitkern.linear_attention(q, k, v, feature_map="elu1", decay=d, key_mask=mask, backend=backend)
        ],
    )


@pytest.mark.parametrize("name", NAMES)
def test_the_definition_weighs_numerator_and_denominator(draw, name):
    (q, k, v), mask = masked(draw)
    d = decays(draw)[name]
    each = d if isinstance(d, list) else [d]
    m = sum(one.dense(q, k) for one in each) / len(each)
    a, b = (torch.nn.functional.elu(t) + 1 for t in (q, k))
    weights = torch.einsum("bihd,bjhd->bhij", a, b) * m * mask[:, None, None]
    want = torch.einsum("bhij,bjhe->bihe", weights / (weights.sum(-1, keepdim=True) + 1e-6), v)
    assert_close(vitkern.linear_attention(q, k, v, feature_map="elu1", decay=d, key_mask=mask), want)


def test_retention_is_the_recurrence_of_retnet(draw):
    """S_t = gamma S_(t-1) + k_t v_t^T, out_t = q_t S_t (Sun et al. 2023, eq. 6), with the rates of its heads."""
    (q, k, v), _ = masked(draw)
    gamma = 1 - 2.0 ** (-5 - torch.arange(H, dtype=torch.float64))
    state, rows = torch.zeros(2, H, 4, 3, dtype=torch.float64), []
    for t in range(q.shape[1]):
        state = gamma[:, None, None] * state + k[:, t, :, :, None] * v[:, t, :, None]
        rows.append((q[:, t, :, :, None] * state).sum(-2))
    options = {"feature_map": "identity", "normalizer": "none", "decay": decay.Retention(gamma.log()), "causal": True}
    out, (s, _, n) = vitkern.linear_attention(q, k, v, **options, return_state=True)
    assert_close(out, torch.stack(rows, 1))
    assert_close(s, state)
    assert torch.equal(n, torch.full((2, H), 20.0, dtype=torch.float64))


def test_gated_linear_attention_is_its_recurrence(draw):
    """S_t = diag(alpha_t) S_(t-1) + k_t v_t^T (Yang et al. 2024, eq. 3), with a gate for each feature."""
    (q, k, v), _ = masked(draw)
    gate = -draw(2, 20, H, 4).abs()
    state, rows = torch.zeros(2, H, 4, 3, dtype=torch.float64), []
    for t in range(20):
        state = gate[:, t, :, :, None].exp() * state + k[:, t, :, :, None] * v[:, t, :, None]
        rows.append((q[:, t, :, :, None] * state).sum(-2))
    options = {"feature_map": "identity", "normalizer": "none", "causal": True}
    assert_close(vitkern.linear_attention(q, k, v, **options, decay=decay.Gated(gate)), torch.stack(rows, 1))
    gate.requires_grad_()
    both_agree(
        [q, k, v, gate],
        lambda backend: [vitkern.linear_attention(q, k, v, **options, decay=decay.Gated(gate), backend=backend)],
    )


def test_mamba_2_is_gated_attention(draw):
    """Y = (L o C B^T) X with L the products of the scalar decays (Dao and Gu 2024, eq. 16)."""
    (c, b, x), _ = masked(draw)
    log_a = -draw(2, 20, H).abs()
    along = log_a.cumsum(1).transpose(1, 2)
    factors = (along[..., :, None] - along[..., None, :]).exp().tril()
    want = torch.einsum("bhij,bihd,bjhd,bjhe->bihe", factors, c, b, x)
    options = {"feature_map": "identity", "normalizer": "none", "causal": True}
    assert_close(vitkern.linear_attention(c, b, x, **options, decay=decay.Gated(log_a)), want)


@pytest.mark.parametrize("causal", (True, 4, 6, 100))
@pytest.mark.parametrize("name", (None, "retention", "ordered", "gated"))
def test_causality_hides_what_stands_behind_the_block(draw, causal, name):
    (q, k, v), mask = masked(draw)
    d = None if name is None else decays(draw)[name]
    both_agree(
        [q, k, v, *([] if d is None else tensors(d))],
        lambda backend: [
            vitkern.linear_attention(
                q, k, v, preset="mlla", decay=d, causal=causal, key_mask=mask, offset=0.5, backend=backend
            )
        ],
    )


@pytest.mark.parametrize("causal", (True, 4))
def test_causal_is_the_masked_quadratic_form(draw, causal):
    (q, k, v), mask = masked(draw)
    block = int(causal)
    at = torch.arange(20)
    seen = (at[:, None] // block >= at // block) & mask[:, None]
    a, b = q.relu(), k.relu()
    weights = torch.einsum("bihd,bjhd->bhij", a, b) * seen[:, None]
    for normalizer, count in (("sum", 1), ("mean", seen.sum(-1)[:, None, :, None])):
        want = torch.einsum("bhij,bjhe->bihe", weights / (weights.sum(-1, keepdim=True) + 1e-3 * count), v)
        options = {"normalizer": normalizer, "eps": 1e-3, "causal": causal, "key_mask": mask}
        assert_close(vitkern.linear_attention(q, k, v, **options), want)


@pytest.mark.parametrize("rope", (False, True))
@pytest.mark.parametrize("name", (None, "retention", "gated", "features"))
def test_a_chain_in_two_pieces_is_the_chain(draw, name, rope):
    (q, k, v), mask = masked(draw)
    links = decays(draw)["gated"].log_alpha
    features = -draw(2, 20, H, 4).abs()
    angles = draw(1, 20, 1, 2)

    def piece(part, state):
        made = {
            None: lambda: None,
            "retention": lambda: decay.Retention(links[0, 0]),
            "gated": lambda: decay.Gated(links[:, part]),
            "features": lambda: decay.Gated(features[:, part]),
        }[name]()
        turn = vitkern.Rope(angles[:, part].cos(), angles[:, part].sin()) if rope else None
        return vitkern.linear_attention(
            q[:, part], k[:, part], v[:, part], preset="mlla", decay=made, causal=True, rope=turn, key_mask=mask[:, part],
            initial_state=state, return_state=True,
        )  # fmt: skip

    whole, end = piece(slice(0, 20), None)
    first, state = piece(slice(0, 7), None)
    second, last = piece(slice(7, 20), state)
    assert_close(torch.cat((first, second), 1), whole)
    for got, want in zip(last, end, strict=True):
        assert_close(got, want)
    agree(second, whole[:, 7:], [q, k, v])


def test_packed_sequences_are_calls_of_their_own(draw):
    lengths = (5, 0, 1, 14)
    bounds = torch.tensor([0, *lengths]).cumsum(0).to(torch.int32)
    q, k, v, links = draw(20, H, 4), draw(20, H, 4), draw(20, H, 3), -draw(20, H).abs()
    start = (draw(4, H, 4, 3), draw(4, H, 4).abs(), draw(4, H).abs())
    for causal in (True, 3, False):
        more = {"initial_state": start, "return_state": True} if causal else {}
        for backend in ("cpu", "reference"):
            options = {"feature_map": "elu1", "normalizer": "mean", "causal": causal, "backend": backend}
            found = vitkern.linear_attention(q, k, v, cu_seqlens=bounds, decay=decay.Gated(links), **options, **more)
            for w, (i, j) in enumerate(zip(bounds[:-1].tolist(), bounds[1:].tolist(), strict=True)):
                own = [t[None, i:j] for t in (q, k, v)]
                if causal:
                    more["initial_state"] = tuple(t[w : w + 1] for t in start)
                want = vitkern.linear_attention(*own, decay=decay.Gated(links[None, i:j]), **options, **more)
                if not causal:
                    assert_close(found[i:j], want[0])
                    continue
                assert_close(found[0][i:j], want[0][0])
                for got, one in zip(found[1], want[1], strict=True):
                    assert_close(got[w], one[0])
            more["initial_state"] = start
            more = more if causal else {}


def test_grouped_heads_and_weights_of_keys(draw):
    (q, k, v), mask = masked(draw, kv_heads=1)
    weight = draw(2, 20, 1).abs().requires_grad_()
    rate = -draw(H).abs()
    both_agree(
        [q, k, v, weight],
        lambda backend: [
            vitkern.linear_attention(
                q,
                k,
                v,
                key_weight=weight,
                key_mask=mask,
                decay=decay.Retention(rate),
                feature_map="elu1",
                backend=backend,
            )
        ],
    )


def test_no_decay_is_plain_linear_attention(draw):
    """The diagonal counts once."""
    (q, k, v), mask = masked(draw)
    plain = vitkern.linear_attention(q, k, v, key_mask=mask)
    zero = torch.zeros(2, *GRID, H, dtype=torch.float64)
    for d in (
        decay.Retention(zero[0, 0, 0]),
        decay.Gated(zero.flatten(1, 2)),
        decay.Manhattan(zero[0, 0, 0], GRID),
        decay.Polyline(zero, zero, GRID),
    ):
        assert_close(vitkern.linear_attention(q, k, v, key_mask=mask, decay=d), plain)


def test_paths_are_turned_maps_of_each_other(draw):
    (q, k, v), _ = masked(draw)
    row, col = (0.1 - draw(2, *GRID, H).abs() / 4 for _ in range(2))

    def turn(t):
        return t.unflatten(1, GRID).transpose(1, 2).flatten(1, 2)

    own = vitkern.linear_attention(q, k, v, feature_map="elu1", decay=decay.Polyline(row, col, GRID, "col_first"))
    turned = decay.Polyline(col.transpose(1, 2), row.transpose(1, 2), GRID[::-1], "row_first")
    other = vitkern.linear_attention(turn(q), turn(k), turn(v), feature_map="elu1", decay=turned)
    assert_close(other.unflatten(1, GRID[::-1]).transpose(1, 2).flatten(1, 2), own)
    first = vitkern.linear_attention(q, k, v, feature_map="elu1", decay=decay.Polyline(row, col, GRID, "row_first"))
    assert (first - own).abs().max() > 1e-3


@pytest.mark.parametrize("rate", (0.0, -1e-4, -80.0, 0.1))
def test_every_rate_gives_finite_numbers(rate):
    q, k, v = torch.randn(3, 1, 60, 2, 8, generator=torch.Generator().manual_seed(0)).unbind()
    rates = torch.full((2,), rate)
    maps = torch.full((1, 6, 10, 2), rate)
    for d in (
        decay.Retention(rates),
        decay.Gated(rates.expand(1, 60, 2)),
        decay.Manhattan(rates, (6, 10)),
        decay.Polyline(maps, maps, (6, 10)),
    ):
        leaves = [t.clone().requires_grad_() for t in (q, k, v)]
        out = vitkern.linear_attention(*leaves, feature_map="elu1", decay=d)
        options = {"feature_map": "elu1", "decay": d, "backend": "reference"}
        oracle = vitkern.linear_attention(*(t.double() for t in (q, k, v)), **options)
        assert_close_to_oracle(type(d).__name__, out, oracle, vitkern.linear_attention(q, k, v, **options))
        for grad in torch.autograd.grad(out.sum(), leaves):
            assert grad.isfinite().all()


def test_hidden_keys_never_leak(draw):
    (q, k, v), mask = masked(draw)
    with torch.no_grad():
        k[~mask], v[~mask] = float("nan"), float("nan")
    for d in decays(draw).values():
        assert vitkern.linear_attention(q, k, v, decay=d, key_mask=mask).isfinite().all()
    assert vitkern.linear_attention(q, k, v, causal=True, key_mask=mask).isfinite().all()


def test_a_weight_that_is_not_finite_stays_with_its_token(draw):
    x, weight = draw(1, 3, 1, 5).float().requires_grad_(), torch.tensor([torch.inf, 1.0, 2.0])[None, :, None]
    grads = []
    for part in (slice(None), slice(1, None)):
        out = feature_rows(x[:, part], None, weight[:, part], "silu_norm")
        grads.append(torch.autograd.grad(out.sum(), x)[0][:, 1:])
    assert torch.equal(*grads) and grads[0].isfinite().all()


@pytest.mark.parametrize("spoilt", ["a", "b", "c"])
def test_what_is_not_finite_stays_in_its_sequence(draw, spoilt):
    fields = {name: draw(1, 5, 1, 4) for name in "abc"}
    fields[spoilt][:, 2] = torch.inf
    out, last = chain_sum(**fields, cu_seqlens=torch.tensor([0, 3, 5], dtype=torch.int32))
    alone, end = chain_sum(*(fields[name][:, 3:] for name in "abc"))
    assert_close(out[:, 3:], alone)
    assert_close(last[1:], end)


def test_the_gradient_of_links_is_that_of_the_pairs_that_cross_them(draw):
    dout, c = draw(2, *GRID, H, 9), draw(2, *GRID, H, 9)
    a, b = draw(2, *GRID, H, 4), draw(2, *GRID, H, 4)
    row, col = (0.1 - draw(2, *GRID, H).abs() / 4 for _ in range(2))
    for got, want in zip(
        LINKS.overload()(dout, a, b, c, row, col, False, ""), grid_links(dout, a, b, c, row, col), strict=True
    ):
        assert_close(got, want, rtol=1e-12, atol=1e-12)


REFUSED = {
    "decay must be one of": {"decay": torch.zeros(H)},
    "rate of decay Retention must have shape": {"decay": decay.Retention(torch.zeros(2))},
    "log_alpha of decay Gated must have shape": {"decay": decay.Gated(torch.zeros(2, 19, H))},
    "takes a rate for each feature with causal=True": {"decay": decay.Gated(torch.zeros(2, 20, H, 4))},
    "the grid of decay Manhattan must have the 20 tokens": {"decay": decay.Manhattan(torch.zeros(H), (3, 5))},
    "row of decay Polyline must have shape": {"decay": decay.Polyline(*torch.zeros(2, 2, 5, 4, H), GRID)},
    "paths of decay Polyline must be one of": {"decay": decay.Polyline(*torch.zeros(2, 2, *GRID, H), GRID, "zigzag")},
    "takes neither causal nor cu_seqlens": {"decay": decay.Manhattan(torch.zeros(H), GRID), "causal": True},
    "must be int32": {"decay": decay.Retention(torch.zeros(H), torch.arange(20))},
    "takes no order in a list": {
        "decay": [decay.Retention(torch.zeros(H), torch.arange(20, dtype=torch.int32)), decay.Retention(torch.zeros(H))]
    },
    "causal must be a bool or the number of tokens": {"causal": 0},
    "causal takes neither normalizer='subtract'": {"causal": True, "normalizer": "subtract"},
    "initial_state must be None without causal": {"initial_state": (torch.zeros(2, H, 4, 3),) * 3},
    "initial_state must be the triple": {"initial_state": torch.zeros(2), "causal": True},
    "S of initial_state must have shape": {"initial_state": (torch.zeros(2, H, 4, 2),) * 3, "causal": True},
    "S of initial_state must have the 4 features": {
        "initial_state": (torch.zeros(2, H, 5, 3), torch.zeros(2, H, 5), torch.zeros(2, H)),
        "causal": True,
    },
    "return_state must be False with decay": {"decay": decay.Retention(torch.zeros(H)), "return_state": True},
    "window_size must be None with decay": {"decay": decay.Retention(torch.zeros(H)), "window_size": 5},
    "take one decay, got 2": {"decay": [decay.Retention(torch.zeros(H))] * 2, "causal": True, "return_state": True},
}


@pytest.mark.parametrize("sentence", REFUSED)
def test_bad_input_is_refused(draw, sentence):
    (q, k, v), _ = masked(draw)
    with pytest.raises((ValueError, TypeError), match=sentence.replace("(", r"\(")):
        vitkern.linear_attention(q, k, v, **REFUSED[sentence])
    with pytest.raises(ValueError, match="k must have the tokens of q"):
        vitkern.linear_attention(q, k[:, :7], v[:, :7], causal=True)


def test_explain_names_what_makes_the_sums():
    """Few tokens with gradients are summed over all pairs, unless a back-end is named."""
    q, d = torch.randn(1, 20, H, 4), decay.Manhattan(torch.zeros(H), GRID)
    assert "runs on: cpu" in vitkern.explain(vitkern.linear_attention, q, q, q, decay=d)
    q.requires_grad_()
    assert "runs on: reference" in vitkern.explain(vitkern.linear_attention, q, q, q, decay=d)
    assert "runs on: cpu" in vitkern.explain(vitkern.linear_attention, q, q, q, decay=d, backend="cpu")
    q = torch.randn(1, 400, H, 4, requires_grad=True)
    assert "runs on: cpu" in vitkern.explain(vitkern.linear_attention, q, q, q, causal=True)
