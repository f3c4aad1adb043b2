"""window_attention: softmax attention inside the windows of a map, shifted windows included.

    s_ij  = scale q_i.k_j                                       plain scores
          = exp(min(tau_h, tau_max)) q^_i.k^_j                  cosine scores, x^ = x / max(|x|, eps)
    s_ij += bias_h,ij + mask_value [region_i != region_j]       regions: what a shift brought together from afar
    P_ij  = exp(s_ij - lse_i),  lse_i = log sum_j exp(s_ij)     over the keys at s > -inf that exist
    o_i   = sum_j Z_ij P_ij v_j                                 Z: dropout keep / (1 - p), else 1

A row that sees no key gives o = 0 and lse = -inf. A NaN or infinity in a key makes the rows that see it NaN; one in a value
makes them NaN in that channel; no other row, and no gradient of another row, knows of it. The geometry of one axis (length L, window w, shift s, P = ceil(L / w) w) is

    pad_roll: p = (r + s) mod P, a pad where p >= L;     roll_pad: (r + s) mod L for r < L, a pad beyond
    window = r div w, position = r mod w;  region = 0 if s = 0 or r < P - w;  1 if r < P - s;  2 otherwise
"""

import math

import torch
from torch import Tensor

PHILOX_KEY = (0x9E3779B9, 0xBB67AE85)
PHILOX_MULTIPLIER = (0xD2511F53, 0xCD9E8D57)


def window_attention(
    q: Tensor,  # [B, *L, H, D]
    k: Tensor,  # [B, *L, Hk, D]
    v: Tensor,  # [B, *L, Hk, Dv]
    bias: Tensor | None,  # [H|1, N|1, N|1], or a table [R, H] where index is given
    index: Tensor | None,  # [N, N] int32, rows of the table
    logit_scale: Tensor | None,  # [H]: cosine scores
    k_pad: Tensor | None,  # [Hk, D]  the key of a pad; None is 0
    v_pad: Tensor | None,  # [Hk, Dv] the value of a pad; None is 0
    seed: Tensor | None,  # [1|2] int64: dropout
    window: list[int],
    shift: list[int],
    roll_first: bool,  # pad_order="roll_pad"
    pad_visible: bool,  # pads take part
    scale: float,
    mask_value: float,  # -inf hides exactly
    cosine_max: float,
    cosine_eps: float,
    dropout_p: float,
    gpu: str = "",
) -> tuple[Tensor, Tensor]:  # out [B, *L, H, Dv], lse [B, *L, H]
    batch, *lengths, heads, _ = q.shape
    acc = torch.promote_types(q.dtype, torch.float32)  # float32; float64 stays float64
    token, region, slot = geometry(lengths, window, shift, roll_first, q.device)  # [nW, N], [nW, N], [T]
    real = token >= 0  # [nW, N]
    group = heads // k.shape[-2]
    qw = gather(q, token, None).to(acc)  # [B, nW, H, N, D]
    kw = gather(k, token, k_pad).to(acc).repeat_interleave(group, 2)  # [B, nW, H, N, D]
    vw = gather(v, token, v_pad).to(acc).repeat_interleave(group, 2)  # [B, nW, H, N, Dv]
    broken = ~kw.isfinite().all(-1)  # [B, nW, H, N]
    kw = kw.masked_fill(~kw.isfinite(), 0.0)  # [B, nW, H, N, D]
    if logit_scale is not None:
        qw = normalize(qw, cosine_eps).to(q.dtype).to(acc)  # [B, nW, H, N, D]
        kw = normalize(kw, cosine_eps).to(k.dtype).to(acc)  # [B, nW, H, N, D]
        tau = logit_scale.to(acc).clamp(max=cosine_max).exp()  # [H]
        s = qw @ kw.mT * tau[:, None, None]  # [B, nW, H, N, N]
    else:
        s = qw @ kw.mT * scale  # [B, nW, H, N, N]
    s = s.masked_fill(broken[:, :, :, None], math.nan)  # [B, nW, H, N, N]
    if bias is not None:
        dense = dense_bias(bias, index).to(acc)  # [H|1, N|1, N|1]
        s = (s + dense).masked_fill(dense == -math.inf, -math.inf)  # [B, nW, H, N, N]
    differs = (region[:, :, None] != region[:, None, :])[:, None]  # [nW, 1, N, N]
    hidden = torch.zeros_like(differs) if pad_visible else ~real[:, None, None]  # [nW, 1, N|1, N]
    if mask_value == -math.inf:
        hidden = hidden | differs  # [nW, 1, N, N]
    else:
        s = s + differs * mask_value  # [B, nW, H, N, N]
    s = s.masked_fill(hidden, -math.inf)  # [B, nW, H, N, N]
    unseen = s == -math.inf  # [B, nW, H, N, N]
    empty = unseen.all(-1, keepdim=True)  # [B, nW, H, N, 1]
    top = s.detach().amax(-1, keepdim=True).masked_fill(empty, 0.0)  # [B, nW, H, N, 1] the result does not depend on it
    e = (s - top).exp()  # [B, nW, H, N, N]
    z = e.sum(-1, keepdim=True).masked_fill(empty, 1.0)  # [B, nW, H, N, 1] never 0: finite gradients
    lse = (top + z.log()).masked_fill(empty, -math.inf)  # [B, nW, H, N, 1]
    p = e / z  # [B, nW, H, N, N]
    if dropout_p > 0.0:
        p = (
            p * keep_pattern(seed, batch, heads, token, dropout_p, token.shape[1]).to(acc) / (1.0 - dropout_p)
        )  # [B, nW, H, N, N]
    finite = vw.isfinite()  # [B, nW, H, N, Dv]
    o = p.to(q.dtype).to(acc) @ vw.masked_fill(~finite, 0.0)  # [B, nW, H, N, Dv]
    o = o.masked_fill((~unseen).to(acc) @ (~finite).to(acc) > 0, math.nan)  # [B, nW, H, N, Dv]
    out = o.transpose(2, 3).flatten(1, 2)[:, slot].to(v.dtype)  # [B, T, H, Dv]
    lse = lse.transpose(2, 3).flatten(1, 2)[:, slot, :, 0]  # [B, T, H]
    return out.unflatten(1, lengths), lse.unflatten(1, lengths)  # [B, *L, H, Dv], [B, *L, H]


def geometry(lengths, window, shift, roll_first, device):
    """token and region of every slot, both [nW, N] (token -1 is a pad), and the slot of every token, [T]."""
    rank = len(lengths)
    token = torch.zeros((1,) * (2 * rank), dtype=torch.int64, device=device)  # [nW0, nW1, ..., w0, w1, ...]
    region, pad = token.clone(), token.bool()
    of_window = torch.zeros((1,) * rank, dtype=torch.int64, device=device)  # [L0, L1, ...]
    of_position = of_window.clone()
    for a, (length, w, s) in enumerate(zip(lengths, window, shift, strict=True)):
        padded = -(-length // w) * w
        period = length if roll_first else padded
        r = torch.arange(padded, device=device)  # [P]
        p = torch.where(r < length, (r + s) % period, length) if roll_first else (r + s) % period
        zone = torch.where((r < padded - w) | (s == 0), 0, torch.where(r < padded - s, 1, 2))
        place = [1] * (2 * rank)
        place[a], place[rank + a] = padded // w, w  # this axis of [nW0, ..., w0, ...]
        pad = pad | (p >= length).view(place)
        token = token * length + p.view(place)
        region = region * 3 + zone.view(place)
        back = (torch.arange(length, device=device) - s) % period  # [L] working coordinate of each token
        along = [1] * rank
        along[a] = length
        of_window = of_window * (padded // w) + (back // w).view(along)
        of_position = of_position * w + (back % w).view(along)
    size = math.prod(window)
    token = token.masked_fill(pad, -1).reshape(-1, size)
    return token, region.reshape(-1, size), (of_window * size + of_position).reshape(-1)


def gather(x: Tensor, token: Tensor, pad: Tensor | None) -> Tensor:
    """The windows of a map x [B, *L, H, D]: [B, nW, H, N, D], with pad [H, D] (or 0) where token is -1."""
    flat = x.flatten(1, x.dim() - 3)  # [B, T, H, D]
    windows = flat[:, token.clamp(min=0)].transpose(2, 3)  # [B, nW, H, N, D]
    is_pad = (token < 0)[:, None, :, None]  # [nW, 1, N, 1]
    fill = x.new_zeros(()) if pad is None else pad.to(x.dtype)[:, None, :]  # [] or [H, 1, D]
    return torch.where(is_pad, fill, windows)  # [B, nW, H, N, D]


def normalize(x: Tensor, eps: float) -> Tensor:
    """x / max(|x|, eps) over the last axis; the gradient below eps is 1 / eps."""
    square = (x * x).sum(-1, keepdim=True)  # [..., 1]
    small = square <= eps * eps  # [..., 1]
    norm = square.masked_fill(small, 1.0).sqrt().masked_fill(small, eps)  # [..., 1] never differentiated at 0
    return x / norm


def dense_bias(bias: Tensor, index: Tensor | None, op: str = "window_attention") -> Tensor:
    """[H|1, N|1, N|1]: the bias itself, or the rows of a table [R, H] that index [N, N] names."""
    if index is None:
        return bias
    plain = type(index) is Tensor and index.device.type == "cpu" and not torch._C._are_functorch_transforms_active()
    eager = not torch.compiler.is_compiling() and plain
    if eager and index.numel() and not (int(index.min()) >= 0 and int(index.max()) < bias.shape[0]):
        raise ValueError(
            f"{op}: bias.index must lie in [0, {bias.shape[0]}), the rows of the table, "
            f"got entries from {int(index.min())} to {int(index.max())}"
        )
    return bias[index.long()].permute(2, 0, 1)  # [H, N, N]


def keep_pattern(seed: Tensor, batch: int, heads: int, token: Tensor, p: float, keys: int) -> Tensor:
    """True where dropout keeps a weight, [B, nW, H, N, keys]: a function of seed, image, head, query token and key slot. Behind
    the seed may stand the number of the first head, plus 2^32 times that of the first image, and behind that image 2^32 + token of
    each query."""
    windows, n = token.shape
    slots = -(-keys // 4)
    shape = (batch, windows, heads, n, slots)
    grid = [torch.arange(m, device=token.device) for m in (batch, heads, slots)]
    place = (grid[0].view(-1, 1, 1) << 32) + token.clamp(min=0)  # [B, nW, N]: image, query token on the map
    first = seed[1] if len(seed) > 1 else torch.zeros_like(seed[0])
    place = place + (first >> 32 << 32)
    if len(seed) > 2:
        place = seed[2:].view(batch, windows, n)
    place = place[:, :, None, :, None]  # [B, nW, 1, N, 1]
    counter = [
        (place >> 32).expand(shape),  # image
        (grid[1] + (first & 0xFFFFFFFF)).view(1, 1, -1, 1, 1).expand(shape),  # head
        (place & 0xFFFFFFFF).expand(shape),  # query token on the map
        grid[2].view(1, 1, 1, 1, -1).expand(shape),  # key slot div 4
    ]
    lanes = torch.stack(philox(counter, seed[:1]), -1).flatten(-2)[..., :keys]  # [B, nW, H, N, keys]
    return lanes >= math.ceil(p * 2.0**32)  # u = lane 2^-32 >= p


def philox(counter: list[Tensor], seed: Tensor) -> list[Tensor]:
    """Philox-4x32-10 (Salmon et al. 2011) on int64 tensors that hold 32-bit words."""
    low32 = 0xFFFFFFFF
    c0, c1, c2, c3 = counter
    k0, k1 = seed & low32, (seed >> 32) & low32
    for _ in range(10):
        h0, l0 = multiply(PHILOX_MULTIPLIER[0], c0)
        h1, l1 = multiply(PHILOX_MULTIPLIER[1], c2)
        c0, c1, c2, c3 = h1 ^ c1 ^ k0, l1, h0 ^ c3 ^ k1, l0
        k0, k1 = (k0 + PHILOX_KEY[0]) & low32, (k1 + PHILOX_KEY[1]) & low32
    return [c0, c1, c2, c3]


def multiply(a: int, b: Tensor) -> tuple[Tensor, Tensor]:
    """High and low 32 bits of a b, in int64 without overflow."""
    middle = (a >> 16) * b + (((a & 0xFFFF) * b) >> 16)  # below 2^49
    return middle >> 16, (a * b) & 0xFFFFFFFF
