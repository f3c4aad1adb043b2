"""linear_attention where the weight of a key depends on its place: decays, causality and states.

Features are made by feature_rows (those with parameters by PyTorch), the sums by chain_sum and grid_sum in time linear in the
tokens. Where these have no kernel, and in the reference, they are sums over all pairs with the decays as a tensor.
"""

from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from vitkern import backends
from vitkern import decay as decays
from vitkern.ops import _call, _checks, chain_sum, feature_rows, grid_sum
from vitkern.ops._attention_modifier_checks import fields
from vitkern.ops._linear_lowering import NAME, Lowered, SoftmaxMap
from vitkern.reference.linear_attention import mapped, normalize, sequences, turn, weighted

ALL_PAIRS = 200  # tokens up to which sums over all pairs are as fast, where gradients are wanted (benchmarks/NOTES.md)


@dataclass(frozen=True)
class Placed:
    """Decays (their masks are averaged), the tokens of a causal block (0: every key is seen), and the state in front."""

    decays: tuple[Any, ...]
    block: int
    state: tuple[Tensor, Tensor, Tensor] | None

    @property
    def order(self) -> Tensor | None:
        return next((d.order for d in self.decays if isinstance(d, (decays.Retention, decays.Gated))), None)


def lower(
    lowered: Lowered, custom: Any, decay: Any, causal: Any, initial_state: Any, return_state: bool, cu_seqlens_k: Any
) -> Placed | None:
    """The checked options, or None where the call has none of them."""
    block = _block(causal)
    if decay is None and not block:
        if initial_state is not None:
            raise ValueError(f"{NAME}: initial_state must be None without causal, got a {type(initial_state).__name__}")
        return None
    each = tuple(decay) if isinstance(decay, (list, tuple)) else () if decay is None else (decay,)
    q, k = lowered.q, lowered.k
    if cu_seqlens_k is not None:
        raise ValueError(f"{NAME}: cu_seqlens_k must be None with decay or causal, got a tensor")
    if q.shape[:5] != k.shape[:5]:
        raise ValueError(f"{NAME}: k must have the tokens of q with decay or causal, got {_tokens(k)} and {_tokens(q)}")
    softmax = lowered.feature_map == "softmax" or isinstance(custom, SoftmaxMap)
    if block and (lowered.normalizer == "subtract" or softmax):
        raise ValueError(
            f"{NAME}: causal takes neither normalizer='subtract' nor the map 'softmax', whose sums run over all keys"
        )
    if return_state and not block:
        raise ValueError(
            f"{NAME}: return_state must be False with decay and causal=False: two directions end in no state"
        )
    for d in each:
        _check_decay(d, block, each, lowered)
    if len(each) > 1 and (return_state or initial_state is not None):
        raise ValueError(f"{NAME}: initial_state and return_state take one decay, got {len(each)}")
    if lowered.cu_q is not None:
        each = tuple(_batched(d) for d in each)
    return Placed(each, block, _state(initial_state, block, lowered))


def _batched(d: Any) -> Any:
    """The links of packed tokens with an axis of batch."""
    if not isinstance(d, decays.Gated):
        return d
    return decays.Gated(d.log_alpha[None], None if d.log_alpha_backward is None else d.log_alpha_backward[None])


def _tokens(x: Tensor) -> int:
    return x.shape[1] * x.shape[2] * x.shape[3] * x.shape[4]


def _block(causal: Any) -> int:
    if isinstance(causal, bool):
        return int(causal)
    if not isinstance(causal, int) or causal < 1:
        raise ValueError(
            f"{NAME}: causal must be a bool or the number of tokens of a block, at least 1, got {causal!r}"
        )
    return causal


def _check_decay(d: Any, block: int, each: tuple[Any, ...], lowered: Lowered) -> None:
    q = lowered.q
    heads, tokens, packed = q.shape[5], q.shape[2] * q.shape[4], lowered.cu_q is not None
    if not isinstance(d, decays.DECAYS):
        known = ", ".join(kind.__name__ for kind in decays.DECAYS)
        raise TypeError(
            f"{NAME}: decay must be one of vitkern.decay ({known}) or a list of these, got {type(d).__name__}"
        )
    name = f"decay {type(d).__name__}"
    if q.shape[1] * q.shape[3] != 1 and not packed:
        raise ValueError(f"{NAME}: window_size must be None with decay, got windows")
    if not isinstance(d, decays.Manhattan):
        fields("decay", d, q.device, NAME)
    if isinstance(d, (decays.Manhattan, decays.Polyline)):
        grid = d.grid
        if block or packed:
            raise ValueError(f"{NAME}: {name} takes neither causal nor cu_seqlens")
        if len(grid) != 2 or grid[0] * grid[1] != tokens:
            raise ValueError(f"{NAME}: the grid of {name} must have the {tokens} tokens of q, got {grid}")
    elif d.order is not None:
        if len(each) > 1:
            raise ValueError(f"{NAME}: {name} takes no order in a list of decays")
        if d.order.dtype != torch.int32 or tuple(d.order.shape) != (tokens,):
            raise TypeError(
                f"{NAME}: the order of {name} must be int32 [{tokens}], got {d.order.dtype} {list(d.order.shape)}"
            )
        if packed:
            raise ValueError(f"{NAME}: {name} takes no order with cu_seqlens")
    if isinstance(d, decays.Polyline):
        if d.paths not in decays.PATHS:
            raise ValueError(f"{NAME}: paths of {name} must be one of {decays.PATHS}, got {d.paths!r}")
        for side, chain in (("row", d.row), ("col", d.col)):
            _checks.shape(NAME, f"{side} of {name}", chain, (q.shape[0], *d.grid, heads), "[B, Hs, Ws, H]")
    elif isinstance(d, decays.Gated):
        lead = (tokens, heads) if packed else (q.shape[0], tokens, heads)
        wide = (*lead, q.shape[6])
        for links in (d.log_alpha, d.log_alpha_backward):
            if links is not None and tuple(links.shape) not in (lead, wide):
                wanted = f"{list(lead)} or, causal, {list(wide)}"
                raise ValueError(f"{NAME}: log_alpha of {name} must have shape {wanted}, got {list(links.shape)}")
            if links is not None and links.dim() > len(lead) and block != 1:
                raise ValueError(f"{NAME}: {name} takes a rate for each feature with causal=True alone")
    else:
        for rate in d.rates if isinstance(d, decays.Manhattan) else (d.rate,):
            _checks.parameter(NAME, f"rate of {name}", rate, q.device)
            _checks.shape(NAME, f"rate of {name}", rate, (heads,), "[H]")


def _state(given: Any, block: int, lowered: Lowered) -> tuple[Tensor, Tensor, Tensor] | None:
    if given is None:
        return None
    if not block:
        raise ValueError(f"{NAME}: initial_state must be None without causal, got a {type(given).__name__}")
    if not isinstance(given, (tuple, list)) or len(given) != 3:
        raise TypeError(
            f"{NAME}: initial_state must be the triple (S, z, n) that return_state gives, got {type(given).__name__}"
        )
    q = lowered.q
    count = q.shape[0] * q.shape[1] * q.shape[3] if lowered.cu_q is None else len(lowered.cu_q) - 1
    lead, width = (count, q.shape[5]), lowered.v.shape[6]
    for name, t, rest in (("S", given[0], "F E"), ("z", given[1], "F"), ("n", given[2], "")):
        _checks.parameter(NAME, f"{name} of initial_state", t, q.device)
        tail = tuple({"F": t.shape[2] if t.dim() > 2 else 0, "E": width}[letter] for letter in rest.split())
        _checks.shape(
            NAME, f"{name} of initial_state", t, (*lead, *tail), f"[S, H{''.join(', ' + x for x in rest.split())}]"
        )
    return given[0], given[1], given[2]


# the sums ---------------------------------------------------------------------------------------------------------------


def attend(lowered: Lowered, placed: Placed, backend: str | None) -> tuple[Tensor, Any]:
    """The output as the op gives it, and the state where the call is causal."""
    acc = torch.promote_types(lowered.q.dtype, torch.float32)
    valid = None if lowered.key_mask is None else sequences(lowered.key_mask)  # [S, N]
    summed = _Sums(placed, lowered.cu_q, backend, sequences(lowered.q))
    a, b, v = _rows(lowered, valid, acc, backend)  # [S, N, heads, width]
    group = a.shape[2] // b.shape[2]
    if group > 1:
        b, v = (t.repeat_interleave(group, 2) for t in (b, v))
    cos_q, sin_q, cos_k, sin_k = lowered.tables
    one = torch.ones_like(v[..., :1])  # [S, N, H, 1]
    start: list[Any] = [None] * 3 if placed.state is None else [t.to(acc) for t in placed.state]
    for name, t in (("S", start[0]), ("z", start[1])):
        if t is not None and t.shape[2] != a.shape[3]:
            raise ValueError(
                f"{NAME}: {name} of initial_state must have the {a.shape[3]} features of q, got {t.shape[2]}"
            )
    z: Any = None if start[1] is None else start[1][..., None]  # [S, H, F, 1]
    if cos_q is None:
        whole = None if start[0] is None else torch.cat((start[0], z), -1)
        out, last = summed(a, b, torch.cat((v, one), -1), whole)
        num, den = out[..., :-1], out[..., -1:]
        s, z = last[..., :-1], last[..., -1]
    else:
        turned = turn(a, cos_q, sin_q, lowered.half), turn(b, cos_k, sin_k, lowered.half)
        num, s = summed(*turned, v, start[0])
        den, z = summed(a, b, one, z)
        z = z[..., 0]
    each = one[:, :, :1] if valid is None else valid[..., None, None].to(acc)  # [S, N, 1, 1]
    count, total = summed.running(each, start[2])  # [S, N, 1|H, 1]
    values = num.new_zeros(1)
    if lowered.offset or lowered.normalizer == "subtract":
        values = summed.running(v, None)[0]
    num, den = num + lowered.offset * values, den + lowered.offset * count
    out = normalize(num, den, values, count, lowered.normalizer, lowered.eps, lowered.detach).to(lowered.v.dtype)
    batch, rows, wy, columns, wx = lowered.q.shape[:5]
    out = out.unflatten(0, (batch, rows, columns)).unflatten(3, (wy, wx)).transpose(2, 3)
    return out, (s, z, total.expand(s.shape[:2]))


def _rows(lowered: Lowered, valid: Tensor | None, acc: torch.dtype, backend: str | None) -> tuple[Tensor, ...]:
    """The features of q and k, and v: 0 where no key is, in the dtype of the sums."""
    q, k, v = (sequences(t) for t in (lowered.q, lowered.k, lowered.v))
    weight = None if lowered.key_weight is None else sequences(lowered.key_weight)  # [S, N, Hk]
    name, rate, scale = lowered.feature_map, lowered.rate, lowered.scale
    if name == "softmax":  # that of the keys runs over the tokens
        weight = None if weight is None else weight.to(acc)
        return mapped(q.to(acc), k.to(acc), v.to(acc), valid, weight, name, rate, scale)[:3]

    def rows(x: Tensor, mask: Tensor | None, by: Tensor | None, name: str, scale: float) -> Tensor:
        if mask is None and by is None and name == "identity" and scale == 1 and x.dtype == acc:
            return x
        return feature_rows.feature_rows(x, mask, by, name, rate, scale, backend=backend)

    return rows(q, None, None, name, scale), rows(k, valid, weight, name, 1.0), rows(v, valid, None, "identity", 1.0)


def explanation(lowered: Lowered, placed: Placed, backend: str | None) -> _call.Found:
    """Which back-end makes the sums; `lowered` stands for the features."""
    return _found(placed, lowered.cu_q, sequences(lowered.q), backend)


def _found(placed: Placed, cu: Tensor | None, a: Tensor, backend: str | None) -> _call.Found:
    on_grid = [isinstance(d, (decays.Manhattan, decays.Polyline)) for d in placed.decays]
    short = cu is None and a.shape[1] <= ALL_PAIRS and backends.needs_grad((a,))
    if short and backends.forced(backend) is None:
        backend = "reference"
    if any(on_grid):
        return _call.explanation(NAME, grid_sum.OP, (a, a, a, a[..., 0], a[..., 0], False), backend)
    return _call.explanation(NAME, chain_sum.OP, (a, a, a, None, None, None, None, False, False, False, 0), backend)


class _Sums:
    """``sum_j M_ij <a_i, b_j> c_j`` with the mean M of the decays of a call."""

    def __init__(self, placed: Placed, cu: Tensor | None, backend: str | None, a: Tensor):
        self.placed, self.cu, self.backend = placed, cu, backend
        self.dense = _found(placed, cu, a, backend)[0] == "reference"

    def __call__(self, a: Tensor, b: Tensor, c: Tensor, start: Tensor | None) -> tuple[Tensor, Tensor]:
        if self.dense:
            return self._by_pairs(a, b, c, start)
        found: list[Any] = [self._by_links(a, b, c, start, d) for d in self.placed.decays or (None,)]
        out = found[0][0] if len(found) == 1 else sum(f[0] for f in found) / len(found)
        return out, found[0][1]

    def running(self, x: Tensor, start: Tensor | None) -> tuple[Tensor, Tensor]:
        """Sums of x [S, N, ...] over the keys that each query sees, and over all of each sequence, [S, H|1]."""
        order = self.placed.order
        own, begin, stop = chain_sum.spans(x.shape[1], self.cu, self.placed.block, x.device)
        walked = x if order is None else x[:, order.long()]
        before = torch.nn.functional.pad(walked.movedim(1, -1).cumsum(-1), (1, 0)).movedim(-1, 1)  # [S, N + 1, ...]
        found = before[:, stop] - before[:, begin]
        if order is not None:
            found = found[:, torch.argsort(order.long())]
        total = (
            before[:, -1] if self.cu is None else (before[:, self.cu[1:].long()] - before[:, self.cu[:-1].long()])[0]
        )
        total = total[..., 0]
        if start is not None:
            found = found + (start[own][None] if self.cu is not None else start[:, None])[..., None]
            total = total + start
        return found, total

    def _by_links(self, a: Tensor, b: Tensor, c: Tensor, start: Tensor | None, d: Any) -> tuple[Tensor, Tensor]:
        if isinstance(d, (decays.Manhattan, decays.Polyline)):
            return self._on_grid(a, b, c, d).flatten(1, 2), c.new_zeros(a.shape[0], a.shape[2], 1, 1)  # no state
        link, back, order = _links(d, a)
        block, sums = self.placed.block, partial(chain_sum.chain_sum, a, b, c, backend=self.backend)
        out, last = sums(link, start, order, self.cu)
        if block != 1:
            out = out + sums(back, None, order, self.cu, reverse=True, strict=True, block=block)[0]
        return out, last

    def _on_grid(self, a: Tensor, b: Tensor, c: Tensor, d: Any) -> Tensor:
        a, b, c = (t.unflatten(1, d.grid) for t in (a, b, c))  # [B, Hs, Ws, H, .]
        if isinstance(d, decays.Manhattan):
            col, row = (r.expand(a.shape[:4]) for r in d.rates)
            return grid_sum.grid_sum(a, b, c, row, col, backend=self.backend)
        found = []
        if d.paths != "col_first":
            found.append(grid_sum.grid_sum(a, b, c, d.row, d.col, backend=self.backend))
        if d.paths != "row_first":
            found.append(grid_sum.grid_sum(a, b, c, d.row, d.col, True, backend=self.backend))
        return found[0] if len(found) == 1 else (found[0] + found[1]) / 2

    def _by_pairs(self, a: Tensor, b: Tensor, c: Tensor, start: Tensor | None) -> tuple[Tensor, Tensor]:
        if self.cu is None:
            return self._pairs_of(a, b, c, start, slice(None))
        bounds = self.cu.tolist()
        found = []
        for w, (i, j) in enumerate(zip(bounds[:-1], bounds[1:], strict=True)):
            found.append(
                self._pairs_of(
                    a[:, i:j], b[:, i:j], c[:, i:j], None if start is None else start[w : w + 1], slice(i, j)
                )
            )
        return torch.cat([f[0] for f in found], 1), torch.cat([f[1] for f in found])

    def _pairs_of(self, a: Tensor, b: Tensor, c: Tensor, start: Tensor | None, part: slice) -> tuple[Tensor, Tensor]:
        tokens, order, block = a.shape[1], self.placed.order, self.placed.block
        place = torch.arange(tokens, device=a.device) if order is None else torch.argsort(order.long())
        m, reach = a.new_ones(1, 1, tokens, tokens), a.new_ones(1, 1, tokens, 1)
        if self.placed.decays:
            each = [_part(d, part) for d in self.placed.decays]
            m = sum(d.dense(a, b) for d in each) / len(each)
            if block:
                reach = _reach(each[0], a)
        if block:
            hidden = place[:, None] // block < place // block  # [N, N]
            m = m.masked_fill(hidden.reshape(tokens, tokens, *(1,) * (m.dim() - 4)), 0.0)
        end = int(place.argmax()) if tokens else 0
        return weighted(a, b, c, m.to(a.dtype), start, reach, end)


def _part(d: Any, part: slice) -> Any:
    """The decay of one packed sequence."""
    if isinstance(d, decays.Gated) and part != slice(None):
        back = None if d.log_alpha_backward is None else d.log_alpha_backward[:, part]
        return decays.Gated(d.log_alpha[:, part], back)
    return d


def _links(d: Any, a: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """The links of a chain forwards and backwards, [B, N, H, 1|F], and its order."""
    if d is None:
        return None, None, None
    if isinstance(d, decays.Retention):
        link = d.rate.to(a.dtype).expand(a.shape[:3])[..., None]
        return link, link, d.order
    found = []
    for links in (d.log_alpha, d.log_alpha if d.log_alpha_backward is None else d.log_alpha_backward):
        links = links.to(a.dtype)
        found.append(links if links.dim() == a.dim() else links[..., None])
    return found[0], found[1], d.order


def _reach(d: Any, a: Tensor) -> Tensor:
    """What is left of an initial state at every token, [B|1, H, N, 1|F]."""
    link, _, order = _links(d, a)
    assert link is not None
    walked = link if order is None else link[:, order.long()]
    along = walked.cumsum(1)
    if order is not None:
        along = along[:, torch.argsort(order.long())]
    return along.exp().transpose(1, 2)
