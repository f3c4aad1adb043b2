"""Published systems on attention: what they draw, their calls, and the formula of their paper or code. Here those that are a
mask or have other keys; biased_systems.py has the others."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

import vitkern
from vitkern import bias, mask, testing
from vitkern.testing.registry import Call, Entry

D = torch.float64
SYSTEMS: dict[str, Callable[[], "System"]] = {}
ENTRY = Entry("systems", lambda rng: of("pma_net"), list, list)


@dataclass(frozen=True)
class System:
    """`ours(t, backend)` and `formula(t)` give the same tensors from the tensors `drawn`."""

    drawn: dict[str, Tensor]
    ours: Callable[[dict[str, Tensor], str | None], Any]
    formula: Callable[[dict[str, Tensor]], Any]


def call(name: str, found: System) -> Call:
    """A call for the oracle rule: the reference is the formula, every other back-end runs the system's calls."""

    def function(t: dict[str, Tensor], backend: str | None) -> Any:
        return found.formula(t) if backend == "reference" else found.ours(t, backend)

    return Call(name, function, lambda t: ((t,), {}), found.drawn, seed=len(name))


def of(name: str) -> Call:
    return call(name, SYSTEMS[name]())


def holds(found: Call, dtype: torch.dtype, backend: str) -> None:
    testing.assert_matches(ENTRY, found, dtype, backend)


def system(make: Callable[[], System]) -> Callable[[], System]:
    SYSTEMS[make.__name__] = make
    return make


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=D)


def ids(*values: int) -> Tensor:
    return torch.tensor([values])


def qkv(queries: int, keys: int | None = None, heads: int = 2, kv: int | None = None, d: int = 8, batch: int = 2):
    keys, kv = keys or queries, kv or heads
    shapes = {"q": (queries, heads, d), "k": (keys, kv, d), "v": (keys, kv, d)}
    return {name: normal(batch, *shape, seed=i) for i, (name, shape) in enumerate(shapes.items())}


def scores(q: Tensor, k: Tensor, scale: float | None = None) -> Tensor:
    k = k.repeat_interleave(q.shape[2] // k.shape[2], 2)
    return torch.einsum("bihd,bjhd->bhij", q, k) * (q.shape[3] ** -0.5 if scale is None else scale)


def weigh(p: Tensor, v: Tensor) -> Tensor:
    return torch.einsum("bhij,bjhd->bihd", p, v.repeat_interleave(p.shape[1] // v.shape[2], 2))


def softmax(s: Tensor, v: Tensor, seen: Tensor | None = None) -> Tensor:
    return weigh((s if seen is None else s.masked_fill(~seen, -math.inf)).softmax(-1), v)


# which tokens see which ----------------------------------------------------------------------------------------------------


@system
def few_queries_that_all_samples_share() -> System:
    """CrossViT's line: probes [1, 5, H, D] for the batch, padded keys."""
    seen = torch.arange(70) < torch.tensor([[70], [41]])

    def ours(t, backend):
        return vitkern.attention(
            t["q"].expand(2, -1, -1, -1), t["k"], t["v"], mask=seen[:, None, None], backend=backend
        )

    given = qkv(5, 70, heads=4, kv=2)
    given["q"] = given["q"][:1]
    return System(
        given, ours, lambda t: softmax(scores(t["q"].expand(2, -1, -1, -1), t["k"]), t["v"], seen[:, None, None])
    )


@system
def dar_and_its_cache() -> System:
    """A level sees itself and those below: in one call, and level after level with the keys kept, joined by merge_lse."""
    levels = torch.tensor([0, 1, 1, 1, 2, 2, 2, 2, 2, 2, 3, 3, 3, 3])
    ends = [0, 1, 4, 10, 14]

    def ours(t, backend):
        whole = vitkern.attention(
            *(t[n] for n in "qkv"), mask=mask.BlockCausal(levels[None], levels[None]), backend=backend
        )
        steps = []
        for first, last in zip(ends, ends[1:], strict=False):
            parts = [
                vitkern.attention(
                    t["q"][:, first:last], *(t[n][:, part] for n in "kv"), return_stats="lse", backend=backend
                )
                for part in (slice(0, first), slice(first, last))
            ]
            steps.append(vitkern.merge_lse([out for out, _ in parts], [stats.lse for _, stats in parts])[0])
        return whole, torch.cat(steps, 1)

    def formula(t):
        out = softmax(scores(t["q"], t["k"]), t["v"], levels <= levels[:, None])
        return out, out

    return System(qkv(14), ours, formula)


@system
def unixcoder() -> System:
    """A prefix that all see, causal behind it; its length differs by sample."""
    length = torch.tensor([[0], [6], [17]])
    level = (torch.arange(17) - length + 1).clamp(min=0)

    def formula(t):
        i = torch.arange(17)
        return softmax(scores(t["q"], t["k"]), t["v"], ((i <= i[:, None]) | (i < length[..., None]))[:, None])

    ours = lambda t, backend: vitkern.attention(  # noqa: E731
        *(t[n] for n in "qkv"), mask=mask.BlockCausal(level, level), backend=backend
    )
    return System(qkv(17, batch=3), ours, formula)


@system
def rvt() -> System:
    """Three views of other sizes, and text that is seen by all and sees all; view after view in the formula."""
    view = [1] * 5 + [0] * 3 + [2] * 7 + [3] * 4
    allow = torch.eye(4, dtype=torch.bool)
    allow[0], allow[:, 0] = True, True

    def formula(t):
        at, out = torch.tensor(view), torch.zeros_like(t["q"])
        for n in range(4):
            rows, columns = at == n, (at == n) | (at == 0) | (n == 0)
            part = softmax(scores(t["q"][:, rows], t["k"][:, columns]), t["v"][:, columns])
            out = out.index_add(1, rows.nonzero()[:, 0], part)
        return out

    ours = lambda t, backend: vitkern.attention(  # noqa: E731
        *(t[n] for n in "qkv"), mask=mask.Segments(ids(*view), ids(*view), allow), backend=backend
    )
    return System(qkv(19), ours, formula)


@system
def dino_detr() -> System:
    """Groups of noised queries see themselves and the matching queries (id 0), which see none of them; padded images."""
    group = torch.tensor([[1] * 6 + [2] * 6 + [0] * 5, [1] * 4 + [-1] * 2 + [2] * 4 + [-1] * 2 + [0] * 5])
    allow = torch.eye(3, dtype=torch.bool)
    allow[:, 0] = True

    def formula(t):
        parts = []
        for b in range(2):
            out = torch.zeros_like(t["q"][0])
            for n in range(3):
                rows, columns = group[b] == n, (group[b] == n) | (group[b] == 0)
                part = softmax(
                    *((scores(t["q"][b : b + 1, rows], t["k"][b : b + 1, columns])), t["v"][b : b + 1, columns])
                )
                out = out.index_add(0, rows.nonzero()[:, 0], part[0])
            parts.append(out)
        return torch.stack(parts)

    ours = lambda t, backend: vitkern.attention(  # noqa: E731
        *(t[n] for n in "qkv"), mask=mask.Segments(group, group, allow), backend=backend
    )
    return System(qkv(17), ours, formula)


@system
def mask2dit() -> System:
    """Two scenes: their texts (ids 0, 1) and videos (2, 3) see their own scene, videos see each other."""
    scene = [0] * 3 + [1] * 4 + [2] * 5 + [3] * 6
    allow = torch.eye(4, dtype=torch.bool)
    for text, video in ((0, 2), (1, 3)):
        allow[text, video] = allow[video, text] = True
    allow[2:, 2:] = True

    def formula(t):
        at = torch.tensor(scene)
        of_scene, is_video = at % 2, at >= 2
        seen = (of_scene[:, None] == of_scene) | (is_video[:, None] & is_video)
        return softmax(scores(t["q"], t["k"]), t["v"], seen)

    ours = lambda t, backend: vitkern.attention(  # noqa: E731
        *(t[n] for n in "qkv"), mask=mask.Segments(ids(*scene), ids(*scene), allow), backend=backend
    )
    return System(qkv(18), ours, formula)


@system
def s2lic() -> System:
    """The second parity of a checkerboard attends to the first, which sees nobody: an empty row of the table."""
    y, x = torch.meshgrid(torch.arange(4), torch.arange(5), indexing="ij")
    parity = ((y + x) % 2).flatten()
    allow = torch.tensor([[False, False], [True, False]])

    def formula(t):
        anchors = parity == 0
        part = softmax(scores(t["q"][:, ~anchors], t["k"][:, anchors]), t["v"][:, anchors])
        return torch.zeros_like(t["q"]).index_add(1, (~anchors).nonzero()[:, 0], part)

    ours = lambda t, backend: vitkern.attention(  # noqa: E731
        *(t[n] for n in "qkv"), mask=mask.Segments(parity[None], parity[None], allow), backend=backend
    )
    return System(qkv(20), ours, formula)


@system
def fast_metro() -> System:
    """Joints see everything, vertices of a ring their neighbours and the joints: one fixed tensor."""
    i = torch.arange(36)
    apart = (i[:, None] - i).abs() % 32
    seen = (apart <= 2) | (apart >= 30) | (i < 4) | (i < 4)[:, None]

    def formula(t):
        turned = (t[n].transpose(1, 2) for n in "qkv")
        return F.scaled_dot_product_attention(*turned, attn_mask=seen).transpose(1, 2)

    return System(
        qkv(36), lambda t, backend: vitkern.attention(*(t[n] for n in "qkv"), mask=seen, backend=backend), formula
    )


# other keys ----------------------------------------------------------------------------------------------------------------


@system
def pma_net() -> System:
    """Prototype memories behind the own keys, one set for the batch."""
    drawn = qkv(9) | {"k_m": normal(1, 6, 2, 8, seed=5), "v_m": normal(1, 6, 2, 8, seed=6)}

    def formula(t):
        k, v = (torch.cat((t[n], t[f"{n}_m"].expand(2, -1, -1, -1)), 1) for n in "kv")
        return softmax(scores(t["q"], k), v)

    ours = lambda t, backend: vitkern.attention(  # noqa: E731
        *(t[n] for n in "qkv"), extra_kv=(t["k_m"], t["v_m"]), backend=backend
    )
    return System(drawn, ours, formula)


@system
def crate() -> System:
    """One tensor is queries, keys and values: its gradient is the sum of the three."""
    drawn = {"v": normal(2, 17, 2, 8), "table": normal(7 * 3, 2, seed=1)}
    grid = (4, 2)

    def ours(t, backend):
        v, k = t["v"], t["v"][:, :8]
        table = bias.RelativePosition(t["table"], grid=grid)
        return (
            vitkern.attention(v, v, v, scale=0.4, backend=backend),
            vitkern.attention(k, k, v[:, 8:16], bias=table, backend=backend),
        )

    def formula(t):
        v, k = t["v"], t["v"][:, :8]
        y, x = torch.arange(8) // 2, torch.arange(8) % 2
        offset = t["table"][(y[:, None] - y + 3) * 3 + x[:, None] - x + 1].permute(2, 0, 1)
        return softmax(scores(v, v, 0.4), v), softmax(scores(k, k) + offset, v[:, 8:16])

    return System(drawn, ours, formula)


@system
def dab_detr() -> System:
    """Content and place by concatenation, so that keys are twice as wide as values; place scaled by the box."""
    drawn = qkv(6, 20, d=16) | {"v": normal(2, 20, 2, 8, seed=3), "size": normal(2, 6, 1, 1, seed=4).abs() + 0.5}

    def ours(t, backend):
        content, place = t["q"].chunk(2, -1)
        return vitkern.attention(torch.cat((content, place * t["size"]), -1), t["k"], t["v"], backend=backend)

    def formula(t):
        (c_q, p_q), (c_k, p_k) = (t[n].chunk(2, -1) for n in "qk")
        return softmax(scores(c_q, c_k, 0.25) + scores(p_q * t["size"], p_k, 0.25), t["v"])

    return System(drawn, ours, formula)


@system
def greenformers() -> System:
    """Linformer: projected keys and values."""
    drawn = qkv(12) | {"e": normal(5, 12, seed=5) / 3, "f": normal(5, 12, seed=6) / 3}

    def projected(t):
        return (torch.einsum("mn,bnhd->bmhd", t[w], t[n]) for w, n in (("e", "k"), ("f", "v")))

    def formula(t):
        k, v = projected(t)
        return softmax(scores(t["q"], k), v)

    return System(drawn, lambda t, backend: vitkern.attention(t["q"], *projected(t), backend=backend), formula)
