"""depthwise_value: the convolution that DepthwiseValue adds, against torch's, and the sums of its weight's gradient."""

import pytest
import torch
from agreement import agree

from vitkern import DepthwiseValue, testing
from vitkern.ops.depthwise_value import depthwise_value
from vitkern.testing.depthwise_value import make

ENTRY = testing.entries()["depthwise_value"]
BACKENDS = ["reference", *testing.backends()]
D = torch.float64


def draw(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=D).requires_grad_()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("sides", [(1, 1), (3, 3), (5, 5), (5, 3), (7, 3)])
def test_it_is_the_convolution_of_channels_of_their_own(sides, backend):
    v, weight, bias = draw(2, 4 * 6, 3, 5), draw(15, 1, *sides, seed=1), draw(15, seed=2)
    conv = torch.nn.Conv2d(15, 15, sides, padding=(sides[0] // 2, sides[1] // 2), groups=15, dtype=D)
    maps = v.reshape(2, 4, 6, 15).permute(0, 3, 1, 2)
    want = torch.func.functional_call(conv, {"weight": weight, "bias": bias}, (maps,))
    want = want.permute(0, 2, 3, 1).reshape(2, 24, 3, 5)
    agree(depthwise_value(v, weight, bias, (4, 6), backend=backend), want, (v, weight, bias))


@pytest.mark.parametrize("backend", BACKENDS)
def test_tokens_in_front_of_the_map_get_nothing(backend):
    v, weight = draw(2, 2 + 12, 2, 3), draw(3, 1, 3, 3, seed=1)
    found = DepthwiseValue(weight, None, (3, 4), prefix_tokens=2).of(v, backend=backend)
    want = depthwise_value(v[:, 2:], weight, None, (3, 4), backend="reference")
    agree(found, torch.cat((torch.zeros(2, 2, 2, 3, dtype=D), want), 1), (v, weight))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, D], ids=str)
@pytest.mark.parametrize("call", [
    make(1, 3, (70, 5), 2, 40),                       # bands of rows, blocks of channels
    make(2, 90, (3, 3), 1, 20, layout="heads"),       # more maps than chunks
    make(3, 1, (33, 20), 2, 70, sides=(5, 5), layout="heads"),
    make(4, 2, (18, 4), 2, 3, sides=(9, 3), layout="channels", shared=True),
], ids=lambda c: str(c.seed))  # fmt: skip
@pytest.mark.parametrize("backend", testing.backends())
def test_maps_of_many_pieces(call, dtype, backend):
    testing.assert_matches(ENTRY, call, dtype, backend)


def test_the_kernel_refuses_maps_and_kernels_that_do_not_fit():
    op, v = torch.ops.vitkern.depthwise_value_fwd, torch.zeros(1, 6, 1, 2)
    with pytest.raises(RuntimeError, match="v must be .B, N, H, D. of a map of N cells"):
        op(v, torch.zeros(2, 1, 3, 3), None, [2, 2], "")
    with pytest.raises(RuntimeError, match="weight must be .H D or D, 1, kh, kw. with odd sides"):
        op(v, torch.zeros(2, 1, 2, 3), None, [2, 3], "")
    with pytest.raises(RuntimeError, match="bias must have the first axis of weight"):
        op(v, torch.zeros(2, 1, 3, 3), torch.zeros(3), [2, 3], "")
