"""docs/systems.csv: every published system has a call that vitkern can read, and a test that is there."""

import ast
import csv
import inspect
import pathlib
import re

import pytest
import torch
from system_calls import explained

import vitkern
from vitkern import bias, decay, feature_map, mask, modulation

ROOT = pathlib.Path(__file__).parents[1]
COLUMNS = ["family", "system", "also", "operator", "call", "module", "backends", "test", "state"]
FAMILIES = {"windows": 41, "masked": 55, "linear": 28, "tokens": 31}
PLACES = (vitkern, bias, mask, modulation, decay, feature_map)
with open(ROOT / "docs" / "systems.csv", newline="", encoding="utf-8") as file:
    HEADER, *LINES = csv.reader(file)
ROWS = [dict(zip(HEADER, line, strict=True)) for line in LINES]
EACH = pytest.mark.parametrize("row", ROWS, ids=[f"{r['family']} {r['system']}" for r in ROWS])


def named(node):
    """What the function of a call is, and whether it is a method of what another call makes."""
    if isinstance(node, ast.Name):
        if node.id == "torch":
            return torch, False
        found = [getattr(place, node.id) for place in PLACES if hasattr(place, node.id)]
        assert found, f"vitkern has no {node.id}"
        return found[0], False
    assert isinstance(node, ast.Attribute), ast.unparse(node)
    made = isinstance(node.value, ast.Call)
    return getattr(named(node.value.func if made else node.value)[0], node.attr), made


def bound(call):
    """A call whose arguments, at their places and by their names, are those of its function."""
    function, of_made = named(call.func)
    if getattr(function, "__module__", "").startswith("vitkern"):
        keywords = {k.arg: ... for k in call.keywords}
        inspect.signature(function).bind(*[...] * (len(call.args) + of_made), **keywords)


def test_the_table_has_every_row():
    assert HEADER == COLUMNS and len(ROWS) == 155
    assert [r["family"] for r in ROWS] == [name for name, count in FAMILIES.items() for _ in range(count)]
    assert len({(r["family"], r["system"]) for r in ROWS}) == len(ROWS)


@EACH
def test_its_call_is_one_of_vitkern(row):
    assert row["call"] or row["state"].startswith("no"), "only what cannot be computed has no call"
    for node in ast.walk(ast.parse(row["call"] or "...", mode="eval")):
        if isinstance(node, ast.Call):
            bound(node)
    assert not row["module"] or row["module"] in vitkern.nn.__all__


@EACH
def test_its_call_runs_and_its_backends_are_those_that_take_it(row):
    pytest.importorskip("triton")
    if row["state"] != "yes":
        assert row["backends"] == ""
    else:
        assert row["backends"] == (" ".join(explained(row)) or "reference")


@EACH
def test_its_state_is_that_of_its_test(row):
    assert row["operator"] and len(row["operator"]) <= 110
    assert re.fullmatch("yes|no: .{1,60}", row["state"])
    assert bool(row["test"]) == (row["state"] == "yes")
    if row["test"]:
        file, case = row["test"].split("::")
        text = (ROOT / "tests" / file).read_text(encoding="utf-8")
        assert f"def {case}(" in text or f'"{case}":' in text, f"tests/{file} has no {case}"
