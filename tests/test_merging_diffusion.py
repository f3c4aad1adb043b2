"""vitkern.merging.apply_diffusion against one-hot matrices around the sub-layers of diffusers' own blocks, in float64."""

from contextlib import contextmanager

import libraries  # noqa: F401
import pytest
import torch

from vitkern import merging

diffusers = pytest.importorskip("diffusers")


def unet():
    torch.manual_seed(0)
    model = diffusers.UNet2DConditionModel(
        sample_size=8, in_channels=4, out_channels=4, layers_per_block=1, block_out_channels=(32, 64), norm_num_groups=8,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"), up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        cross_attention_dim=16, attention_head_dim=8,
    )  # fmt: skip
    return model.double().eval()


@contextmanager
def merging_of(model):
    report = merging.apply_diffusion(model, ratio=0.5)
    yield report
    report.undo()


def one_hot(x, grid, stride, r):
    """Which tokens each slot averages [slots, N], with the first position of every cell as its destination."""
    rows, columns = grid
    destinations = [
        y * columns + c
        for y in range(0, rows // stride[0] * stride[0], stride[0])
        for c in range(0, columns // stride[1] * stride[1], stride[1])
    ]
    unit = x / x.norm(dim=-1, keepdim=True)
    best = {
        i: max((float(unit[i] @ unit[j]), -j) for j in destinations) for i in range(len(x)) if i not in destinations
    }
    order = sorted(best, key=lambda i: (-best[i][0], i))[:r]
    into = {i: -best[i][1] for i in order}
    kept = [i for i in range(len(x)) if i not in into and i not in destinations] + destinations
    return torch.stack(
        [torch.tensor([1.0 if i == k or into.get(i) == k else 0.0 for i in range(len(x))]) for k in kept]
    ).to(x.dtype)


@pytest.mark.parametrize("parts", [("attn1",), ("attn1", "attn2", "ff")], ids=str)
def test_a_block_equals_one_hot_matrices(parts):
    model = unet()
    blocks = {n: m for n, m in model.named_modules() if type(m).__name__ == "BasicTransformerBlock"}
    sample, text = torch.randn(1, 4, 6, 10, dtype=torch.float64), torch.randn(1, 5, 16, dtype=torch.float64)
    seen = {}
    with torch.no_grad():
        plain = model(sample, 3, text).sample
        report = merging.apply_diffusion(model, 0.4, parts=parts, max_downsample=2)
        handles = [
            b.register_forward_hook(lambda m, a, k, out, n=n: seen.__setitem__(n, (a[0], out)), with_kwargs=True)
            for n, b in blocks.items()
        ]
        merged = model(sample, 3, text).sample
        assert {r.path for r in report.replaced} == {f"{n}.{part}" for n in blocks for part in parts}
        for handle in handles:
            handle.remove()
        report.undo()
        assert not torch.allclose(merged, plain) and torch.equal(model(sample, 3, text).sample, plain)
        for name, (x, out) in seen.items():
            grid = (6, 10) if x.shape[1] == 60 else (3, 5)
            r = int(x.shape[1] * 0.4)
            hot = one_hot(x[0], grid, (2, 2), r)
            assert report.tokens[name] == (x.shape[1], x.shape[1] - r) == (x.shape[1], len(hot))
            mean, spread = hot / hot.sum(1, keepdim=True), hot.mT
            block = blocks[name]
            around = lambda part, f, t: spread @ f(mean @ t) if part in parts else f(t)  # noqa: B023, E731
            h = x + around("attn1", block.attn1, block.norm1(x))
            h = h + around("attn2", lambda t: block.attn2(t, encoder_hidden_states=text), block.norm2(h))  # noqa: B023
            torch.testing.assert_close(out, h + around("ff", block.ff, block.norm3(h)))


def test_the_pattern_changes_with_every_pass_of_an_even_batch_and_deeper_blocks_stay_whole():
    model = unet()
    sample, text = torch.randn(2, 4, 8, 8, dtype=torch.float64), torch.randn(2, 5, 16, dtype=torch.float64)
    with torch.no_grad():
        report = merging.apply_diffusion(model, seed=5)
        first, second = (model(sample, 3, text).sample for _ in range(2))
        assert not torch.equal(first, second)
        assert {outside: inside for outside, inside in report.tokens.values()} == {64: 32, 16: 16}
        report.undo()
        again = merging.apply_diffusion(model, seed=5)
        assert torch.equal(model(sample=sample, timestep=3, encoder_hidden_states=text).sample, first)
        odd = [model(sample[:1], 3, text[:1]).sample for _ in range(2)]
        assert torch.equal(*odd)
        again.undo()
    merging.apply_diffusion(model)
    model(sample, 3, text).sample.sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())


@pytest.mark.parametrize(
    "options, sentence",
    [
        (dict(ratio=0.0), r"ratio must lie in \(0, 1\), got 0.0"),
        (dict(stride=0), "stride must be an int of at least 1, or two, got 0"),
        (dict(max_downsample=0), "max_downsample must be at least 1, got 0"),
        (dict(parts=("mlp",)), r"parts must be some of attn1, attn2, ff, got \('mlp',\)"),
    ],
)
def test_refusals_are_sentences(options, sentence):
    with pytest.raises(ValueError, match=f"merging.apply_diffusion: {sentence}"):
        merging.apply_diffusion(unet(), **options)
    with pytest.raises(ValueError, match="model must hold blocks of diffusers"):
        merging.apply_diffusion(torch.nn.Linear(2, 2))


def test_what_is_patched_already_is_named():
    model = unet()
    merging.apply_diffusion(model)
    again = merging.apply_diffusion(model)
    assert not again.replaced and {k.reason for k in again.kept} == {"patched already"}


def test_a_mask_over_tokens_that_merge_is_refused_and_one_over_the_text_is_not():
    model = unet()
    with merging_of(model):
        x, text = torch.randn(1, 4, 8, 8, dtype=torch.float64), torch.randn(1, 5, 16, dtype=torch.float64)
        with torch.no_grad():
            assert model(x, 1, text, encoder_attention_mask=torch.ones(1, 5)).sample.isfinite().all()
            with pytest.raises(ValueError, match="attention_mask must be None in a block that merges tokens"):
                model(x, 1, text, attention_mask=torch.ones(1, 64))
