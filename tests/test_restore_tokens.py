"""restore_tokens: a brute force, edges and refusals. What every op must do is in tests/test_ops.py."""

import pytest
import torch

import vitkern
from vitkern import testing

BACKENDS = ["reference", *testing.backends()]
ON = pytest.mark.parametrize("backend", BACKENDS)


@ON
def test_every_kind_of_fill_against_a_loop(backend):
    y = torch.randn(3, 4, 5, dtype=torch.float64)
    index = torch.stack([torch.randperm(9)[:4] for _ in range(3)])
    index[1, 2] = 9  # a row that goes nowhere
    fills = (-1.5, *(torch.randn(s, dtype=torch.float64) for s in ((5,), (1, 1, 5), (3, 1, 5), (9, 5), (3, 9, 5))))
    for fill in fills:
        got = vitkern.restore_tokens(y, index, 9, fill, backend=backend)
        want = torch.as_tensor(fill, dtype=torch.float64).expand(3, 9, 5).clone()
        for b in range(3):
            for o in range(4):
                if index[b, o] < 9:
                    want[b, index[b, o]] = y[b, o]
        assert torch.equal(got, want)


@ON
def test_rows_come_out_bit_for_bit_and_nothing_leaks(backend):
    for dtype in (torch.float32, torch.bfloat16, torch.float16, torch.float64):
        y = torch.randn(2, 3, 7).to(dtype)
        y[0, 1] = torch.nan
        fill = torch.randn(2, 8, 7).to(dtype)
        index = torch.tensor([[7, 0, 3], [1, 2, 4]])
        fill[0, [7, 0, 3]], fill[1, [1, 2, 4]] = torch.nan, torch.inf  # hidden
        out = vitkern.restore_tokens(y, index, 8, fill, backend=backend)
        assert out.isnan().any(-1).tolist() == [[True] + [False] * 7, [False] * 8]
        assert torch.equal(out[1, [1, 2, 4]], y[1]) and torch.equal(out[0, [1, 2, 4, 5, 6]], fill[0, [1, 2, 4, 5, 6]])


@ON
def test_the_gradient_of_a_mask_token_is_summed_in_float32(backend):
    """A bfloat16 sum of 64 x 147 ones would stop at 256."""
    y, token = torch.zeros(64, 49, 8, dtype=torch.bfloat16), torch.zeros(8, requires_grad=True)
    index = torch.stack([torch.randperm(196)[:49] for _ in range(64)])
    out = vitkern.restore_tokens(y, index, 196, token, backend=backend)
    (grad,) = torch.autograd.grad(out, token, torch.ones_like(out))
    assert grad.eq(64 * 147).all()


@ON
def test_mixed_precision_keeps_the_dtype_of_the_rows(backend):
    y = torch.randn(2, 3, 4, dtype=torch.bfloat16, requires_grad=True)
    fill = torch.randn(2, 6, 4, requires_grad=True)
    out = vitkern.restore_tokens(y, torch.tensor([[0, 1, 2], [3, 4, 5]]), 6, fill, backend=backend)
    dy, dfill = torch.autograd.grad(out.sum(), (y, fill))
    assert out.dtype == dy.dtype == torch.bfloat16 and dfill.dtype == torch.float32
    assert dy.eq(1).all() and dfill[0, :3].eq(0).all() and dfill[0, 3:].eq(1).all()


@pytest.mark.skipif("cpu" not in BACKENDS, reason="the CPU library is not built")
def test_a_damaged_index_is_refused_by_the_kernel_too():
    y = torch.randn(1, 3, 2)
    for bad in ([[0, 1, 7]], [[0, -1, 2]], [[1, 1, 2]]):
        with pytest.raises(RuntimeError, match=r"restore_tokens: index must hold distinct positions in \[0, n\)"):
            torch.ops.vitkern.restore_tokens_fwd(y, torch.tensor(bad, dtype=torch.int32), None, None, 6, 0.0, "")


Y, PLACES = torch.randn(2, 3, 4), torch.tensor([[0, 1, 2], [3, 4, 5]])


@pytest.mark.parametrize(
    "call, kind, sentence",
    [
        (
            lambda: vitkern.restore_tokens(Y, PLACES, 4),
            ValueError,
            r"index must lie in \[0, n\] = \[0, 4\], got 0 to 5",
        ),
        (
            lambda: vitkern.restore_tokens(Y, PLACES * 0, 6),
            ValueError,
            "index must hold distinct positions in every sample",
        ),
        (lambda: vitkern.restore_tokens(Y, PLACES.float(), 6), TypeError, "index must hold integers"),
        (lambda: vitkern.restore_tokens(Y, PLACES[:, :2], 6), ValueError, r"index must have shape \[B, K\] = \[2, 3\]"),
        (lambda: vitkern.restore_tokens(Y, PLACES, 6.0), TypeError, "n must be an int, got 6.0"),
        (lambda: vitkern.restore_tokens(Y, PLACES, -6), ValueError, "n must be at least 0"),
        (lambda: vitkern.restore_tokens(Y, PLACES, 6, "mask"), TypeError, "fill must be a number or a tensor"),
        (
            lambda: vitkern.restore_tokens(Y, PLACES, 6, Y),
            ValueError,
            r"fill must be a number, of y's trailing shape \[4\] or",
        ),
        (lambda: vitkern.restore_tokens(Y[0, 0], PLACES, 6), ValueError, r"y must have shape \[B, K, ...\], got \[4\]"),
    ],
)
def test_refusals_are_sentences(call, kind, sentence):
    with pytest.raises(kind, match=sentence):
        call()
