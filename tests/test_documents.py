"""What the documents say is true: the README's code runs, its tables are those of the committed results."""

import os
import pathlib
import re
import subprocess
import sys
import types

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


PAGES = [
    p
    for p in sorted((ROOT / "docs").glob("*.md"))
    if p.name != "cuda-without-a-gpu.md" and "```python" in p.read_text()
]


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.stem)
def test_the_code_of_a_page_runs_from_top_to_bottom(page):
    pytest.importorskip("transformers.models.swin.modeling_swin")
    known: dict = {}
    for code in re.findall(r"```python\n(.*?)```", page.read_text(), re.S):
        exec(code, known)


def test_the_reference_page_has_every_public_name():
    listed = set(re.findall(r"^::: vitkern\.(?:patch\.)?(\w+)$", (ROOT / "docs" / "reference.md").read_text(), re.M))
    modules = {name for name in vitkern.__all__ if isinstance(getattr(vitkern, name), types.ModuleType)}
    assert not set(vitkern.__all__) - modules - listed


def test_the_site_builds_without_a_warning(tmp_path):
    command = [sys.executable, "-m", "mkdocs", "build", "-q", "-d", str(tmp_path)]
    environment = os.environ | {"NO_MKDOCS_2_WARNING": "1"}
    built = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert built.returncode == 0 and (tmp_path / "figures" / "windows.svg").exists(), built.stdout + built.stderr


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
