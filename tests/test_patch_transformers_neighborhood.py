"""vitkern.patch on transformers' DiNAT, the module of NAT, and NATTEN's old functions."""

import copy

import libraries  # noqa: F401
import patch_cases
import pytest
import torch
from module_cases import by_formula
from torch import nn

import vitkern
from vitkern.nn import DilatedNeighborhoodAttention, NeighborhoodAttention
from vitkern.patch import natten

transformers = pytest.importorskip("transformers")


def windows(length, kernel, dilation):
    """The keys [L, K] of every token of an axis, and their distance in steps, by NATTEN's rule."""
    keys = torch.zeros(length, kernel, dtype=torch.int64)
    for i in range(length):
        group = range(i % dilation, length, dilation)
        first = min(max(i // dilation - kernel // 2, 0), len(group) - kernel)
        keys[i] = torch.tensor(group[first : first + kernel])
    return keys, (keys - torch.arange(length)[:, None]) // dilation


def scores(q, k, rpb, kernel, dilation):
    """Of maps [B, heads, H, W, D] by gathering: [B, heads, H, W, K K]."""
    (y, dy), (x, dx) = (windows(n, kernel, dilation) for n in q.shape[2:4])
    near = k[:, :, y[:, None, :, None], x[None, :, None, :]]  # [B, heads, H, W, K, K, D]
    bias = rpb[:, dy[:, None, :, None] + kernel - 1, dx[None, :, None, :] + kernel - 1]  # [heads, H, W, K, K]
    return (torch.einsum("bhyxd,bhyxijd->bhyxij", q, near) + bias).flatten(-2)


def values(a, v, kernel, dilation):
    (y, _), (x, _) = (windows(n, kernel, dilation) for n in v.shape[2:4])
    near = v[:, :, y[:, None, :, None], x[None, :, None, :]]
    return torch.einsum("bhyxij,bhyxijd->bhyxd", a.unflatten(-1, (kernel, kernel)), near)


def by_gathering(self, hidden_states, output_attentions=False):
    """transformers 4's forward of DiNAT's attention: heads move in front of the map."""
    shape = (self.num_attention_heads, self.attention_head_size)
    q, k, v = (f(hidden_states).unflatten(-1, shape).movedim(3, 1) for f in (self.query, self.key, self.value))
    weights = scores(q * shape[1] ** -0.5, k, self.rpb, self.kernel_size, self.dilation).softmax(-1)
    out = values(weights, v, self.kernel_size, self.dilation).movedim(1, 3).flatten(-2)
    return (out, weights) if output_attentions else (out,)


@pytest.fixture
def dinat(monkeypatch):
    from transformers.models.dinat import modeling_dinat
    from transformers.utils import import_utils

    for name in ("natten2dqkrpb", "natten2dav"):
        monkeypatch.setattr(modeling_dinat, name, getattr(modeling_dinat, name))
    monkeypatch.setitem(import_utils.BACKENDS_MAPPING, "natten", import_utils.BACKENDS_MAPPING["natten"])
    natten.stand_in()
    monkeypatch.setattr(modeling_dinat.NeighborhoodAttention, "forward", by_gathering)
    sizes = {"embed_dim": 16, "depths": [2, 2], "num_heads": [2, 4], "kernel_size": 3, "dilations": [[1, 3], [1, 2]]}
    config = transformers.DinatConfig(**sizes, drop_path_rate=0.0, layer_scale_init_value=0.5)
    return patch_cases.randomize(transformers.DinatModel(config))


def test_dinat_runs_on_a_machine_without_natten_and_matches(dinat):
    patch_cases.check(dinat, (48, 64), (40, 36), (16, 24), replaced=4)
    patch_cases.check(dinat, (40, 36), replaced=4, train=True)


def test_attention_weights_are_given_where_they_are_asked_for(dinat):
    x = torch.randn(1, 3, 48, 64, dtype=torch.float64)
    dinat.double().eval()
    with torch.no_grad():
        want = dinat(x, output_attentions=True).attentions
        with vitkern.patched(dinat):
            got = dinat(x, output_attentions=True).attentions
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b)


def formula(module, x):
    height, width = x.shape[1:3]
    least = module.kernel_size * module.dilation
    x = nn.functional.pad(x, (0, 0, 0, max(0, least - width), 0, max(0, least - height)))
    q, k, v = module.qkv(x).unflatten(-1, (3, module.num_heads, -1)).movedim(-2, 1).unbind(-2)
    a = scores(q * q.shape[-1] ** -0.5, k, module.rpb, module.kernel_size, module.dilation).softmax(-1)
    out = values(a, v, module.kernel_size, module.dilation).movedim(1, 3).flatten(-2)
    return module.proj(out[:, :height, :width])


@pytest.mark.parametrize("size", [(9, 11), (4, 12)])
def test_the_modules_are_the_formula(size):
    x = torch.randn(2, *size, 12, generator=torch.Generator().manual_seed(1))
    for module in (NeighborhoodAttention(12, 3, 5), DilatedNeighborhoodAttention(12, 2, 3, 2, qkv_bias=False)):
        nn.init.normal_(module.rpb)
        by_formula(module, formula, x)
    assert set(module.state_dict()) == {"qkv.weight", "rpb", "proj.weight", "proj.bias"}


def test_dropout_acts_on_the_weights():
    module = NeighborhoodAttention(8, 2, 3, attn_drop=0.5).train()
    x = torch.randn(1, 6, 6, 8)
    torch.manual_seed(1)
    first = module(x)
    assert not torch.equal(first, module(x)) and torch.equal(copy.deepcopy(module).eval()(x), module.eval()(x))


@pytest.mark.parametrize("axes", [1, 2, 3])
def test_nattens_functions_take_maps_heads_first(axes):
    shape = (2, 3, *(6, 5, 4)[:axes], 8)
    q, k, v = torch.randn(3, *shape).unbind(0)
    rpb = torch.randn(3, *(5,) * axes)
    a = getattr(natten, f"natten{axes}dqkrpb")(q, k, rpb, 3, 1)
    out = getattr(natten, f"natten{axes}dav")(a.softmax(-1), v, 3, 1)
    moved = (t.movedim(1, -2) for t in (q, k, v))
    want = vitkern.neighborhood_attention(*moved, 3, rpb=rpb, scale=1.0)
    torch.testing.assert_close(out, want.movedim(-2, 1))
    with pytest.raises(
        ValueError, match=rf"natten{axes}dav: value must have shape \[B, heads, \*{axes} axes, head_dim\]"
    ):
        getattr(natten, f"natten{axes}dav")(a, v[0], 3, 1)
