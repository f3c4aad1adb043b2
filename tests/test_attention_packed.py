"""attention_varlen: modifiers of packed sequences against one call each, the sequence's own numbers and places."""

import pytest
import torch
from test_attention_varlen import D, bounds, one_by_one, packed

import vitkern
from vitkern import bias, mask, modulation


def drawn(*shape, grad=True):
    return torch.randn(shape, dtype=D, generator=torch.Generator().manual_seed(sum(shape))).requires_grad_(grad)


def agree(arguments, each, learned, **options):
    """The call of all sequences is that of each alone, and so are the gradients."""
    got, want = vitkern.attention_varlen(*arguments, **options), one_by_one(arguments, each)
    torch.testing.assert_close(got, want)
    wanted = (*arguments[:3], *learned)
    grads = [torch.autograd.grad(t.sin().sum(), wanted, allow_unused=True) for t in (got, want)]
    for a, b in zip(*grads, strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("diagonal", [False, True])
def test_a_policy_counts_the_keys_of_the_own_sequence(diagonal):
    arguments = packed(grad=True)
    keep = torch.rand(1, len(arguments[1]), dtype=D, generator=torch.Generator().manual_seed(1)).requires_grad_()
    each = lambda s, rows, columns: {"modulation": modulation.Policy(keep[:, columns], 0.3, diagonal)}  # noqa: E731
    agree(arguments, each, (keep,), modulation=modulation.Policy(keep, 0.3, diagonal))


def test_a_policy_without_eps_has_finite_gradients_where_nothing_is_seen():
    arguments = packed(((3, 4), (2, 0)), grad=True)
    keep = torch.ones(1, 4, dtype=D, requires_grad=True)
    for backend in ("cpu", "reference"):
        out = vitkern.attention_varlen(*arguments, modulation=modulation.Policy(keep, 0.0), backend=backend)
        assert all(g.isfinite().all() for g in torch.autograd.grad(out.sin().sum(), (*arguments[:3], keep)))


@pytest.mark.parametrize("k_grid", [(8, 8), (4, 16)])
def test_tables_of_a_grid_count_inside_the_sequence(k_grid):
    """A shorter sequence stands at the top left; its dense form is cut from that of the whole grid."""
    arguments = packed(grad=True)
    rel_h, rel_w = (drawn(2 * max(8, n) - 1, 8) for n in k_grid)
    given = bias.DecomposedRelativePosition(rel_h, rel_w, (8, 8), k_grid)

    def each(s, rows, columns):
        q = arguments[0][None, rows]
        n, m = q.shape[1], columns.stop - columns.start
        whole = given.dense(torch.cat((q, q.new_zeros(1, 64 - n, 4, 8)), 1), q)
        return {"bias": whole[:, :, :n, :m]}

    agree(arguments, each, (rel_h, rel_w), bias=given)


def tables():
    index = torch.randint(0, 7, (64, 64), generator=torch.Generator().manual_seed(3))
    return drawn(7, 1, 8), drawn(7, 4, 8), drawn(7, 4, 8), index


@pytest.mark.parametrize("normalizer", ["softmax", "relu"])
@pytest.mark.parametrize("parts", [(0, 1, 2), (0,), (1,), (2,)])
def test_contextual_positions_are_the_same_for_all_sequences(parts, normalizer):
    arguments = packed(grad=True)
    *given, index = tables()
    given = [t if i in parts else None for i, t in enumerate(given)]

    def each(s, rows, columns):
        n, m = rows.stop - rows.start, columns.stop - columns.start
        return {"bias": bias.ContextualPosition(*given, index[:n, :m]), "normalizer": normalizer}

    learned = [t for t in given if t is not None]
    agree(arguments, each, learned, bias=bias.ContextualPosition(*given, index[None]), normalizer=normalizer)


def test_contextual_positions_meet_the_own_keys_beside_further_ones():
    arguments = packed(grad=True)
    *given, index = tables()
    more = {"extra_kv": (drawn(1, 3, 2, 8), drawn(1, 3, 2, 8))}

    def each(s, rows, columns):
        n, m = rows.stop - rows.start, columns.stop - columns.start
        return {"bias": bias.ContextualPosition(*given, index[:n, :m])} | more

    agree(arguments, each, (*given, *more["extra_kv"]), bias=bias.ContextualPosition(*given, index), **more)


@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.parametrize("transposed", [False, True])
def test_every_sequence_is_a_map_with_a_path_of_its_own(shared, transposed):
    arguments = packed(((12, 12),) * 3, grad=True)
    row, col = (drawn(1 if shared else 3, 3, 4, n) for n in (4, 4))
    table = drawn(35, 4)

    def each(s, rows, columns):
        own = slice(0, 1) if shared else slice(s, s + 1)
        path = bias.PolylinePath(row[own], col[own], transposed)
        return {"bias": [path, bias.RelativePosition(table, grid=(3, 4))]}

    whole = [bias.PolylinePath(row, col, transposed), bias.RelativePosition(table, grid=(3, 4))]
    agree(arguments, each, (row, col, table), bias=whole)
    alike = {"mask": mask.Causal(2), "modulation": modulation.Policy(torch.ones(1, 36, dtype=D) / 2)}
    got, want = (
        vitkern.attention_varlen(*arguments, bias=whole, **alike, backend=backend) for backend in ("cpu", "reference")
    )
    torch.testing.assert_close(got, want)


def test_no_sequence_has_no_path_and_no_positions():
    arguments = (*(torch.zeros(0, 4, 8, dtype=D) for _ in range(3)), bounds(()), bounds(()))
    path = bias.PolylinePath(torch.ones(1, 3, 4, 4), torch.ones(1, 3, 4, 4))
    assert vitkern.attention_varlen(*arguments, 12, 12, bias=path).shape == (0, 4, 8)
    for b in (
        bias.ContextualPosition(*tables()),
        bias.DecomposedRelativePosition(drawn(15, 8), drawn(15, 8), (8, 8), (8, 8)),
    ):
        assert vitkern.attention_varlen(*arguments, 64, 64, bias=b).shape == (0, 4, 8)


def test_explain_names_a_padded_batch_where_kernels_want_one():
    context = {"bias": bias.ContextualPosition(*tables())}
    path = {"bias": bias.PolylinePath(torch.ones(3, 3, 4, 4), torch.ones(3, 3, 4, 4))}
    said = lambda arguments, **options: vitkern.explain(vitkern.attention_varlen, *arguments, **options)  # noqa: E731
    assert "padded batch" in said(packed(), key_index=torch.full((153, 1), -1))
    for text in (said(packed(), **context), said(packed(((12, 12),) * 3), **path)):
        assert "padded" not in text and "map of scores" not in text


ALIKE = packed(((12, 12),) * 3)
PATH = bias.PolylinePath(torch.ones(3, 3, 4, 4), torch.ones(3, 3, 4, 4))
TABLES = (torch.ones(7, 1, 8), None, None)
WHOLE = torch.zeros(64, 64, dtype=torch.int64)


@pytest.mark.parametrize(
    "arguments, options, message",
    [
        (packed(), {"bias": PATH}, r"PolylinePath.row must have shape \[B or 1, Hs, Ws, H or 1\], got \[3, 3, 4, 4\]"),
        (packed(((12, 12), (12, 12), (12, 5))), {"bias": PATH}, "sequences of 12 tokens each, got 36 queries and 29 keys in 3"),
        (packed(((13, 13), (12, 12), (11, 11))), {"bias": PATH}, "PolylinePath.grid must hold the 13 tokens of q"),
        (ALIKE, {"bias": [PATH, PATH]}, "PolylinePath has no form for packed sequences beside another modifier of its kind"),
        (ALIKE, {"bias": PATH, "extra_kv": (torch.ones(1, 3, 2, 8, dtype=D),) * 2}, "or beside extra_kv"),
        (packed(), {"bias": bias.ContextualPosition(*TABLES, torch.zeros(153, 106).long())}, r"index must have shape \[64, 64\]"),
        (packed(), {"bias": [bias.ContextualPosition(*TABLES, WHOLE)] * 2}, "ContextualPosition has no form"),
        (
            packed(),
            {"bias": bias.DecomposedRelativePosition(torch.ones(13, 8), torch.ones(13, 8), (7, 7), (8, 8))},
            "DecomposedRelativePosition.grid must hold the 64 tokens of q",
        ),
        (packed(), {"mask": mask.FromLogits(torch.ones(1, 64, 2, 2), (8, 8))}, "FromLogits has no form for packed sequences"),
    ],
)  # fmt: skip
def test_bad_input_gets_a_sentence(arguments, options, message):
    with pytest.raises((ValueError, TypeError, NotImplementedError), match=message):
        vitkern.attention_varlen(*arguments, **options)
