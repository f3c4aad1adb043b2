"""attention: gathered keys and the convolution of the values, against loops; biases that repeat themselves."""

import math

import pytest
import torch
from functorch.compile import make_boxed_func
from memory import grown
from test_attention import logits, output, qkv
from torch._dynamo.backends.common import aot_autograd
from torch.utils._python_dispatch import TorchDispatchMode

import vitkern
from vitkern import DepthwiseValue, Rope
from vitkern.bias import DecomposedRelativePosition, EuclideanDistance, KeyBias, PolylinePath
from vitkern.modulation import ElementwiseMask, TalkingHeads
from vitkern.ops._attention_definition import TENSORS
from vitkern.ops.attention import OP

D = torch.float64


def drawn(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=D).requires_grad_()


@pytest.mark.parametrize("normalizer", ["softmax", "sigmoid", "relu", "none"])
def test_every_query_has_keys_of_its_own(normalizer):
    """Repeats count twice, -1 names nothing, a row of -1 is empty."""
    q, k, v = qkv(6, 9, heads=4, kv_heads=4, grad=True)
    index = torch.randint(-1, 9, (2, 6, 5), generator=torch.Generator().manual_seed(1))
    index[0, 0, :2], index[1, 2] = 3, -1
    sample = torch.arange(2)[:, None, None]
    keys, values = (t[sample, index.clamp(min=0)] for t in (k, v))  # [B, Nq, K, H, D]
    s = torch.einsum("bihd,bijhd->bhij", q, keys) * q.shape[-1] ** -0.5
    none = (index < 0)[:, None]
    p = {
        "softmax": lambda: s.masked_fill(none, -math.inf).softmax(-1).nan_to_num(0.0),
        "sigmoid": lambda: s.sigmoid().masked_fill(none, 0.0),
        "relu": lambda: s.relu().masked_fill(none, 0.0),
        "none": lambda: s.masked_fill(none, 0.0),
    }[normalizer]()
    want = torch.einsum("bhij,bijhd->bihd", p, values)
    got = vitkern.attention(q, k, v, key_index=index, normalizer=normalizer)
    torch.testing.assert_close(got, want)
    full = index.clamp(min=0)  # the gradient of the loop's softmax over an empty row is NaN
    keys, values = (t[sample, full] for t in (k, v))
    p = (torch.einsum("bihd,bijhd->bhij", q, keys) * q.shape[-1] ** -0.5).softmax(-1)
    found = [
        torch.autograd.grad(t.sin().sum(), (q, k, v))
        for t in (vitkern.attention(q, k, v, key_index=full), torch.einsum("bhij,bijhd->bihd", p, values))
    ]
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("shared", [True, False])
@pytest.mark.parametrize("prefix", [0, 2])
def test_the_values_of_the_neighbours_are_added(shared, prefix):
    grid, heads, width = (3, 4), 4, 6
    q, k, v = qkv(12 + prefix, 12 + prefix, heads=heads, kv_heads=2, grad=True)
    channels = width if shared else 2 * width
    weight, offset = drawn(channels, 1, 3, 5), drawn(channels, seed=1)
    got = vitkern.attention(q, k, v, lepe=DepthwiseValue(weight, offset, grid, prefix))
    want = torch.zeros(2, 12 + prefix, 2, width, dtype=D)
    for y in range(3):
        for x in range(4):
            for h in range(2):
                for c in range(width):
                    channel = c if shared else h * width + c
                    total = offset[channel]
                    for dy in range(-1, 2):
                        for dx in range(-2, 3):
                            if 0 <= y + dy < 3 and 0 <= x + dx < 4:
                                token = prefix + (y + dy) * 4 + x + dx
                                total = total + weight[channel, 0, dy + 1, dx + 2] * v[:, token, h, c]
                    want[:, prefix + y * 4 + x, h, c] = total
    torch.testing.assert_close(got, output(logits(q, k).softmax(-1), v) + want.repeat_interleave(2, 2))
    assert all(g.abs().sum() > 0 for g in torch.autograd.grad(got.sin().sum(), (q, k, v, weight, offset)))


@pytest.mark.parametrize(
    "options, error, message",
    [
        ({"key_index": torch.zeros(2, 5, 3)}, TypeError, "key_index must hold integers, got torch.float32"),
        (
            {"key_index": torch.zeros(2, 4, 3, dtype=torch.int32)},
            ValueError,
            r"key_index must have shape \[B or 1, Nq = 5, K\], got \[2, 4, 3\]",
        ),
        (
            {"key_index": torch.full((2, 5, 3), 5)},
            ValueError,
            r"key_index must lie in \[-1, 5\), the keys, got 5 to 5",
        ),
        ({"key_index": torch.zeros(2, 5, 3).int(), "topk": 2}, NotImplementedError, "key_index goes neither with topk"),
        ({"lepe": torch.zeros(8, 1, 3, 3)}, TypeError, "lepe must be a vitkern.DepthwiseValue or None, got Tensor"),
        (
            {"lepe": DepthwiseValue(torch.zeros(6, 1, 3, 3), None, (2, 2))},
            ValueError,
            r"lepe DepthwiseValue.grid must hold the 5 tokens of v without the prefix, got \(2, 2\)",
        ),
        (
            {"lepe": DepthwiseValue(torch.zeros(6, 1, 2, 2), None, (1, 5))},
            ValueError,
            r"lepe.weight must have shape \[12 or 6, 1, kh, kw\] with odd kh and kw, got \[6, 1, 2, 2\]",
        ),
        (
            {"lepe": DepthwiseValue(torch.zeros(6, 1, 3, 3), torch.zeros(5), (1, 5))},
            ValueError,
            r"lepe.bias must have shape \[channels of lepe.weight\] = \[6\], got \[5\]",
        ),
    ],
)
def test_bad_input_gets_a_sentence(options, error, message):
    with pytest.raises(error, match=message):
        vitkern.attention(*qkv(5, 5), **options)


# biases and factors that repeat themselves ------------------------------------------------------------------------------


class Shapes(TorchDispatchMode):
    """The shapes of the biases that the backward sees."""

    def __init__(self, name="bias"):
        super().__init__()
        self.place, self.found = OP.lead + TENSORS.index(name), []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.name() == "vitkern::attention_bwd":
            self.found.append(tuple(args[self.place].shape))
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("shape", [(1, 1, 5, 7), (2, 1, 5, 1), (1, 4, 1, 7), (5, 7), (4, 5, 7), (1,)], ids=str)
def test_a_bias_that_repeats_itself_has_one_gradient_for_all_places(shape):
    """Value, gradient and double backward are those of a copy without strides of 0; the kernel sums over what repeats."""
    q, k, v = qkv(5, 7, heads=4, kv_heads=2, grad=True)
    bias, full = drawn(*shape), (2, 4, 5, 7)
    found = []
    with Shapes() as shapes:
        for whole in (bias.expand(full), bias.expand(full).clone()):
            out = vitkern.attention(q, k, v, bias=whole)
            grads = torch.autograd.grad(out.sin().sum(), (bias, q), create_graph=True)
            found.append((out, *grads, *torch.autograd.grad(grads[1].square().sum(), (bias, k))))
    assert shapes.found[:1] == [(1,) * (4 - len(shape)) + shape]
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("name", ["gain", "weight", "early_gain", "early_weight"])
def test_factors_that_repeat_themselves_for_samples_and_heads(name):
    """Kernels want their axes of queries and keys whole."""
    q, k, v = qkv(5, 7, heads=4, kv_heads=2, grad=True)
    factor, full = drawn(1, 1, 5, 1), (2, 4, 5, 7)
    mixture = TalkingHeads(drawn(4, 4, seed=3), None, drawn(4, 4, seed=4), None)
    found = []
    with Shapes(name) as shapes:
        for whole in (factor.expand(full), factor.expand(full).clone()):
            one = ElementwiseMask(whole, "logit" if "gain" in name else "prob")
            out = vitkern.attention(q, k, v, modulation=[one, mixture] if "early" in name else one)
            found.append((out, *torch.autograd.grad(out.sin().sum(), (factor, q))))
    assert shapes.found == [(1, 1, 5, 7), full]
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b)


def test_the_view_itself_gets_equal_shares_and_a_leaf_every_place():
    q, k, v = qkv(5, 7, heads=4, kv_heads=4)
    bias = drawn(1, 1, 5, 7)
    view, leaf = bias.expand(2, 4, 5, 7), bias.detach().expand(2, 4, 5, 7).requires_grad_()
    whole = leaf.detach().clone().requires_grad_()
    of_view, of_leaf, want = (
        torch.autograd.grad(vitkern.attention(q, k, v, bias=b).sin().sum(), b)[0] for b in (view, leaf, whole)
    )
    torch.testing.assert_close(of_leaf, want)
    torch.testing.assert_close(of_view, want.mean((0, 1), keepdim=True).expand(2, 4, 5, 7))
    assert of_view.stride()[:2] == (0, 0)


def test_biases_in_a_list_are_added_once_for_all_that_they_repeat_for():
    q, k, v = qkv(5, 7, heads=4, kv_heads=4, grad=True)
    shared, own = drawn(1, 1, 5, 7), drawn(1, 4, 1, 7, seed=1)
    found = []
    with Shapes() as shapes:
        for made in (lambda t: t.expand(2, 4, 5, 7), lambda t: t.expand(2, 4, 5, 7).clone()):
            out = vitkern.attention(q, k, v, bias=[made(shared), own.expand(2, 4, 5, 7)])
            found.append((out, *torch.autograd.grad(out.sin().sum(), (shared, own, q))))
    assert shapes.found[0] == (1, 4, 5, 7)
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b)


def test_repeated_biases_under_transforms_and_in_forward_mode():
    q, bias, step = drawn(2, 5, 3, 8).detach(), drawn(5, 5), drawn(5, 5, seed=1).detach()

    def loss(bias, q=q):
        return vitkern.attention(q, q, q, bias=[bias.expand(2, 3, 5, 5), bias]).square().sum()

    (want,) = torch.autograd.grad(loss(bias), bias)
    torch.testing.assert_close(torch.func.grad(loss)(bias), want)
    torch.testing.assert_close(torch.func.jvp(loss, (bias,), (step,))[1], (want * step).sum())
    torch.testing.assert_close(torch.vmap(loss)(torch.stack((bias, step))), torch.stack((loss(bias), loss(step))))
    with torch.autograd.forward_ad.dual_level():
        dual = torch.autograd.forward_ad.make_dual(bias, step)
        torch.testing.assert_close(torch.autograd.forward_ad.unpack_dual(loss(dual))[1], (want * step).sum())


def test_compiled_code_sums_over_what_repeats_and_takes_biases_of_fixed_sizes():
    def call(q, bias):
        return vitkern.attention(q, q, q, bias=bias.expand(len(q), q.shape[2], -1, -1)).square().sum()

    shapes = []

    def backward(graph, example):
        ops = [n for n in graph.graph.nodes if n.target is torch.ops.vitkern.attention_bwd.default]
        shapes.extend(n.args[OP.lead + TENSORS.index("bias")].meta["val"].shape[:2] for n in ops)
        return make_boxed_func(graph)

    for dynamic in (False, True):
        q, bias = drawn(2, 5, 3, 8), torch.nn.Parameter(drawn(5, 5).detach())  # whose sizes are never traced
        torch._dynamo.reset()
        backend = aot_autograd(fw_compiler=lambda graph, example: make_boxed_func(graph), bw_compiler=backward)
        compiled = torch.compile(call, fullgraph=True, dynamic=dynamic, backend=backend)
        got, want = (torch.autograd.grad(f(q, bias), bias)[0] for f in (compiled, call))
        torch.testing.assert_close(got, want)
    assert [tuple(s) for s in shapes] == [(1, 1), (1, 1)]


REPEATED = """
def call(n):
    q, bias = torch.randn(8, n, 8, 8), torch.randn(1, 1, n, n, requires_grad=True)
    vitkern.attention(q, q, q, bias=bias.expand(8, 8, n, n)).square().sum().backward()

call(16)
"""


def test_a_repeated_bias_needs_no_map_for_each_sample_and_head():
    """Each of 64 maps of 1024 x 1024 scores would take 4.2 MB."""
    assert grown(REPEATED, "call(1024)") < 150e6
    assert (
        grown(REPEATED.replace("bias=bias.expand(8, 8, n, n)", "bias=[bias.expand(8, 8, n, n), bias]"), "call(1024)")
        < 150e6
    )


def fixed(*shape):
    return torch.nn.Parameter(drawn(*shape).detach())


FIXED = {
    "tensor": lambda: {"bias": fixed(3, 9, 9)},
    "keys": lambda: {"bias": KeyBias(fixed(2, 3, 9))},
    "decomposed": lambda: {"bias": DecomposedRelativePosition(fixed(2, 9, 3, 3), fixed(2, 9, 3, 3), None, (3, 3))},
    "distances": lambda: {"bias": EuclideanDistance(fixed(3), fixed(2, 9, 2), fixed(2, 9, 2))},
    "path": lambda: {"bias": PolylinePath(fixed(2, 3, 3, 3), fixed(2, 3, 3, 3))},
    "further keys": lambda: {"extra_kv": (fixed(2, 4, 3, 8), fixed(2, 4, 3, 8))},
    "rotation": lambda: {"rope": Rope(fixed(2, 9, 3, 4), fixed(2, 9, 3, 4), "half")},
    "scale": lambda: {"scale": fixed(3)},
}


@pytest.mark.parametrize("name", FIXED)
def test_parameters_of_fixed_sizes_meet_tokens_of_traced_ones(name):
    """A traced size equals the number it has, but is in no tuple with it."""
    options, q = FIXED[name](), drawn(2, 9, 3, 8).detach()
    torch._dynamo.reset()
    compiled = torch.compile(
        lambda q: vitkern.attention(q, q, q, **options), fullgraph=True, dynamic=True, backend="eager"
    )
    torch.testing.assert_close(compiled(q), vitkern.attention(q, q, q, **options))
