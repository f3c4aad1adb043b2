"""Cases of window_attention for the emulated CUDA kernels: inputs, the oracle, one call forward and backward."""

import dataclasses
import math

import torch

from vitkern.ops import _window_gpu
from vitkern.reference.window_attention import window_attention as reference
from vitkern.testing import assert_close_to_oracle, poisoned

GRADIENTS = ("q", "k", "v", "bias", "logit_scale", "k_pad", "v_pad")


@dataclasses.dataclass(frozen=True)
class Case:
    map: tuple[int, ...] = (8, 8)
    window: tuple[int, ...] = (4, 4)
    shift: tuple[int, ...] = (0, 0)
    batch: int = 2
    heads: int = 2
    group: int = 1  # query heads per key head
    d: int = 32
    dv: int = 32
    bias: str = ""  # "", "dense", "row" (broadcast over heads and queries), "table"
    bias_dtype: torch.dtype = torch.float32
    empty_rows: bool = False  # some rows of the bias are -inf
    cosine: bool = False
    cosine_max: float = math.log(100.0)
    roll_first: bool = False
    pads: str = "hidden"  # "hidden", "zero", "vector"
    mask_value: float = -100.0
    scale: float = 0.3
    dropout_p: float = 0.0
    layout: str = "plain"  # "plain", "packed", "unaligned", "heads_first"
    dlse: bool = True
    poison: bool = False  # NaN in keys and values that some rows do not see
    broken: bool = False  # NaN and infinity in values that rows see


CASES = {
    "one warp, shifted, dense bias": Case((8, 9), shift=(2, 1), bias="dense"),
    "7x7 table": Case((14, 7), (7, 7), (3, 0), bias="table", heads=3, scale=32**-0.5),
    "7x7 packed, shifted": Case((7, 14), (7, 7), (3, 3), bias="table", layout="packed", batch=1),
    "8x8 cosine": Case((8, 16), (8, 8), (4, 4), cosine=True, bias="table", mask_value=-200.0, batch=1),
    "cosine beyond its maximum": Case(cosine=True, cosine_max=0.1, d=64, dv=64, batch=1),
    "no bias, 1-D, N=50": Case((101,), (50,), (7,), d=16, dv=32),
    "3-D": Case((4, 5, 3), (2, 3, 3), (1, 1, 0), bias="dense", d=64, dv=24, batch=1),
    "4-D": Case((2, 3, 2, 5), (2, 2, 1, 4), (1, 0, 0, 2), batch=1),
    "pads with vectors": Case((5, 9), (4, 4), (2, 2), pads="vector", bias="table"),
    "pads with vectors, rolled first": Case((9, 6), (4, 4), (1, 3), pads="vector", roll_first=True),
    "pads are zeros": Case((3, 7), (4, 5), (0, 2), pads="zero", cosine=True),
    "window larger than the map": Case((5, 3), (7, 7), (3, 3), pads="hidden", bias="dense", batch=1),
    "exact mask": Case((8, 12), (4, 6), (2, 3), mask_value=-math.inf, bias="row", poison=True),
    "hidden pads, poisoned": Case((5, 11), (4, 4), (2, 2), mask_value=-math.inf, poison=True, d=64, dv=64),
    "grouped queries, D=128": Case((6, 5), (5, 4), heads=4, group=2, d=128, dv=96, batch=1),
    "grouped, pads, unaligned": Case((5, 9), (3, 8), heads=3, group=3, d=24, dv=40, pads="vector", layout="unaligned"),
    "unaligned": Case((8, 8), (8, 4), d=24, dv=8, layout="unaligned", bias="dense", bias_dtype=torch.float16),
    "heads first": Case((9, 4), (3, 4), (1, 0), layout="heads_first", bias="dense", bias_dtype=torch.bfloat16),
    "dropout": Case((8, 5), (4, 5), (2, 0), dropout_p=0.3, bias="dense", dlse=False),
    "rows that see no key": Case((8, 4), bias="dense", empty_rows=True, poison=True),
    "broken values": Case((8, 12), (4, 6), (2, 3), bias="dense", broken=True),
    "broken values, exact mask": Case((8, 12), (4, 6), (2, 3), mask_value=-math.inf, broken=True),
    "broken values, grouped, dropout": Case(
        (7, 14), (7, 7), (3, 3), bias="table", heads=4, group=2, dropout_p=0.2, broken=True, batch=1
    ),
    "one token": Case((3,), (1,), (0,), heads=1, bias="dense"),
    "empty batch": Case(batch=0, bias="table"),
}


class Inputs:
    """Tensors of a case: q, k, v in `dtype`, the rest as the op takes it."""

    def __init__(self, case: Case, dtype: torch.dtype):
        g = torch.Generator().manual_seed(7)
        self.case, self.dtype = case, dtype
        c, n, kv = case, math.prod(case.window), case.heads // case.group

        def normal(*shape, dtype=torch.float32):
            return torch.randn(shape, generator=g).to(dtype)

        self.q = arrange(normal(c.batch, *c.map, c.heads, c.d, dtype=dtype), c.layout)
        self.k = arrange(normal(c.batch, *c.map, kv, c.d, dtype=dtype), c.layout)
        self.v = arrange(normal(c.batch, *c.map, kv, c.dv, dtype=dtype), c.layout)
        self.dout = arrange(normal(c.batch, *c.map, c.heads, c.dv, dtype=dtype), c.layout)
        self.dlse = normal(c.batch, *c.map, c.heads) if c.dlse else None
        self.bias = self.index = self.logit_scale = self.k_pad = self.v_pad = self.seed = None
        if c.bias == "table":
            self.bias = normal(n + 5, c.heads, dtype=c.bias_dtype)
            self.index = torch.randint(0, n + 5, (n, n), generator=g, dtype=torch.int32)
        elif c.bias:
            self.bias = normal(*((1, 1, n) if c.bias == "row" else (c.heads, n, n)), dtype=c.bias_dtype)
        if c.empty_rows:
            self.bias[0, 1] = -math.inf
            self.bias[1, :, 3] = -math.inf
        if c.poison and c.empty_rows:
            token = (0, 0, 3)  # slot 3 of the first window, hidden from head 1
            self.k[token][1], self.v[token][1] = math.nan, math.inf
        elif c.poison:
            # The first token stands in the last window of every shifted axis, where there are other regions.
            self.k[0, 0, 0] = math.nan
            self.v[0, 0, 0, :, 1] = math.nan
            self.v[0, 0, 0, :, 2] = -math.inf
        if c.broken:
            self.v[0, 0, 0, :, 1], self.v[-1, 3, 2, :, 5] = math.nan, math.inf
        if c.cosine:
            self.logit_scale = normal(c.heads) * 0.5 + 0.3
        if c.pads == "vector":
            self.k_pad, self.v_pad = normal(kv, c.d, dtype=dtype), normal(kv, c.dv, dtype=dtype)
        if c.dropout_p:
            self.seed = torch.tensor([0x123456789ABCDEF, 5][: 2 if c.group > 1 else 1])

    def without_poison(self):
        self.k, self.v = (torch.nan_to_num(x, 0.0, 0.0, 0.0) for x in (self.k, self.v))
        return self

    def options(self):
        c = self.case
        return (
            self.bias, self.index, self.logit_scale, self.k_pad, self.v_pad, self.seed, list(c.window), list(c.shift),
            c.roll_first, c.pads != "hidden", c.scale, c.mask_value, c.cosine_max, 1e-12, c.dropout_p,
        )  # fmt: skip


def arrange(x: torch.Tensor, layout: str) -> torch.Tensor:
    """The same values in another memory layout."""
    *lead, heads, d = x.shape
    if layout == "packed":  # the first of three, rows of one allocation
        return x.new_full((*lead, 3, heads, d), math.nan).select(-3, 1).copy_(x)
    if layout == "unaligned":  # every row starts two bytes off
        return x.new_full((*lead, heads, d + 3), math.nan)[..., 1 : d + 1].copy_(x)
    if layout == "heads_first":
        return x.new_empty((x.shape[0], heads, *lead[1:], d)).movedim(1, -2).copy_(x)
    return x


def oracle(inputs: Inputs, dtype: torch.dtype | None) -> dict[str, torch.Tensor]:
    """Results and gradients of the reference, in `dtype`, or in the dtypes of the inputs."""
    leaves = {}
    for name in GRADIENTS:
        x = getattr(inputs, name)
        leaves[name] = None if x is None else x.detach().to(dtype or x.dtype).requires_grad_()
    _, index, _, _, _, seed, *rest = inputs.options()
    out, lse = reference(
        leaves["q"], leaves["k"], leaves["v"], leaves["bias"], index, leaves["logit_scale"], leaves["k_pad"],
        leaves["v_pad"], seed, *rest,
    )  # fmt: skip
    result = {"out": out.detach(), "lse": lse.detach()}
    loss = (out * inputs.dout.to(out.dtype)).nan_to_num(0.0).sum(dtype=torch.float64)
    if inputs.dlse is not None:
        loss = loss + (lse * inputs.dlse.to(lse.dtype)).masked_fill(lse == -math.inf, 0.0).sum(dtype=torch.float64)
    used = {name: x for name, x in leaves.items() if x is not None}
    for name, gradient in zip(used, torch.autograd.grad(loss, list(used.values()), allow_unused=True), strict=True):
        result["d" + name] = torch.zeros_like(used[name]) if gradient is None else gradient
    return result


def check(build, case: Case, dtype: torch.dtype, seeds) -> None:
    """Every seed gives the same bits, and they agree with the oracle."""
    inputs, first = Inputs(case, dtype), None
    for seed in seeds:
        with build.schedule(seed):
            results = run(build, inputs)
            if first is None:
                first = results
                check_against_oracle(inputs, results)
            for name, x in results.items():
                same = torch.equal(x.nan_to_num(-7.0), first[name].nan_to_num(-7.0))
                assert same, f"{name} differs from that of the first seed"


def check_against_oracle(inputs: Inputs, results: dict[str, torch.Tensor]) -> None:
    exact, eager = oracle(inputs, torch.float64), oracle(inputs, None)
    rows = slice(None)
    for name in ("out", "lse"):
        assert_close_to_oracle(name, results[name], exact[name], eager[name])
    if inputs.case.poison:
        # Tokens whose log-sum-exp is not NaN neither see a NaN key nor share a key with a row that does: their
        # gradients are those of a map without it.
        clean = Inputs(inputs.case, inputs.dtype).without_poison()
        exact, eager, rows = oracle(clean, torch.float64), oracle(clean, None), ~results["lse"].isnan()
    for name in ("dq", "dk", "dv") if inputs.case.poison else results.keys() - {"out", "lse"}:
        assert_close_to_oracle(name, results[name][rows], exact[name][rows], eager[name][rows], gradient=True)


def run(build, inputs: Inputs) -> dict[str, torch.Tensor]:
    """The kernels of a build, forward and backward; whatever they must write starts as NaN."""
    layout, options = inputs.case.layout, inputs.options()
    with build.active(), poisoned():
        args = (inputs.q, inputs.k, inputs.v, *options)
        out, lse = _window_gpu.forward("cuda", *args)
        into = tuple(arrange(torch.empty(x.shape, dtype=x.dtype), layout) for x in args[:3])
        rest = _window_gpu.backward("cuda", into, inputs.dout, inputs.dlse, lse, *args, 0b1111111)
    results = {"out": out, "lse": lse} | {f"d{name}": x for name, x in zip(GRADIENTS, (*into, *rest), strict=True)}
    return {name: x for name, x in results.items() if x is not None}
