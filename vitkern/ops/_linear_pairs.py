"""linear_attention: Q (K^T V) or (Q K^T) V, chosen from the shape alone."""

from dataclasses import replace
from typing import Any

from vitkern import backends
from vitkern.ops import _checks
from vitkern.ops._linear_gpu import GPU, MAPS
from vitkern.ops._linear_lowering import Lowered

MOST = 256  # tokens that one program holds


def chosen(lowered: Lowered, backend: str | None) -> bool:
    """Whether the call takes fewer products by all pairs of queries and keys than by a state, and has a kernel for them."""
    q, k, v = lowered.q, lowered.k, lowered.v
    if lowered.feature_map not in MAPS or lowered.cu_q is not None or lowered.tables[0] is not None:
        return False
    keys, queries = k.shape[2] * k.shape[4], q.shape[2] * q.shape[4]
    features, channels, of_group = q.shape[6], v.shape[6], queries * (q.shape[5] // k.shape[5])
    fewer = of_group * keys * (features + channels) < (of_group + keys) * features * channels
    if not all(_checks.known(x) for x in (queries <= MOST, keys <= MOST, fewer)):
        return False
    if q.device.type != "cuda":
        return True
    return _on_gpu(replace(lowered, pairs=True).args, backends.forced(backend))


def _on_gpu(args: tuple[Any, ...], wanted: str | None) -> bool:
    """CUDA C++ kernels go by states alone, and come first where they serve the call."""
    if wanted == "cuda" or (wanted is None and not GPU.cuda_refusals((*args[:-1], False))):
        return False
    return wanted == "reference" or not GPU.triton_refusals(args)
