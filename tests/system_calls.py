"""The calls of docs/systems.csv on small tensors: every name in them has a value here, every system its own where sizes differ."""

import ast
import math
from typing import Any
from unittest import mock

import torch

import vitkern
from vitkern import backends, bias, decay, feature_map, mask, modulation
from vitkern.ops import _call

HALF, FULL = torch.bfloat16, torch.float32
HEADS, WIDTH, TOKENS = 2, 32, 64
ROWS = (2, TOKENS, HEADS, WIDTH)
PLACES = (bias, mask, modulation, decay, feature_map, vitkern)
KERNELS = ("cpu", "triton", "cuda")


def normal(*shape: int, dtype: torch.dtype = HALF) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(dtype)


def bounds(*lengths: int) -> torch.Tensor:
    return torch.tensor([0, *lengths]).cumsum(0).int()


def common() -> dict[str, Any]:
    """What the names of most calls stand for: two samples of 8 x 8 tokens with two heads of 32 channels."""
    x, ids = normal(*ROWS), torch.zeros(2, TOKENS, dtype=torch.long)
    at = torch.stack((torch.arange(TOKENS) // 8, torch.arange(TOKENS) % 8), -1)[None].float()
    few = normal(2, 9, HEADS, WIDTH)
    tokens = (
        "q",
        "k",
        "v",
        "places",
        "places_q",
        "q_cos",
        "q_sin",
        "k_cos",
        "k_sin",
        "ones",
        "v_and_one",
        "v_1",
        "v_2",
        "v_3",
    )
    tokens += ("c_q", "p_q", "c_k", "p_k", "w_q", "k_times_pooled")
    other = (
        "q_pooled",
        "k_pooled",
        "v_pooled",
        "k_few",
        "v_few",
        "k_mean",
        "v_mean",
        "k_memory",
        "v_memory",
        "e_k",
        "f_v",
    )
    other += (
        "k_cache",
        "v_cache",
        "k_more",
        "v_more",
        "k_class",
        "v_class",
        "codes",
        "q_latents",
        "k_latents",
        "v_latents",
    )
    other += ("q_det", "k_det", "v_det")
    keys = ("far", "log_size", "log_count", "norms", "score")
    maps = ("b", "c", "cost", "geometry", "scores", "pairs", "factor")
    named = (
        dict.fromkeys(tokens, x) | dict.fromkeys(other, few) | dict.fromkeys(keys, normal(2, HEADS, TOKENS, dtype=FULL))
    )
    named |= dict.fromkeys(maps, normal(2, HEADS, TOKENS, TOKENS)) | dict.fromkeys(("ids", "levels", "parity"), ids)
    named |= dict.fromkeys(("q_levels", "k_levels"), ids) | dict.fromkeys(("grid", "q_grid", "k_grid"), (8, 8))
    named |= dict.fromkeys(("seen", "adjacency", "fields"), torch.ones(1, 1, TOKENS, TOKENS, dtype=torch.bool))
    named |= dict.fromkeys(("rel_h", "rel_w"), normal(15, WIDTH)) | dict.fromkeys(("w_1", "w_2"), normal(HEADS, HEADS))
    named |= dict.fromkeys(("b_1", "b_2"), normal(HEADS)) | dict.fromkeys(
        ("sigma", "alpha"), normal(3, HEADS, dtype=FULL)
    )
    named |= dict.fromkeys(("rows", "columns"), normal(2, TOKENS, HEADS, 8)) | dict.fromkeys(
        ("row", "col"), normal(2, TOKENS, HEADS)
    )
    named |= dict.fromkeys(("rate", "slope", "logit_scale"), -normal(HEADS, dtype=FULL).abs())
    named |= {
        "rope": vitkern.Rope(normal(1, TOKENS, 1, 16), normal(1, TOKENS, 1, 16)),
        "tau": normal(1)[0],
        "ratio": normal(1)[0],
    }
    return named | {
        "allow": torch.ones(4, 4, dtype=torch.bool),
        "xy": at,
        "table": normal(15 * 15, HEADS),
        "weight": normal(HEADS * WIDTH, 1, 5, 5),
        "real": torch.ones(2, TOKENS, dtype=torch.bool),
        "anchors": torch.ones(2, TOKENS, dtype=torch.bool),
        "keep": torch.rand(2, TOKENS),
        "minus_log_n": torch.full((1, 1, TOKENS), -4.0),
        "nearest": torch.arange(4).expand(2, TOKENS, 4),
        "scale": 0.1,
        "a": 0.5,
        "torch": torch,
        "merging": vitkern.merging,
    }


def of_windows(call: str) -> dict[str, Any]:
    """Maps that the windows of the call divide, and tables of their offsets."""
    node = next(n for n in ast.walk(ast.parse(call, mode="eval")) if isinstance(n, ast.Call) and len(n.args) > 3)
    window = ast.literal_eval(node.args[3])
    first = window[0] if isinstance(window, list) else window
    axes = len(first) if isinstance(first, tuple) else 1 if first in (49, 64, 256) else 2
    sides = first if isinstance(first, tuple) else (first,) * axes
    lengths = (
        [2 * math.prod({w or 1 for w in at}) for at in zip(*window, strict=True)] if isinstance(window, list) else []
    )
    lengths = lengths or [2 * (w or 3) for w in sides]
    given = ast.literal_eval(next((k.value for k in node.keywords if k.arg == "context_size"), ast.Constant(None)))
    context = sides if given is None else (given,) * axes
    rows = math.prod(w if 'sign="abs"' in call else w + c - 1 for w, c in zip(sides, context, strict=True) if w)
    x, cell = normal(1, *lengths, HEADS, WIDTH), normal(1, *sides, HEADS, WIDTH) if None not in sides else None
    pads = dict.fromkeys(("k_pad", "v_pad"), normal(HEADS, WIDTH))
    named = dict.fromkeys("qkv", x) | pads | {"table": normal(rows, HEADS), "q_window": cell}
    named |= {"shifts": torch.ones(1, axes, dtype=torch.int32), "order": torch.arange(lengths[0], dtype=torch.int32)}
    area = math.prod(w or 1 for w in sides)
    return named | {"b": normal(HEADS, area, area) if "lepe" not in call else normal(HEADS * WIDTH)}


def of_tokens() -> dict[str, Any]:
    """Two samples of 600 tokens of 32 channels, and what their functions take beside them."""
    x, score = normal(2, 600, WIDTH), normal(2, 600, dtype=FULL)
    named = dict.fromkeys(("score", "gate", "policy", "difference", "edge"), score) | {
        "x": x,
        "k": x,
        "size": score.abs() + 1,
    }
    half = torch.arange(600)[None].expand(2, -1)
    named |= {
        "sources": half[:, :300],
        "kept": half[:, 300:],
        "low": half[:, :300],
        "high": half[:, 300:],
        "targets": half[:, ::4],
    }
    named |= {"counts": torch.tensor([3, 4]), "weight": score.abs(), "codebook": normal(1, 20, WIDTH)}
    named |= {
        "mask_token": normal(WIDTH),
        "similarity": normal(2, 600, 30),
        "logits": normal(2, 600, 30),
        "t": normal(2, 600, 30).abs() + 1,
    }
    named |= {
        "n": 90,
        "weights": normal(2, 90, 5),
        "cell": torch.arange(600)[None].expand(2, -1) % 512,
        "slots": half % 128,
    }
    return named


def tokens(n: int, heads: int = HEADS, width: int = WIDTH, batch: int = 2) -> torch.Tensor:
    return normal(batch, n, heads, width)


def positions(*names: str) -> dict[str, Any]:
    """Tables and indices of contextual positions."""
    at = torch.zeros(TOKENS, TOKENS, dtype=torch.int32)
    return {name: at if name.startswith("i") else normal(9, 1, WIDTH) for name in names}


def packed() -> dict[str, Any]:
    named = dict.fromkeys("qkv", normal(TOKENS, HEADS, WIDTH)) | {"cu_seqlens": bounds(40, 24), "n": TOKENS}
    return named | {"rope": vitkern.Rope(normal(1, TOKENS, 1, 16), normal(1, TOKENS, 1, 16))}


def scanned(*lead: int, routes: tuple[int, ...] = ()) -> dict[str, Any]:
    u, states = normal(*lead, 16), normal(*lead, *routes, 4)
    rate = -normal(*routes, 16, 4, dtype=FULL).abs()
    return {
        "u": u,
        "delta": normal(*lead, *routes, 16),
        "A": rate,
        "B": states,
        "C": states,
        "d": normal(*routes, 16, dtype=FULL),
    }


def sampled(window: int, places: int, **more: Any) -> dict[str, Any]:
    return dict.fromkeys("qkv", normal(1, 2 * window, 2 * window, HEADS, WIDTH)) | {
        "coords": normal(1, 2, 2, places, HEADS, 2, dtype=FULL)
    } | more  # fmt: skip


def sampled_levels() -> dict[str, Any]:
    named = {"value": normal(1, 84, HEADS, WIDTH), "spatial_shapes": ((8, 8), (4, 4), (2, 2))}
    named |= {"sampling_locations": normal(1, 9, HEADS, 3, 4, 2), "attention_weights": normal(1, 9, HEADS, 3, 4)}
    return named | {
        "shapes": named["spatial_shapes"],
        "locations": normal(1, 9, HEADS, 12, 2),
        "weights": normal(1, 9, HEADS, 12),
    }


def routed(n: int, kept: int, **more: Any) -> dict[str, Any]:
    """Tokens that come back to their places among n."""
    index = torch.arange(kept, dtype=torch.int32).expand(2, -1)
    return {
        "x": normal(2, n, WIDTH),
        "y": normal(2, kept, WIDTH),
        "index": index,
        "gate": normal(2, n, dtype=FULL),
    } | more


PER_CHANNEL = {"b": normal(HEADS * WIDTH)}  # of DepthwiseValue
QKV = dict.fromkeys("qkv", tokens(TOKENS))
OWN: dict[str, Any] = {
    "windows GC ViT": {"q": normal(1, 7, 7, HEADS, WIDTH)},
    "windows Hiera": dict.fromkeys("qkv", tokens(64)),
    "windows ViTPose": dict.fromkeys(("k_pooled", "v_pooled"), tokens(9, batch=1)),
    "windows Combiner": dict.fromkeys(("k_mean", "v_mean"), tokens(9, batch=1)),
    "windows Qwen2.5-VL": packed(),
    "windows NAT": dict.fromkeys("qkv", normal(1, 14, 14, HEADS, WIDTH)) | {"rpb": normal(HEADS, 13, 13)},
    "windows LSNet": {"v": normal(1, 14, 14, HEADS, WIDTH), "weights": normal(1, 14, 14, HEADS, 9)},
    "windows Deformable DETR": sampled_levels(),
    "windows RT-DETRv2": sampled_levels(),
    "windows HiSViT": dict.fromkeys("kv", normal(1, 32, 32, HEADS, WIDTH)),
    "windows CRAFT": {"b_1": normal(1, 64, 64), "b_2": normal(1, 64, 64)},
    "windows ViDT": dict.fromkeys(("q_det", "k_det", "v_det", "k_image", "v_image"), tokens(9)),
    "windows SG-Former": {"q_tokens": tokens(TOKENS)},
    "windows FaViT": {"v": tokens(49), "k": tokens(49), "weight": normal(HEADS * WIDTH, 1, 3, 3)} | PER_CHANNEL,
    "windows Swin3D": positions("q_1", "k_1", "i_1", "q_2", "k_2", "i_2", "v_12", "i_12"),
    "windows VSA": sampled(7, 49, table=normal(169, HEADS)),
    "windows RVSA": sampled(7, 49, rel_h=normal(13, WIDTH), rel_w=normal(13, WIDTH)),
    "windows S2LIC": sampled(16, 20),
    "masked BEiT": dict.fromkeys("qkv", tokens(65)) | {"table": normal(15 * 15 + 3, HEADS)},
    "masked LeViT": {"table": normal(TOKENS, HEADS)},
    "masked RMT": PER_CHANNEL,
    "masked FiTv2": packed(),
    "masked MBT": packed(),
    "masked Mask2Former": {"k": tokens(1024), "v": tokens(1024), "logits": normal(2, TOKENS, 16, 16)},
    "masked iRPE": positions("r_q", "r_k", "r_v", "index"),
    "masked Better RPE": positions("a_q", "a_k", "index"),
    "masked PPMA": dict.fromkeys(("row", "col"), -normal(2, 8, 8, HEADS).abs()),
    "masked LRFormer": {"alpha": normal(1)[0]},
    "masked SVFormer (value residual)": {"b": 0.5},
    "linear SLAB": PER_CHANNEL,
    "linear FLatten": PER_CHANNEL | {"scale": normal(HEADS * WIDTH)},
    "linear MLLA": PER_CHANNEL,
    "linear Performer": {"omega": normal(16, WIDTH)},
    "linear XCiT": {"temperature": normal(HEADS)},
    "linear DLGSANet": {"temperature": normal(HEADS)},
    "linear DRSformer": dict.fromkeys("qkv", tokens(TOKENS, width=48)) | {"w": normal(4)},
    "linear Histoformer": dict.fromkeys("qkv", tokens(128)) | {"order": torch.arange(128, dtype=torch.int32)},
    "linear HiT-SR": dict.fromkeys("qkv", normal(1, 16, 16, HEADS, WIDTH)),
    "linear Mamba": scanned(2, 9),
    "linear VMamba": scanned(2, 4, 5, routes=(4,)),
    "linear LION": scanned(20) | {"coords": torch.randint(0, 30, (20, 3)), "groups": bounds(12, 8)},
    "linear EcoFormer": {"anchors": normal(HEADS, 9, WIDTH), "matrix": normal(HEADS, 9, 16), "mean": normal(HEADS, 9)},
    "linear Mamba-2 study": {"log_a": -normal(2, TOKENS, HEADS, dtype=FULL).abs()},
    "linear TransforMatcher": {"w_k": tokens(1), "w_q": tokens(1)},
    "linear Transformer-VQ": {"v_mean": tokens(9), "log_count": normal(2, HEADS, 9, dtype=FULL)},
    "linear Diffusion-RWKV": {"w": normal(HEADS, dtype=FULL).abs(), "n": TOKENS},
    "tokens EViT": QKV,
    "tokens EVAD": QKV | {"weight": normal(2, TOKENS, dtype=FULL).abs()},
    "tokens DiT (token routing)": routed(256, 64),
    "tokens MAE": routed(196, 49, mask_token=normal(WIDTH)),
    "tokens Zero-TPrune": {"q": tokens(600), "k": tokens(600)},
    "tokens Expediting": {"x": normal(1, 4096, WIDTH), "y": normal(1, 256, WIDTH), "centers": normal(1, 256, WIDTH)},
    "tokens CCT": {"score": normal(2, 600, 1)},
    "tokens STViT": dict.fromkeys("kv", normal(1, 12, 12, HEADS, WIDTH)) | {"q_pooled": normal(1, 3, 3, HEADS, WIDTH)},
    "tokens IA-RED²": packed(),
    "tokens SegViTv2": QKV | {"q": tokens(600)},
    "tokens PaSST": {"x": normal(2, 769, WIDTH)},
    "tokens kMaX-DeepLab": QKV,
    "tokens PEM": {"k": tokens(1024), "v": tokens(1024), "logits": normal(2, TOKENS, 16, 16)},
    "tokens TCFormer": QKV | {"key_score": normal(2, 1, TOKENS, dtype=FULL)},
    "tokens Any2Point": {
        "y": normal(2, 512, WIDTH),
        "plan": vitkern.MergePlan.from_map(torch.arange(600).expand(2, -1) % 512, 512),
    },
    "tokens Reformer": dict.fromkeys("qkv", tokens(256))
    | {"seen": torch.ones(64, 192, dtype=torch.bool)}
    | {"outs": [tokens(9)] * 2, "lses": [normal(2, 9, HEADS, dtype=FULL)] * 2},
    "tokens TOVA": {"k": tokens(600), "v": tokens(600), "q": tokens(1)},
    "tokens Attamba": scanned(2, TOKENS) | {"q": tokens(TOKENS, width=16), "v": tokens(TOKENS, 1, 16)},
    "tokens Vcc": QKV,
    "tokens ARC-Encoder": QKV,
}


def values(row: dict[str, str]) -> dict[str, Any]:
    """What the names of a row's call stand for."""
    named = common()
    if row["family"] == "tokens":
        named |= of_tokens()
    if "window_attention(" in row["call"] and "sampled" not in row["call"]:
        named |= of_windows(row["call"])
    return named | OWN.get(f"{row['family']} {row['system']}", {})


def explained(row: dict[str, str]) -> list[str]:
    """The back-ends whose kernels take every call of an op in the row, as the functions explain; the call runs on the CPU."""
    able: list[set[str]] = []

    def takes(function: Any, backend: str, args: Any, options: Any) -> bool:
        try:
            function.explain(*args, **options, backend=backend)
        except backends.Refused:
            return False
        return True

    def spied(function: Any) -> Any:
        def run(*args: Any, **options: Any) -> Any:
            able.append({name for name in KERNELS if takes(function, name, args, options)})
            return function(*args, **options)

        return run

    def reasons(op: Any, args: Any) -> dict[str, list[str]]:
        """Those of the arguments alone, not of this machine."""
        here = (str(backends.load("_cuda")), "Triton kernels need")
        found = {"triton": op.gpu.triton_refusals(args), "cuda": op.gpu.cuda_refusals(args)}
        return {"reference": [], "cpu": []} | {
            n: [w for w in why if not w.startswith(here)] for n, why in found.items()
        }

    known = {name: getattr(place, name) for place in PLACES for name in dir(place) if not name.startswith("_")}
    known |= {name: spied(f) for name, f in known.items() if hasattr(f, "explain")}
    with mock.patch.object(_call, "reasons", reasons):
        eval(row["call"], known | values(row))
    return [name for name in KERNELS if all(name in found for found in able)]
