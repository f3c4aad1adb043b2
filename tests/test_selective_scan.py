"""selective_scan and selective_scan_2d: the recurrence element by element, edges and refusals."""

import math

import pytest
import torch
from agreement import agree

import vitkern
from vitkern import testing
from vitkern.testing import assert_close_to_oracle

BACKENDS = ["reference", *testing.backends()]
ON = pytest.mark.parametrize("backend", BACKENDS)
F = torch.nn.functional


def recurrence(u, delta, A, B, C, D=None, z=None, delta_bias=None, delta_softplus=False, last=False):
    """The loop as published (Mamba's reference), on [B, L, C] and one group, number by number."""
    if delta_bias is not None:
        delta = delta + delta_bias
    if delta_softplus:
        delta = F.softplus(delta)
    h = u.new_zeros(u.shape[0], *A.shape)
    ys = []
    for t in range(u.shape[1]):
        decay = torch.exp(torch.einsum("bd,dn->bdn", delta[:, t], A))
        h = decay * h + torch.einsum("bd,bn,bd->bdn", delta[:, t], B[:, t], u[:, t])
        ys.append(torch.einsum("bdn,bn->bd", h, C[:, t]))
    y = torch.stack(ys, 1) if D is None else torch.stack(ys, 1) + u * D
    y = y if z is None else y * F.silu(z)
    return (y, h) if last else y


def inputs(batch=2, length=9, channels=6, states=3, seed=0):
    g = torch.Generator().manual_seed(seed)

    def normal(*shape):
        return torch.randn(shape, generator=g, dtype=torch.float64).requires_grad_()

    made = {"u": normal(batch, length, channels), "delta": normal(batch, length, channels)}
    made["A"] = (-torch.rand(channels, states, generator=g, dtype=torch.float64) - 0.1).requires_grad_()
    made |= {"B": normal(batch, length, states), "C": normal(batch, length, states)}
    return made | {"D": normal(channels), "z": normal(batch, length, channels), "delta_bias": normal(channels)}


@ON
@pytest.mark.parametrize("softplus", [False, True])
def test_mamba(backend, softplus):
    given = inputs(length=70)
    if not softplus:
        given["delta"] = given["delta"].detach().abs().requires_grad_()
        del given["delta_bias"]
    got, state = vitkern.selective_scan(**given, delta_softplus=softplus, return_state=True, backend=backend)
    want, last = recurrence(**given, delta_softplus=softplus, last=True)
    agree(got, want, list(given.values()))
    leaves = [t for n, t in given.items() if n not in ("C", "D", "z")]
    agree(state, last, leaves)  # the state's gradient reaches what made it


@ON
def test_vim_adds_a_turned_scan(backend):
    given = inputs()
    turned = {n: t.flip(1) if n in ("u", "delta", "B", "C", "z") else t for n, t in given.items()}
    back = recurrence(**turned).flip(1)
    agree(vitkern.selective_scan(**given, route="backward", backend=backend), back, list(given.values()))
    both = vitkern.selective_scan(**given, route="both", backend=backend)
    agree(both, recurrence(**given) + back, list(given.values()))


@ON
@pytest.mark.parametrize("shared", ["uz", "u", "z", ""])
def test_routes_may_have_their_own_inputs(backend, shared):
    first, second = inputs(), inputs(seed=1)
    second |= {n: first[n] for n in shared}
    rows = ("u", "delta", "B", "C", "z")
    own = {n: torch.stack((first[n], second[n]), 2 if n in rows else 0) for n in first if n not in shared}
    own |= {n: t.unsqueeze(3) for n, t in own.items() if n in "BC"}
    got = vitkern.selective_scan(**{n: first[n] for n in shared}, **own, route="both", backend=backend)
    turned = {n: t.flip(1) if n in rows else t for n, t in second.items()}
    leaves = {id(t): t for t in (*first.values(), *second.values())}
    agree(got, recurrence(**first) + recurrence(**turned).flip(1), list(leaves.values()))


@ON
@pytest.mark.parametrize("grid", [(5, 9), (4, 4), (1, 7)])
@pytest.mark.parametrize("low_rank", [False, True])
def test_vmamba_on_maps_that_are_not_square(backend, grid, low_rank):
    """Trap 29: four routes as copies of the map: its rows, its columns, and both turned around."""
    g = torch.Generator().manual_seed(2)
    high, wide, c, s = *grid, 6, 2
    u = torch.randn(2, high, wide, c, generator=g, dtype=torch.float64).requires_grad_()
    x = torch.randn(2, high, wide, 4, 3, generator=g, dtype=torch.float64).requires_grad_()
    weight = torch.randn(4, c, 3, generator=g, dtype=torch.float64).requires_grad_()
    B, C = (torch.randn(2, high, wide, 4, s, generator=g, dtype=torch.float64).requires_grad_() for _ in range(2))
    A = (-torch.rand(4, c, s, generator=g, dtype=torch.float64)).requires_grad_()
    D, bias = (torch.randn(4, c, generator=g, dtype=torch.float64).requires_grad_() for _ in range(2))
    full = torch.einsum("bhwrk,rck->bhwrc", x, weight)
    delta = {"delta": x, "delta_weight": weight} if low_rank else {"delta": full}
    options = {"D": D, "delta_bias": bias, "delta_softplus": True, "backend": backend}
    got = vitkern.selective_scan_2d(u, A=A, B=B, C=C, **delta, **options)

    def there(t, r):
        t = t.transpose(1, 2) if r % 4 in (1, 3) else t
        t = t.flatten(1, 2)
        return t.flip(1) if r >= 2 else t

    def back(y, r):
        y = y.flip(1) if r >= 2 else y
        return y.unflatten(1, (wide, high)).transpose(1, 2) if r in (1, 3) else y.unflatten(1, (high, wide))

    want = 0  # VMamba's order: rows, columns, and then both reversed
    for r, own in enumerate((0, 2, 1, 3)):
        parts = [there(t, r) for t in (u, full[..., own, :], B[..., own, :], C[..., own, :])]
        y = recurrence(parts[0], parts[1], A[own], *parts[2:], D[own], delta_bias=bias[own], delta_softplus=True)
        want = want + back(y, r)
    agree(got, want, [u, x, weight, A, B, C, D, bias])


@ON
def test_reductions_and_routes_by_index(backend):
    g = torch.Generator().manual_seed(3)
    u = torch.randn(1, 3, 4, 5, generator=g, dtype=torch.float64)
    delta = torch.rand(1, 3, 4, 2, 5, generator=g, dtype=torch.float64)
    A, B = -torch.rand(2, 5, 2, generator=g).double(), torch.randn(1, 3, 4, 2, 2, generator=g, dtype=torch.float64)
    z = torch.randn(1, 3, 4, 5, generator=g, dtype=torch.float64)
    leaves = [t.requires_grad_() for t in (u, delta, A, B, z)]
    names = ("row_reverse", "col")
    pixel = torch.arange(12, dtype=torch.int32)
    index = (pixel.flip(0), pixel.view(3, 4).t().flatten())
    stack = vitkern.selective_scan_2d(u, delta, A, B, B, z=z, routes=names, reduce="stack", backend=backend)
    by_index = vitkern.selective_scan_2d(u, delta, A, B, B, z=z, routes=index, reduce="stack", backend=backend)
    assert torch.equal(stack, by_index) and stack.shape == (1, 3, 4, 2, 5)
    for reduce, want in (("sum", stack.sum(3)), ("mean", stack.mean(3))):
        got = vitkern.selective_scan_2d(u, delta, A, B, B, z=z, routes=names, reduce=reduce, backend=backend)
        agree(got, want, leaves)
    alone = [
        vitkern.selective_scan_2d(u, delta[..., r : r + 1, :], A[r : r + 1], B[..., r : r + 1, :], B[..., r : r + 1, :],
                                  z=z, routes=names[r : r + 1], backend=backend)
        for r in range(2)
    ]  # fmt: skip
    agree(stack, torch.stack(alone, 3), leaves)


@ON
def test_a_sequence_in_two_parts(backend):
    """Trap 30: the state of the first part starts the second, and carries the gradient."""
    given = inputs(length=11)
    cut = {"u", "delta", "B", "C", "z"}
    parts = [{n: t[:, at] if n in cut else t for n, t in given.items()} for at in (slice(4), slice(4, None))]
    first, state = vitkern.selective_scan(**parts[0], return_state=True, backend=backend)
    second = vitkern.selective_scan(**parts[1], initial_state=state, backend=backend)
    agree(torch.cat((first, second), 1), recurrence(**given), list(given.values()))


@ON
@pytest.mark.parametrize("route", ["forward", "backward", "both"])
def test_packed_sequences_are_separate_calls(backend, route):
    lengths = (3, 0, 40, 1)
    given = inputs(batch=1, length=sum(lengths))
    rows = {n: t[0] if n in ("u", "delta", "B", "C", "z") else t for n, t in given.items()}
    cu = torch.tensor((0, *lengths)).cumsum(0).int()
    got = vitkern.selective_scan(**rows, cu_seqlens=cu, route=route, backend=backend)
    want = []
    for a, b in zip(cu.tolist(), cu.tolist()[1:], strict=False):
        part = {n: t[:, a:b] if n in ("u", "delta", "B", "C", "z") else t for n, t in given.items()}
        want.append(vitkern.selective_scan(**part, route=route, backend="reference")[0])
    agree(got, torch.cat(want), list(given.values()))


@ON
def test_softplus_around_its_threshold(backend):
    """Trap 28: above 20 it is the identity; far below 0 it is exp, which ln(1 + x) would round to 0."""
    delta = torch.tensor([-40.0, -20.0, -1.0, 0.0, 19.0, 20.0, 21.0, 500.0])[None, :, None]
    one = torch.ones(1, 8, 1)
    got = vitkern.selective_scan(one, delta, torch.zeros(1, 1), one, one, delta_softplus=True, backend=backend)
    exact, eager = (
        F.softplus(d)[0, :, 0].cumsum(0).log() for d in (delta.double(), delta)
    )  # logs: each to its own size
    assert_close_to_oracle("softplus", got[0, :, 0].log(), exact, eager)


@ON
def test_decays_that_vanish_and_explode(backend):
    rates = torch.tensor([-200.0, -88.5, -87.0, 0.0, 85.0, 100.0])
    one, none = torch.ones(1, 1, 1), torch.zeros(1, 1, 6)
    first = torch.ones(1, 1, 6)
    _, state = vitkern.selective_scan(
        one, one, rates[None], none, none, initial_state=first, return_state=True, backend=backend
    )
    torch.testing.assert_close(state[0, 0], rates.exp())


@ON
def test_what_an_earlier_call_left_is_not_read(backend):
    """Blocks of channels are padded: their memory, last used for NaN, must count for nothing."""

    def gradients(channels, fill):
        g = torch.Generator().manual_seed(7)
        u, delta = (torch.randn(1, 5, channels, generator=g).add(fill).requires_grad_() for _ in range(2))
        B, C = (torch.randn(1, 5, 2, generator=g).add(fill).requires_grad_() for _ in range(2))
        out = vitkern.selective_scan(u, delta, -torch.ones(channels, 2), B, C, delta_softplus=True, backend=backend)
        return torch.autograd.grad(out.sum(), (u, delta, B, C))

    for _ in range(3):
        gradients(64, math.nan)
        assert all(t.isfinite().all() for t in gradients(3, 0.0))


@ON
def test_groups_and_states_that_do_not_decay(backend):
    g = torch.Generator().manual_seed(4)
    u, delta = (torch.randn(2, 7, 6, generator=g, dtype=torch.float64) for _ in range(2))
    B, C = (torch.randn(2, 7, 3, 2, generator=g, dtype=torch.float64) for _ in range(2))
    A = torch.zeros(6, 2, dtype=torch.float64)
    got = vitkern.selective_scan(u, delta, A, B, C, backend=backend)
    parts = [
        recurrence(*(t[..., 2 * i : 2 * i + 2] for t in (u, delta)), A[:2], B[:, :, i], C[:, :, i]) for i in range(3)
    ]
    torch.testing.assert_close(got, torch.cat(parts, -1))


def test_nothing_and_an_empty_batch():
    for batch, length in ((0, 4), (2, 0)):
        u = torch.zeros(batch, length, 3, requires_grad=True)
        b = torch.zeros(batch, length, 2)
        out = vitkern.selective_scan(u, u, torch.zeros(3, 2), b, b)
        out.sum().backward()
        assert out.shape == u.shape and u.grad.shape == u.shape


U, S = torch.zeros(2, 5, 6), torch.zeros(2, 5, 3)
CALL = {"u": U, "delta": U, "A": torch.zeros(6, 3), "B": S, "C": S}


@pytest.mark.parametrize(
    "changed, kind, sentence",
    [
        ({"u": U[0]}, ValueError, r"u must have shape \[B, L, C\], with 2 routes behind L for"),
        ({"delta": U[..., :5]}, ValueError, r"delta must have the channels of u \(6\), got 5"),
        ({"delta": U[:, :4]}, ValueError, r"delta must have the tokens of u, \[2, 5\], got \[2, 4, 6\]"),
        ({"A": torch.zeros(5, 3)}, ValueError, r"A must have shape \[C, S\] = \[6, 'S'\]"),
        ({"C": S[..., :2]}, ValueError, "C must have the shape of B"),
        ({"B": S.double()}, TypeError, r"B must have the dtype of u \(torch.float32\), got torch.float64"),
        ({"A": torch.zeros(6, 4)}, ValueError, r"B must have the 1 to 256 states of A \(4\), got 3"),
        ({"B": torch.zeros(2, 5, 4, 3), "C": torch.zeros(2, 5, 4, 3)}, ValueError, "the groups of B must divide"),
        ({"D": torch.zeros(5)}, ValueError, r"D must have shape \[C\] = \[6\]"),
        ({"z": U[..., :3]}, ValueError, "z must have shape that of u"),
        ({"route": "up"}, ValueError, "route must be 'forward', 'backward' or 'both', got 'up'"),
        ({"delta_softplus": 1}, TypeError, "delta_softplus must be a bool, got 1"),
        ({"initial_state": torch.zeros(2, 6, 4)}, ValueError, "initial_state must have shape"),
        (
            {"cu_seqlens": torch.zeros(2, dtype=torch.int32)},
            ValueError,
            r"u must have shape \[T, C\], with 2 routes behind T for",
        ),
    ],
)
def test_refusals_are_sentences(changed, kind, sentence):
    with pytest.raises(kind, match=sentence):
        vitkern.selective_scan(**CALL | changed)


M = {"u": torch.zeros(1, 2, 3, 4), "delta": torch.zeros(1, 2, 3, 1, 4), "A": torch.zeros(1, 4, 2)}
M |= {"B": torch.zeros(1, 2, 3, 1, 2), "C": torch.zeros(1, 2, 3, 1, 2), "routes": ("row",)}


@pytest.mark.parametrize(
    "changed, kind, sentence",
    [
        ({"u": U}, ValueError, r"u must have shape \[B, Hs, Ws, C\], got \[2, 5, 6\]"),
        ({"routes": ("diagonal",)}, ValueError, "routes must be 'row', 'row_reverse', 'col', 'col_reverse' or index"),
        ({"routes": "row"}, TypeError, "routes must be a tuple of names or index tensors, got 'row'"),
        ({"routes": (torch.zeros(6, dtype=torch.int32),)}, ValueError, "routes must be permutations of the 6 pixels"),
        ({"routes": ("row", "col")}, ValueError, r"delta must have shape \[B, Hs, Ws, R, C\] = \[1, 2, 3, 2, 4\]"),
        ({"A": torch.zeros(2, 4, 2)}, ValueError, r"A must have shape \[R, C, S\] = \[1, 4, 'S'\]"),
        ({"B": torch.zeros(1, 2, 3, 2)}, ValueError, r"B must have shape \[B, Hs, Ws, R, G, S\]"),
        ({"reduce": "max"}, ValueError, "reduce must be 'sum', 'mean' or 'stack', got 'max'"),
        ({"delta_weight": torch.zeros(1, 4, 3)}, ValueError, r"delta_weight must have shape \[R, C, K\] = \[1, 4, 4\]"),
    ],
)
def test_refusals_of_maps(changed, kind, sentence):
    with pytest.raises(kind, match=sentence):
        vitkern.selective_scan_2d(**M | changed)


def test_what_runs_is_explained():
    assert vitkern.explain(vitkern.selective_scan, **CALL)
    assert vitkern.explain(vitkern.selective_scan_2d, **M, D=torch.zeros(1, 4))
    assert math.isfinite(float(vitkern.selective_scan_2d(**M).sum()))
