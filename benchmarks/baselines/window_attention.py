"""What people run today instead of window_attention: the meaning of timm's and transformers' blocks, in plain PyTorch."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from vitkern.bias import offset_index
from vitkern.reference.window_attention import geometry, normalize

from ..cases.window_attention import Case


def _partition(x: Tensor, window: tuple[int, ...]) -> Tensor:
    """[B, *L, 3, H, D] to [3, B nW, H, N, D]; the map is padded to whole windows before."""
    rank = len(window)
    batch, lengths = x.shape[0], x.shape[1 : 1 + rank]
    split = [s for length, w in zip(lengths, window, strict=True) for s in (length // w, w)]
    x = x.reshape(batch, *split, *x.shape[1 + rank :])
    outer, inner = range(1, 2 * rank, 2), range(2, 2 * rank + 1, 2)
    last = 2 * rank + 1
    x = x.permute(last, 0, *outer, last + 1, *inner, last + 2)
    return x.reshape(3, -1, x.shape[2 + rank], inner_size(window), x.shape[-1])


def inner_size(window: tuple[int, ...]) -> int:
    size = 1
    for w in window:
        size *= w
    return size


def _merge(o: Tensor, batch: int, lengths: tuple[int, ...], window: tuple[int, ...]) -> Tensor:
    """The inverse, [B nW, H, N, D] to [B, *L, H, D]."""
    rank = len(window)
    counts = [length // w for length, w in zip(lengths, window, strict=True)]
    o = o.transpose(1, 2).reshape(batch, *counts, *window, *o.shape[1:2], o.shape[-1])
    order = [axis for a in range(rank) for axis in (1 + a, 1 + rank + a)]
    return o.permute(0, *order, 1 + 2 * rank, 2 + 2 * rank).reshape(batch, *lengths, o.shape[-2], o.shape[-1])


class Baseline:
    """Roll, partition, attention on the windows, reverse; the mask is made once, as the models do."""

    def __init__(self, case: Case, device: str, dtype: torch.dtype) -> None:
        self.case = case
        self.index = offset_index(case.window, "query-key", torch.device(device)).long().flatten()
        self.padded = tuple(-(-length // w) * w for length, w in zip(case.lengths, case.window, strict=True))
        _, region, _ = geometry(list(self.padded), list(case.window), list(case.shift), False, torch.device(device))
        differs = region[:, :, None] != region[:, None, :]
        self.mask = (differs * -100.0).to(dtype) if any(case.shift) else None

    def windows(self, qkv: Tensor) -> Tensor:
        case, rank = self.case, len(self.case.window)
        if self.padded != case.lengths:
            widths = [
                w
                for length, p in zip(reversed(case.lengths), reversed(self.padded), strict=True)
                for w in (0, p - length)
            ]
            qkv = F.pad(qkv, (0, 0, 0, 0, 0, 0, *widths))
        if any(case.shift):
            qkv = qkv.roll([-s for s in case.shift], tuple(range(1, 1 + rank)))
        return _partition(qkv, case.window)

    def back(self, o: Tensor) -> Tensor:
        case = self.case
        x = _merge(o, case.batch, self.padded, case.window)
        if any(case.shift):
            x = x.roll(case.shift, tuple(range(1, 1 + len(case.window))))
        return x[(slice(None), *(slice(0, length) for length in case.lengths))]

    def bias(self, table: Tensor) -> Tensor:
        n = inner_size(self.case.window)
        return table[self.index].view(n, n, -1).permute(2, 0, 1)

    def scores(self, q: Tensor, k: Tensor, inputs: dict[str, Any]) -> tuple[Tensor, Tensor, float]:
        if not self.case.cosine:
            return q, k, self.case.d**-0.5
        tau = inputs["logit_scale"].clamp(max=4.6052).exp()[:, None, None].to(q.dtype)
        return normalize(q, 1e-12) * tau, normalize(k, 1e-12), 1.0


class Eager(Baseline):
    def __call__(self, inputs: dict[str, Any]) -> Tensor:
        q, k, v = self.windows(inputs["qkv"]).unbind(0)
        q, k, scale = self.scores(q, k, inputs)
        s = (q * scale) @ k.transpose(-2, -1) + self.bias(inputs["table"]).to(q.dtype)
        if self.mask is not None:
            s = (s.unflatten(0, (self.case.batch, -1)) + self.mask[None, :, None]).flatten(0, 1)
        return self.back(s.softmax(-1) @ v)


class Sdpa(Baseline):
    def __call__(self, inputs: dict[str, Any]) -> Tensor:
        q, k, v = self.windows(inputs["qkv"]).unbind(0)
        q, k, scale = self.scores(q, k, inputs)
        bias = self.bias(inputs["table"]).to(q.dtype)[None]
        if self.mask is not None:
            bias = (bias + self.mask[:, None])[None].expand(self.case.batch, -1, -1, -1, -1).flatten(0, 1)
        return self.back(F.scaled_dot_product_attention(q, k, v, attn_mask=bias, scale=scale))


class Flex(Baseline):
    def __init__(self, case: Case, device: str, dtype: torch.dtype) -> None:
        super().__init__(case, device, dtype)
        from torch.nn.attention.flex_attention import flex_attention

        self.flex = torch.compile(flex_attention, dynamic=False)

    def __call__(self, inputs: dict[str, Any]) -> Tensor:
        q, k, v = (t.contiguous() for t in self.windows(inputs["qkv"]).unbind(0))
        q, k, scale = self.scores(q, k, inputs)
        bias, mask = self.bias(inputs["table"]), self.mask

        def score_mod(score: Tensor, b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
            score = score + bias[h, i, j]
            return score if mask is None else score + mask[b % mask.shape[0], i, j]

        return self.back(self.flex(q, k, v, score_mod=score_mod, scale=scale))


def make(name: str, case: Case, device: str, dtype: torch.dtype) -> Any:
    """The baseline as a function of the inputs."""
    if name == "compiled":
        eager = Eager(case, device, dtype)
        return torch.compile(eager.__call__, dynamic=False)
    return {"eager": Eager, "sdpa": Sdpa, "flex": Flex}[name](case, device, dtype)


def supports(name: str, case: Case, device: str, backward: bool) -> bool:
    """FlexAttention has no backward on the CPU."""
    return not (name == "flex" and device == "cpu" and backward)
