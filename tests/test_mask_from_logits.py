"""mask_from_logits, the kernel behind mask.FromLogits, against its definition; and attention past tiles that nobody sees."""

import math

import pytest
import torch

import vitkern
from vitkern import testing
from vitkern.mask import BlockCausal, Causal, FromLogits, Segments, packed, unpacked
from vitkern.ops import _attention_slots
from vitkern.ops.attention import lower
from vitkern.ops.mask_from_logits import mask_from_logits


def drawn(*shape, seed=0, dtype=torch.float32):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def cells(m):
    """What the kernel shows, bool [B, Q, cells]."""
    count = math.prod(m.size)
    return unpacked(mask_from_logits(m, m.logits.shape[1], count), count)


def defined(m):
    with vitkern.use_backend("reference"):
        return cells(m)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("size", [(8, 8), (32, 32), (5, 3), (1, 1), (16, 24)])
def test_the_kernel_sees_what_the_definition_sees(dtype, size):
    logits = drawn(2, 3, 8, 8, dtype=dtype)
    for layout in (logits, logits.transpose(2, 3), drawn(2, 3, 8, 16, dtype=dtype)[..., ::2]):
        for inclusive in (True, False):
            m = FromLogits(layout, size, 0.1, inclusive=inclusive)
            resized = torch.nn.functional.interpolate(layout.double(), size=size, mode="bilinear").flatten(2)
            near = (resized - 0.1).abs() < 1e-6  # decided by the rounding of the interpolation
            got, want = cells(m), defined(m)
            assert got.shape == want.shape and ((got == want) | near).all()


@pytest.mark.parametrize("inclusive", [True, False])
def test_ties_and_nan(inclusive):
    """Mask2Former attends where nothing says below the threshold, EoMT where something says above it."""
    logits = torch.tensor([[[[0.0, -1.0], [torch.nan, 1.0]]]])
    on = cells(FromLogits(logits, (2, 2), inclusive=inclusive))
    assert on.flatten().tolist() == [inclusive, False, inclusive, True]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_logits_are_compared_and_not_probabilities(dtype):
    """sigmoid(-1e-4) rounds to 0.5 in float16, sigmoid(-1e-3) in bfloat16."""
    on = cells(FromLogits(torch.full((1, 1, 2, 2), -1e-4, dtype=dtype), (2, 2), empty="none"))
    assert not on.any()


def test_rows_without_a_cell_and_open_rows():
    logits = -drawn(1, 3, 4, 4).abs() - 1
    logits[0, 1, 2, 3] = 5.0
    assert cells(FromLogits(logits, (4, 4))).sum(-1).tolist() == [[16, 1, 16]]
    assert cells(FromLogits(logits, (4, 4), empty="none")).sum(-1).tolist() == [[0, 1, 0]]
    open_rows = torch.tensor([[False, True, True]])
    assert cells(FromLogits(logits, (4, 4), empty="none", open_rows=open_rows)).sum(-1).tolist() == [[0, 16, 16]]
    lost = torch.full((1, 1, 8, 8), -10.0)
    lost[..., 0, 0] = 1.0  # one pixel that the resized map loses
    assert cells(FromLogits(lost, (2, 2))).all()


def test_it_compiles_and_no_gradient_goes_to_the_logits():
    logits, q, k = drawn(1, 5, 4, 4).requires_grad_(), drawn(1, 5, 2, 8), drawn(1, 16, 2, 8, seed=1)

    def call(logits):
        return vitkern.attention(q, k, k, mask=FromLogits(logits, (4, 4)))

    torch.testing.assert_close(torch.compile(call, fullgraph=True, backend="aot_eager")(logits), call(logits))
    assert not call(logits).requires_grad


def blobs(queries, side, radius):
    """bool [queries, side * side]: every query sees a disc of its own; one sees nothing."""
    y, x = torch.meshgrid(torch.arange(side), torch.arange(side), indexing="ij")
    centre = torch.rand(queries, 2, generator=torch.Generator().manual_seed(3)) * side
    seen = (y - centre[:, :1, None]).square() + (x - centre[:, 1:, None]).square() < radius**2
    seen[queries // 2] = False
    return seen.flatten(1)


def predicted(queries, keys):
    """The discs as logits."""
    logits = blobs(queries, 18, 3.0)[:, :keys].double() - 0.5
    return FromLogits(logits[None, :, None].expand(2, -1, -1, -1), (1, keys), empty="none")


MASKS = {
    "discs": lambda q, k: blobs(q, 18, 3.0)[:, :k],
    "discs and causal": lambda q, k: [blobs(q, 18, 3.0)[:, :k], Causal(k - q)],
    "half of the keys": lambda q, k: torch.arange(k)[None, None, None] < k // 2,
    "predicted discs": lambda q, k: predicted(q, k),
    "predicted discs, causal": lambda q, k: [predicted(q, k), Causal(k - q)],
    "causal": lambda q, k: Causal(0),
    "segments": lambda q, k: Segments(torch.arange(q)[None] // 9 - 1, torch.arange(k)[None] // 60 - 1),
    "many segments": lambda q, k: Segments(torch.arange(q)[None] * 3 % 130, torch.arange(k)[None] % 130),
    "table": lambda q, k: Segments(
        torch.arange(q)[None] // 9, torch.arange(k)[None] // 60, torch.eye(8, dtype=torch.bool).roll(1, 0)
    ),
    "falling levels": lambda q, k: BlockCausal(torch.arange(q)[None] // 9, 5 - torch.arange(k)[None] // 50),
    "levels": lambda q, k: BlockCausal(torch.arange(q)[None] // 9 - 3, torch.arange(k)[None] // 60 - 2),
}


@pytest.mark.parametrize("name", MASKS)
@pytest.mark.parametrize("keys", [324, 321])
def test_hidden_tiles_are_passed_over_and_nothing_else_is(name, keys):
    """Outputs, statistics and gradients are those of the reference; NaN in what nobody sees never shows."""
    q, k, v = (drawn(2, n, 2, 16, seed=n, dtype=torch.float64) for n in (40, keys, keys))
    seen = MASKS[name](40, keys)
    shown = vitkern.attention(q, k, v, mask=seen, return_stats="probs", backend="reference")[1].probs.sum((1, 2)) > 0
    k, v = (torch.where(shown[..., None, None], t, torch.nan) for t in (k, v))
    added = drawn(1, 2, 40, keys, seed=7, dtype=torch.float64)
    tensors = [t.requires_grad_() for t in (q, k, v, added)]
    found = []
    for backend in ("reference", "cpu"):
        out, stats = vitkern.attention(
            *tensors[:3], bias=added, mask=seen, return_stats=("lse", "key_mean"), backend=backend
        )
        loss = out.sin().sum() + stats.lse.masked_fill(stats.lse.isinf(), 0.0).sum() + stats.key_mean.sin().sum()
        found.append((out, stats.lse, stats.key_mean, *torch.autograd.grad(loss, tensors)))
    for a, b in zip(*found, strict=True):
        assert a.isfinite().logical_or(a.isinf()).all()
        torch.testing.assert_close(b, a)


def test_causal_is_its_triangle_bit_for_bit():
    q, k, v = (drawn(1, 200, 2, 16, seed=n) for n in range(3))
    triangle = torch.ones(200, 200, dtype=torch.bool).tril()
    assert torch.equal(vitkern.attention(q, k, v, mask=Causal()), vitkern.attention(q, k, v, mask=triangle))


# the bits in attention ---------------------------------------------------------------------------------------------------


def slots(q, k, masks, **options):
    """The arguments of the op that masks become."""
    return _attention_slots.slots(lower(q, k, k, mask=masks, **options), None, None)


def test_predicted_masks_stay_bits_beside_each_other_rules_and_masks_of_keys():
    q, k = drawn(2, 5, 2, 8), drawn(2, 70, 2, 8)
    m = FromLogits(drawn(2, 3, 4, 4) - 0.5, (4, 9), rows=(1, 4), cols=(31, 67))
    other = FromLogits(drawn(2, 5, 7, 10, seed=2), (7, 10), empty="none")
    of_keys, pairs = torch.rand(2, 1, 1, 70) < 0.5, torch.rand(5, 70) < 0.5
    alone = m.dense(q, k)
    for masks, want in (
        (m, alone),
        ([m, Causal(3)], alone),
        ([m, of_keys], alone),
        ([m, other], alone & other.dense(q, k)),
    ):
        words = slots(q, k, masks)["mask"]
        assert words.dtype == torch.int32 and torch.equal(words, packed(want))
    more = drawn(1, 5, 2, 8)
    further = slots(q, k, m, extra_kv=(more, more))["mask"]
    assert torch.equal(further, packed(torch.nn.functional.pad(alone, (0, 5), value=True)))
    assert torch.equal(slots(q, k, [m, pairs])["mask"], alone & pairs)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize("keys", [1, 16, 31, 32, 33, 63, 64, 65, 300])
def test_words_that_are_not_full_not_contiguous_and_repeated(keys, dtype, monkeypatch):
    """Whatever lies behind the last key; words of every head and image or of all, strided."""

    def strange(m, queries, keys, backend=None):
        words = packed(m.dense(drawn(2, queries, 1, 1), drawn(2, keys, 1, 1))[:, 0])
        if keys % 32:
            words[..., -1] |= -1 << keys % 32
        return torch.stack((words, ~words), -1).transpose(1, 2).contiguous().transpose(1, 2)[..., 0]

    q, k, v = (drawn(2, n, 2, 8, seed=n).to(dtype) for n in (19, keys, keys))
    logits = drawn(2, 19, 3, 20, seed=3) - 0.7
    logits[:, 4] = -1.0
    for shared in (False, True):
        if shared:
            logits = logits[:1].expand(2, -1, -1, -1)
        m = FromLogits(logits, (1, keys), empty="none")
        tensors = {"q": q, "k": k, "v": v}
        options = {"mask": m, "return_stats": ("lse", "key_mean")}
        call = testing.Call("words", vitkern.attention, lambda t: ((t["q"], t["k"], t["v"]), options), tensors)
        with monkeypatch.context() as patch:
            patch.setattr(_attention_slots, "mask_from_logits", strange)
            testing.assert_matches(testing.entries()["attention"], call, dtype, "cpu")


@pytest.mark.parametrize(
    "shape", [(1, 2, 20, 70), (2, 1, 20, 70), (2, 2, 1, 70), (2, 2, 20, 70), (2, 1, 20, 31)], ids=str
)
def test_words_of_images_heads_and_rows_are_the_bytes_they_stand_for(shape):
    q, k = (drawn(2, n, 2, 8, seed=n).float().requires_grad_() for n in (20, shape[-1]))
    seen = drawn(*shape) > 0.3
    found = []
    for mask in (seen, packed(seen)):
        given = slots(q, k, None) | {"mask": mask}
        out, lse, _ = torch.ops.vitkern.attention(*given.values(), "")
        found.append((out, lse, *torch.autograd.grad(out.sin().sum(), (q, k))))
    for of_bytes, of_bits in zip(*found, strict=True):
        torch.testing.assert_close(of_bits, of_bytes)


def test_a_mask_of_words_must_have_a_bit_for_every_key(monkeypatch):
    q, k = drawn(1, 3, 1, 8), drawn(1, 40, 1, 8)
    m = FromLogits(drawn(1, 3, 1, 40), (1, 40))
    for words in (1, 3):
        monkeypatch.setattr(
            _attention_slots, "mask_from_logits", lambda *_, n=words, **__: torch.zeros(1, 3, n, dtype=torch.int32)
        )
        with pytest.raises(RuntimeError, match="mask must have a bit for every key"):
            vitkern.attention(q, k, k, mask=m, backend="cpu")
