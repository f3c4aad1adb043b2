"""vitkern.patch by path: only=, skip=, dry_run=."""

import importlib

import libraries  # noqa: F401
import pytest
import torch

import vitkern
from vitkern.patch import table

transformers = pytest.importorskip("transformers")
SIZES = {"depths": [2, 1], "num_heads": [1, 2], "embed_dim": 4, "window_size": 2, "image_size": 16, "patch_size": 2}


@pytest.fixture
def swin():
    return transformers.SwinModel(transformers.SwinConfig(**SIZES)).eval()


def replaced(model, **options):
    with vitkern.patched(model, **options) as report:
        return [r.path for r in report.replaced]


BLOCKS = ["encoder.layers.0.blocks.0", "encoder.layers.0.blocks.1", "encoder.layers.1.blocks.0"]


@pytest.mark.parametrize("options, paths", [
    ({}, BLOCKS),
    ({"only": "encoder.layers.0"}, BLOCKS[:2]),
    ({"only": "*.blocks.0"}, BLOCKS[::2]),
    ({"only": ["encoder.layers.1", "*.blocks.1"]}, BLOCKS[1:]),
    ({"skip": "encoder.layers.[1-9]"}, BLOCKS[:2]),
    ({"only": "encoder", "skip": ["*.layers.0.blocks.1"]}, BLOCKS[::2]),
    ({"only": "embeddings"}, []),
])  # fmt: skip
def test_paths_choose_what_is_served(swin, options, paths):
    assert replaced(swin, **options) == paths


def test_what_is_left_out_is_in_the_report(swin):
    report = vitkern.patch(swin, only="encoder.layers.0", skip="*.blocks.1")
    assert {k.path: k.reason for k in report.kept} == {
        BLOCKS[1]: "skip='*.blocks.1' leaves it out",
        BLOCKS[2]: "only= names other modules",
    }


def test_a_part_may_be_served_where_what_is_around_it_is_left_out():
    timm = pytest.importorskip("timm")
    sizes = {"embed_dim": 16, "depth": 2, "num_heads": 2, "img_size": 32, "patch_size": 8, "window_size": 2}
    sam = timm.models.vision_transformer_sam.VisionTransformerSAM(**sizes, use_rel_pos=True, neck_chans=8)
    assert replaced(sam) == ["blocks.0", "blocks.1"]
    assert replaced(sam, only="blocks.0.attn") == ["blocks.0.attn"]


def test_a_name_that_no_module_has_is_an_error(swin):
    with pytest.raises(
        ValueError, match=r"patch: only='encoder.layer.0' names no module; among those .* encoder.layers"
    ):
        vitkern.patch(swin, only="encoder.layer.0")
    with pytest.raises(ValueError, match=r"patch: skip='blocks' names no module"):
        vitkern.patch(swin, skip=("encoder", "blocks"))
    assert not any("forward" in vars(m) for m in swin.modules())


@pytest.mark.parametrize("library, kind, op", table.served(), ids=lambda x: x.rsplit(".", 1)[-1])
def test_every_class_of_the_table_is_one_of_its_library(library, kind, op):
    pytest.importorskip(library)
    module, name = kind.rsplit(".", 1)
    assert issubclass(getattr(importlib.import_module(module), name), torch.nn.Module)
    assert op.split()[0].rstrip(",") in vitkern.__all__


def test_a_dry_run_reports_and_changes_nothing(swin):
    report = vitkern.patch(swin, dry_run=True)
    assert [r.path for r in report.replaced] == BLOCKS and "3 modules to be replaced" in str(report)
    assert not any("forward" in vars(m) for m in swin.modules())
    report.undo()
    x = torch.rand(1, 3, 16, 16)
    want = swin(x)[0]
    with vitkern.patched(swin):
        torch.testing.assert_close(swin(x)[0], want)
