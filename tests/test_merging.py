"""vitkern.merging.apply against a dense oracle: one-hot matrices, sizes multiplied into the softmax, float64."""

import math

import libraries  # noqa: F401
import pytest
import torch

import vitkern
from vitkern import merging
from vitkern.bias import KeyBias
from vitkern.merging import _blocks
from vitkern.patch import _interface

timm = pytest.importorskip("timm")
transformers = pytest.importorskip("transformers")
LAYERS, R = 3, 4


def timm_model(**options):
    torch.manual_seed(0)
    shape = dict(img_size=32, patch_size=8, embed_dim=24, depth=LAYERS, num_heads=3, num_classes=5)
    kind = options.pop("kind", timm.models.vision_transformer.VisionTransformer)
    model = kind(**(shape | options)).double().eval()
    for name, p in model.named_parameters():
        torch.nn.init.normal_(p, std=0.3) if p.dim() > 1 or "bias" in name else torch.nn.init.uniform_(p, 0.5, 1.5)
    return model


def timm_parts(block):
    def heads(x):
        qkv = block.attn.qkv(x).unflatten(-1, (3, block.attn.num_heads, -1))
        q, k, v = (t.transpose(1, 2) for t in qkv.unbind(2))
        return block.attn.q_norm(q), block.attn.k_norm(k), v, k

    return block.norm1, heads, block.attn.proj, block.ls1, block.norm2, lambda x: block.ls2(block.mlp(x))


def hf_parts(block):
    attention = getattr(block, "attention", None) or block.self_attn
    count = getattr(attention, "num_heads", None) or attention.num_attention_heads

    def heads(x):
        q, k, v = (getattr(attention, f"{n}_proj")(x).unflatten(-1, (count, -1)).transpose(1, 2) for n in "qkv")
        return q, k, v, k

    norm1 = next(getattr(block, n) for n in ("layernorm_before", "norm1", "layer_norm1") if hasattr(block, n))
    norm2 = next(getattr(block, n) for n in ("layernorm_after", "norm2", "layer_norm2") if hasattr(block, n))
    plain = torch.nn.Identity()
    scale1, scale2 = getattr(block, "layer_scale1", plain), getattr(block, "layer_scale2", plain)
    out = getattr(attention, "o_proj", None) or attention.out_proj
    return norm1, heads, out, scale1, norm2, lambda x: scale2(block.mlp(x))


def dense(blocks, parts, x, r, prefix, metric="k", prop_attn=True, reduce="mean", order="split"):
    """The intended merge, image by image and token by token; returns tokens and which inputs each holds."""
    results = []
    for image in x.split(1):
        size = torch.ones(image.shape[1], dtype=x.dtype)
        holds = torch.eye(image.shape[1], dtype=torch.bool)
        for block in blocks:
            norm1, heads, out, scale, norm2, mlp = parts(block)
            q, k, v, projected = heads(norm1(image))
            weight = (q @ k.mT * q.shape[-1] ** -0.5).exp() * (size if prop_attn else 1.0)
            attended = (weight / weight.sum(-1, keepdim=True)) @ v
            image = image + scale(out(attended.transpose(1, 2).flatten(2)))
            of = projected[0].mean(0) if metric == "k" else image[0]
            image, size, holds = merge(image[0], of, size, holds, r, prefix, reduce, order)
            image = image[None] + mlp(norm2(image[None]))
        results.append((image, holds))
    return torch.cat([i for i, _ in results]), torch.stack([h for _, h in results])


def merge(x, metric, size, holds, r, prefix, reduce, order):
    tokens = len(x)
    unit = metric / metric.norm(dim=-1, keepdim=True)
    pairs = []
    for i in range(0, tokens, 2):
        if i >= prefix:
            best = max((float(unit[i] @ unit[j]), -j) for j in range(1, tokens, 2) if j >= prefix)
            pairs.append((-best[0], i, -best[1]))
    gone = {i: j for _, i, j in sorted(pairs)[: min(r, (tokens - prefix) // 2)]}
    left = [*range(prefix), *(i for i in range(prefix, tokens) if i % 2 == 0 and i not in gone)]
    left += [j for j in range(prefix, tokens) if j % 2 == 1]
    if order == "position":
        left = sorted(left)
    rows = torch.zeros(len(left), tokens, dtype=x.dtype)
    for slot, token in enumerate(left):
        rows[slot, [token, *(i for i, j in gone.items() if j == token)]] = 1.0
    total = rows @ size
    merged = (rows * size) @ x / total[:, None]
    if reduce == "max":
        merged = torch.stack([x[row.bool()].amax(0) for row in rows])
    return merged, total, (rows @ holds.to(x.dtype)).bool()


@pytest.fixture(params=["op", "sdpa"])
def calls(request, monkeypatch):
    """Runs a test on vitkern.attention and on PyTorch's; the biases of the calls of vitkern.attention."""
    biases = []

    def counted(*args, bias=None, **options):
        biases.append(bias)
        return vitkern.attention(*args, bias=bias, **options)

    for module in (_blocks, _interface):
        monkeypatch.setattr(module, "attention", counted)
    monkeypatch.setattr(_blocks, "LEAST_ROWS", 0 if request.param == "op" else 10**9)
    yield biases
    assert all(isinstance(b, KeyBias) for b in biases) and (request.param == "op" or not biases)


TIMM = {
    "class token": (dict(), 1),
    "no class token": (dict(class_token=False, global_pool="avg"), 0),
    "LayerScale, norms, registers": (dict(init_values=0.5, qk_norm=True, reg_tokens=3), 4),
    "distilled": (dict(kind=timm.models.deit.VisionTransformerDistilled), 2),
    "unfused": (dict(), 1),
}


@pytest.mark.parametrize("name", TIMM)
def test_timm_models_equal_the_dense_oracle(name, calls):
    options, prefix = TIMM[name]
    model = timm_model(**options)
    if name == "unfused":
        for block in model.blocks:
            block.attn.fused_attn = False
    x = torch.randn(3, 3, 32, 32, dtype=torch.float64)
    with torch.no_grad():
        start = model.norm_pre(model.patch_drop(model._pos_embed(model.patch_embed(x))))
        plain = model(x)
        tokens, holds = dense(model.blocks, timm_parts, start, R, prefix)
        want = model.norm(tokens)
        report = merging.apply(model, r=R, trace=True)
        got = model.forward_features(x)
        torch.testing.assert_close(got, want)
        assert torch.equal(report.plan.source(), holds)
        assert report.tokens == [start.shape[1] - R * n for n in (1, 2, 3)] and 0.1 < report.flops_saved < 0.6
        assert len(report.replaced) == LAYERS and "3 modules replaced" in str(report)
        report.undo()
        assert torch.equal(model(x), plain)
        assert not any("forward" in m.__dict__ or m._forward_hooks for m in model.modules())
    assert len(calls) in (0, 0 if name == "unfused" else LAYERS - 1)  # nothing is known of sizes in the first block


def hf_model(name):
    torch.manual_seed(0)
    shape = dict(hidden_size=24, num_hidden_layers=LAYERS, num_attention_heads=3, intermediate_size=48, image_size=32,
                 patch_size=8, attn_implementation="sdpa")  # fmt: skip
    kinds = {
        "ViT": (transformers.ViTConfig, transformers.ViTModel, 1),
        "DeiT": (transformers.DeiTConfig, transformers.DeiTModel, 2),
        "DINOv2": (transformers.Dinov2Config, transformers.Dinov2Model, 1),
        "registers": (transformers.Dinov2WithRegistersConfig, transformers.Dinov2WithRegistersModel, 5),
        "CLIP": (transformers.CLIPVisionConfig, transformers.CLIPVisionModel, 1),
    }
    config, kind, prefix = kinds[name]
    model = kind(config(**shape)).double().eval()
    for p in model.parameters():
        torch.nn.init.normal_(p, std=0.3) if p.dim() > 1 else torch.nn.init.uniform_(p, 0.5, 1.5)
    return model, prefix


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("name", ["ViT", "DeiT", "DINOv2", "registers", "CLIP"])
def test_transformers_models_equal_the_dense_oracle(name, attention, calls):
    model, prefix = hf_model(name)
    model.set_attn_implementation(attention)
    kinds = ("ViTLayer", "DeiTLayer", "Dinov2Layer", "Dinov2WithRegistersLayer", "CLIPEncoderLayer")
    blocks = [m for m in model.modules() if type(m).__name__ in kinds]
    seen = {}
    first = blocks[0].register_forward_pre_hook(lambda m, inputs: seen.__setitem__("start", inputs[0].detach()))
    last = blocks[-1].register_forward_hook(lambda m, inputs, out: seen.__setitem__("end", out))
    x = torch.randn(2, 3, 32, 32, dtype=torch.float64)
    with torch.no_grad():
        plain = model(x).last_hidden_state
        want, _ = dense(blocks, hf_parts, seen["start"], R, prefix)
        report = merging.apply(model, r=R)
        model(x)
        bound = 1e-5 if attention == "eager" else 1e-7  # the eager softmax of transformers is float32 in every dtype
        torch.testing.assert_close(seen["end"], want, rtol=bound, atol=bound)
        first.remove()
        last.remove()
        report.undo()
        assert torch.equal(model(x).last_hidden_state, plain)
    assert len(calls) in (0, 0 if attention == "eager" else LAYERS - 1)


def test_only_the_vision_tower_of_clip_merges():
    vision = dict(
        hidden_size=24, num_hidden_layers=2, num_attention_heads=3, intermediate_size=48, image_size=32, patch_size=8
    )
    text = dict(hidden_size=24, num_hidden_layers=2, num_attention_heads=3, intermediate_size=48, vocab_size=50)
    model = transformers.CLIPModel(
        transformers.CLIPConfig(vision_config=vision, text_config=text, projection_dim=8)
    ).eval()
    report = merging.apply(model, r=2)
    assert len(report.replaced) == 2 and all("vision" in r.path for r in report.replaced)
    assert len(report.kept) == 2 and all("causal" in k.reason for k in report.kept)
    with torch.no_grad():
        model(input_ids=torch.zeros(1, 4, dtype=torch.long), pixel_values=torch.randn(1, 3, 32, 32))
    assert report.tokens == [15, 13]


def test_nothing_to_merge_is_the_model_itself_and_gradients_flow():
    model = timm_model()
    x = torch.randn(2, 3, 32, 32, dtype=torch.float64)
    plain = model(x)
    report = merging.apply(model, r=0)
    assert torch.equal(model(x), plain) and report.flops_saved == 0.0
    report.undo()
    with_merging = merging.apply(model, r=(4, 0.5))
    model(x).sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())
    assert with_merging.tokens == [17 - 2, 15 - 4, 11 - 5]  # at most half of what is left


def test_both_attentions_give_the_same_gradients_and_hooks_and_few_rows_keep_the_modules_own(monkeypatch):
    x, found, ran = torch.randn(2, 3, 32, 32, dtype=torch.float64), [], []
    monkeypatch.setattr(_blocks, "attention", lambda *a, **o: ran.append(1) or vitkern.attention(*a, **o))
    for rows in (0, 2 * 13 * 3 + 1):  # the second of the blocks has 2 images of 13 tokens in 3 heads
        monkeypatch.setattr(_blocks, "LEAST_ROWS", rows)
        model = timm_model(qk_norm=True, scale_attn_norm=True)
        for block in model.blocks:
            block.attn.gate = torch.nn.Linear(24, 24, dtype=torch.float64)
        merging.apply(model, r=R)
        found.append(torch.autograd.grad(model(x).square().sum(), list(model.parameters())))
        assert len(ran) == LAYERS - 1
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b)
    monkeypatch.setattr(_blocks, "LEAST_ROWS", 0)
    seen = []
    model.blocks[1].attn.register_forward_hook(lambda m, i, o: seen.append(o))
    model(x)
    assert len(seen) == 1 and len(ran) == 2 * (LAYERS - 1) - 1


def test_an_applied_model_compiles_whole(calls):
    model, x = timm_model(), torch.randn(2, 3, 32, 32, dtype=torch.float64)
    merging.apply(model, r=R, trace=True)
    torch._dynamo.reset()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x), model(x))


def test_a_threshold_merges_another_number_in_every_image_and_padding_is_seen_by_nothing(calls):
    model = timm_model(class_token=False, global_pool="avg", pos_embed="none")
    x = torch.randn(2, 3, 32, 32, dtype=torch.float64)
    x[0] = x[0, :, :8, :8].repeat(1, 4, 4)  # sixteen equal patches
    with torch.no_grad():
        report = merging.apply(model, threshold=0.9999)
        both = model.forward_features(x)
        tower = report.towers[0]
        assert tower.size[0].gt(0).sum() < 4 < tower.size[1].gt(0).sum() and (tower.size.sum(1) == 16).all()
        for i in range(2):
            alone = model.forward_features(x[i : i + 1])
            torch.testing.assert_close(both[i : i + 1, : alone.shape[1]], alone)


def test_a_ratio_other_metrics_and_no_size_bias(calls):
    model = timm_model()
    x = torch.randn(2, 3, 32, 32, dtype=torch.float64)
    options = {"metric": "x", "prop_attn": False, "reduce": "max", "order": "position"}
    with torch.no_grad():
        report = merging.apply(model, ratio=0.25, **options)
        assert model(x).isfinite().all() and report.tokens == [13, 10, 8]
        report.undo()
        start = model.norm_pre(model.patch_drop(model._pos_embed(model.patch_embed(x))))
        for left_out in (None, *options):  # each option changes something, and all together are the oracle's
            given = {name: value for name, value in options.items() if name != left_out}
            report = merging.apply(model, r=R, **given)
            want = model.norm(dense(model.blocks, timm_parts, start, R, 1, **options)[0])
            assert torch.allclose(model.forward_features(x), want) == (left_out is None), left_out
            report.undo()


def test_the_metric_k_norm_reads_the_keys_behind_the_norm():
    x = torch.randn(2, 3, 32, 32, dtype=torch.float64)
    plans = {}
    with torch.no_grad():
        for metric in ("k", "k_norm"):
            model = timm_model(qk_norm=True, depth=1)
            model.blocks[0].attn.k_norm.weight.mul_(torch.tensor([0.0, 9, 1, 0, 0, 1, 0, 0], dtype=torch.float64))
            block = model.blocks[0]
            seen = []
            block.attn.k_norm.register_forward_hook(lambda m, i, o, seen=seen: seen.append((i[0], o)))
            report = merging.apply(model, r=R, metric=metric, trace=True)
            model(x)
            keys = seen[0][metric == "k_norm"].transpose(1, 2)
            want = vitkern.merge_plan(vitkern.bipartite_match(keys, protect=1), r=R)
            assert torch.equal(report.plan.token_map, want.token_map)
            plans[metric] = want.token_map
        assert not torch.equal(plans["k"], plans["k_norm"])
        plain = timm_model()
        report = merging.apply(plain, r=R, metric="k_norm")  # a model without a key norm: the keys
        assert plain(x).isfinite().all() and report.tokens[-1] == 17 - LAYERS * R


def test_pooling_by_size_is_the_mean_over_the_patches_that_were():
    model = timm_model(global_pool="avg", fc_norm=False, depth=2)
    x = torch.randn(2, 3, 32, 32, dtype=torch.float64)
    with torch.no_grad():
        plain = model(x)
        report = merging.apply(model, r=R, pool="size", trace=True)
        tokens = model.forward_features(x)
        spread = vitkern.unmerge_tokens(tokens, report.plan)[:, 1:]
        torch.testing.assert_close(model(x), model.head(model.fc_norm(spread.mean(1))))
        report.undo()
        assert torch.equal(model(x), plain) and "pool" not in model.__dict__
    with pytest.raises(ValueError, match="pool='size' must go with a model of timm whose global_pool is 'avg'"):
        merging.apply(timm_model(), r=1, pool="size")


def test_a_picture_of_the_groups():
    token_map = torch.tensor([[0, 1, 1, 2, 2, 3, 3]])  # a class token, then a grid of 2 x 3: rows 1 1 2 and 2 3 dropped
    plan = vitkern.MergePlan.from_map(token_map, 3)
    picture = torch.arange(4 * 6 * 3, dtype=torch.uint8).reshape(4, 6, 3)
    shown = merging.visualize(plan, picture.numpy(), (2, 3), strength=1.0, border=0)
    assert shown.dtype == torch.uint8 and shown.shape == (4, 6, 3)
    assert torch.equal(shown[:2, :4], picture[:2, :4].float().mean((0, 1)).round().byte().expand(2, 4, 3))
    two = torch.cat((picture[:2, 4:].reshape(-1, 3), picture[2:, :2].reshape(-1, 3))).float().mean(0).round().byte()
    assert torch.equal(shown[0, 5], two) and torch.equal(shown[3, 0], two) and not shown[2:, 2:].any()
    assert torch.equal(merging.visualize(plan, picture, (2, 3), strength=0.0, border=0)[:2], picture[:2])
    lines = merging.visualize(plan, picture, (2, 3), border=1).eq(255).all(-1)
    assert lines.tolist() == [
        [False, False, False, True, True, False],
        [True, True, True, True, True, True],
        [True, True, True, True, True, True],
        [False, True, True, False, False, False],
    ]
    for options, sentence in (
        (dict(grid=(2, 2)), "grid must hold the plan's 7 tokens less prefix=1"),
        (dict(grid=(2, 3), sample=1), "sample must lie in the plan's batch of 1, got 1"),
        (dict(grid=(2, 3), strength=2.0), r"strength must lie in \[0, 1\], got 2.0"),
    ):
        with pytest.raises(ValueError, match=f"merging.visualize: {sentence}"):
            merging.visualize(plan, picture, **options)
    with pytest.raises(ValueError, match=r"picture must have shape \[H, W, 3\], got \[6, 3\]"):
        merging.visualize(plan, picture[0], (2, 3))
    with pytest.raises(ValueError, match=r"a pixel for every patch of \(2, 3\), got 1x6"):
        merging.visualize(plan, picture[:1], (2, 3))


def test_schedules():
    assert merging.parse_r(4, 8) == [8, 8, 8, 8]
    assert merging.parse_r(5, (8, 1.0)) == [0, 4, 8, 12, 16] and merging.parse_r(1, (8, 0.5)) == [4]
    assert merging.parse_r(4, (16, -0.5)) == [24, 18, 13, 8]
    assert merging.parse_r(3, [5]) == [5, 0, 0]
    for r, sentence in (([1, 2, 3, 4], "at most one entry per layer"), (-1, "at least 0"), ("all", "must be an int")):
        with pytest.raises((ValueError, TypeError), match=f"merging.parse_r: r must .*{sentence}|{sentence}"):
            merging.parse_r(3, r)


def test_published_destinations():
    match = vitkern.bipartite_match(torch.randn(1, 197, 8), partition=merging.kth_index(197, 4))
    plan = vitkern.merge_plan(match, order="position")
    assert plan.n_out == 1 + 49 and plan.offsets[0, -1] == 197  # every token has a slot, the tail too
    place = merging.random2d_index((7, 9), (3, 2), seed=4, prefix=2)
    assert place.shape == (8,) and place.min() >= 2
    match = vitkern.bipartite_match(torch.randn(1, 60, 8), protect=0, partition=merging.frame_index(5, 12, [0, 3]))
    assert match.role[0].view(5, 12)[[0, 3]].eq(1).all() and match.limit == 36


@pytest.mark.parametrize(
    "options, sentence",
    [
        (dict(), "r must be given, or ratio, or threshold"),
        (dict(ratio=1.0), r"ratio must lie in \(0, 1\), got 1.0"),
        (dict(ratio=0.0), r"ratio must lie in \(0, 1\), got 0.0"),
        (dict(r=2, metric="q"), "metric must be 'k', 'k_norm' or 'x', got 'q'"),
        (dict(r=2, pool="max"), "pool must be 'model' or 'size', got 'max'"),
        (dict(r=2, protect=-1), "protect must be at least 0, got -1"),
        (dict(r=2, order="size"), "order must be 'split', 'score' or 'position', got 'size'"),
        (dict(r=2, reduce="min"), "reduce must be 'mean', 'sum', 'max', 'first' or 'mlerp', got 'min'"),
    ],
)
def test_refusals_are_sentences(options, sentence):
    with pytest.raises(ValueError, match=f"merging.apply: .*{sentence}|{sentence}"):
        merging.apply(timm_model(), **options)


def test_models_and_blocks_that_cannot_merge_are_named():
    with pytest.raises(ValueError, match="model must hold blocks that merging serves"):
        merging.apply(torch.nn.Linear(2, 2), r=1)
    model = timm_model()
    report = merging.apply(model, r=1)
    again = merging.apply(model, r=1)
    assert not again.replaced and {k.reason for k in again.kept} == {"patched already"}
    with pytest.raises(ValueError, match="attn_mask must be None in a model that merges tokens"):
        model.blocks[0](torch.zeros(1, 17, 24, dtype=torch.float64), attn_mask=torch.zeros(17, 17))
    report.undo()
    assert math.isfinite(float(model(torch.zeros(1, 3, 32, 32, dtype=torch.float64)).sum().detach()))
