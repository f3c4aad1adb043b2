"""What people run today: the meaning of the models' own windows, in plain PyTorch."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from vitkern.bias import offset_index
from vitkern.ops._window_general import halo_index

from ..cases.window_options import Case


class Windows:
    """Windows of a map [B, h, w, heads, d] of any sides that divide it, as [B nW, heads, N, d], and back."""

    def __init__(self, height: int, width: int, rows: int, columns: int, strided: bool = False) -> None:
        self.split = (height // rows, rows, width // columns, columns)
        if strided:
            self.split = (rows, height // rows, columns, width // columns)
        self.outer, self.inner = ((2, 4), (1, 3)) if strided else ((1, 3), (2, 4))
        self.sides, self.tokens = (height, width), rows * columns

    def parts(self, x: Tensor) -> Tensor:
        heads, d = x.shape[-2:]
        x = x.view(len(x), *self.split, heads, d).permute(0, *self.outer, 5, *self.inner, 6)
        return x.reshape(-1, heads, self.tokens, d)

    def back(self, x: Tensor, batch: int) -> Tensor:
        heads, d = x.shape[1], x.shape[3]
        sizes = [self.split[a - 1] for a in self.outer], [self.split[a - 1] for a in self.inner]
        x = x.view(batch, *sizes[0], heads, *sizes[1], d)
        place = {axis: i for i, axis in zip((1, 2, 4, 5), (*self.outer, *self.inner), strict=True)}
        return x.permute(0, *(place[a] for a in (1, 2, 3, 4)), 3, 6).reshape(batch, *self.sides, heads, d)


class Baseline:
    """Partition, attention on windows with a dense bias, reverse."""

    def __init__(self, case: Case, device: str, fused: bool) -> None:
        self.case, self.fused = case, fused
        n, w = case.side, case.window
        sides = (w, w)
        if case.kind == "stripes":
            self.windows = [Windows(n, n, n, w), Windows(n, n, w, n)]
            self.index = [offset_index(s, "query-key", torch.device(device)).long() for s in ((n, w), (w, n))]
            return
        self.windows = [Windows(case.padded, case.padded, w, w, strided=case.kind == "grid")]
        if case.kind == "decomposed":
            self.offset = torch.arange(w, device=device)[:, None] - torch.arange(w, device=device) + w - 1
        elif case.kind == "halo":
            self.index = [halo_index(sides, (case.keys,) * 2, "query-key", torch.device(device)).long()]
        else:
            self.index = [offset_index(sides, "query-key", torch.device(device)).long()]

    def attend(self, q: Tensor, k: Tensor, v: Tensor, bias: Tensor) -> Tensor:
        if self.fused:
            return F.scaled_dot_product_attention(q, k, v, attn_mask=bias)
        return ((q * q.shape[-1] ** -0.5) @ k.mT + bias).softmax(-1) @ v

    def bias(self, table: Tensor, which: int, dtype: torch.dtype) -> Tensor:
        return table[self.index[which]].permute(2, 0, 1)[None].to(dtype)

    def __call__(self, inputs: dict[str, Any]) -> Tensor:
        return getattr(self, self.case.kind)(inputs, *inputs["qkv"].unbind(-3))

    def decomposed(self, inputs: dict[str, Any], q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        w, n, more = self.case.window, self.case.side, self.case.padded - self.case.side
        wide = (0, 0, 0, 0, 0, more, 0, more)
        inside = F.pad(q.new_ones(1, n, n, 1, 1), wide).bool()
        k, v = (torch.where(inside, F.pad(t, wide), inputs[name]) for t, name in ((k, "k_pad"), (v, "v_pad")))
        q, k, v = (self.windows[0].parts(t) for t in (F.pad(q, wide), k, v))
        grid = q.unflatten(2, (w, w))
        rows, columns = (inputs[name].to(q.dtype)[self.offset] for name in ("rel_h", "rel_w"))
        down = torch.einsum("bhyxd,yud->bhyxu", grid, rows)[..., :, None]
        along = torch.einsum("bhyxd,xud->bhyxu", grid, columns)[..., None, :]
        bias = (down + along).flatten(4).flatten(2, 3)
        return self.windows[0].back(self.attend(q, k, v, bias), self.case.batch)[:, :n, :n]

    def halo(self, inputs: dict[str, Any], q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        case = self.case

        def unfolded(x: Tensor) -> Tensor:
            maps = x.flatten(3).permute(0, 3, 1, 2)
            found = F.unfold(maps, case.keys, stride=case.window, padding=(case.keys - case.window) // 2)
            found = found.view(case.batch, case.heads, case.d, case.keys**2, -1).permute(0, 4, 1, 3, 2)
            return found.flatten(0, 1)

        bias = self.bias(inputs["table"], 0, q.dtype)
        out = self.attend(self.windows[0].parts(q), unfolded(k), unfolded(v), bias)
        return self.windows[0].back(out, case.batch)

    def grid(self, inputs: dict[str, Any], q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        q, k, v = (self.windows[0].parts(t) for t in (q, k, v))
        return self.windows[0].back(self.attend(q, k, v, self.bias(inputs["table"], 0, q.dtype)), self.case.batch)

    def shared(self, inputs: dict[str, Any], q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        k, v = (self.windows[0].parts(t) for t in (k, v))
        q = inputs["q"].flatten(1, 2).transpose(1, 2)
        q = q.repeat_interleave(len(k) // len(q), 0)
        return self.windows[0].back(self.attend(q, k, v, self.bias(inputs["table"], 0, q.dtype)), self.case.batch)

    def stripes(self, inputs: dict[str, Any], q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        found = []
        half = self.case.heads // 2
        for g, windows in enumerate(self.windows):
            rows = [windows.parts(t[..., g * half : (g + 1) * half, :]) for t in (q, k, v)]
            out = self.attend(*rows, self.bias(inputs[f"table{g}"], g, q.dtype))
            weight = inputs["weight"].chunk(2)[g]
            sides = (windows.split[1], windows.split[3])
            maps = rows[2].transpose(2, 3).reshape(len(out), -1, *sides)
            added = F.conv2d(maps, weight, padding=1, groups=len(weight))
            out = out + added.view(len(out), half, -1, windows.tokens).transpose(2, 3)
            found.append(windows.back(out, self.case.batch))
        return torch.cat(found, -2)


def make(name: str, case: Case, device: str, dtype: torch.dtype) -> Any:
    """The baseline as a function of the inputs."""
    run = Baseline(case, device, fused=name == "sdpa")
    return torch.compile(run.__call__, dynamic=False) if name == "compiled" else run


def supports(name: str, case: Case, device: str, backward: bool) -> bool:
    return True
