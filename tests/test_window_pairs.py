"""Options of windows and neighbourhoods in pairs, as published systems join them, window by window."""

import itertools

import pytest
import torch
import torch.nn.functional as F
from agreement import agree
from test_window_options import axis_block, looped, windows
from window_maps import BACKENDS, draw, maps

import vitkern
from vitkern import CosineScore, DepthwiseValue
from vitkern.reference.window_attention import philox

D = torch.float64


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("border", ["pad", "shift"])
def test_halos_on_pooled_keys(border, backend):
    """VWFormer: a window of 4 x 4 queries sees 3 x 4 pooled cells around its own 2 x 2."""
    q = maps(8, 12)[0]
    _, k, v = maps(4, 6, seed=5)
    axes = []
    for length, c in ((4, 3), (6, 4)):
        starts = [i - (c - 2) // 2 for i in range(0, length, 2)]
        if border == "shift":
            starts = [min(max(s, 0), length - c) for s in starts]
        axes.append([list(range(s, s + c)) for s in starts])
    queries, keys = windows((8, 12), axis_block(8, 4), axis_block(12, 4)), windows((4, 6), *axes)
    options = {"context_size": (3, 4), "context_border": border, "backend": backend}
    agree(vitkern.window_attention(q, k, v, 4, **options), looped(q, k, v, queries, keys), (q, k, v))


@pytest.mark.parametrize("backend", BACKENDS)
def test_groups_with_cosine_scores_and_pooled_keys(backend):
    """HiSViT: two shapes of windows, each with the pooled cells of its own place."""
    q = maps(4, 8, heads=4)[0]
    _, k, v = maps(2, 4, heads=4, seed=5)
    tau, sizes = draw(4, seed=9).requires_grad_(), [(2, 4), (4, 2)]
    want = []
    for g, (h, w) in enumerate(sizes):
        part = [t[..., 2 * g : 2 * g + 2, :] for t in (q, k, v)]
        unit = [F.normalize(t, dim=-1) for t in part[:2]]
        scale = tau[2 * g : 2 * g + 2].exp() * 2.0  # against the D ** -0.5 of looped
        queries = windows((4, 8), axis_block(4, h), axis_block(8, w))
        keys = windows((2, 4), axis_block(2, h // 2), axis_block(4, w // 2))
        want.append(looped(*unit, part[2], queries, keys, score=lambda s, *_, scale=scale: s * scale))
    got = vitkern.window_attention(q, k, v, sizes, cosine=CosineScore(tau), backend=backend)
    agree(got, torch.cat(want, -2), (q, k, v, tau))


def convolved(v, weight, cells):
    """Each window [H, D] of `cells` (None where there is no token) as a map of its own, zeros around it."""
    heads, width = v.shape[-2:]
    out = torch.zeros_like(v)
    for image, one in itertools.product(range(len(v)), cells):
        rows, columns = len(one), len(one[0])
        grid = [torch.zeros(heads, width, dtype=D) if c is None else v[(image, *c)] for line in one for c in line]
        inside = torch.stack(grid).view(1, rows, columns, heads * width).permute(0, 3, 1, 2)
        found = F.conv2d(inside, weight, padding=1, groups=heads * width)[0].permute(1, 2, 0)
        for y, x in itertools.product(range(rows), range(columns)):
            if one[y][x] is not None:
                out = out.index_put(tuple(torch.tensor(n) for n in (image, *one[y][x])), found[y, x].view(heads, width))
    return out


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("partition, order", [("grid", "pad_roll"), ("block", "pad_roll"), ("block", "roll_pad")])
def test_convolutions_inside_strided_and_shifted_windows(partition, order, backend):
    q, k, v = maps(5, 6)
    weight = draw(8, 1, 3, 3, seed=4).requires_grad_()

    def token(r, length, shift):
        period = length if order == "roll_pad" else -(-length // 3) * 3
        if order == "roll_pad" and r >= length:
            return None
        return (r + shift) % period if (r + shift) % period < length else None

    axes = []
    for length, shift in ((5, 1), (6, 2)):
        count = -(-length // 3)
        if partition == "grid":
            axes.append([[i + j * count if i + j * count < length else None for j in range(3)] for i in range(count)])
        else:
            axes.append([[token(i * 3 + j, length, shift) for j in range(3)] for i in range(count)])
    cells = [
        [[None if y is None or x is None else (y, x) for x in columns] for y in rows]
        for rows, columns in itertools.product(*axes)
    ]
    options = {"partition": partition, "pad_order": order, "shift_size": 0 if partition == "grid" else (1, 2)}
    plain = vitkern.window_attention(q, k, v, 3, backend="reference", **options)
    lepe = DepthwiseValue(weight, scope="window")
    got = vitkern.window_attention(q, k, v, 3, lepe=lepe, backend=backend, **options)
    agree(got, plain + convolved(v, weight, cells), (q, k, v, weight))


@pytest.mark.parametrize("options", [{"shift_size": "own"}, {"order": True}, {"shared_q": True}], ids=str)
def test_dropout_counts_the_tokens_of_the_map(options):
    """The pattern drawn here by hand: Philox of seed, image, head, token of the query and slot of the key."""
    line = "order" in options
    q, k, v = maps(12) if line else maps(4, 6)
    size, slots = (3, 3) if line else ((2, 2), 4)
    shift, order = (0, 0), None
    given = {"dropout_p": 0.5, "dropout_seed": 2**35 + 3}
    if "shift_size" in options:
        shift = (1, 1)
        given |= {"shift_size": torch.tensor([shift, shift], dtype=torch.int32), "mask_value": 0.0}
    elif line:
        order = torch.randperm(12, generator=torch.Generator().manual_seed(0))
        given["order"] = order.to(torch.int32)
    else:
        q = draw(2, 2, 2, 2, 4, seed=6)
        given |= {"shared_q": True, "key_mask": torch.ones(2, 4, 6, dtype=torch.bool)}
    tokens = torch.arange(12 if line else 24).view(k.shape[1:-2])
    image, head, token, slot = torch.meshgrid(
        torch.arange(2), torch.arange(2), tokens.flatten(), torch.arange(slots), indexing="ij"
    )
    drawn = philox([image, head, token, slot // 4], torch.tensor([2**35 + 3]))
    keep = torch.stack(drawn, -1).gather(-1, (slot % 4)[..., None])[..., 0] >= 2**31  # [B, H, T, slots]
    for s in range(slots):
        row = tokens.flatten()[order] if line else tokens
        cells = row.view(-1, 3)[:, s] if line else _of_slot(row, size, shift, s)
        named = torch.zeros(*v.shape[:-1], 1, dtype=D)  # values of 1 in one slot of every window
        named.view(2, -1, 2, 1)[:, cells.flatten()] = 1.0
        kept = vitkern.window_attention(q, k, named, size, **given)[..., 0].flatten(1, -2) != 0  # [B, T, H]
        assert torch.equal(kept, keep[..., s].transpose(1, 2))


def _of_slot(tokens, size, shift, slot):
    """The tokens that stand in one place of all windows."""
    y, x = slot // size[1], slot % size[1]
    rolled = tokens.roll((-shift[0], -shift[1]), (0, 1))
    return rolled[y :: size[0], x :: size[1]]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(
    "kernel, dilation, stride", [(3, 2, 1), (4, 1, 1), (5, 1, 2), ((3, 4), (2, 1), (1, 2))], ids=str
)
def test_borders_of_zeros_are_those_of_unfold(kernel, dilation, stride, backend):
    """Slots beyond the map, or beyond the tokens of the query's own residue, have keys and values of 0."""
    q, k, v = maps(8, 12)
    kernels, dilations, strides = ((n, n) if isinstance(n, int) else n for n in (kernel, dilation, stride))
    scores, values = [], []
    for y, x in itertools.product(range(8), range(12)):
        places = []
        for i, length, n, d, t in zip((y, x), (8, 12), kernels, dilations, strides, strict=True):
            lead = min((i // d) // t * t + t // 2, (length - i % d + d - 1) // d - 1)
            places.append([i % d + (lead - n // 2 + j) * d for j in range(n)])
        cells = list(itertools.product(*places))
        real = [0 <= a < 8 and 0 <= b < 12 for a, b in cells]
        keys, vals = (
            torch.stack(
                [t[:, a, b] if ok else torch.zeros_like(t[:, 0, 0]) for (a, b), ok in zip(cells, real, strict=True)], 1
            )
            for t in (k, v)
        )
        scores.append(torch.einsum("bhd,bnhd->bhn", q[:, y, x], keys) * 0.5)
        values.append(torch.einsum("bhn,bnhd->bhd", scores[-1].softmax(-1), vals))
    want = torch.stack(values, 1).view_as(q)
    options = {"dilation": dilation, "stride": stride, "border": "zero", "backend": backend}
    agree(vitkern.neighborhood_attention(q, k, v, kernel, **options), want, (q, k, v))
