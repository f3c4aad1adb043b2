"""vitkern.nn's modules on attention: published modules with the same weights, or the formula where no library has one."""

import math
from collections.abc import Callable
from functools import partial

import libraries  # noqa: F401
import patch_cases
import pytest
import torch
from module_cases import by_formula, compare, ours_alone
from torch import nn

import vitkern
from vitkern.nn import (
    Attention,
    BeitAttention,
    DecomposedRelPosAttention,
    GaussianMixtureAttention,
    LevitAttention,
    LevitAttentionDownsample,
    MaskedCrossAttention,
    MultiScaleAttention,
    SigmoidAttention,
    TalkingHeadAttention,
)


def spread(module):
    """Random weights, also for tables and normalisations that start at zero."""
    patch_cases.randomize(module)
    generator = torch.Generator().manual_seed(8)
    for name, p in module.named_parameters():
        if any(part in name for part in ("rel_pos", "attention_biases", "bn.weight")):
            p.detach().normal_(generator=generator)
    return module


# plain -------------------------------------------------------------------------------------------------------------------


def attention_is_timms(options):
    module = pytest.importorskip("timm.layers.attention")
    theirs = spread(module.Attention(12, 3, norm_layer=nn.LayerNorm, **{"qkv_bias": True} | options))
    compare(Attention(12, 3, **options), theirs, ours_alone, (7,), strict=True)


def attention_takes_bias_mask_and_rope():
    ours, x = spread(Attention(12, 3)), torch.randn(2, 7, 12)
    bias, hidden, angles = torch.randn(3, 7, 7), torch.rand(2, 1, 7, 7) > 0.3, torch.randn(1, 7, 1, 2)
    hidden[..., 0] = True
    rope = vitkern.Rope(angles.cos(), angles.sin())

    def formula(module, x):
        q, k, v = module.qkv(x).unflatten(-1, (3, 3, 4)).unbind(2)
        q, k = rope.turn(q, None), rope.turn(k, None)
        q, k, v = (t.transpose(1, 2) for t in (q, k, v))
        added = bias.to(x.dtype).masked_fill(~hidden, -math.inf)
        return module.proj(nn.functional.scaled_dot_product_attention(q, k, v, added).transpose(1, 2).flatten(2))

    by_formula(ours, formula, x, lambda module, x: module(x, bias=bias.to(x.dtype), mask=hidden, rope=rope))


# SAM, BEiT, CaiT, LeViT --------------------------------------------------------------------------------------------------


def decomposed_positions_are_timms_and_are_resized(size, qk_norm):
    module = pytest.importorskip("timm.models.vision_transformer_sam")
    theirs = spread(module.Attention(12, 3, qk_norm=qk_norm, use_rel_pos=True, input_size=(4, 6)))
    compare(DecomposedRelPosAttention(12, (4, 6), 3, qk_norm=qk_norm), theirs, ours_alone, size, strict=True)


def decomposed_positions_are_those_of_transformers(size):
    sam = pytest.importorskip("transformers.models.sam.modeling_sam")
    config = sam.SamVisionConfig(hidden_size=12, num_attention_heads=3)
    theirs = spread(sam.SamVisionAttention(config, 4))
    compare(DecomposedRelPosAttention(12, (4, 4), 3), theirs, lambda attn, x: attn(x)[0], size, strict=True)


def beit_is_timms(window, shared):
    module = pytest.importorskip("timm.models.beit")
    theirs = spread(module.Attention(12, 3, qkv_bias=True, window_size=window))

    def call(attn, x):
        return attn(x, x[:1, :, :7].expand(1, 3, 7, 7) if shared else None)

    compare(BeitAttention(12, window, 3), theirs, call, (7,), strict=True, mine=call)


POOLS = {
    "nothing pooled": {},
    "all pooled": {"kernel_q": (3, 3), "stride_q": (2, 2), "kernel_kv": (3, 3), "stride_kv": (4, 4)},
    "keys pooled": {"kernel_kv": (3, 3), "stride_kv": (2, 2), "residual_pooling": False},
}


def mvit_v2_is_timms(pools, first):
    module = pytest.importorskip("timm.models.mvitv2")
    options = pools | {"num_heads": 2, "has_cls_token": first}
    theirs = spread(module.MultiScaleAttention(12, 16, (8, 8), **options))

    def call(attn, x):
        return attn(x, (8, 8))[0]

    compare(MultiScaleAttention(12, 16, (8, 8), **options), theirs, call, (64 + first,), strict=True, mine=call)


def talking_heads_are_timms():
    module = pytest.importorskip("timm.models.cait")
    compare(TalkingHeadAttention(12, 3), spread(module.TalkingHeadAttn(12, 3, True)), ours_alone, (7,), strict=True)


def levit_is_timms(train):
    module = pytest.importorskip("timm.models.levit")
    options = {"key_dim": 4, "num_heads": 3, "attn_ratio": 2.5, "resolution": (3, 5)}
    for ours, theirs in (
        (LevitAttention(12, **options), module.Attention(12, act_layer=nn.Hardswish, **options)),
        (
            LevitAttentionDownsample(12, 20, stride=2, **options),
            module.AttentionDownsample(12, 20, stride=2, act_layer=nn.Hardswish, **options),
        ),
    ):
        ours.train(train)
        theirs.train(train)
        compare(ours, spread(theirs), ours_alone, (15,), strict=True)
        assert torch.equal(ours.attention_bias_idxs, theirs.attention_bias_idxs)


# Mask2Former -------------------------------------------------------------------------------------------------------------


def masked_cross_attention_is_that_of_transformers(masked):
    modeling = pytest.importorskip("transformers.models.mask2former.modeling_mask2former")
    predictor = modeling.Mask2FormerMaskPredictor(12, 3, 12)
    predictor.mask_embedder = nn.Identity()
    size = (4, 3)

    def parts(x):
        """Queries, cells, positions of both, and logits on 2 x 6 pixels, all negative for the second query."""
        queries, cells = x[:, :5], x[:, 5:17]
        pixels = x[:, 17:].transpose(1, 2).unflatten(2, (2, 6))
        pixels = torch.where(torch.arange(12)[:, None, None] == 1, -pixels.abs(), pixels)
        pointers = queries.roll(1, 0) * 0.5
        pointers = torch.where(torch.arange(5)[:, None] == 1, (torch.arange(12) == 1).to(x.dtype), pointers)
        return queries, cells, queries.flip(1), cells.flip(1), *predictor(pointers.transpose(0, 1), pixels, size)

    def call(attn, x):
        queries, cells, at_queries, at_cells, _, hidden = parts(x)
        hidden = hidden & ~hidden.all(-1, keepdim=True)  # as the decoder does
        assert hidden.any() and not hidden[:, 1].any()
        keys = (cells + at_cells).transpose(0, 1)
        out, _ = attn(
            (queries + at_queries).transpose(0, 1), keys, cells.transpose(0, 1), attn_mask=hidden if masked else None
        )
        return out.transpose(0, 1)

    def mine(attn, x):
        queries, cells, at_queries, at_cells, logits, _ = parts(x)
        return attn(queries, cells, at_queries, at_cells, *((logits, size) if masked else ()))

    compare(MaskedCrossAttention(12, 3), spread(nn.MultiheadAttention(12, 3)), call, (29,), strict=True, mine=mine)


# the formula of the paper ------------------------------------------------------------------------------------------------


def sigmoid_attention_counts_the_keys_that_a_query_sees(rows):
    ours, x = spread(SigmoidAttention(12, 3, qkv_bias=True)), torch.randn(2, 9, 12)
    mask = {
        "all": None,
        "one for all": torch.tensor([True] * 5 + [False] * 4)[None, :],
        "each its own": torch.rand(2, 3, 9, 9) > 0.5,
    }[rows]

    def formula(module, x):
        q, k, v = module.qkv(x).unflatten(-1, (3, 3, 4)).permute(2, 0, 3, 1, 4)
        seen = torch.ones(9, 9, dtype=torch.bool) if mask is None else mask.expand(2, 3, 9, 9)
        logits = q @ k.mT / 2 - seen.sum(-1, keepdim=True).to(x.dtype).log()
        return module.proj((logits.sigmoid().masked_fill(~seen, 0.0) @ v).transpose(1, 2).flatten(2))

    by_formula(ours, formula, x, lambda module, x: module(x, mask=mask))


def sigmoid_attention_of_the_code_reads_its_buffers():
    ours, x = spread(SigmoidAttention(12, 3, qk_norm=True, compat="code")), torch.randn(2, 9, 12)
    ours.attn_bias.fill_(-2.5)
    ours.attn_temp.fill_(0.4)

    def formula(module, x):
        q, k, v = module.qkv(x).unflatten(-1, (3, 3, 4)).permute(2, 0, 3, 1, 4)
        logits = module.q_norm(q) @ module.k_norm(k).mT / 2 * module.attn_temp.exp() + module.attn_bias
        return module.proj((logits.sigmoid() @ v).transpose(1, 2).flatten(2))

    by_formula(ours, formula, x)
    assert (
        set(ours.state_dict()) > {"attn_bias", "attn_temp"} and "attn_bias" not in SigmoidAttention(8, 2).state_dict()
    )


def a_gaussian_mixture_multiplies_the_scores(compat):
    """On 3 x 12 cells, where the code has no weight beyond ten cells and the paper has."""
    ours, x = spread(GaussianMixtureAttention(12, (3, 12), 2, 5, compat=compat)), torch.randn(2, 36, 12)
    with torch.no_grad():
        ours.mask.sigma.copy_(torch.linspace(-4, 20, 6).view(3, 2, 1, 1))
        ours.mask.alpha.copy_(torch.linspace(2, -1, 6).view(3, 2, 1, 1))
    y, c = torch.meshgrid(torch.arange(3.0), torch.arange(12.0), indexing="ij")
    square = (y.flatten()[:, None] - y.flatten()).square() + (c.flatten()[:, None] - c.flatten()).square()

    def formula(module, x):
        q, k, v = module.to_qkv(x).unflatten(-1, (3, 2, 5)).permute(2, 0, 3, 1, 4)
        bells = (-square.to(x.dtype) / (2 * (module.mask.sigma**2 + 1e-5))).exp()
        if compat == "code":
            bells = bells * (square < 104)
        factor = (module.mask.alpha * bells).sum(0)
        return module.to_out(((factor * (q @ k.mT) * 5**-0.5).softmax(-1) @ v).transpose(1, 2).flatten(2))

    by_formula(ours, formula, x)


MODULES: dict[str, Callable[[], None]] = {
    "attention": partial(attention_is_timms, {}),
    "attention with norms": partial(attention_is_timms, {"qk_norm": True}),
    "attention without a bias of qkv": partial(attention_is_timms, {"qkv_bias": False}),
    "attention with bias, mask and rope": attention_takes_bias_mask_and_rope,
    "talking heads": talking_heads_are_timms,
    "levit": partial(levit_is_timms, False),
    "levit in training": partial(levit_is_timms, True),
    "mask2former": partial(masked_cross_attention_is_that_of_transformers, True),
    "mask2former without a mask": partial(masked_cross_attention_is_that_of_transformers, False),
    "sigmoid of the code": sigmoid_attention_of_the_code_reads_its_buffers,
}
for size in ((4, 6), (5, 3)):
    for qk_norm in (False, True):
        MODULES[f"sam {size} {qk_norm=}"] = partial(decomposed_positions_are_timms_and_are_resized, size, qk_norm)
for size in ((4, 4), (5, 3)):
    MODULES[f"sam of transformers {size}"] = partial(decomposed_positions_are_those_of_transformers, size)
for window in ((2, 3), None):
    for shared in (False, True):
        MODULES[f"beit {window} {shared=}"] = partial(beit_is_timms, window, shared)
for pools, options in POOLS.items():
    for first in (True, False):
        name = f"mvit v2, {pools}, {'class token' if first else 'map'}"
        MODULES[name] = partial(mvit_v2_is_timms, options, first)
for rows in ("all", "one for all", "each its own"):
    MODULES[f"sigmoid, mask: {rows}"] = partial(sigmoid_attention_counts_the_keys_that_a_query_sees, rows)
for compat in ("paper", "code"):
    MODULES[f"gaussian mixture of the {compat}"] = partial(a_gaussian_mixture_multiplies_the_scores, compat)
