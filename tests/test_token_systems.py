"""Published systems built from the token functions and the statistics of attention, against their own arithmetic."""

import torch

import vitkern
from vitkern import bias


def drawn(*shape):
    return torch.randn(shape, generator=torch.Generator().manual_seed(len(shape)))


def whole(q, k):
    """The weights [B, H, N, N] that published code reads off its softmax."""
    return (torch.einsum("bihd,bjhd->bhij", q, k) * q.shape[3] ** -0.5).softmax(-1)


def test_tome_merges_between_attention_and_mlp_with_proportional_attention():
    """Sizes enter as log size per key, the keys' mean over heads is the metric; nothing is lost: the sizes sum to N."""
    q, k, v, x = drawn(2, 17, 4, 8), drawn(2, 17, 4, 8) + 1, drawn(2, 17, 4, 8) - 1, drawn(2, 17, 32)
    size = torch.ones(2, 17)
    for r in (4, 3):
        out = vitkern.attention(q, k, v, bias=bias.KeyBias(size.log()[:, None]))
        p = whole(q, k) * size[:, None, None]
        want = torch.einsum("bhij,bjhd->bihd", p / p.sum(-1, keepdim=True), v)
        torch.testing.assert_close(out, want)
        plan = vitkern.merge_plan(vitkern.bipartite_match(k), r=r)
        (x, q, k, v), size = vitkern.merge_tokens((x, q, k, v), plan, weight=size)
    assert x.shape == (2, 10, 32) and size.sum(1).eq(17).all()


def test_evit_keeps_what_the_class_token_attends_to_and_fuses_the_rest():
    q, k, v, x = drawn(2, 12, 3, 8), drawn(2, 12, 3, 8) + 0.5, drawn(2, 12, 3, 8), drawn(2, 12, 24)
    _, stats = vitkern.attention(q, k, v, return_stats=("row",), stat_rows=(0,))
    score = stats.row[:, :, 0].mean(1)  # [B, N]
    got, index = vitkern.select_tokens(x, score, 7, fuse_rest=True, order="score")
    attention = whole(q, k)[:, :, 0, 1:].mean(1)  # [B, N - 1]
    _, idx = attention.topk(7, dim=1)
    left = torch.ones_like(attention, dtype=torch.bool).scatter(1, idx, False)
    kept = x[:, 1:].gather(1, idx[..., None].expand(-1, -1, 24))
    extra = (x[:, 1:] * (attention * left)[..., None]).sum(1, keepdim=True)
    torch.testing.assert_close(got, torch.cat((x[:, :1], kept, extra), 1))
    assert torch.equal(index[:, 1:].long(), idx + 1)


def test_evad_ranks_tokens_by_the_attention_they_receive_from_weighted_queries():
    """Key-frame tokens come first and stay; the others by their mean received weight, key-frame queries counting more."""
    q, k, x = drawn(2, 20, 4, 8), drawn(2, 20, 4, 8) * 2, drawn(2, 20, 32)
    frame, weight = 5, torch.ones(2, 20)
    weight[:, :frame] = 4.0
    _, stats = vitkern.attention(q, k, None, return_stats=("key_mean",), query_weight=weight)
    received = (whole(q, k) * weight[:, None, :, None]).sum(2).mean(1) / weight.sum(1, keepdim=True)
    torch.testing.assert_close(stats.key_mean.mean(2), received)
    y, index = vitkern.select_tokens(x, stats.key_mean.mean(2), 6, protect=frame)
    want = received[:, frame:].topk(6, dim=1).indices.sort(1).values + frame
    assert torch.equal(index[:, frame:].long(), want) and torch.equal(y[:, :frame], x[:, :frame])
    dense = vitkern.restore_tokens(y, index, 20, torch.zeros(32))  # EEVG: sparse to dense
    assert torch.equal(dense.gather(1, index.long()[..., None].expand(y.shape)), y)
    assert dense.abs().sum(-1).ne(0).sum(1).eq(11).all()


def test_routed_tokens_run_the_block_and_the_others_pass_by():
    """A gate per token: the chosen ones get x + gate * block(x), of a number that differs between samples."""
    x, block = drawn(3, 16, 8), torch.nn.Linear(8, 8)
    gate = torch.sigmoid(drawn(3, 16))
    y, index, lengths = vitkern.select_tokens(x, gate, threshold=0.5, protect=0, n_max=16)
    real = torch.arange(16) < lengths[:, None]
    weight = gate.gather(1, index.clamp(max=15).long())[..., None]
    out = vitkern.restore_tokens(torch.where(real[..., None], y + weight * block(y), 0.0), index, 16, x)
    want = torch.where((gate >= 0.5)[..., None], x + gate[..., None] * block(x), x)
    torch.testing.assert_close(out, want)
    assert len(set(lengths.tolist())) > 1
    packed, places, offsets = vitkern.select_tokens(x, gate, threshold=0.5, protect=0)
    assert torch.equal(packed, x[gate >= 0.5]) and offsets[-1] == len(places)


def test_rt_detr_takes_the_best_encoder_tokens_as_queries():
    memory, classes = drawn(2, 1200, 16), drawn(2, 1200, 9)
    score = classes.max(-1).values
    top, index = vitkern.select_tokens(memory, score, 300, protect=0, order="score")
    want = score.sort(dim=1, descending=True, stable=True).indices[:, :300]  # torch.topk leaves ties open
    assert torch.equal(index.long(), want)
    assert torch.equal(top, memory.gather(1, want[..., None].expand(-1, -1, 16)))


def test_mae_drops_at_random_and_fills_with_its_mask_token():
    """The published shuffle and restore: argsort of the noise, and the mask that is 1 where a token was removed."""
    x, noise, token = drawn(2, 49, 8), torch.rand(2, 49, generator=torch.Generator().manual_seed(0)), drawn(1, 1, 8)
    kept, index = vitkern.drop_tokens(x, 0.75, noise=noise)
    shuffle = noise.argsort(1)
    back = shuffle.argsort(1)
    want = x.gather(1, shuffle[:, :12, None].expand(-1, -1, 8))
    assert torch.equal(kept, want)
    filled = torch.cat((want, token.expand(2, 37, 8)), 1).gather(1, back[..., None].expand(-1, -1, 8))
    assert torch.equal(vitkern.restore_tokens(kept, index, 49, token), filled)
    mask = torch.ones(2, 49)
    mask[:, :12] = 0
    assert torch.equal(torch.ones(2, 49).scatter(1, index.long(), 0.0), mask.gather(1, back))
