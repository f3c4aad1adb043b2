"""Published systems on attention: their calls against their formulas, and against the code of libraries."""

import libraries  # noqa: F401
import masked_systems
import pytest
import torch
from agreement import agree
from composed_systems import SYSTEMS
from library_systems import LIBRARIES
from masked_systems import qkv, scores, weigh

import vitkern
from vitkern import mask


@pytest.mark.parametrize("name", SYSTEMS)
def test_the_definition_is_the_formula(name):
    found = SYSTEMS[name]()
    leaves = {n: t.requires_grad_() for n, t in found.drawn.items()}
    got, want = (f if isinstance(f, tuple) else (f,) for f in (found.ours(leaves, "reference"), found.formula(leaves)))
    for a, b in zip(got, want, strict=True):
        used = [
            t
            for t in leaves.values()
            if torch.autograd.grad(b.sum(), t, retain_graph=True, allow_unused=True)[0] is not None
        ]
        agree(a, b, used)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("name", SYSTEMS)
def test_kernels_compute_the_formula(name, dtype):
    masked_systems.holds(masked_systems.of(name), dtype, "cpu")


def test_the_weights_of_every_head_are_an_output():
    """INTR: class queries on an image; the weights learn too."""
    leaves = {n: t.requires_grad_() for n, t in qkv(20, 49, heads=4).items()}
    out, stats = vitkern.attention(*leaves.values(), return_stats=("probs",))
    p = scores(leaves["q"], leaves["k"]).softmax(-1)
    agree(out, weigh(p, leaves["v"]), [*leaves.values()])
    agree(stats.probs, p, [leaves["q"], leaves["k"]])
    agree(out.mean() + stats.probs.square().sum(), weigh(p, leaves["v"]).mean() + p.square().sum(), [*leaves.values()])


# the code of libraries -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("name", LIBRARIES)
def test_kernels_compute_what_the_code_of_libraries_does(name, dtype):
    masked_systems.holds(masked_systems.call(name, LIBRARIES[name]()), dtype, "cpu")


def test_the_denoising_mask_of_rt_detr_is_a_table():
    detr = pytest.importorskip("transformers.models.rt_detr.modeling_rt_detr")
    targets = [{"class_labels": torch.arange(n), "boxes": torch.rand(n, 4)} for n in (3, 1)]
    embedding = torch.nn.Embedding(6, 8)
    found = detr.get_contrastive_denoising_training_group(targets, 5, 7, embedding, num_denoising_queries=9)
    groups = found[3]["dn_num_group"]
    ids = torch.cat((torch.arange(1, groups + 1).repeat_interleave(6), torch.zeros(7, dtype=torch.long)))[None]
    allow = torch.eye(groups + 1, dtype=torch.bool)
    allow[:, 0] = True
    q, k, v = qkv(ids.shape[1]).values()
    assert groups == 3 and torch.equal(mask.Segments(ids, ids, allow).dense(q, k)[0, 0], found[2] == 0)
    torch.testing.assert_close(
        vitkern.attention(q, k, v, mask=mask.Segments(ids, ids, allow)), vitkern.attention(q, k, v, bias=found[2])
    )
