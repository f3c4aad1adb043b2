"""What the documents say is true: the README's code runs, its tables are those of the committed results."""

import os
import pathlib
import re
import subprocess
import sys

import libraries  # noqa: F401
import pytest
import torch

import vitkern
from benchmarks import tables

ROOT = pathlib.Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()
BLOCKS = re.findall(r"```python\n(.*?)```", README, re.S)


@pytest.mark.parametrize("code", BLOCKS, ids=[b.strip().splitlines()[-1][:40] for b in BLOCKS])
def test_the_code_of_the_readme_runs(code, capsys):
    swin = pytest.importorskip("transformers.models.swin.modeling_swin")
    model = swin.SwinModel(swin.SwinConfig(image_size=32, embed_dim=12, depths=[2], num_heads=[2], window_size=4))
    exec(code, {"model": model, "torch": torch, "vitkern": vitkern})
    if "print(report)" in code:
        assert "SwinLayer" in capsys.readouterr().out


def test_the_first_kernel_of_the_page_runs(tmp_path):
    page = (ROOT / "docs" / "cuda-without-a-gpu.md").read_text()
    for language, name in (("cpp", "first.cu"), ("python", "first.py")):
        (tmp_path / name).write_text(re.findall(rf"```{language}\n(.*?)```", page, re.S)[0])
    environment = os.environ | {"PYTHONPATH": str(ROOT / "tests")}
    ran = subprocess.run([sys.executable, "first.py"], cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert ran.returncode == 0 and ran.stdout.split()[1:3] == ["496.", "496."], ran.stdout + ran.stderr


@pytest.mark.parametrize("path", tables.generated(), ids=lambda p: p.name)
def test_tables_are_made_from_the_committed_results(path):
    assert path.read_text() == tables.generated()[path], "run python -m benchmarks.tables"


def test_every_file_that_a_document_names_is_there():
    listed = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True).stdout.split()
    for document in (n for n in listed if n.endswith(".md")):
        for name in re.findall(r"`([\w./]+\.(?:py|cu|cuh|h|inc|cpp|md|json|txt))`", (ROOT / document).read_text()):
            assert any(f"/{f}".endswith(f"/{name}") for f in listed), f"{document} names {name}"
