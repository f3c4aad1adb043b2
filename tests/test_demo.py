"""The demo's pieces on models small enough for a test: the lines of its tables, and the report that shows them."""

import re

import libraries  # noqa: F401
import pytest
import torch

transformers = pytest.importorskip("transformers")
import vitkern  # noqa: E402
from vitkern.demo import measure, merging, run  # noqa: E402
from vitkern.demo.efficientvit import efficientvit, fused  # noqa: E402
from vitkern.demo.models import OnDefinition, deformable_detr, dinat, on_kernel  # noqa: E402
from vitkern.demo.report import write_report  # noqa: E402


def test_the_report_shows_what_was_measured(tmp_path):
    pictures = run.photographs([])
    torch.manual_seed(0)
    swin = transformers.SwinForImageClassification(
        transformers.SwinConfig(image_size=32, embed_dim=12, depths=[2], num_heads=[2], window_size=4, num_labels=7)
    ).eval()
    x = run.pixels(pictures, (32, 32))
    assert x.shape == (2, 3, 32, 32)
    exact = measure.logits(swin.double(), x.double()).detach().float()
    steps = []
    line = measure.compare("Swin", swin.float(), x, exact, torch.float32, None, 0.0, steps.append, vitkern.patched)
    assert line.replaced == 2 and line.difference < 1e-5 and line.same_best and line.ratio > 0
    shape = dict(hidden_size=24, num_hidden_layers=2, num_attention_heads=3, intermediate_size=48, image_size=32)
    deit = transformers.DeiTModel(transformers.DeiTConfig(patch_size=8, **shape)).eval()
    merged = merging.compare("DeiT", deit, x, [p for _, p in pictures], 8, 3, 0.0, steps.append)
    assert merged.tokens == [18, 15, 12] and 0 < merged.saved < 1 and 0.3 < merged.cosine < 1 - 1e-6
    assert [p.shape for p in merged.pictures] == [(32, 32, 3)] * 2
    assert run.table([line]).row_count == merging.table([merged]).row_count == 1
    page = write_report(tmp_path, [line], [merged], {"Swin": "what was replaced"}, pictures, True).read_text()
    assert len(re.findall('<img class="groups"', page)) == 2 and "18 tokens in 12 groups" in page
    assert "what was replaced" in page and steps


def test_efficientvit_is_the_same_with_the_op():
    torch.manual_seed(0)
    model, x = efficientvit().eval(), torch.randn(1, 3, 96, 64)
    with torch.inference_mode():
        exact = measure.logits(model.double(), x.double()).float()
        before = measure.logits(model.float(), x)
        line = measure.compare("EfficientViT", model.float(), x, exact, torch.float32, None, 0.0, len, fused)
        assert line.replaced == 7 and 0 < line.difference < 1e-4 * line.scale
        with fused(model) as report:
            assert "7 modules run on linear_attention" in str(report)
        assert torch.equal(before, measure.logits(model, x))


def test_dinat_runs_on_its_definition_and_on_the_kernel():
    torch.manual_seed(0)
    model, x = dinat().eval(), torch.randn(1, 3, 64, 96)
    with torch.inference_mode():
        exact = measure.logits(model.double(), x.double()).float()
        line = measure.compare("DiNAT", model.float(), x, exact, torch.float32, None, 0.0, len, on_kernel)
    assert isinstance(model, OnDefinition) and model.backend == "reference"
    assert line.replaced == 8 and 0 < line.difference < 1e-4 * line.scale


def test_deformable_detr_is_the_same_patched():
    torch.manual_seed(0)
    model, x = deformable_detr().eval(), torch.randn(1, 3, 64, 96)
    with torch.inference_mode():
        exact = measure.logits(model.double(), x.double()).float()
    line = measure.compare("DETR", model.float(), x, exact, torch.float32, None, 0.0, len, vitkern.patched)
    assert line.replaced == 6 and 0 < line.difference < 1e-3 * line.scale
