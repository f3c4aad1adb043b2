"""vitkern.nn's modules on attention: published modules with the same weights, or the formula where no library has one."""

import copy
import math

import libraries  # noqa: F401
import patch_cases
import pytest
import torch
from module_cases import compare, ours_alone
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
from vitkern.testing import assert_close_to_oracle


def spread(module):
    """Random weights, also for tables and normalisations that start at zero."""
    patch_cases.randomize(module)
    generator = torch.Generator().manual_seed(8)
    for name, p in module.named_parameters():
        if any(part in name for part in ("rel_pos", "attention_biases", "bn.weight")):
            p.detach().normal_(generator=generator)
    return module


def hold(ours, formula, x):
    """A module and a formula of it, in float32 and float64."""
    with torch.no_grad():
        exact = formula(copy.deepcopy(ours).double(), x.double())
        assert_close_to_oracle(type(ours).__name__, ours(x), exact, formula(ours, x))


# plain -------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("options", [{}, {"qk_norm": True}, {"qkv_bias": False}])
def test_attention_is_timms(options):
    module = pytest.importorskip("timm.layers.attention")
    theirs = spread(module.Attention(12, 3, norm_layer=nn.LayerNorm, **{"qkv_bias": True} | options))
    compare(Attention(12, 3, **options), theirs, ours_alone, (7,), strict=True)


def test_attention_takes_bias_mask_and_rope():
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

    with torch.no_grad():
        got, want = ours(x, bias=bias, mask=hidden, rope=rope), formula(ours, x)
        assert_close_to_oracle("output", got, formula(copy.deepcopy(ours).double(), x.double()), want)


# SAM, BEiT, CaiT, LeViT --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [(4, 6), (5, 3)])
@pytest.mark.parametrize("qk_norm", [False, True])
def test_decomposed_positions_are_timms_and_are_resized(size, qk_norm):
    module = pytest.importorskip("timm.models.vision_transformer_sam")
    theirs = spread(module.Attention(12, 3, qk_norm=qk_norm, use_rel_pos=True, input_size=(4, 6)))
    compare(DecomposedRelPosAttention(12, (4, 6), 3, qk_norm=qk_norm), theirs, ours_alone, size, strict=True)


@pytest.mark.parametrize("size", [(4, 4), (5, 3)])
def test_decomposed_positions_are_those_of_transformers(size):
    sam = pytest.importorskip("transformers.models.sam.modeling_sam")
    config = sam.SamVisionConfig(hidden_size=12, num_attention_heads=3)
    theirs = spread(sam.SamVisionAttention(config, 4))
    compare(DecomposedRelPosAttention(12, (4, 4), 3), theirs, lambda attn, x: attn(x)[0], size, strict=True)


@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.parametrize("window", [(2, 3), None])
def test_beit_is_timms(window, shared):
    module = pytest.importorskip("timm.models.beit")
    theirs = spread(module.Attention(12, 3, qkv_bias=True, window_size=window))

    def call(attn, x):
        return attn(x, x[:1, :, :7].expand(1, 3, 7, 7) if shared else None)

    compare(BeitAttention(12, window, 3), theirs, call, (7,), strict=True, mine=call)


POOLS = [
    {},
    {"kernel_q": (3, 3), "stride_q": (2, 2), "kernel_kv": (3, 3), "stride_kv": (4, 4)},
    {"kernel_kv": (3, 3), "stride_kv": (2, 2), "residual_pooling": False},
]


@pytest.mark.parametrize("first", [True, False], ids=["class token", "map"])
@pytest.mark.parametrize("pools", POOLS, ids=["nothing pooled", "all pooled", "keys pooled"])
def test_mvit_v2_is_timms(pools, first):
    module = pytest.importorskip("timm.models.mvitv2")
    options = pools | {"num_heads": 2, "has_cls_token": first}
    theirs = spread(module.MultiScaleAttention(12, 16, (8, 8), **options))

    def call(attn, x):
        return attn(x, (8, 8))[0]

    compare(MultiScaleAttention(12, 16, (8, 8), **options), theirs, call, (64 + first,), strict=True, mine=call)


def test_mvit_v2_takes_maps_of_other_sizes():
    ours = MultiScaleAttention(12, 16, (8, 8), 2, kernel_q=(3, 3), stride_q=(2, 2), kernel_kv=(3, 3), stride_kv=(4, 4))
    out, size = ours(torch.randn(2, 1 + 9 * 13, 12), (9, 13))
    assert size == (5, 7) and out.shape == (2, 36, 16)
    with pytest.raises(ValueError, match=r"MultiScaleAttention: x must have shape \[B, 118, 12\]"):
        ours(torch.randn(2, 117, 12), (9, 13))


def test_a_beit_checkpoint_loads_strictly_and_its_index_is_ours():
    theirs = pytest.importorskip("timm.models.beit").Attention(12, 3, qkv_bias=True, window_size=(2, 5))
    ours = BeitAttention(12, (2, 5), 3)
    assert torch.equal(ours.relative_position_index, theirs.relative_position_index)
    ours.load_state_dict(theirs.state_dict() | {"relative_position_index": theirs.relative_position_index}, strict=True)
    assert "q_bias" not in BeitAttention(12, (2, 5), 3, qkv_bias=False).state_dict()


def test_talking_heads_are_timms():
    module = pytest.importorskip("timm.models.cait")
    compare(TalkingHeadAttention(12, 3), spread(module.TalkingHeadAttn(12, 3, True)), ours_alone, (7,), strict=True)


@pytest.mark.parametrize("train", [False, True])
def test_levit_is_timms(train):
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


@pytest.mark.parametrize("masked", [False, True])
def test_masked_cross_attention_is_that_of_transformers(masked):
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


def test_no_gradient_goes_to_the_mask():
    ours, logits = MaskedCrossAttention(8, 2), torch.randn(1, 3, 2, 2, requires_grad=True)
    ours(torch.randn(1, 3, 8), torch.randn(1, 4, 8), mask_logits=logits, size=(2, 2)).sum().backward()
    assert logits.grad is None and ours.in_proj_weight.grad.abs().sum() > 0


# the formula of the paper ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("rows", ["all", "one for all", "each its own"])
def test_sigmoid_attention_counts_the_keys_that_a_query_sees(rows):
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

    with torch.no_grad():
        exact = formula(copy.deepcopy(ours).double(), x.double())
        assert_close_to_oracle(rows, ours(x, mask=mask), exact, formula(ours, x))


def test_sigmoid_attention_of_the_code_reads_its_buffers():
    ours, x = spread(SigmoidAttention(12, 3, qk_norm=True, compat="code")), torch.randn(2, 9, 12)
    ours.attn_bias.fill_(-2.5)
    ours.attn_temp.fill_(0.4)

    def formula(module, x):
        q, k, v = module.qkv(x).unflatten(-1, (3, 3, 4)).permute(2, 0, 3, 1, 4)
        logits = module.q_norm(q) @ module.k_norm(k).mT / 2 * module.attn_temp.exp() + module.attn_bias
        return module.proj((logits.sigmoid() @ v).transpose(1, 2).flatten(2))

    hold(ours, formula, x)
    assert (
        set(ours.state_dict()) > {"attn_bias", "attn_temp"} and "attn_bias" not in SigmoidAttention(8, 2).state_dict()
    )


@pytest.mark.parametrize("compat", ["paper", "code"])
def test_a_gaussian_mixture_multiplies_the_scores(compat):
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

    hold(ours, formula, x)


def test_a_gaussian_mixture_loads_a_checkpoint_with_its_constant():
    ours = GaussianMixtureAttention(12, (3, 3), 2, 5)
    ours.load_state_dict(ours.state_dict() | {"mask.mask": torch.zeros(1, 1, 9, 9)}, strict=True)
    assert set(ours.state_dict()) == {"to_qkv.weight", "to_out.0.weight", "to_out.0.bias", "mask.sigma", "mask.alpha"}


# all -----------------------------------------------------------------------------------------------------------------------

X = {"tokens": (2, 6, 12), "map": (2, 2, 3, 12)}
DROPS = [Attention, TalkingHeadAttention, SigmoidAttention, lambda *a, **o: BeitAttention(12, None, 3, **o)]


@pytest.mark.parametrize("make", [*DROPS, lambda *a, **o: DecomposedRelPosAttention(12, (2, 3), 3, **o)])
def test_dropout_draws_in_training_only(make):
    for options in ({"attn_drop": 0.5}, {"proj_drop": 0.5}):
        ours = spread(make(12, 3, **options))
        x = torch.randn(X["map" if isinstance(ours, DecomposedRelPosAttention) else "tokens"])
        assert not torch.equal(ours(x), ours(x))
        assert torch.equal(ours.eval()(x), ours(x))


def test_refusals_name_what_they_got():
    with pytest.raises(ValueError, match="TalkingHeadAttention: num_heads must divide dim .16., got 3"):
        TalkingHeadAttention(16, 3)
    with pytest.raises(ValueError, match=r"Attention: x must have shape \[B, N, 12\], got \[2, 3, 4, 12\]"):
        Attention(12, 3)(torch.zeros(2, 3, 4, 12))
    with pytest.raises(ValueError, match=r"BeitAttention: x must have shape \[B, 7, 12\], got \[1, 6, 12\]"):
        BeitAttention(12, (2, 3), 3)(torch.zeros(1, 6, 12))
    with pytest.raises(ValueError, match=r"LevitAttention: x must have shape \[B, 15, 12\], got \[1, 9, 12\]"):
        LevitAttention(12, 4, resolution=(3, 5))(torch.zeros(1, 9, 12))
    with pytest.raises(ValueError, match="SigmoidAttention: compat must be one of paper, code, got 'book'"):
        SigmoidAttention(12, 3, compat="book")
    with pytest.raises(
        ValueError, match=r"MaskedCrossAttention: memory must have shape \[2, h w, 12\], got \[1, 9, 12\]"
    ):
        MaskedCrossAttention(12, 3)(torch.zeros(2, 4, 12), torch.zeros(1, 9, 12))
    with pytest.raises(
        ValueError, match=r"MaskedCrossAttention: size must be the \(h, w\) of memory with mask_logits, got None"
    ):
        MaskedCrossAttention(12, 3)(torch.zeros(1, 4, 12), torch.zeros(1, 9, 12), mask_logits=torch.zeros(1, 4, 2, 2))
