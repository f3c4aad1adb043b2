"""linear_attention: what published models mean by it."""

from dataclasses import dataclass
from typing import Any

from vitkern.feature_map import Favor, Focused, Hash, Hedgehog, Polar

EPS = {"sum": 1e-6, "mean": 1e-6, "none": 0.0, "max": 1e-6, "abs_max": 1.0, "subtract": 0.0}


@dataclass(frozen=True)
class Preset:
    """`feature_map`: a name, or the class of what the caller must give. `scale`: a number, or "width" for D^-1/2."""

    feature_map: Any
    normalizer: str
    eps: float = 0.0
    scale: Any = 1.0
    rope_order: str = "after"
    detach: bool = False
    of_bits: bool = False  # the offset is the number of bits plus 1
    reweighted: bool = False  # RALA's weights of the keys


PRESETS = {
    "efficientvit": Preset("relu", "sum", 1e-15),
    "timm": Preset("relu", "sum", 1e-5),
    "sana": Preset("relu", "sum", 1e-15, rope_order="before"),
    "sana_rope": Preset("relu", "sum", 1e-15),
    "linear_transformer": Preset("elu1", "sum", 1e-6),
    "loftr": Preset("elu1", "sum", 1e-6),
    "mlla": Preset("elu1", "mean", 1e-6),
    "rala": Preset("elu1", "mean", 1e-6, reweighted=True),
    "linfusion": Preset("elu1", "mean", 1e-4),
    "flatten": Preset(Focused, "mean", 1e-6),
    "slab": Preset("relu", "sum", 1e-6),
    "polaformer": Preset(Polar, "mean", 1e-6),
    "inline": Preset("identity", "subtract", scale="width"),
    "efficient_attention": Preset("softmax", "none"),
    "lucidrains": Preset("softmax", "none", scale="width"),
    "lion_lit": Preset("elu1", "sum", 1e-6, "width"),
    "lion_d": Preset("silu_norm", "sum", 1e-6, "width"),
    "lion_s": Preset("silu_norm", "sum", 1e-6, "width"),
    "vssd": Preset("identity", "none"),
    "retnet": Preset("identity", "abs_max", 1.0, "width", detach=True),
    "fla": Preset("identity", "sum", 1e-10, "width"),
    "ecoformer": Preset(Hash, "sum", of_bits=True),
    "performer": Preset(Favor, "sum"),
    "hedgehog_fla": Preset(Hedgehog, "sum", 1e-10, "width"),
    "hedgehog_split": Preset(Hedgehog, "sum", 1e-6, "width"),
    "hedgehog_exp": Preset(Hedgehog, "sum", 1e-6, "width"),
}
FORMS = {"hedgehog_fla": "joint", "hedgehog_split": "split", "hedgehog_exp": "exp"}
