"""window_attention in Triton, interpreted on the CPU, against the reference in float64. Run by tests/test_triton.py."""

import math

import pytest
import torch

from vitkern.reference.window_attention import window_attention as reference
from vitkern.testing import assert_close_to_oracle, poisoned
from vitkern.triton_kernels import _host, _reduce
from vitkern.triton_kernels import window_attention as forward
from vitkern.triton_kernels import window_attention_bwd as backward

GRADIENTS = ("dq", "dk", "dv", "dbias", "dlogit_scale", "dk_pad", "dv_pad")
INPUTS = (0, 1, 2, 3, 5, 6, 7)  # their places among the arguments
ONE_TILE = {
    "forward": [{"block_m": 64, "block_n": 64, "warps": 4, "stages": 2, "programs": 3}],
    "backward_window": [{"block": 64, "warps": 4, "stages": 1, "programs": 3}],
}
TILES = {"block_m": 16, "block_n": 32, "warps": 4, "stages": 1, "programs": 20}
SMALL_TILES = {x: [TILES] for x in ("forward", "backward_queries", "backward_keys", "backward_bias")} | {
    "backward_window": [{"block": 0}],
}


@pytest.fixture(autouse=True)
def poison():
    """Whatever the launch functions allocate starts as NaN."""
    with poisoned():
        yield


@pytest.fixture
def tuned(monkeypatch):
    """Replaces the configuration table; kernels that a table leaves out keep the shipped rows for wide windows."""
    shipped = _host.tables("window_attention")["default"]
    tiles = {x: [TILES | {"block_n": 64, "block_m": 64}] for x in shipped if x != "backward_window"}

    def use(table):
        monkeypatch.setattr(_host, "tables", lambda op: {"default": shipped | tiles | table})
        _host.config.cache_clear()

    yield use
    _host.config.cache_clear()


def arguments(
    L=(7, 9),
    window=(4, 5),
    shift=(2, 2),
    H=2,
    Hk=None,
    D=16,
    Dv=None,
    B=1,
    dtype=torch.float32,
    bias="dense",
    bias_dtype=torch.float32,
    roll_first=False,
    pads="vectors",
    mask_value=-100.0,
    tau=None,
    dropout=0.0,
    scale=None,
    seed=0,
):
    """The arguments of fwd, in its order."""
    g = torch.Generator().manual_seed(seed)
    n, Hk, Dv = math.prod(window), Hk or H, Dv or D

    def random(*shape, dtype=dtype):
        return torch.randn(shape, generator=g).to(dtype)

    q, k, v = random(B, *L, H, D), random(B, *L, Hk, D), random(B, *L, Hk, Dv)
    index = torch.randint(0, 2 * n - 1, (n, n), generator=g, dtype=torch.int32) if bias == "table" else None
    values = {
        None: lambda: None,
        "dense": lambda: random(H, n, n, dtype=bias_dtype),
        "table": lambda: random(2 * n - 1, H, dtype=bias_dtype),
        "shared": lambda: random(1, n, n, dtype=bias_dtype).expand(H, n, n),
        "keys": lambda: random(H, 1, n, dtype=bias_dtype).expand(H, n, n),
        "hiding": lambda: random(H, n, n).masked_fill(torch.rand(H, n, n, generator=g) < 0.4, -math.inf),
    }[bias]()
    tau = None if tau is None else torch.tensor(tau).expand(H) if isinstance(tau, float) else torch.tensor(tau)
    k_pad, v_pad = (random(Hk, D), random(Hk, Dv)) if pads == "vectors" else (None, None)
    return [
        q,
        k,
        v,
        values,
        index,
        tau,
        k_pad,
        v_pad,
        torch.tensor([0x123456789ABCDEF + seed, 3]) if dropout else None,
        list(window),
        list(shift),
        roll_first,
        pads is not None,
        D**-0.5 if scale is None else scale,
        mask_value,
        math.log(100.0),
        1e-12,
        dropout,
    ]


def wide(args):
    return [x.double() if isinstance(x, torch.Tensor) and x.is_floating_point() else x for x in args]


def reference_gradients(args, dout, dlse):
    leaves = [args[n].detach().clone().requires_grad_() if args[n] is not None else None for n in INPUTS]
    filled = list(args)
    for n, x in zip(INPUTS, leaves, strict=True):
        filled[n] = x
    out, lse = reference(*filled)
    loss = (out * dout).sum() if dout is not None else 0.0
    if dlse is not None:
        loss = loss + (lse * dlse)[lse > -math.inf].sum()
    loss.backward()
    return [None if x is None else torch.zeros_like(x) if x.grad is None else x.grad for x in leaves]


def check(args, dout="random", dlse="random", outputs=(None, None, None), repeat=False):
    """Forward and backward against the oracle."""
    v = args[2]
    out, lse = forward.fwd(*args)
    same, oracle = reference(*args), reference(*wide(args))
    assert_close_to_oracle("out", out, oracle[0], same[0])
    assert_close_to_oracle("lse", lse, oracle[1], same[1])
    assert out.is_contiguous() and lse.is_contiguous()
    g = torch.Generator().manual_seed(9)
    if isinstance(dout, str):
        dout = torch.randn(out.shape, generator=g).to(v.dtype)
    if isinstance(dlse, str):
        dlse = torch.randn(lse.shape, generator=g)
    need = [True] * 7
    assert not forward.supported(*args)
    got = backward.bwd(dout, dlse, lse, *args, need, *outputs)
    same = reference_gradients(args, dout, dlse)
    oracle = reference_gradients(wide(args), *[None if x is None else x.double() for x in (dout, dlse)])
    for name, x, y, z in zip(GRADIENTS, got, same, oracle, strict=True):
        if z is None:
            assert x is None
        else:
            assert x.dtype == y.dtype
            assert_close_to_oracle(name, x, z, y, gradient=True)
    if repeat:
        again = backward.bwd(dout, dlse, lse, *args, need)
        assert all(x is None or torch.equal(x, y) for x, y in zip(again, got, strict=True))


GEOMETRY = {
    "1-D": dict(L=(23,), window=(8,), shift=(4,)),
    "1-D last": dict(L=(24,), window=(8,), shift=(7,)),
    "3-D": dict(L=(3, 5, 3), window=(2, 3, 2), shift=(1, 0, 1), H=1),
    "4-D": dict(L=(2, 3, 2, 3), window=(2, 2, 1, 2), shift=(1, 1, 0, 1), H=1),
    "no shift": dict(shift=(0, 0)),
    "one axis": dict(shift=(3, 0)),
    "last": dict(shift=(3, 4)),
    "roll first": dict(roll_first=True),
    "roll first last": dict(roll_first=True, shift=(3, 4)),
    "divides": dict(L=(8, 10)),
    "small map": dict(L=(3, 7), shift=(2, 2)),
    "small map roll first": dict(L=(3, 7), shift=(2, 2), roll_first=True),
    "one token": dict(L=(1, 1)),
    "images": dict(B=3, L=(4, 9)),
    "swin": dict(L=(9, 10), window=(7, 7), shift=(3, 3), bias="table"),
}
OPTIONS = {
    "no bias": dict(bias=None),
    "table": dict(bias="table"),
    "table half": dict(bias="table", bias_dtype=torch.float16),
    "shared bias": dict(bias="shared"),
    "key bias": dict(bias="keys"),
    "bias hides": dict(bias="hiding"),
    "mask -200": dict(mask_value=-200.0),
    "mask hides": dict(mask_value=-math.inf),
    "pads zero": dict(pads="zero"),
    "pads hidden": dict(pads=None),
    "pads hidden, mask hides": dict(pads=None, mask_value=-math.inf, roll_first=True),
    "cosine": dict(tau=(1.0, 3.0), H=2),
    "cosine at and above its maximum": dict(tau=(math.log(100.0), 5.0), dtype=torch.float32),
    "cosine, pads zero": dict(tau=(2.0, 0.5), pads="zero"),
    "dropout": dict(dropout=0.3),
    "dropout table pads": dict(dropout=0.7, bias="table", pads=None),
    "scale 0": dict(scale=0.0),
    "scale": dict(scale=1.3),
    "groups": dict(H=4, Hk=2, dropout=0.2, bias="table", L=(4, 7)),
    "one key head": dict(H=3, Hk=1, tau=(1.0, 2.0, 5.0), L=(5, 5)),
}


@pytest.mark.parametrize("name", GEOMETRY)
def test_geometry(name, tuned):
    tuned(ONE_TILE)
    check(arguments(**GEOMETRY[name], dtype=torch.float16))


@pytest.mark.parametrize("name", OPTIONS)
def test_options(name, tuned):
    tuned(ONE_TILE)
    check(arguments(**OPTIONS[name]))


@pytest.mark.parametrize(
    "name", ["no bias", "table", "bias hides", "mask hides", "pads zero", "cosine", "dropout", "groups"]
)
def test_options_in_small_tiles(name, tuned):
    tuned(SMALL_TILES)
    check(arguments(**{"L": (5, 7), "H": 1, "dtype": torch.float16} | OPTIONS[name]), repeat=name == "table")


@pytest.mark.parametrize(
    "D, Dv", [(1, 8), (8, 1), (15, 24), (24, 15), (32, 48), (48, 32), (64, 96), (128, 64), (256, 256)]
)
def test_widths(D, Dv, tuned):
    tuned(ONE_TILE)
    check(arguments(D=D, Dv=Dv, H=1, L=(7, 6), dtype=torch.float16))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_shipped_configuration(dtype):
    check(arguments(H=1, L=(5, 5), D=32, bias="table", dtype=dtype), repeat=True)


@pytest.mark.parametrize(
    "case",
    [
        dict(L=(13,), window=(70,), shift=(9,), pads=None, H=1),
        dict(L=(10, 13), window=(9, 8), shift=(4, 4), bias="table", H=1, dropout=0.1),
        dict(L=(9, 9), window=(12, 12), shift=(6, 0), tau=(2.0,), H=1, roll_first=True),
    ],
    ids=["70", "72", "144"],
)
def test_several_tiles(case, tuned):
    tuned({})
    check(arguments(**case))


@pytest.mark.parametrize("table", [ONE_TILE, SMALL_TILES], ids=["one tile", "small tiles"])
def test_gradient_stops_above_the_maximum_of_tau(table, tuned):
    """Keys that nearly agree keep the softmax open at a scale of 100, so that tau has a gradient worth comparing."""
    tuned(table)
    args = arguments(tau=(math.log(100.0), 4.7), L=(4, 5), shift=(0, 0), dtype=torch.float32)
    args[1] = 1.0 + 0.01 * args[1]
    check(args)
    lse = forward.fwd(*args)[1]
    dtau = backward.bwd(torch.ones_like(args[2]) * args[2], None, lse, *args, [False] * 4 + [True, False, False])[4]
    assert dtau[0] != 0.0 and dtau[1] == 0.0


def test_343_tokens(tuned):
    tuned({"forward": [TILES | {"block_m": 128, "block_n": 128}]})
    check(arguments(L=(7, 7, 8), window=(7, 7, 7), shift=(3, 3, 3), H=1, bias="table"))


def test_table_gradient_of_a_long_index(monkeypatch):
    index = torch.randint(0, 40, (30, 60), dtype=torch.int32)[:, ::2]
    dense = torch.randn(2, 30, 30)
    want, eager = (
        torch.zeros(45, 2, dtype=dtype).index_add(0, index.flatten().long(), dense.flatten(1).T.to(dtype))
        for dtype in (torch.float64, torch.float32)
    )
    scanned = _reduce.table_gradient(dense, index, 45, torch.float32)
    monkeypatch.setattr(_reduce, "SCAN_LIMIT", 0)
    gathered = _reduce.table_gradient(dense, index, 45, torch.float32)
    for got in (scanned, gathered):
        assert_close_to_oracle("table", got, want, eager, gradient=True)


def test_many_parts_are_added():
    parts = torch.randn(150, 3, 70)
    added = _reduce.add_parts(parts, torch.float32)
    assert_close_to_oracle("sum", added, parts.double().sum(0), parts.sum(0), gradient=True)


@pytest.mark.parametrize("table", [ONE_TILE, SMALL_TILES], ids=["one tile", "small tiles"])
def test_strides(table, tuned):
    """Packed inputs, packed gradients, an expanded dout, a channels-first view, a broadcast image."""
    tuned(table)
    args = arguments(dtype=torch.float16, D=8, B=2, L=(4, 6))
    packed = torch.stack(args[:3], 3)  # [B, L0, L1, 3, H, D]
    args[:3] = packed.unbind(3)
    grads = torch.full_like(packed, math.nan)
    out = forward.fwd(*args)[0]
    check(args, dout=torch.randn(8).half().expand(out.shape), outputs=grads.unbind(3))
    assert grads.isfinite().all()
    first = [torch.empty_like(x.permute(0, 3, 4, 1, 2).contiguous()).copy_(x.permute(0, 3, 4, 1, 2)) for x in args[:3]]
    args[:3] = [x.permute(0, 3, 4, 1, 2) for x in first]
    args[2] = args[2][:1].expand_as(args[2])
    check(
        args,
        dout=torch.randn(2, 2, 8, 4, 6).half().permute(0, 3, 4, 1, 2),
        dlse=torch.randn(2, 2, 4, 6).permute(0, 2, 3, 1),
    )


@pytest.mark.parametrize("table", [ONE_TILE, SMALL_TILES], ids=["one tile", "small tiles"])
def test_dout_or_dlse_alone(table, tuned):
    tuned(table)
    args = arguments(L=(4, 5), H=1, dtype=torch.float16, tau=(1.0,))
    check(args, dlse=None)
    check(args, dout=None)
    v, lse = args[2], forward.fwd(*args)[1]
    got = backward.bwd(None, None, lse, *args, [True] * 7)
    assert all(x is None or (x == 0).all() for x in got)
    for n in range(7):
        need = [m == n for m in range(7)]
        some = backward.bwd(torch.ones_like(v), None, lse, *args, need)
        assert [x is not None for x in some] == [a and args[m] is not None for a, m in zip(need, INPUTS, strict=True)]


def test_no_images():
    args = arguments(B=0)
    out, lse = forward.fwd(*args)
    assert out.shape == args[0].shape and lse.shape == args[0].shape[:-1]
    grads = backward.bwd(out, None, lse, *args, [True] * 7)
    assert all(x is None or (x.shape == args[n].shape and (x == 0).all()) for x, n in zip(grads, INPUTS, strict=True))


@pytest.mark.parametrize("table", [ONE_TILE, SMALL_TILES], ids=["one tile", "small tiles"])
@pytest.mark.parametrize("hides", ["mask", "bias"])
def test_hidden_nan(hides, table, tuned):
    """NaN and infinity in keys and values that a row does not see change nothing for that row."""
    tuned(table)
    dirty = arguments(
        mask_value=-math.inf, bias="hiding" if hides == "bias" else "dense", pads=None, B=2, H=1, dtype=torch.float16
    )
    clean_args = list(dirty)
    q, k, v = dirty[:3]
    if hides == "bias":
        dirty[3] = dirty[3].clone()
        dirty[3][:, :, 3] = -math.inf  # position 3 is seen by nobody
        clean_args[3] = dirty[3]
        slots = torch.zeros(7, 9, dtype=torch.bool)
        r0, r1 = (torch.arange(8)[:, None] + 2) % 8, (torch.arange(10)[None] + 2) % 10
        spots = (torch.arange(8)[:, None] % 4 == 0) & (torch.arange(10)[None] % 5 == 3)
        for y, x in spots.nonzero().tolist():
            if r0[y, 0] < 7 and r1[0, x] < 9:
                slots[r0[y, 0], r1[0, x]] = True
        dirty[1], dirty[2] = k.clone(), v.clone()
        dirty[1][:, slots] = math.nan
        dirty[2][:, slots] = math.inf
    else:
        dirty[2] = v.clone()
        dirty[2][0, 0, 0, 0, 4] = math.nan  # the corner: its region is small
        dirty[2][1, 6, 8, 0, 2] = -math.inf
    out, lse = forward.fwd(*dirty)
    eager = reference(*dirty)
    oracle = reference(*(x.double() if isinstance(x, torch.Tensor) and x.is_floating_point() else x for x in dirty))
    assert_close_to_oracle("out", out, oracle[0], eager[0])
    assert_close_to_oracle("lse", lse, oracle[1], eager[1])
    if hides == "bias":
        dout = torch.randn(out.shape).half()
        got = backward.bwd(dout, None, lse, *dirty, [True] * 7)
        want = backward.bwd(dout, None, lse, *clean_args, [True] * 7)
        assert torch.equal(got[0], want[0]) and torch.equal(got[3], want[3])
        keep = ~slots
        assert torch.equal(got[1][:, keep], want[1][:, keep]) and torch.equal(got[2][:, keep], want[2][:, keep])


def test_offsets_beyond_32_bits():
    """A view whose images lie more than 2^31 elements apart (memory of untouched pages is not used)."""
    args = arguments(B=2, L=(4, 5), H=1, D=16, dtype=torch.float16, shift=(0, 0))
    far = torch.UntypedStorage(2 * (2**31 + 4096))
    flat = torch.tensor([], dtype=torch.float16).set_(far)
    for n in range(3):
        x = args[n]
        view = flat.as_strided(x.shape, (2**31, *x.stride()[1:]), n * 1024)
        args[n] = view.copy_(x)
    check(args)


def test_reasons():
    args = arguments(D=300, Dv=16, window=(40, 40), shift=(0, 0), L=(3, 3), bias=None, dtype=torch.float64)
    why = " ".join(forward.supported(*args))
    assert "1600" in why and "300" in why and "float64" in why
