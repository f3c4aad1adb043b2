"""What the kernels of selective scans share: where a program stands, what a visit reads, gates."""

import triton
import triton.language as tl


@triton.jit
def stand(windows, count, channels, groups, BC: tl.constexpr):
    """Sample, window, route, group, the channels [BC] of this program, and which of them there are."""
    share = channels // groups
    blocks = (share + BC - 1) // BC
    pid = tl.program_id(0)
    block = pid % (blocks * groups)
    rest = pid // (blocks * groups)
    group = block // blocks
    at = block % blocks * BC + tl.arange(0, BC)
    return rest // count // windows, rest // count % windows, rest % count, group, group * share + at, at < share


@triton.jit
def row_of(sample, token, route, strides):
    """Offset of a token's row of a route."""
    return sample.to(tl.int64) * strides[0] + token.to(tl.int64) * strides[1] + route.to(tl.int64) * strides[2]


@triton.jit
def channels_of(ptr, sample, token, route, strides, c, inside):
    """[BC] of a row, in float32."""
    return tl.load(ptr + row_of(sample, token, route, strides) + c * strides[3], mask=inside, other=0.0).to(tl.float32)


@triton.jit
def states_of(ptr, sample, token, route, group, strides, s, S: tl.constexpr):
    """[BS] of a row of b or c, in float32."""
    at = row_of(sample, token, route, strides) + group.to(tl.int64) * strides[3]
    return tl.load(ptr + at + s * strides[4], mask=s < S, other=0.0).to(tl.float32)


@triton.jit
def parameter(ptr, route, channels, c, inside):
    """[BC] of a contiguous [R, C], 0 where there is none."""
    x = tl.zeros(c.shape, tl.float32)
    if ptr is not None:
        x = tl.load(ptr + route * channels + c, mask=inside, other=0.0).to(tl.float32)
    return x


@triton.jit
def softplus(x):
    """ln(1 + exp x), to the last places of small results too; x itself above 20."""
    t = tl.exp(-tl.abs(x))
    w = 1.0 + t
    rest = tl.where(w == 1.0, t, tl.log(w) * (t / tl.where(w == 1.0, 1.0, w - 1.0)))
    return tl.where(x > 20.0, x, tl.maximum(x, 0.0) + rest)


@triton.jit
def sigmoid(x):
    return 1.0 / (1.0 + tl.exp(-x))


@triton.jit
def state_place(ptr, sample, window, route, windows, count, channels, c, s, S: tl.constexpr):
    """Pointers [BC, BS] into a contiguous [N, R, W, C, S]."""
    row = ((sample.to(tl.int64) * count + route) * windows + window) * channels
    return ptr + (row + c)[:, None] * S + s[None, :]
