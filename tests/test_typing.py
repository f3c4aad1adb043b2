"""What a type checker knows: the package by its own strict rules, and what a user's calls give."""

import inspect
import pathlib
import re
import subprocess
import sys

import pytest
import torch

import vitkern
from vitkern.ops import _options

ROOT = pathlib.Path(__file__).parent.parent
# Beyond the rules of the package: the rest of --strict.
USER = """\
# mypy: warn-return-any, disallow-untyped-calls, disallow-any-generics, warn-unused-ignores
import torch

import vitkern
from vitkern.bias import RelativePosition

q = torch.randn(1, 8, 8, 2, 16)
tokens = torch.randn(1, 64, 2, 16)
stats: tuple[str, ...] = ("lse",)
asked: bool = True

reveal_type(vitkern.window_attention(q, q, q, 4, 2, bias=RelativePosition(torch.randn(49, 2)), scale=0.25))  # Tensor
reveal_type(vitkern.window_attention(q, q, q, 4, return_stats=("lse",)))  # tuple[Tensor, Stats]
reveal_type(vitkern.window_attention_qkvpacked(torch.stack((q, q, q), -3), 4, backend="cpu"))  # Tensor
reveal_type(vitkern.attention(tokens, tokens, tokens, sink=None))  # Tensor
reveal_type(vitkern.attention(tokens, tokens, tokens, return_stats=stats)[1].lse)  # Tensor | None
reveal_type(vitkern.attention(tokens, tokens, None, return_stats=("key_mean",)))  # tuple[None, Stats]
reveal_type(vitkern.neighborhood_attention(q, q, q, 3))  # Tensor
reveal_type(vitkern.linear_attention(tokens, tokens, tokens, feature_map="relu"))  # Tensor
reveal_type(vitkern.linear_attention(tokens, tokens, tokens, causal=True, return_state=True)[1][0])  # Tensor
either = vitkern.linear_attention(tokens, tokens, tokens, return_state=asked)
reveal_type(either)  # Tensor | tuple[Tensor, tuple[Tensor, Tensor, Tensor]]
match = vitkern.bipartite_match(tokens.flatten(2))
reveal_type(match)  # Match
plan = vitkern.merge_plan(match, r=4)
reveal_type(plan)  # MergePlan
reveal_type(vitkern.merge_tokens(tokens, plan))  # tuple[Tensor, Tensor]
reveal_type(vitkern.merge_tokens((tokens, q), plan)[0])  # tuple[Tensor, ...]
reveal_type(vitkern.unmerge_tokens(tokens, plan))  # Tensor
module = vitkern.nn.WindowAttention(32, (4, 4), 2)
reveal_type(module(torch.randn(4, 16, 32)))  # Tensor
reveal_type(vitkern.patch(module))  # PatchReport
reveal_type(vitkern.merging.apply(module, r=2))  # MergeReport
with vitkern.patched(module) as report:
    reveal_type(report)  # PatchReport
vitkern.attention(tokens, tokens, tokens, bais=tokens)  # error: call-overload
vitkern.linear_attention(tokens, tokens, tokens, eps="small")  # error: call-overload
"""
MODULES = sorted(n for n, c in vars(vitkern.nn).items() if inspect.isclass(c) and issubclass(c, torch.nn.Module))
USER += "".join(f"def of_{name}(m: vitkern.nn.{name}) -> None: reveal_type(m.__call__)  # module\n" for name in MODULES)
TUPLE = re.compile(r"tuple\[(?:Tensor \| None, )*Tensor \| None, fallback=Stats\]")
OPTIONS = [
    ("attention", "AttentionOptions"),
    ("attention_varlen", "AttentionOptions"),
    ("window_attention", "WindowOptions"),
    ("neighborhood_attention", "NeighborhoodOptions"),
    ("linear_attention", "LinearOptions"),
    ("selective_scan", "ScanOptions"),
]


def test_the_package_and_the_calls_of_a_user(tmp_path):
    """One process for both: it reads torch once."""
    (tmp_path / "user.py").write_text(USER)
    options = ["--config-file", "pyproject.toml", "--cache-dir", str(tmp_path / "cache"), "--no-pretty"]
    command = [sys.executable, "-m", "mypy", *options, "vitkern", str(tmp_path / "user.py")]
    lines = subprocess.run(command, cwd=ROOT, capture_output=True, text=True).stdout.splitlines()
    users = re.compile(r".*user\.py:(\d+): (?:note: Revealed type is \"(.*)\"|error: .*\[([\w-]+)\])")
    found = {}
    for line in filter(users.match, lines):
        number, kind, code = users.match(line).groups()
        shown = f"error: {code}" if code else TUPLE.sub("Stats", re.sub(r"(?:\w+\.)+(?=\w)", "", kind))
        found.setdefault(int(number), "module" if re.match(r"def \(\w+: Tensor.*\) -> \S*Tensor\b", shown) else shown)
    wanted = {n: line.split("  # ")[1] for n, line in enumerate(USER.splitlines(), 1) if "  # " in line}
    assert found == wanted
    others = [line for line in lines if "error: " in line and not users.match(line)]
    assert not others, "\n".join(others)
    assert lines[-1].endswith("source files)"), lines[-1]


@pytest.mark.parametrize("name, options", OPTIONS, ids=[name for name, _ in OPTIONS])
def test_options_of_overloads_are_those_of_the_function(name, options):
    parameters = inspect.signature(getattr(vitkern, name)).parameters.values()
    own = {p.name: p.annotation for p in parameters if p.kind is p.KEYWORD_ONLY and not p.name.startswith("return_")}
    assert getattr(_options, options).__annotations__ == own
