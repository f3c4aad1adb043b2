"""The CUDA kernels of linear_attention on the emulator: launches, refusals, planted faults. Cases and schedules are in
cuda_emulator/linear_attention.py, which test_cuda_emulated.py runs under the sanitizers."""

import re

import pytest
import torch
from emulated import Edit, emulated
from emulated_linear import CALLS, SUMS, check
from gpu_path import tokens_on_gpu

import vitkern
from vitkern.ops import _cuda, _linear_gpu
from vitkern.ops.linear_attention import OP
from vitkern.testing.linear_attention import make
from vitkern.testing.oracle import assert_close_to_oracle

pytestmark = pytest.mark.compile


@pytest.fixture(scope="module")
def kernels():
    return emulated()


def test_two_launches_forward_three_backward_and_one_more_where_there_are_many_runs(kernels):
    short, few, many = 20, 16 * 64, 17 * 64 - 3
    for queries, keys in ((short, few), (short, many), (many, short)):
        kernels.launched()
        check(kernels, make(1, 1, (queries,), (keys,), heads=1, **SUMS), torch.bfloat16, (0,))
        names = ["keys", "add", "queries", "query_gradients", "query_sums", "add", "key_gradients"]
        if keys != many:
            names.pop(1)
        if queries != many:
            names.pop(-2)
        # once against the oracle, once more for the bits
        assert kernels.launched() == [f"linear_attention_{name}" for name in names] * 2


def test_each_gradient_alone(kernels):
    q, k, v = (torch.randn(1, 40, 2, 8).bfloat16() for _ in "qkv")
    tensors = [q, k, v, torch.rand(1, 40, 2).bfloat16()]

    def run(wanted):
        leaves = [t.clone().requires_grad_(i in wanted) for i, t in enumerate(tensors)]
        with kernels.active(), tokens_on_gpu("cuda"):
            out = vitkern.linear_attention(*leaves[:3], key_weight=leaves[3], feature_map="silu_norm")
            return torch.autograd.grad(out.float().square().sum(), [leaves[i] for i in wanted])

    every = run(range(4))
    for i in range(4):
        assert torch.equal(run([i])[0], every[i])


@pytest.mark.parametrize("of", ["the state", "one number"])
def test_gradients_that_are_not_given_or_not_stored(kernels, of):
    """Of the sums alone, and of an output whose gradient is expanded."""
    found = []
    for backend, dtype in (("cuda", torch.bfloat16), ("reference", torch.float64), ("reference", torch.bfloat16)):
        leaves = [torch.randn(1, 20, 1, 8, generator=torch.Generator().manual_seed(i)) for i in range(3)]
        leaves = [t.bfloat16().to(dtype).requires_grad_() for t in leaves]
        with kernels.active(), tokens_on_gpu("cuda"):
            out, state = vitkern.linear_attention(*leaves, feature_map="elu1", return_state=True, backend=backend)
            loss = out.sum() if of == "one number" else state[0].square().sum() + state[1].sum()
            found.append(torch.autograd.grad(loss, leaves, materialize_grads=True))
    for name, got, exact, eager in zip("qkv", *found, strict=True):
        assert_close_to_oracle(f"d{name}", got, exact, eager, gradient=True)


def test_runs_come_from_the_shape_alone():
    splits, tile = _linear_gpu.splits, _linear_gpu.TILE
    assert splits(1, 8, 4096) == 16 and splits(1, 8, 0) == splits(0, 8, 5) == 1
    assert splits(1, 16, 65536) == 32 and splits(2, 16, 32768) == 17 and splits(64, 16, 3136) == 1
    for tokens in range(1, 3000, 37):
        tiles = -(-tokens // tile)
        runs = splits(1, 2, tokens)
        assert (runs - 1) * -(-tiles // runs) < tiles  # none is empty


def test_what_the_kernels_do_not_serve_is_refused(kernels):
    def reasons(q, k=None, v=None, weight=None, cos=None, name="relu", pairs=False):
        args = (q, q if k is None else k, q if v is None else v, None, weight, cos, cos, cos, cos, *(None,) * 5, name)
        with kernels.active():
            return _linear_gpu.refusals((*args, 0.0, "sum", 1e-6, 1.0, 0.0, False, False, pairs))

    q = torch.zeros(1, 1, 1, 1, 5, 2, 16, dtype=torch.bfloat16)
    wide = q.repeat_interleave(9, -1)
    assert reasons(q) == []
    for (reason,), words in (
        (reasons(q.float()), "must be bfloat16 or float16, that of q is torch.float32"),
        (reasons(q, v=q[..., :12]), "of v must be a multiple of 8 up to 128, it is 12"),
        (reasons(wide, wide, q), "of q and k must be a multiple of 8 up to 128, it is 144"),
        (reasons(q, k=q.mT.contiguous().mT), "last dimension of k must be contiguous, its stride is 2"),
        (reasons(q, name="softmax"), "must be one of relu, .* silu_norm, it is softmax"),
        (reasons(q, cos=q), "rope must be applied before the feature map"),
        (reasons(q, weight=q[..., 0].double()), "key_weight must not be float64"),
        (reasons(q, pairs=True), "sums over all pairs are for the other back-ends"),
    ):
        assert re.search(words, reason)
    with pytest.raises(ValueError, match="cuda: the tensors are on cpu"):
        vitkern.linear_attention(q[0, 0, 0], q[0, 0, 0], q[0, 0, 0], backend="cuda")
    with kernels.active(), tokens_on_gpu("cuda"), pytest.raises(RuntimeError, match="multiples of 8 up to 128"):
        x = q[..., :12]
        _linear_gpu.forward(x, x, x, *(None,) * 11, "relu", 0.0, "sum", 1e-6, 1.0, 0.0, False, False, False)
    assert OP.gpu.cuda is not None and _cuda.ops is torch.ops.vitkern


def test_bounds_beyond_the_tokens_stay_within_them(kernels):
    x = torch.randn(1, 1, 1, 1, 20, 1, 8).bfloat16()
    rest = ("relu", 0.0, "sum", 1e-6, 1.0, 0.0, False, False, False)
    found = []
    with kernels.active():
        for bounds in ([0, 7, 20], [-3, 7, 2**31 - 1]):
            cu = torch.tensor(bounds, dtype=torch.int32)
            found.append(_linear_gpu.forward(x, x, x, *(None,) * 6, cu, cu, *(None,) * 3, *rest))
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


SUMS_FILE, FILE = "linear_attention_sums.cuh", "linear_attention.cu"
BACK = "linear_attention_bwd.cu"
FAULTS = {
    "a tile read while it is written": (SUMS_FILE, "__syncthreads();  // this tile is complete;", "// this tile", "tiles"),
    "the low halves lost": (SUMS_FILE, "if (!exact) mma_16x8x8_tf32(c", "if (false) mma_16x8x8_tf32(c", "tiles"),
    "factors not waited for": (SUMS_FILE, "__syncthreads();  // the factors are complete", "", "a wide head"),
    "what is hidden": (SUMS_FILE, "seen ? x + left_at + chunk * 8 : nullptr", "x + left_at + chunk * 8", "broken"),
    "the gradients of the second head": (SUMS_FILE, "head * p.group + tile / of_head", "head * p.group", "weights"),
    "dout before it is there": (
        BACK, "copy_wait_all();\n    __syncwarp();  // both rows are complete\n    float n", "float n", "tiles",
    ),
    "gradients of what is hidden": (BACK, "seen[h] ? pack2", "true ? pack2", "the mean taken off"),
    "results not waited for": (FILE, "__syncwarp();  // the results are complete;", "//", "weights"),
}  # fmt: skip


@pytest.mark.parametrize("name", FAULTS)
def test_a_planted_fault_is_caught(name, monkeypatch):
    file, old, new, call = FAULTS[name]
    monkeypatch.setattr(_linear_gpu, "WAVE", 1)
    broken = emulated((Edit(file, old, new),))
    with pytest.raises((AssertionError, RuntimeError)):
        check(broken, CALLS[call], torch.bfloat16, range(8))
