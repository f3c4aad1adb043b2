"""What people run today instead of linear_attention: products with a column of ones, as timm and SANA have it, chunks where it is
causal; SDPA on the same q, k, v; on a GPU the kernels of flash-linear-attention (causal) and flash_bla, where installed."""

import importlib
import importlib.util
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..cases.linear_attention import Case

CHUNK = 64
EPS = 1e-6
PEERS = {"fla": "fla.ops.linear_attn", "flash_bla": "flash_bla.ops.linear_attn.fused"}


class Eager:
    """The published modules: map, append a column of ones, multiply, divide."""

    def __init__(self, case: Case) -> None:
        self.case = case

    def __call__(self, inputs: dict[str, Any]) -> Tensor:
        q, k, v = (t.transpose(1, 2) for t in self.case.qkv(inputs))
        q, k = (self.mapped(t).float() for t in (q, k))
        v1 = F.pad(v.float(), (0, 1), value=1.0)
        out = self.in_chunks(q, k, v1) if self.case.causal else q @ (k.mT @ v1)
        return (out[..., :-1] / (out[..., -1:] + EPS)).to(v.dtype).transpose(1, 2)

    def mapped(self, x: Tensor) -> Tensor:
        return x.relu() if self.case.feature_map == "relu" else F.elu(x) + 1

    def in_chunks(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """All pairs within a chunk, the sums of the chunks before it."""
        q, k, v = (t.unflatten(2, (-1, CHUNK)) for t in (q, k, v))  # [B, H, chunks, CHUNK, .]
        states = k.mT @ v
        before = states.cumsum(2) - states
        return (q @ before + (q @ k.mT).tril() @ v).flatten(2, 3)


class Peer:
    """Another package's kernel on features that PyTorch made."""

    def __init__(self, case: Case, name: str) -> None:
        self.eager, self.name = Eager(case), name
        module = importlib.import_module(PEERS[name])
        self.run = module.chunk_linear_attn if name == "fla" else module.linear_attention

    def __call__(self, inputs: dict[str, Any]) -> Tensor:
        q, k, v = self.eager.case.qkv(inputs)
        q, k = self.eager.mapped(q), self.eager.mapped(k)
        if self.name == "fla":
            return self.run(q, k, v, scale=1.0, normalize=True)[0]
        q, k, v = (t.transpose(1, 2).contiguous() for t in (q, k, v))
        return self.run(q, k, v, eps=EPS).transpose(1, 2)


def sdpa(case: Case, inputs: dict[str, Any]) -> Tensor:
    """Another function of the same tensors: what softmax costs at this length."""
    q, k, v = (t.transpose(1, 2) for t in case.qkv(inputs))
    return F.scaled_dot_product_attention(q, k, v, is_causal=case.causal).transpose(1, 2)


def make(name: str, case: Case, device: str, dtype: torch.dtype) -> Any:
    """The baseline as a function of the inputs."""
    if name in PEERS:
        return Peer(case, name)
    if name == "sdpa":
        return lambda inputs: sdpa(case, inputs)
    return torch.compile(Eager(case).__call__, dynamic=False) if name == "compiled" else Eager(case)


def supports(name: str, case: Case, device: str, backward: bool) -> bool:
    """SDPA takes minutes for the long cases on a CPU: benchmarks.lengths has it there."""
    if name in PEERS:
        return device == "cuda" and case.causal == (name == "fla") and installed(PEERS[name].partition(".")[0])
    return name != "sdpa" or device == "cuda"


def installed(package: str) -> bool:
    return importlib.util.find_spec(package) is not None
