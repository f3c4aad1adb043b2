"""Published systems that choose, merge, rank or route tokens, as calls of several ops, against their own arithmetic."""

import math

import pytest
import torch
import torch.nn.functional as F
from agreement import agree
from window_maps import BACKENDS, draw

import vitkern
from vitkern import MergePlan, bias, mask, merging

EACH = pytest.mark.parametrize("backend", [b for b in BACKENDS if b in ("reference", "cpu")])


@pytest.fixture(autouse=True)
def forced(request):
    with vitkern.use_backend(request.getfixturevalue("backend")):
        yield


def leaf(*shape, seed=0):
    return draw(*shape, seed=seed).requires_grad_()


def weights(q, k):
    return (torch.einsum("bihd,bjhd->bhij", q, k) * q.shape[3] ** -0.5).softmax(-1)


def softmax(q, k, v, added=0.0):
    s = torch.einsum("bihd,bjhd->bhij", q, k) * q.shape[3] ** -0.5 + added
    return torch.einsum("bhij,bjhd->bihd", s.softmax(-1), v)


def rows(x, index):
    return x.gather(1, index[(...,) + (None,) * (x.dim() - 2)].expand(*index.shape, *x.shape[2:]))


@EACH
def test_diffrate_merges_the_least_important_into_the_kept_and_drops_the_rest(backend):
    x, metric, score, size = leaf(2, 12, 8), draw(2, 12, 8, seed=1), draw(2, 12, seed=2), draw(2, 12, seed=3).abs() + 1
    order = score.argsort(1, descending=True)
    keep, source = order[:, :7], order[:, 7:10]  # two more are dropped
    match = vitkern.bipartite_match(metric, protect=0, partition=(source, keep))
    plan = vitkern.merge_plan(match, r=3)
    y, _ = vitkern.merge_tokens(x, plan)
    weighted = torch.where(match.role == 0, match.score, 1.0) * size
    total = vitkern.merge_tokens(weighted[..., None], plan, reduce="sum")[0]
    at = plan.token_map.gather(1, keep).long()
    unit = F.normalize(metric, dim=-1)
    best, partner = (rows(unit, source) @ rows(unit, keep).mT).max(-1)  # [B, 3]
    into = F.one_hot(partner, 7).double()  # [B, 3, 7]
    sums, counts = rows(x, keep) + into.mT @ rows(x, source), 1 + into.sum(1)
    agree(rows(y, at), sums / counts[..., None], (x,))
    want = rows(size, keep) + (into * (best * rows(size, source))[..., None]).sum(1)
    torch.testing.assert_close(rows(total, at)[..., 0], want, check_dtype=False)


@EACH
def test_git_merge_3d_merges_with_another_number_in_every_segment(backend):
    x, metric, taken = leaf(4, 24, 8), draw(4, 24, 8, seed=1), (5, 6, 7, 8)
    centers = torch.arange(0, 24, 4)
    match = vitkern.bipartite_match(metric, protect=0, partition=centers[None].expand(4, -1))
    plan = vitkern.merge_plan(match, r=torch.tensor(taken))
    y, _ = vitkern.merge_tokens(x, plan)
    unit = F.normalize(metric, dim=-1)
    similar = (unit @ unit.mT)[:, :, centers]  # [B, N, centers]
    member = torch.zeros(4, 24, 24, dtype=torch.float64)  # who is averaged with whom
    for b, r in enumerate(taken):
        best, at = similar[b].max(-1)
        best[centers] = -math.inf
        group = torch.arange(24)
        for i in best.topk(r).indices:
            group[i] = centers[at[i]]
        member[b] = (group[:, None] == group).double()
    agree(vitkern.unmerge_tokens(y, plan), member / member.sum(-1, keepdim=True) @ x, (x,))


@EACH
def test_zero_tprune_ranks_by_attention_and_removes_what_is_most_like_the_others(backend):
    q, k, x = draw(2, 20, 3, 8), draw(2, 20, 3, 8, seed=1), leaf(2, 20, 8, seed=2)
    got = merging.attention_rank(q, k, rounds=5, variance=None)
    p, s = weights(q, k), torch.full((2, 3, 20), 1 / 20, dtype=torch.float64)
    for _ in range(5):
        s = torch.einsum("bhi,bhij->bhj", s, p)
    want = s.square().mean(1).sqrt()
    torch.testing.assert_close(got / got.sum(1, keepdim=True), (want / want.sum(1, keepdim=True)).float())
    order = got.argsort(1, descending=True)
    low, high = order[:, 10:], order[:, :10]
    match = vitkern.bipartite_match(k, protect=0, partition=(low, high))
    y, _ = vitkern.merge_tokens(x, vitkern.merge_plan(match, r=4), reduce="first")
    unit = F.normalize(k.mean(2), dim=-1)
    gone = rows(low, (rows(unit, low) @ rows(unit, high).mT).amax(-1).topk(4).indices)
    stay = torch.ones(2, 20, dtype=torch.bool).scatter(1, gone, False)
    kept = x[stay].unflatten(0, (2, 16))
    agree(y.sum(1), kept.sum(1), (x,))
    torch.testing.assert_close(y.sort(1).values, kept.sort(1).values)


@EACH
def test_sg_former_sorts_tokens_and_sums_groups_with_learned_weights(backend):
    x, score, w = leaf(2, 16, 6), draw(2, 16, seed=1), leaf(4, seed=2)
    sorted_, _ = vitkern.select_tokens(x, score, 16, protect=0, order="score")
    groups = sorted_.unflatten(1, (4, 4)).flatten(0, 1)
    got = vitkern.soft_merge(groups, w[None, :, None].expand(8, -1, -1), normalize="none").view(2, 4, 6)
    by_score = rows(x, score.argsort(1, descending=True))
    agree(got, torch.einsum("bgnc,n->bgc", by_score.unflatten(1, (4, 4)), w), (x, w))


@EACH
def test_ia_red_keeps_what_reaches_a_threshold_and_attends_packed(backend):
    x, score = leaf(3, 12, 16), torch.rand(3, 12, generator=torch.Generator().manual_seed(1))
    y, _, ends = vitkern.select_tokens(x, score, threshold=0.5)
    heads = y.unflatten(-1, (2, 8))
    got = vitkern.attention_varlen(heads, heads, heads, ends, ends, 12, 12)
    keep = score >= 0.5
    keep[:, 0] = True
    parts = [t[seen].unflatten(-1, (2, 8))[None] for t, seen in zip(x, keep, strict=True)]
    agree(got, torch.cat([softmax(t, t, t)[0] for t in parts]), (x,))


@EACH
def test_segvit_shrinks_its_queries_to_the_edges_of_masks(backend):
    q, k, v = (leaf(2, 12, 2, 8, seed=i) for i in range(3))
    edge = draw(2, 12, seed=5)
    got = vitkern.attention(vitkern.select_tokens(q, edge, 4, protect=0)[0], k, v)
    agree(got, softmax(rows(q, edge.topk(4).indices.sort(1).values), k, v), (q, k, v))


@EACH
def test_pem_gives_every_query_its_most_similar_visible_key(backend):
    q, k, v = (leaf(2, n, 2, 8, seed=i) for i, n in enumerate((5, 24, 24)))
    logits = draw(2, 5, 4, 6, seed=5)
    logits[0, 2] = -1.0  # sees nothing, and so everything
    unit = [F.normalize(t, dim=-1) for t in (q, k)]
    given = {"mask": mask.FromLogits(logits, (4, 6)), "normalizer": "argmax_k", "return_stats": ("index",)}
    out, stats = vitkern.attention(*unit, v, **given)
    on = logits.flatten(2) >= 0
    on |= ~on.any(-1, keepdim=True)
    best = torch.einsum("bihd,bjhd->bhij", *unit).masked_fill(~on[:, None], -math.inf).argmax(-1).transpose(1, 2)
    assert torch.equal(stats.index.long(), best)
    agree(out, v.gather(1, best[..., None].expand(-1, -1, -1, 8)), (v,))


@EACH
def test_tcformer_averages_clusters_by_score_and_attends_to_all_tokens(backend):
    x, score = leaf(2, 30, 16), leaf(2, 30, seed=1)
    _, plan, _ = vitkern.cluster_tokens(x, 6, method="dpc_knn")
    y, _ = vitkern.merge_tokens(x, plan, weight=score.exp())
    y, z = y.unflatten(-1, (2, 8)), x.unflatten(-1, (2, 8))
    got = vitkern.attention(y, z, z, bias=bias.KeyBias(score[:, None]))
    member = (
        F.one_hot(plan.token_map.long(), 6).double() * score.exp()[..., None]
    )  # the clusters have a test of their own
    mean = (member.mT @ x / member.sum(1)[..., None]).unflatten(-1, (2, 8))
    agree(got, softmax(mean, z, z, score[:, None, None]), (x,))


@EACH
def test_any_2_point_aggregates_cells_by_maximum_and_mean(backend):
    x, cell = leaf(2, 30, 6), torch.randint(0, 7, (2, 30), generator=torch.Generator().manual_seed(1))
    plan = MergePlan.from_map(cell, 7)
    both = vitkern.merge_tokens(x, plan, reduce="max")[0] + vitkern.merge_tokens(x, plan)[0]
    same = (cell[:, :, None] == cell[:, None])[..., None]  # [B, N, N, 1]
    peak = x[:, None].masked_fill(~same, -math.inf).amax(2)
    mean = (x[:, None] * same).sum(2) / same.sum(2)
    agree(vitkern.unmerge_tokens(both, plan), peak + mean, (x,))


@EACH
def test_reformer_attends_in_sorted_chunks_and_joins_its_rounds(backend):
    """Keys are the queries' directions; a chunk sees itself, but not the own token, and the one before it."""
    n, chunk, d = 16, 4, 8
    x, v = leaf(2, n, 1, d), leaf(2, n, 1, d, seed=1)
    k, row = F.normalize(x, dim=-1), torch.arange(chunk)[:, None]
    column = torch.arange(3 * chunk)[None]
    seen = (column < 2 * chunk) & (column != row + chunk)
    outs, lses, top, bottom = [], [], 0.0, 0.0
    for turn in (draw(d, 4, seed=5), draw(d, 4, seed=6)):
        bucket = torch.cat((x[:, :, 0] @ turn, -x[:, :, 0] @ turn), -1).argmax(-1)
        order = (bucket * n + torch.arange(n)).argsort(1)
        back, given = order.argsort(1), [rows(t, order) for t in (x, k, v)]
        options = {"context_size": 3 * chunk, "mask": seen, "return_stats": ("lse",)}
        out, stats = vitkern.window_attention(*given, chunk, **options)
        outs.append(rows(out, back))
        lses.append(rows(stats.lse, back))
        at = torch.arange(n) // chunk
        near = ((at[:, None] - at) >= 0) & ((at[:, None] - at) <= 1) & ~torch.eye(n).bool()
        e = (torch.einsum("bihd,bjhd->bhij", *given[:2]) * d**-0.5).exp() * near
        top = top + rows(torch.einsum("bhij,bjhd->bihd", e, given[2]), back)
        bottom = bottom + rows(e.sum(-1).transpose(1, 2), back)[..., None]
    agree(vitkern.merge_lse(outs, lses)[0], top / bottom, (x, v))


@EACH
def test_tova_evicts_the_key_that_the_last_query_weighs_least(backend):
    q, k, v = draw(2, 1, 2, 8), leaf(2, 12, 2, 8, seed=1), draw(2, 12, 2, 8, seed=2)
    _, stats = vitkern.attention(q, k, v, return_stats=("row",), stat_rows=(0,))
    score = stats.row[:, :, 0].mean(1)
    least = weights(q, k)[:, :, 0].mean(1).argmin(1)
    stay = torch.arange(12) != least[:, None]
    agree(vitkern.select_tokens(k, score, 11, protect=0)[0], k[stay].unflatten(0, (2, 11)), (k,))


@EACH
def test_attamba_attends_to_the_states_at_the_ends_of_chunks_and_to_the_own_chunk(backend):
    u, delta, q = leaf(2, 12, 6), draw(2, 12, 6, seed=1).abs().requires_grad_(), leaf(2, 12, 1, 6, seed=2)
    a, b, c = -draw(6, 3, seed=3).abs(), leaf(2, 12, 3, seed=4), leaf(2, 12, 3, seed=5)
    i = torch.arange(12)
    seen = (i <= i[:, None]) & ((i % 4 == 3) | (i[:, None] - i < 4))
    y = vitkern.selective_scan(u, delta, a, b, c)[:, :, None]
    state, states = torch.zeros(2, 6, 3, dtype=torch.float64), []
    for t in range(12):
        gain = delta[:, t]
        state = (gain[..., None] * a).exp() * state + (gain * u[:, t])[..., None] * b[:, t, None]
        states.append((state * c[:, t, None]).sum(-1))
    want = torch.stack(states, 1)[:, :, None]
    hidden = torch.zeros(12, 12, dtype=torch.float64).masked_fill(~seen, -math.inf)
    agree(vitkern.attention(q, y, y, mask=seen), softmax(q, want, want, hidden), (u, delta, q, b, c))


@EACH
def test_gnn_vitcap_pools_tokens_by_inverse_distances_to_centres(backend):
    x, centers = leaf(2, 30, 8), leaf(2, 5, 8, seed=1)
    distance = (x[:, :, None] - centers[:, None]).square().sum(-1)
    got = vitkern.soft_merge(x, -distance.log1p(), axis="slot", renormalize=1e-6)
    w = 1 / (1 + distance)
    w = w / w.sum(-1, keepdim=True)
    agree(got, (w / w.sum(1, keepdim=True)).mT @ x, (x, centers))


@EACH
def test_vcc_compresses_pairs_and_leaves_the_rest(backend):
    x = leaf(2, 24, 16)
    slots = torch.cat((torch.arange(8).repeat_interleave(2), torch.arange(8, 16)))[None].expand(2, -1)
    y, size = vitkern.merge_tokens(x, MergePlan.from_map(slots, 16))
    y = y.unflatten(-1, (2, 8))
    pairs = torch.cat((x[:, :16].unflatten(1, (8, 2)).mean(2), x[:, 16:]), 1).unflatten(-1, (2, 8))
    log = torch.tensor([math.log(2)] * 8 + [0.0] * 8, dtype=torch.float64)
    got = vitkern.attention(y, y, y, bias=bias.KeyBias(size.log()[:, None].double()))
    agree(got, softmax(pairs, pairs, pairs, log), (x,))
