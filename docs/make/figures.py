"""The figures of the pages, drawn from what the ops compute: with one-hot values the output of an attention is its weights."""

import io
from collections.abc import Callable
from typing import Any

import matplotlib
import torch
from torch import Tensor

import vitkern
from vitkern import bias, decay, mask

matplotlib.use("svg")
matplotlib.rcParams["svg.hashsalt"] = "vitkern"  # the same file from the same figure
import matplotlib.pyplot as plt  # noqa: E402

INK, SEEN, QUERY = "#777777", "viridis", "#e4572e"


def weights_of_map(
    attend: Callable[[Tensor, Tensor, Tensor], Tensor], grid: tuple[int, int], query: tuple[int, int]
) -> Tensor:
    """`[H, W]`: the weight of every token of the map for one query, where all scores are alike."""
    n = grid[0] * grid[1]
    q = torch.zeros(1, *grid, 1, 4)
    v = torch.eye(n).reshape(1, *grid, 1, n)
    return attend(q, q, v)[0, query[0], query[1], 0].reshape(grid)


def weights_of_row(n: int, **options: Any) -> Tensor:
    """`[N, N]`: the weights of :func:`vitkern.attention` where all scores are alike."""
    q = torch.zeros(1, n, 1, 4)
    return vitkern.attention(q, q, torch.eye(n)[None, :, None], **options)[0, :, 0]


def drawn(panels: list[tuple[str, Tensor, tuple[int, int] | None]], lines: int = 0) -> bytes:
    """Panels side by side; a query is framed; `lines` is the side of the windows that are drawn over the map."""
    figure, axes = plt.subplots(1, len(panels), figsize=(1.9 * len(panels), 2.2), squeeze=False)
    for axis, (title, values, query) in zip(axes[0], panels, strict=True):
        shown = values / values.max()
        axis.imshow(shown.masked_fill(shown == 0, torch.nan), cmap=SEEN, vmin=0, vmax=1.15)
        axis.set_title(title, fontsize=9, color=INK)
        axis.set_xticks([]), axis.set_yticks([])
        for spine in axis.spines.values():
            spine.set_color(INK)
        for at in range(lines, values.shape[0], lines) if lines else ():
            axis.axhline(at - 0.5, color=INK, linewidth=0.4)
            axis.axvline(at - 0.5, color=INK, linewidth=0.4)
        if query is not None:
            box = plt.Rectangle((query[1] - 0.5, query[0] - 0.5), 1, 1, fill=False, edgecolor=QUERY, linewidth=2)
            axis.add_patch(box)
    return saved(figure)


def saved(figure: Any) -> bytes:
    figure.tight_layout()
    buffer = io.BytesIO()
    figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None})
    plt.close(figure)
    return buffer.getvalue()


def windows() -> bytes:
    grid, corner, inside = (16, 16), (14, 14), (6, 9)

    def window(query: tuple[int, int], **options: Any) -> Tensor:
        return weights_of_map(lambda q, k, v: vitkern.window_attention(q, k, v, 4, **options), grid, query)

    def stripes(query: tuple[int, int]) -> Tensor:
        return weights_of_map(lambda q, k, v: vitkern.window_attention(q, k, v, (None, 2)), grid, query)

    return drawn(
        [
            ("window 4", window(inside), inside),
            ("shift 2, at the border", window(corner, shift_size=2, mask_value=-torch.inf), corner),
            ('partition="grid"', window(inside, partition="grid"), inside),
            ("context_size=8", window(inside, context_size=8), inside),
            ("window_size=(None, 2)", stripes(inside), inside),
        ],
        lines=4,
    )


def neighborhoods() -> bytes:
    grid, corner, inside = (16, 16), (1, 15), (7, 8)

    def near(query: tuple[int, int], **options: Any) -> Tensor:
        return weights_of_map(lambda q, k, v: vitkern.neighborhood_attention(q, k, v, 5, **options), grid, query)

    value = torch.eye(256).reshape(1, 256, 1, 256)
    around = torch.tensor([[0.2, 0.3], [0.55, 0.25], [0.72, 0.7], [0.33, 0.81]])
    places = around.reshape(1, 1, 1, 1, 4, 2)
    sampled = vitkern.deformable_attention(value, (grid,), places, torch.full((1, 1, 1, 1, 4), 0.25))
    return drawn(
        [
            ("kernel_size=5", near(inside), inside),
            ("at the border", near(corner), corner),
            ("dilation=3", near(inside, dilation=3), inside),
            ("is_causal=True", near(inside, is_causal=True), inside),
            ("deformable, 4 places", sampled[0, 0, 0].reshape(grid), None),
        ]
    )


def masked() -> bytes:
    n, grid = 36, (6, 6)
    ids = torch.arange(n)[None] // 9
    levels = torch.tensor([0] * 4 + [1] * 8 + [2] * 24)[None]
    y, x = torch.meshgrid(torch.arange(-5.0, 6.0), torch.arange(-5.0, 6.0), indexing="ij")
    table = (-0.3 * (x - 1).square() - 0.6 * (y + 1).square()).reshape(-1, 1)
    return drawn(
        [
            ("bias.RelativePosition", weights_of_row(n, bias=bias.RelativePosition(table, grid=grid)), None),
            ("bias.ManhattanDecay", weights_of_row(n, bias=bias.ManhattanDecay(torch.tensor([-0.4]), grid)), None),
            ("mask.Causal", weights_of_row(n, mask=mask.Causal()), None),
            ("mask.Segments", weights_of_row(n, mask=mask.Segments(ids, ids)), None),
            ("mask.BlockCausal", weights_of_row(n, mask=mask.BlockCausal(levels, levels)), None),
        ]
    )


def linear() -> bytes:
    grid, query = (16, 16), (6, 9)

    def decayed(how: Any, **options: Any) -> Tensor:
        q, v = torch.ones(1, 256, 1, 4), torch.eye(256)[None, :, None]
        out = vitkern.linear_attention(q, q, v, feature_map="relu", decay=how, **options)
        return out[0, query[0] * grid[1] + query[1], 0].reshape(grid)

    rate = torch.tensor([-0.25])
    row = torch.full((1, *grid, 1), -0.1)
    return drawn(
        [
            ("no decay", decayed(None), query),
            ("causal", decayed(None, causal=True), query),
            ("decay.Retention", decayed(decay.Retention(rate / 16), causal=True), query),
            ("decay.Manhattan", decayed(decay.Manhattan(rate, grid)), query),
            ("decay.Polyline", decayed(decay.Polyline(row, 4 * row, grid)), query),
        ]
    )


def scans() -> bytes:
    """How much of a map the state holds at one cell, for each route."""
    grid, query = (16, 16), (6, 9)
    u = torch.eye(256).reshape(1, *grid, 256)
    delta = torch.full((1, *grid, 1, 256), 0.05)
    a = torch.full((256, 1), -1.0)
    ones = torch.ones(1, *grid, 1, 1)
    panels = []
    for route in ("row", "row_reverse", "col", "col_reverse"):
        y = vitkern.selective_scan_2d(u, delta, a[None], ones, ones, routes=(route,))
        panels.append((route, y[0, query[0], query[1]].reshape(grid), query))
    return drawn(panels)


def tokens() -> bytes:
    """A made picture of 16 × 16 tokens, and its groups after three rounds of merging."""
    side = 16
    y, x = torch.meshgrid(torch.arange(side) / side, torch.arange(side) / side, indexing="ij")
    disc = ((x - 0.6).square() + (y - 0.4).square() < 0.07).float()
    ground = (y > 0.7).float()
    picture = torch.stack([0.55 + 0.4 * disc, 0.65 + 0.25 * ground - 0.3 * disc, 0.95 - 0.6 * ground - 0.6 * disc], -1)
    picture = (picture * (0.8 + 0.2 * x[..., None])).clamp(0, 1).reshape(1, -1, 3)
    panels = [("256 tokens", picture.reshape(side, side, 3))]
    plan, kept = None, picture
    for r in (100, 60, 40):
        step = vitkern.merge_plan(vitkern.bipartite_match(kept - kept.mean(1, keepdim=True), protect=0), r=r)
        kept, _ = vitkern.merge_tokens(kept, step)
        plan = step if plan is None else plan.compose(step)
        shown = vitkern.unmerge_tokens(vitkern.merge_tokens(picture, plan)[0], plan)
        panels.append((f"{kept.shape[1]} tokens", shown.reshape(side, side, 3)))
    figure, axes = plt.subplots(1, len(panels), figsize=(1.9 * len(panels), 2.2))
    for axis, (title, pixels) in zip(axes, panels, strict=True):
        axis.imshow(pixels.clamp(0, 1))
        axis.set_title(title, fontsize=9, color=INK)
        axis.set_axis_off()
    return saved(figure)


def tiling() -> bytes:
    """One task of the CPU kernel of window_attention: a window's rows through the cache and back."""
    figure, axis = plt.subplots(figsize=(9, 3.6))
    axis.set_xlim(-0.5, 29.5), axis.set_ylim(11, -0.6)
    axis.set_aspect("equal"), axis.set_axis_off()

    def grid(x: float, y: float, rows: int, columns: int, side: float, chosen: Callable[[int, int], bool]) -> None:
        for i in range(rows):
            for j in range(columns):
                face = QUERY if chosen(i, j) else "none"
                cell = plt.Rectangle(
                    (x + j * side, y + i * side), side, side, facecolor=face, edgecolor=INK, linewidth=0.4
                )
                axis.add_patch(cell)

    def text(x: float, y: float, what: str) -> None:
        axis.text(x, y, what, fontsize=8.5, color=INK, ha="center", va="top")

    def arrow(x: float, y: float, to: float) -> None:
        axis.annotate("", (to, y), (x, y), arrowprops={"arrowstyle": "->", "color": INK})

    grid(0, 0, 16, 16, 0.5, lambda i, j: i % 14 < 2 and j % 14 < 2)  # a shifted window that wraps around
    text(4, 8.3, "map in memory: a window\n(here wrapped) is addresses")
    arrow(8.3, 4, 9.9)
    for n, name in enumerate(("q", "k", "v")):
        grid(10.2 + 1.6 * n, 1, 16, 1, 0.38, lambda i, j: True)
        grid(10.6 + 1.6 * n, 1, 16, 2, 0.38, lambda i, j: True)
        text(10.8 + 1.6 * n, 0.1, name)
    text(12.4, 8.3, "rows gathered once,\nwidened to float32, in cache")
    arrow(15.2, 4, 16.6)
    grid(17, 1, 16, 16, 0.38, lambda i, j: 4 <= i < 8)
    text(20, 8.3, "a block of rows of scores:\nproduct, bias, mask, maximum,\nexponential, sum: each one pass")
    arrow(23.4, 4, 24.8)
    grid(25.2, 1, 16, 3, 0.38, lambda i, j: 4 <= i < 8)
    text(26, 8.3, "product with v, ÷ sum,\nstored at the\nwindow's addresses")
    return saved(figure)


FIGURES = {
    "windows": windows,
    "neighborhoods": neighborhoods,
    "masked": masked,
    "linear": linear,
    "scans": scans,
    "tokens": tokens,
    "tiling": tiling,
}
