"""Ahead-of-time compilation of the Triton kernels: what the launch functions would launch, for machines not at hand.

Each launch of a case is caught, its arguments are turned into the signature that Triton's launcher would give them, and
the result is compiled for three architectures. No configuration that ships may spill registers in its loops.
"""

import contextlib
import math
import os
import pathlib
import re
import subprocess
import tempfile

import pytest
import torch

triton = pytest.importorskip("triton")
from triton.backends.compiler import GPUTarget  # noqa: E402
from triton.compiler import ASTSource  # noqa: E402

from vitkern.triton_kernels import (  # noqa: E402
    _attention_bwd_sums,
    _attention_bwd_tables,
    _attention_bwd_tiles,
    _attention_hard,
    _attention_heads_bwd_tiles,
    _attention_heads_choice,
    _attention_heads_maps,
    _attention_heads_sums,
    _attention_host,
    _attention_policy,
    _attention_position_sums,
    _attention_topk,
    _attention_visits,
    _reduce,
    _window_bwd_tiled,
    attention,
    attention_bwd,
    attention_heads,
    bipartite_match,
    merge_plan,
    merge_tokens,
    restore_tokens,
    select_tokens,
    unmerge_tokens,
    window_attention,
    window_attention_bwd,
)

pytestmark = [
    pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") == "1", reason="the interpreter replaces the compiler"),
]
TYPES = {
    torch.float32: "*fp32", torch.float16: "*fp16", torch.bfloat16: "*bf16", torch.int32: "*i32", torch.int64: "*i64",
    torch.int8: "*i8", torch.uint8: "*u8", torch.int16: "*i16",
}  # fmt: skip
SHARED_LIMIT = 99 * 1024  # what every GPU since compute capability 8.0 has
FRAME = 16  # bytes: calls (64-bit division, the slow path of a float division or square root) save some registers


def describe(value, specialize: bool):
    """Type, constant and attributes of one launch argument, as Triton's launcher sees it."""
    if isinstance(value, tuple):
        return [describe(x, specialize) for x in value]
    if value is None:
        return "constexpr", (None,), []
    if isinstance(value, torch.Tensor):
        return TYPES[value.dtype], None, [["tt.divisibility", 16]]
    if isinstance(value, bool):
        return "i1", None, []
    if isinstance(value, int):
        if specialize and value == 1:
            return "constexpr", (1,), []
        kind = "i32" if -(2**31) <= value < 2**31 else "i64"
        return kind, None, [["tt.divisibility", 16]] if specialize and value % 16 == 0 else []
    return "fp32", None, []


def source(kernel, arguments: dict) -> ASTSource:
    signature, constants, attributes = {}, {}, {}
    for place, param in enumerate(kernel.params):
        value = arguments[param.name]
        if param.is_constexpr:
            signature[param.name], constants[(place,)] = "constexpr", value
            continue
        found = describe(value, not param.do_not_specialize)
        flat = [((place, n), x) for n, x in enumerate(found)] if isinstance(value, tuple) else [((place,), found)]
        for path, (_, constant, attribute) in flat:
            if constant is not None:
                constants[path] = constant[0]
            if attribute:
                attributes[path] = attribute
        signature[param.name] = tuple(x[0] for x in found) if isinstance(value, tuple) else found[0]
    return ASTSource(kernel, signature=signature, constexprs=constants, attrs=attributes)


@contextlib.contextmanager
def caught(family, *more):
    """Collects (kernel, arguments) of every launch instead of launching, configured for a family of devices; `more`: modules."""
    launches, patch = [], pytest.MonkeyPatch()
    for module in (window_attention, window_attention_bwd, _attention_host):
        patch.setattr(module, "family", lambda device: family)
    for module in (
        window_attention, window_attention_bwd, _window_bwd_tiled, _reduce, bipartite_match, merge_plan, merge_tokens,
        select_tokens, unmerge_tokens, attention, attention_bwd, _attention_bwd_tiles, _attention_visits,
        _attention_hard, _attention_policy, _attention_topk, _attention_bwd_sums, attention_heads,
        _attention_heads_bwd_tiles, _attention_bwd_tables, _attention_position_sums,
        _attention_heads_maps, _attention_heads_choice, _attention_heads_sums, *more,
    ):  # fmt: skip
        for kernel in {id(x): x for x in vars(module).values() if isinstance(x, triton.JITFunction)}.values():

            def record(*args, grid, warmup, kernel=kernel, **kwargs):
                launches.append((kernel, dict(zip(kernel.arg_names, args, strict=False)) | kwargs))

            patch.setattr(kernel, "run", record)
    try:
        yield launches
    finally:
        patch.undo()


def resources(compiled) -> dict:
    """Registers, stack and local bytes of a cubin, and the shared memory its launch asks for."""
    tool = pathlib.Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        done = subprocess.run([tool, "--dump-resource-usage", file.name], capture_output=True, text=True, check=True)
    found = {name: int(value) for name, value in re.findall(r"(REG|STACK|LOCAL):(\d+)", done.stdout)}
    return found | {"shared": compiled.metadata.shared}


def launches_of(
    capability, window, shift, dtype, width, width_v=None, heads=2, key_heads=None, bias="table", cosine=False,
    dropout=0.0, mask_value=-100.0, pads=True,
):  # fmt: skip
    """What fwd and bwd launch on a small map of two windows per axis, which the windows do not divide if pads."""
    lengths = [2 * w - (1 if pads else 0) for w in window]
    n, key_heads, width_v = math.prod(window), key_heads or heads, width_v or width
    q = torch.zeros(1, *lengths, heads, width, dtype=dtype)
    k = torch.zeros(1, *lengths, key_heads, width, dtype=dtype)
    v = torch.zeros(1, *lengths, key_heads, width_v, dtype=dtype)
    index = torch.zeros(n, n, dtype=torch.int32) if bias == "table" else None
    values = {"table": torch.zeros(4 * n, heads), "dense": torch.zeros(heads, n, n), None: None}[bias]
    pad = [torch.zeros(key_heads, n, dtype=dtype) if pads else None for n in (width, width_v)]
    rest = (
        values,
        index,
        torch.zeros(heads) if cosine else None,
        *pad,
        torch.zeros(1, dtype=torch.int64),
        list(window),
        list(shift),
        False,
        True,
        0.1,
        mask_value,
        math.log(100.0),
        1e-12,
        dropout,
    )
    with caught(f"sm{capability}") as launches:
        out, lse = window_attention.fwd(q, k, v, *rest)
        need = [True, True, True, bias is not None, cosine, pads, pads]
        window_attention_bwd.bwd(out, None, lse, q, k, v, *rest, need)
    return launches


CASES = {
    "swin": dict(window=(7, 7), shift=(3, 3), width=32),
    "swin unshifted": dict(window=(7, 7), shift=(0, 0), width=32, pads=False, bias="dense"),
    "swinv2 8": dict(window=(8, 8), shift=(4, 4), width=32, cosine=True, bias="dense"),
    "swinv2 16": dict(window=(16, 16), shift=(8, 8), width=32, cosine=True, bias="dense", pads=False),
    "video": dict(window=(8, 7, 7), shift=(4, 3, 3), width=32),
    "unetr": dict(window=(7, 7, 7), shift=(3, 3, 3), width=16),
    "sam": dict(window=(14, 14), shift=(0, 0), width=64, bias="dense"),
    "wide 64": dict(window=(7, 7), shift=(3, 3), width=64, bias="dense"),
    "wide 96": dict(window=(8, 8), shift=(0, 0), width=96, bias=None),
    "wide 128": dict(window=(8, 8), shift=(4, 4), width=128),
    "wide 256": dict(window=(8, 8), shift=(4, 4), width=256),
    "tiny": dict(window=(4, 4), shift=(2, 2), width=32),
    "small": dict(window=(4, 7), shift=(2, 3), width=30, width_v=40),
    "dropout": dict(window=(7, 7), shift=(3, 3), width=32, dropout=0.1, mask_value=-math.inf),
    "groups": dict(window=(7, 7), shift=(3, 3), width=64, heads=4, key_heads=2, dropout=0.1),
}


RUNS = [(name, capability, torch.bfloat16) for name in CASES for capability in (80, 90)] + [
    ("swin", 100, torch.bfloat16), ("swinv2 16", 100, torch.bfloat16), ("groups", 100, torch.bfloat16),
    ("swin", 90, torch.float32), ("wide 256", 90, torch.float32), ("swin", 80, torch.float32), ("wide 64", 100, torch.float32),
    ("sam", 100, torch.float16), ("swin", 80, torch.float16),
]  # fmt: skip


def compile_all(launches, where: str, capability: int) -> set[str]:
    """Compiles what was caught, checks registers and shared memory, and returns the kernels' names."""
    seen = set()
    for kernel, arguments in launches:
        options = {
            x: arguments[x] for x in ("num_warps", "num_stages", "enable_fp_fusion", "maxnreg") if x in arguments
        }
        compiled = triton.compile(source(kernel, arguments), target=GPUTarget("cuda", capability, 32), options=options)
        used = resources(compiled)
        print(f"{where} {kernel.__name__} warps={options['num_warps']} {used}")
        of = f"{kernel.__name__} for {where}: {used}"
        assert used["LOCAL"] == 0 and used["STACK"] <= FRAME, f"spills: {of}"
        assert used["shared"] <= SHARED_LIMIT, f"shared memory: {of}"
        seen.add(kernel.__name__)
    return seen


@pytest.mark.parametrize("name, capability, dtype", RUNS, ids=lambda x: str(x).replace("torch.", "").replace(" ", "-"))
def test_compiles_without_spills(name, capability, dtype):
    launches = launches_of(capability, dtype=dtype, **CASES[name])
    seen = compile_all(launches, f"{name}, sm_{capability}, {dtype}", capability)
    assert "_forward" in seen and len(seen) > 1


EVERY_TERM = dict(key_bias=True, mask=True, parameters=True, dropout=0.1, causal=True, bias_dtype=torch.float32)
ATTENTION = {
    "plain": dict(width=64, queries=1024, keys=1024, bias=None),
    "bias": dict(width=64),
    "80 in 64 + 16": dict(width=80, bias=(1, 1, 1, 1)),
    "sigmoid, groups": dict(width=32, heads=4, key_heads=2, normalizer="sigmoid", mask=True),
    "every term": dict(width=64, **EVERY_TERM),
    "SAM": dict(width=80, keys=4096, bias=None, grid=(64, 64)),
    "ids and factors": dict(width=64, bias=None, factors=True, rule="table", grid=(14, 14), keys=196),
    "factors of keys": dict(width=64, bias=None, factors=(0, 1), mask=True),
    "factors of queries": dict(width=64, factors=(1, 0), **EVERY_TERM),
    "wide, factors of keys": dict(width=256, factors=(0, 1), packed=True, mask=True, dropout=0.1),
    "packed": dict(width=80, bias=None, key_bias=True, packed=True),
    "distances and means": dict(width=64, bias=None, distances=True, means=True),
    "packed, every term": dict(
        width=64, packed=True, distances=True, means=True, rule="table", grid=(14, 14), **EVERY_TERM
    ),
    "masked tiles of a bias": dict(width=64, queries=512, keys=512, mask=True, key_heads=1),
    "masked keys of few queries": dict(width=32, queries=100, keys=4096, bias=None, mask=True),
    "masked keys, bits": dict(width=32, queries=100, keys=4096, bias=None, mask="bits"),
    "masked tiles, bits": dict(width=64, queries=512, keys=512, mask="bits", key_heads=1),
    "every term, bits": dict(width=64, **EVERY_TERM | {"mask": "bits"}),
    "wide, every term, bits": dict(width=256, **EVERY_TERM | {"mask": "bits"}),
    "SAM, bits": dict(width=80, keys=4096, bias=None, grid=(64, 64), mask="bits"),
    "path": dict(width=32, bias=None, path=(56, 56), queries=3136, keys=3136, mask=True),
    "policy": dict(width=64, policy=True, mask=True),
    "mixed heads": dict(width=48, heads=8, bias=None, mixed=True),
    "mixed heads, every term": dict(
        width=64,
        heads=16,
        key_heads=8,
        mixed=True,
        key_bias=True,
        mask=True,
        parameters=True,
        dropout=0.1,
        causal=True,
        rule="table",
        means=True,
        packed=True,
        bias_dtype=torch.float32,
    ),
    "mixed heads, bits": dict(width=48, heads=8, bias=None, mixed=True, mask="bits"),
    "best keys, bits": dict(width=128, width_v=256, heads=4, key_heads=2, mask="bits", normalizer="argmax_k"),
    "best keys": dict(width=128, width_v=256, heads=4, key_heads=2, mask=True, normalizer="argmax_k"),
    "best keys, factors": dict(
        width=64, mask=True, normalizer="argmax_k", factors=True, dropout=0.1, means=True, bias=None
    ),
    "best queries": dict(width=80, bias=(1, 1, 1, 1), causal=True, normalizer="argmax_q", packed=True),
    "wide": dict(width=256, width_v=192, causal=True),
    "wide, every term": dict(width=256, **EVERY_TERM),
    "windows that are gathered": dict(width=64, queries=196, keys=196, grid=(14, 14), dropout=0.1, places=True),
}
ATTENTION_RUNS = [(name, capability, torch.bfloat16) for name in ATTENTION for capability in (80, 90)] + [
    ("masked tiles of a bias", 100, torch.bfloat16), ("every term", 100, torch.bfloat16), ("bias", 100, torch.float16),
    ("masked keys, bits", 100, torch.float16), ("every term, bits", 80, torch.float32),
    ("mixed heads, every term", 80, torch.float32), ("mixed heads", 100, torch.float16),
    ("factors of keys", 100, torch.float16), ("factors of queries", 90, torch.float32), ("factors of keys", 80, torch.float32),
    ("wide, factors of keys", 80, torch.float32), ("factors of queries", 100, torch.bfloat16),
    ("every term", 80, torch.float32), ("packed, every term", 90, torch.float32), ("wide, every term", 90, torch.float32),
]  # fmt: skip


def attention_launches(
    capability, dtype, width, width_v=None, queries=257, keys=197, heads=2, key_heads=None, bias=(0, 1, 1, 1),
    bias_dtype=None, key_bias=False, mask=False, parameters=False, dropout=0.0, normalizer="softmax", causal=False,
    grid=None, factors=False, rule="none", packed=False, distances=False, means=False, path=(),
    policy=False, mixed=False, topk=0, places=False, **slots,
):  # fmt: skip
    """`factors`: whether there are, or their axes of queries and of keys; `slots`: further arguments of the op."""
    key_heads, width_v = key_heads or heads, width_v or width
    shapes = ((queries, heads, width), (keys, key_heads, width), (keys, key_heads, width_v))
    batch = 1 if packed else 2
    q, k, v = (torch.zeros(batch, *s, dtype=dtype) for s in shapes)
    kinds = attention.Call.__annotations__
    given = {name: kind() if kind in (bool, int, float) else None for name, kind in kinds.items()}
    given |= {"q": q, "k": k, "v": v, "normalizer": normalizer, "scale": 0.1, "causal": causal, "dropout_p": dropout}
    given |= {"topk": topk}
    given |= {"rule": rule, "seed": torch.zeros(1, dtype=torch.int64)}
    if bias is not None:
        shape = [n if has else 1 for n, has in zip((batch, heads, queries, keys), bias, strict=True)]
        given["bias"] = torch.zeros(shape, dtype=bias_dtype or dtype)
    if key_bias:
        given["key_bias"] = torch.zeros(batch, 1, 1, keys)
    if mask == "bits":
        given["mask"] = torch.zeros(batch, 1, queries, -(-keys // 32), dtype=torch.int32)
    elif mask:
        given["mask"] = torch.zeros(batch, 1, queries, keys, dtype=torch.bool)
    if parameters:
        given |= {name: torch.zeros(heads) for name in ("factor", "sink")}
    if factors:
        sides = (1, 1) if factors is True else factors
        shape = [n if has else 1 for n, has in zip((queries, keys), sides, strict=True)]
        given |= {name: torch.zeros(1, heads, *shape) for name in ("gain", "weight")}
    if grid is not None:
        given |= {f"rel_{axis}": torch.zeros(batch, queries, heads, n) for axis, n in zip("yx", grid, strict=True)}
    if rule != "none":
        given |= {name: torch.zeros(batch, n, dtype=torch.int32) for name, n in (("q_ids", queries), ("k_ids", keys))}
        given["allow"] = torch.zeros(9, 9, dtype=torch.bool)
    if distances:
        spots = {name: torch.zeros(1, n, 2) for name, n in (("q_xy", queries), ("k_xy", keys))}
        given |= {"slope": torch.zeros(heads), **spots}
    if path:
        given |= {name: torch.zeros(batch, keys, heads) for name in ("path_row", "path_col")}
        given |= {"path_width": path[1]}
    if policy:
        given |= {"policy": torch.zeros(batch, keys), "policy_eps": 1e-6, "policy_diagonal": True}
    if mixed:
        given |= {f"{name}_weight": torch.zeros(heads, heads) for name in ("pre", "post")}
        given |= {f"{name}_bias": torch.zeros(heads) for name in ("pre", "post")}
    if means:
        given["query_weight"] = torch.zeros(batch, queries, heads)
    if places:
        given["seed"] = torch.zeros(2 + batch * queries, dtype=torch.int64)
    if packed:
        given |= {name: torch.zeros(9, dtype=torch.int32) for name in ("cu_q", "cu_k")}
        given |= {"max_q": queries, "max_k": keys}
    args = attention.Call(**given | slots)
    with caught(f"sm{capability}") as launches:
        out, *saved = attention.fwd(*args)
        attention.bwd(out, None, saved[1] if means else None, *saved, *args, -1)
    return launches


@pytest.mark.parametrize(
    "name, capability, dtype", ATTENTION_RUNS, ids=lambda x: str(x).replace("torch.", "").replace(" ", "-")
)
def test_attention_compiles_without_spills(name, capability, dtype):
    launches = attention_launches(capability, dtype, **ATTENTION[name])
    seen = compile_all(launches, f"{name}, sm_{capability}, {dtype}", capability)
    if name.startswith("best"):
        of_factors = {"_pair_weights", "_pair_products", "_spread"} if "factors" in ATTENTION[name] else set()
        assert seen - {"_visible"} == {"_choose", "_pick", "_collect"} | of_factors
        assert ("_visible" in seen) == ("mask" in ATTENTION[name])
        return
    if name.startswith("mixed"):
        assert {"_head_rows", "_heads_forward"} <= seen
        assert {"_head_deltas", "_heads_queries", "_heads_keys", "_heads_values"} <= seen
        return
    assert {"_forward", "_backward_queries", "_backward_keys"} <= seen
    case = ATTENTION[name]
    assert ("_backward_bias" in seen) == (case.get("bias", True) is not None or case.get("factors") is True)
    assert ("_backward_relative" in seen) == ("grid" in case or "path" in case) and ("_key_means" in seen) == (
        "means" in case
    )
    assert ("_policy_rows" in seen) == ("policy" in case)
    assert not name.startswith("masked") or {"_visible", "_join", "_backward_sums"} <= seen


@pytest.mark.parametrize("capability", [80, 90, 100])
@pytest.mark.parametrize(
    "dtype, case",
    [
        (torch.bfloat16, dict(width=64, bias=None)),
        (torch.float32, dict(width=256, packed=True, rule="equal", **EVERY_TERM)),
    ],
    ids=["plain", "every-term"],
)
def test_top_k_compiles_without_spills(capability, dtype, case):
    """The kernel that finds who survives, and one that reads it."""
    launches = attention_launches(capability, dtype, topk=8, **case)
    some = [x for x in launches if x[0].__name__ in ("_survivors", "_forward")]
    assert compile_all(some, f"top-k, sm_{capability}, {dtype}", capability) == {"_survivors", "_forward"}


MATCHES = {
    "ToMe": dict(width=64),
    "heads": dict(width=64, heads=12),
    "SD": dict(width=320, tokens=4096, role=True),
    "windows": dict(width=17, role=True, segments=True, window=[2, 2, 8, 8]),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("capability", [80, 90])
@pytest.mark.parametrize("name", MATCHES)
def test_bipartite_match_compiles_without_spills(name, capability, dtype):
    def launch(width, tokens=197, heads=None, role=False, segments=False, window=()):
        shape = (2, tokens, width) if heads is None else (2, tokens, heads, width)
        roles = torch.zeros(2, tokens, dtype=torch.int8) if role else None
        same = torch.zeros(2, tokens, dtype=torch.int32) if segments else None
        bipartite_match.fwd(torch.zeros(shape, dtype=dtype), roles, same, 1, list(window), True, 1e-12)

    with caught(f"sm{capability}") as launches:
        launch(**MATCHES[name])
    assert compile_all(launches, f"{name}, sm_{capability}, {dtype}", capability) == {"_match"}


@pytest.mark.parametrize("width, weighted", [(1, True), (64, False), (768, True), (4096, True)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("capability", [80, 90])
def test_merging_compiles_without_spills(capability, dtype, width, weighted):
    plan = [torch.zeros(2, n, dtype=torch.int32) for n in (40, 40, 21)]
    x, y = torch.zeros(2, 40, width, dtype=dtype), torch.zeros(2, 20, width, dtype=dtype)
    weight = torch.zeros(2, 40) if weighted else None
    with caught(f"sm{capability}") as launches:
        for reduce in merge_tokens.REDUCTIONS:
            args = (x, *plan, weight, reduce, reduce != "mean")
            _, size = merge_tokens.fwd(*args)
            merge_tokens.bwd(y, size if weighted else None, size, *args, 3)
        unmerge_tokens.bwd(unmerge_tokens.fwd(y, *plan, 0.5), y, *plan, 0.5, 1)
        for fill in (torch.zeros(2, 40, width), None):
            args = (y, plan[0][:, :20].contiguous(), fill, torch.zeros(width) if fill is None else None, 40, 0.0)
            restore_tokens.bwd(restore_tokens.fwd(*args), *args, 7)
    seen = compile_all(launches, f"merging C={width}, sm_{capability}, {dtype}", capability)
    assert seen == {"_forward", "_backward", "_unmerge"}


@pytest.mark.parametrize("tokens", [197, 4096])
@pytest.mark.parametrize("capability", [80, 90, 100])
def test_choosing_compiles_without_spills(capability, tokens):
    score, least = torch.zeros(2, tokens), torch.zeros(2)
    dst, role = (torch.zeros(2, tokens, dtype=t) for t in (torch.int32, torch.int8))
    r = torch.zeros(2, dtype=torch.int32)
    with caught(f"sm{capability}") as launches:
        select_tokens.fwd(score, None, 1, tokens // 2, tokens // 2 + 1, False, True)
        select_tokens.fwd(score, least, 1, tokens - 1, tokens, True, False)
        merge_plan.fwd(score, dst, role, None, None, tokens // 4, tokens - tokens // 4, "split")
        merge_plan.fwd(score, dst, role, r, least, tokens // 4, tokens, "score")
        merge_plan.fwd(score, dst, role, r, least, tokens // 4, tokens, "position")
    seen = compile_all(launches, f"choosing of {tokens}, sm_{capability}", capability)
    assert len(launches) == 5 and seen == {"_select", "_plan"}
