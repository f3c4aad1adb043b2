"""vitkern check: models found by directory and by name, errors of every layer, and what is said of a wrong one."""

import json

import libraries  # noqa: F401
import pytest
import torch

import vitkern
from vitkern import check
from vitkern.cli import main
from vitkern.patch import _windows

pytest.importorskip("rich")
transformers = pytest.importorskip("transformers")
SIZES = {"depths": [2], "num_heads": [2], "embed_dim": 8, "window_size": 4, "image_size": 32, "patch_size": 4}


@pytest.fixture
def folder(tmp_path):
    transformers.SwinModel(transformers.SwinConfig(**SIZES)).save_pretrained(tmp_path)
    return str(tmp_path)


def test_a_directory_of_transformers(folder, capsys):
    assert main(["check", folder]) == 0
    said = capsys.readouterr().out
    assert "encoder.layers.0.blocks.0" in said and "encoder.layers.0.blocks.1" in said
    assert "2 modules replaced; the model's output differs by" in said


def test_a_picture_of_another_size_in_bfloat16(folder, tmp_path, capsys):
    image = pytest.importorskip("PIL.Image")
    image.new("RGB", (60, 40), (200, 10, 90)).save(tmp_path / "one.png")
    assert (
        main(["check", folder, "--image", str(tmp_path / "one.png"), "--size", "24", "40", "--dtype", "bfloat16"]) == 0
    )
    assert "2 modules replaced" in capsys.readouterr().out


def test_a_directory_of_timm(tmp_path):
    timm = pytest.importorskip("timm")
    safetensors = pytest.importorskip("safetensors.torch")
    name = "levit_128s"
    with pytest.raises(SystemExit, match="has no config.json"):
        check.load(str(tmp_path))
    (tmp_path / "config.json").write_text(json.dumps({"architecture": name}))
    with pytest.raises(SystemExit, match="neither model.safetensors nor pytorch_model.bin"):
        check.load(str(tmp_path))
    given = timm.create_model(name)
    safetensors.save_file(given.state_dict(), str(tmp_path / "model.safetensors"))
    found = check.load(str(tmp_path)).state_dict()
    assert all(torch.equal(found[n], t) for n, t in given.state_dict().items())


def test_names_of_architectures():
    with pytest.raises(SystemExit, match="'no_such_model' is neither a directory nor an architecture"):
        check.load("no_such_model")
    pytest.importorskip("timm")
    assert type(check.load("levit_128s")).__name__ == "LevitDistilled"


def test_a_model_without_a_served_layer(capsys):
    pytest.importorskip("timm")
    assert main(["check", "resnet10t", "--size", "32", "32"]) == 1
    assert "0 modules to be replaced" in capsys.readouterr().out


def test_a_wrong_layer_is_said_to_be_wrong(folder, capsys, monkeypatch):
    right = vitkern.window_attention
    monkeypatch.setattr(_windows, "window_attention", lambda *args, **options: 1.5 * right(*args, **options))
    assert main(["check", folder]) == 1
    assert "2 modules are further from float64 than they may be" in capsys.readouterr().out
