"""selective_scan on a GPU: a program walks one route of one sequence with the states of a block of channels in registers; then
the routes are added in their order.

The meaning of every argument is that of the reference, vitkern/reference/selective_scan.py. Routes are addresses: nothing is
turned. States are float32. No atomics.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from ._host import DTYPES, device_reasons, power
from ._scan_tiles import channels_of, parameter, sigmoid, softplus, stand, state_place, states_of

CHUNK = 32                              # visits between two states that the backward keeps
REDUCTIONS = ("sum", "mean", "stack")
SIZES = ("length", "windows", "count", "channels", "groups")


class Call(NamedTuple):
    """The arguments of the op, in its order."""

    u: Tensor
    delta: Tensor
    a: Tensor
    b: Tensor
    c: Tensor
    d: Tensor | None
    z: Tensor | None
    delta_bias: Tensor | None
    initial_state: Tensor | None
    delta_weight: Tensor | None
    routes: Tensor
    cu_seqlens: Tensor | None
    softplus: bool
    reduce: str


@triton.jit(do_not_specialize=SIZES)
def _scan(
    u_ptr, delta_ptr, a_ptr, b_ptr, c_ptr, d_ptr, bias_ptr, first_ptr, routes_ptr, bounds_ptr, y_ptr, last_ptr, starts_ptr,
    u_strides, delta_strides, b_strides, c_strides, batch, length, windows, count, channels, groups,
    SOFTPLUS: tl.constexpr, S: tl.constexpr, CHUNK: tl.constexpr, BC: tl.constexpr, BS: tl.constexpr,
):  # fmt: skip
    """y [R, N, L, C], last [N, R, W, C, S] and, if asked for, the states at the starts of chunks, [N, R, slots, C, S] float32,
    all contiguous; those of window w stand from slot bounds[w] // CHUNK + w on. Grid: blocks of channels (fastest) x routes x
    windows x samples, on axis 0. Any strides: u, delta, b, c."""
    sample, window, route, group, c, inside = stand(windows, count, channels, groups, BC)
    s = tl.arange(0, BS)
    both = inside[:, None] & (s < S)[None, :]
    begin, end = 0, length
    if bounds_ptr is not None:
        begin = tl.load(bounds_ptr + window)
        end = tl.load(bounds_ptr + window + 1)
    rate = tl.load(a_ptr + (route * channels + c)[:, None] * S + s[None, :], mask=both, other=0.0).to(tl.float32)
    skip = parameter(d_ptr, route, channels, c, inside)
    bias = parameter(bias_ptr, route, channels, c, inside)
    h = tl.zeros([BC, BS], tl.float32)
    if first_ptr is not None:
        h = tl.load(state_place(first_ptr, sample, window, route, windows, count, channels, c, s, S), mask=both, other=0.0)
        h = h.to(tl.float32)
    slots = length // CHUNK + windows
    slot = begin // CHUNK + window
    y_ptr += (route.to(tl.int64) * batch + sample) * length * channels
    for start in range(begin, end, CHUNK):
        if starts_ptr is not None:
            tl.store(state_place(starts_ptr, sample, slot, route, slots, count, channels, c, s, S), h, mask=both)
            slot += 1
        for at in range(start, tl.minimum(start + CHUNK, end)):
            token = tl.load(routes_ptr + route.to(tl.int64) * length + at)
            u = channels_of(u_ptr, sample, token, route, u_strides, c, inside)
            step = channels_of(delta_ptr, sample, token, route, delta_strides, c, inside) + bias
            if SOFTPLUS:
                step = softplus(step)
            gain = states_of(b_ptr, sample, token, route, group, b_strides, s, S)
            read = states_of(c_ptr, sample, token, route, group, c_strides, s, S)
            h = tl.exp(step[:, None] * rate) * h + (step * u)[:, None] * gain[None, :]
            y = tl.sum(h * read[None, :], 1) + skip * u
            tl.store(y_ptr + token.to(tl.int64) * channels + c, y, mask=inside)
    tl.store(state_place(last_ptr, sample, window, route, windows, count, channels, c, s, S), h, mask=both)


@triton.jit(do_not_specialize=("rows", "length", "channels"))
def _join(
    y_ptr, z_ptr, out_ptr, z_strides, rows, length, channels, count, factor,
    STACK: tl.constexpr, ROWS: tl.constexpr, BC: tl.constexpr,
):  # fmt: skip
    """out [N, L, C] (STACK: [N, L, R, C]) from y [R, N, L, C], both contiguous. Grid: blocks of channels (fastest) x blocks of
    ROWS of the N L tokens, on axis 0."""
    blocks = (channels + BC - 1) // BC
    row = (tl.program_id(0) // blocks).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    c = tl.program_id(0) % blocks * BC + tl.arange(0, BC)
    inside = (row < rows)[:, None] & (c < channels)[None, :]
    total = tl.zeros([ROWS, BC], tl.float32)
    for route in range(count):
        y = tl.load(y_ptr + (route * rows.to(tl.int64) + row)[:, None] * channels + c[None, :], mask=inside, other=0.0)
        if z_ptr is not None:
            at = row // length * z_strides[0] + row % length * z_strides[1] + route * z_strides[2]
            z = tl.load(z_ptr + at[:, None] + c[None, :] * z_strides[3], mask=inside, other=0.0).to(tl.float32)
            y = y * (z * sigmoid(z))
        if STACK:
            place = out_ptr + (row * count + route)[:, None] * channels + c[None, :]
            tl.store(place, y.to(out_ptr.dtype.element_ty), mask=inside)
        else:
            total += y
    if not STACK:
        place = out_ptr + row[:, None] * channels + c[None, :]
        tl.store(place, (total * factor).to(out_ptr.dtype.element_ty), mask=inside)


def supported(*args) -> list[str]:
    """Why fwd and bwd cannot run these arguments, one sentence each; [] if they can."""
    call = Call(*args)
    why = device_reasons("u", call.u, not isinstance(_scan, triton.JITFunction))
    for name in ("u", "delta", "a", "b", "delta_weight"):
        x = getattr(call, name)
        if x is not None and x.dtype not in DTYPES:
            why.append(f"{name} must be float32, bfloat16 or float16, got {x.dtype}")
    return why


def row_strides(x: Tensor) -> tuple[int, ...]:
    """Strides of [N, L, R or 1, ...], 0 for the routes where they share one."""
    found = x.stride()
    return (*found[:2], 0 if x.shape[2] == 1 else found[2], *found[3:])


def delta_of(call: Call) -> Tensor:
    """[N, L, R, C]: the product where delta is of low rank."""
    if call.delta_weight is None:
        return call.delta
    return torch.einsum("nlrk,rck->nlrc", call.delta.float(), call.delta_weight.float())


def windows_of(call: Call) -> int:
    return 1 if call.cu_seqlens is None else call.cu_seqlens.shape[0] - 1


def shared(call: Call, delta: Tensor, elements: int) -> tuple[int, dict]:
    """The number of programs, and what they all take; `elements` of a state are held at once."""
    batch, length, _, channels = call.u.shape
    count, states, groups = call.a.shape[0], call.a.shape[2], call.b.shape[3]
    wide = power(states, 1)
    block = max(1, min(power(channels // groups, 1), 64, elements // wide))
    windows = windows_of(call)
    programs = batch * windows * count * groups * triton.cdiv(channels // groups, block)
    small = {
        f"{name}_ptr": None if t is None else t.contiguous()
        for name, t in (("a", call.a), ("d", call.d), ("bias", call.delta_bias))
    }
    return programs, {
        "u_ptr": call.u, "delta_ptr": delta, "b_ptr": call.b, "c_ptr": call.c, **small, "routes_ptr": call.routes,
        "bounds_ptr": call.cu_seqlens, "u_strides": row_strides(call.u), "delta_strides": row_strides(delta),
        "b_strides": row_strides(call.b), "c_strides": row_strides(call.c), "batch": batch, "length": length, "windows": windows,
        "count": count, "channels": channels, "groups": groups, "SOFTPLUS": call.softplus, "S": states, "CHUNK": CHUNK,
        "BC": block, "BS": wide, "num_warps": max(1, min(4, block * wide // 128)), "enable_fp_fusion": True,
    }  # fmt: skip


def walk(call: Call, delta: Tensor, keep: bool) -> tuple[Tensor, Tensor, Tensor | None]:
    """y [R, N, L, C], the last states, and with `keep` those at the starts of chunks."""
    batch, length, _, channels = call.u.shape
    count, states, windows = call.a.shape[0], call.a.shape[2], windows_of(call)

    def empty(*shape: int) -> Tensor:
        return torch.empty(shape, dtype=torch.float32, device=call.u.device)

    y, last = empty(count, batch, length, channels), empty(batch, count, windows, channels, states)
    starts = empty(batch, count, length // CHUNK + windows, channels, states) if keep else None
    programs, common = shared(call, delta, 1024)
    first = None if call.initial_state is None else call.initial_state.contiguous()
    if programs:
        _scan[(programs,)](first_ptr=first, y_ptr=y, last_ptr=last, starts_ptr=starts, **common)
    return y, last, starts


def rows_of(call: Call) -> tuple[int, dict]:
    """The number of programs over tokens and channels, and what they all take."""
    batch, length, _, channels = call.u.shape
    block = min(power(channels, 1), 64)
    size = 1024 // block
    factor = 1.0 / call.a.shape[0] if call.reduce == "mean" else 1.0
    return triton.cdiv(batch * length, size) * triton.cdiv(channels, block), {
        "rows": batch * length, "length": length, "channels": channels, "count": call.a.shape[0], "factor": factor,
        "z_ptr": call.z, "z_strides": (0,) * 4 if call.z is None else row_strides(call.z), "STACK": call.reduce == "stack",
        "ROWS": size, "BC": block, "num_warps": 4, "enable_fp_fusion": True,
    }  # fmt: skip


def fwd(*args) -> tuple[Tensor, Tensor]:
    call = Call(*args)
    batch, length, _, channels = call.u.shape
    y, last, _ = walk(call, delta_of(call), False)
    routes = (len(call.a),) if call.reduce == "stack" else ()
    out = torch.empty((batch, length, *routes, channels), dtype=call.u.dtype, device=call.u.device)
    programs, common = rows_of(call)
    if programs:
        _join[(programs,)](y_ptr=y, out_ptr=out, **common)
    return last, out


def bwd(*args) -> tuple[Tensor | None, ...]:
    from .selective_scan_bwd import gradients

    return gradients(*args)
