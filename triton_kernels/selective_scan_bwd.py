"""selective_scan on a GPU, backward: chunks of visits from the last to the first, whose states are made once more from the one
at the start of the chunk. What several programs add to is left in parts, which are added in order."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from ._reduce import add_parts
from ._scan_tiles import channels_of, parameter, sigmoid, softplus, stand, state_place, states_of
from .selective_scan import SIZES, Call, delta_of, row_strides, rows_of, shared, walk, windows_of


@triton.jit(do_not_specialize=SIZES)
def _scan_grads(
    u_ptr, delta_ptr, a_ptr, b_ptr, c_ptr, d_ptr, bias_ptr, z_ptr, dout_ptr, routes_ptr, bounds_ptr, starts_ptr, kept_ptr,
    dlast_ptr, du_ptr, ddelta_ptr, da_ptr, db_ptr, dc_ptr, dd_ptr, dbias_ptr, dfirst_ptr, u_strides, delta_strides, b_strides,
    c_strides, z_strides, dout_strides, batch, length, windows, count, channels, groups, factor,
    SOFTPLUS: tl.constexpr, S: tl.constexpr, CHUNK: tl.constexpr, BC: tl.constexpr, BS: tl.constexpr,
):  # fmt: skip
    """Contiguous float32: kept [programs, CHUNK, BC, BS] (scratch), du [R, N, L, C], da [N W, R, C, S], dd and dbias
    [N W, R, C], db and dc [blocks of a group, N, L, R, G, S], dlast and dfirst [N, R, W, C, S]; ddelta [N, L, R, C] contiguous.
    Grid and strides: as _scan."""
    sample, window, route, group, c, inside = stand(windows, count, channels, groups, BC)
    block = tl.program_id(0) % ((channels // groups + BC - 1) // BC)
    s = tl.arange(0, BS)
    both = inside[:, None] & (s < S)[None, :]
    begin, end = 0, length
    if bounds_ptr is not None:
        begin = tl.load(bounds_ptr + window)
        end = tl.load(bounds_ptr + window + 1)
    rate = tl.load(a_ptr + (route * channels + c)[:, None] * S + s[None, :], mask=both, other=0.0).to(tl.float32)
    skip = parameter(d_ptr, route, channels, c, inside)
    bias = parameter(bias_ptr, route, channels, c, inside)
    slope = tl.zeros([BC, BS], tl.float32)                                             # of the state behind the visit
    if dlast_ptr is not None:
        slope = tl.load(state_place(dlast_ptr, sample, window, route, windows, count, channels, c, s, S), mask=both, other=0.0)
    da = tl.zeros([BC, BS], tl.float32)
    dd = tl.zeros([BC], tl.float32)
    dbias = tl.zeros([BC], tl.float32)
    slots = length // CHUNK + windows
    du_ptr += (route.to(tl.int64) * batch + sample) * length * channels
    kept = kept_ptr + tl.program_id(0).to(tl.int64) * (CHUNK * BC * BS) + tl.arange(0, BC)[:, None] * BS + s[None, :]
    chunks = (end - begin + CHUNK - 1) // CHUNK
    for back in range(chunks):
        chunk = chunks - 1 - back
        start = begin + chunk * CHUNK
        visits = tl.minimum(CHUNK, end - start)
        slot = begin // CHUNK + window + chunk
        h = tl.load(state_place(starts_ptr, sample, slot, route, slots, count, channels, c, s, S), mask=both, other=0.0)
        tl.debug_barrier()                                                             # the last chunk has been read
        for i in range(visits):
            tl.store(kept + i * (BC * BS), h)
            token = tl.load(routes_ptr + route.to(tl.int64) * length + start + i)
            u = channels_of(u_ptr, sample, token, route, u_strides, c, inside)
            step = channels_of(delta_ptr, sample, token, route, delta_strides, c, inside) + bias
            if SOFTPLUS:
                step = softplus(step)
            gain = states_of(b_ptr, sample, token, route, group, b_strides, s, S)
            h = tl.exp(step[:, None] * rate) * h + (step * u)[:, None] * gain[None, :]
        tl.debug_barrier()
        for i in range(visits):
            at = visits - 1 - i
            token = tl.load(routes_ptr + route.to(tl.int64) * length + start + at)
            before = tl.load(kept + at * (BC * BS))
            u = channels_of(u_ptr, sample, token, route, u_strides, c, inside)
            raw = channels_of(delta_ptr, sample, token, route, delta_strides, c, inside) + bias
            step = raw
            if SOFTPLUS:
                step = softplus(raw)
            gain = states_of(b_ptr, sample, token, route, group, b_strides, s, S)
            read = states_of(c_ptr, sample, token, route, group, c_strides, s, S)
            dy = channels_of(dout_ptr, sample, token, route, dout_strides, c, inside) * factor
            if z_ptr is not None:
                z = channels_of(z_ptr, sample, token, route, z_strides, c, inside)
                dy = dy * (z * sigmoid(z))
            decay = tl.exp(step[:, None] * rate)
            behind = decay * before + (step * u)[:, None] * gain[None, :]
            slope += dy[:, None] * read[None, :]
            row = ((block.to(tl.int64) * batch + sample) * length + token) * count + route
            states = (row * groups + group) * S + s
            tl.store(dc_ptr + states, tl.sum(dy[:, None] * behind, 0), mask=s < S)
            tl.store(db_ptr + states, tl.sum(slope * (step * u)[:, None], 0), mask=s < S)
            toward = tl.sum(slope * gain[None, :], 1)
            slope = decay * slope
            moved = slope * before
            da += step[:, None] * moved
            dd += dy * u
            dstep = tl.sum(rate * moved, 1) + u * toward
            if SOFTPLUS:
                dstep = tl.where(raw > 20.0, dstep, dstep * sigmoid(raw))
            dbias += dstep
            at_delta = (((sample.to(tl.int64) * length + token) * count) + route) * channels + c
            tl.store(ddelta_ptr + at_delta, dstep.to(ddelta_ptr.dtype.element_ty), mask=inside)
            tl.store(du_ptr + token.to(tl.int64) * channels + c, step * toward + dy * skip, mask=inside)
    tl.store(state_place(dfirst_ptr, sample, window, route, windows, count, channels, c, s, S), slope, mask=both)
    row = ((sample.to(tl.int64) * windows + window) * count + route) * channels + c
    tl.store(da_ptr + row[:, None] * S + s[None, :], da, mask=both)
    tl.store(dd_ptr + row, dd, mask=inside)
    tl.store(dbias_ptr + row, dbias, mask=inside)


@triton.jit(do_not_specialize=("rows", "length", "channels"))
def _gate_grads(
    y_ptr, z_ptr, dout_ptr, dz_ptr, z_strides, dout_strides, rows, length, channels, count, factor,
    STACK: tl.constexpr, OWN: tl.constexpr, ROWS: tl.constexpr, BC: tl.constexpr,
):  # fmt: skip
    """dz [N, L, 1 or R, C] contiguous; OWN: every route has its z. Grid and strides: as _join."""
    blocks = (channels + BC - 1) // BC
    row = (tl.program_id(0) // blocks).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    c = tl.program_id(0) % blocks * BC + tl.arange(0, BC)
    inside = (row < rows)[:, None] & (c < channels)[None, :]
    total = tl.zeros([ROWS, BC], tl.float32)
    for route in range(count):
        y = tl.load(y_ptr + (route * rows.to(tl.int64) + row)[:, None] * channels + c[None, :], mask=inside, other=0.0)
        at = row // length * z_strides[0] + row % length * z_strides[1] + route * z_strides[2]
        z = tl.load(z_ptr + at[:, None] + c[None, :] * z_strides[3], mask=inside, other=0.0).to(tl.float32)
        at = row // length * dout_strides[0] + row % length * dout_strides[1] + route * dout_strides[2]
        dout = tl.load(dout_ptr + at[:, None] + c[None, :] * dout_strides[3], mask=inside, other=0.0).to(tl.float32)
        sigma = sigmoid(z)
        dz = dout * factor * y * (sigma * (1.0 + z * (1.0 - sigma)))
        if OWN:
            place = dz_ptr + (row * count + route)[:, None] * channels + c[None, :]
            tl.store(place, dz.to(dz_ptr.dtype.element_ty), mask=inside)
        else:
            total += dz
    if not OWN:
        tl.store(dz_ptr + row[:, None] * channels + c[None, :], total.to(dz_ptr.dtype.element_ty), mask=inside)


def gradients(dstate, dout, out, *rest) -> tuple[Tensor | None, ...]:
    """The gradients of the ten floating-point arguments, None where `need` does not ask."""
    *args, need = rest
    call = Call(*args)
    batch, length, _, channels = call.u.shape
    count, states, groups, windows = call.a.shape[0], call.a.shape[2], call.b.shape[3], windows_of(call)
    wanted = [need >> i & 1 and t is not None for i, t in enumerate(args[:10])]
    if not batch * length * windows:
        found = [torch.zeros(t.shape, dtype=t.dtype, device=t.device) if w else None for w, t in zip(wanted, args, strict=False)]
        if wanted[8] and dstate is not None:
            found[8] = dstate.to(call.initial_state.dtype)
        return tuple(found)
    delta = delta_of(call)
    y, _, starts = walk(call, delta, True)
    programs, common = shared(call, delta, 512)

    def empty(*shape: int) -> Tensor:
        return torch.empty(shape, dtype=torch.float32, device=call.u.device)

    dout = call.u.new_zeros(()).expand(out.shape) if dout is None else dout
    dout = dout if call.reduce == "stack" else dout.unsqueeze(2)
    blocks = triton.cdiv(channels // groups, common["BC"])
    kept = empty(programs, common["CHUNK"], common["BC"], common["BS"])
    du, dfirst = empty(*y.shape), empty(batch, count, windows, channels, states)
    da, dd, dbias = empty(batch * windows, count, channels, states), *(empty(batch * windows, count, channels) for _ in "db")
    db, dc = (empty(blocks, batch, length, count, groups, states) for _ in "bc")
    ddelta = torch.empty(delta.shape, dtype=delta.dtype, device=delta.device)
    over, gates = rows_of(call)
    _scan_grads[(programs,)](
        z_ptr=call.z, dout_ptr=dout, starts_ptr=starts, kept_ptr=kept, dlast_ptr=None if dstate is None else dstate.contiguous(),
        du_ptr=du, ddelta_ptr=ddelta, da_ptr=da, db_ptr=db, dc_ptr=dc, dd_ptr=dd, dbias_ptr=dbias, dfirst_ptr=dfirst,
        z_strides=gates["z_strides"], dout_strides=row_strides(dout), factor=gates["factor"], **common)
    dz = None
    if wanted[6]:
        dz = torch.empty(call.z.shape, dtype=call.z.dtype, device=call.z.device)
        _gate_grads[(over,)](
            y_ptr=y, dout_ptr=dout, dz_ptr=dz, dout_strides=row_strides(dout), OWN=call.z.shape[2] > 1, **gates)
    dlow = dweight = None
    if call.delta_weight is not None:
        if wanted[1]:
            dlow = torch.einsum("nlrc,rck->nlrk", ddelta, call.delta_weight.float()).to(call.delta.dtype)
        if wanted[9]:
            dweight = torch.einsum("nlrc,nlrk->rck", ddelta, call.delta.float()).to(call.delta_weight.dtype)

    def of(bit: int, parts: Tensor) -> Tensor | None:
        return add_parts(parts, args[bit].dtype) if wanted[bit] else None

    own = call.u.shape[2] > 1
    of_u = (du.permute(1, 2, 0, 3).to(call.u.dtype) if own else of(0, du).unsqueeze(2)) if wanted[0] else None
    return (
        of_u, (ddelta if call.delta_weight is None else dlow) if wanted[1] else None, of(2, da), of(3, db), of(4, dc), of(5, dd),
        dz, of(7, dbias), dfirst.to(call.initial_state.dtype) if wanted[8] else None, dweight,
    )  # fmt: skip
