"""merge_lse: partial attentions over disjoint keys joined to one."""

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from vitkern.ops import _checks

NAME = "merge_lse"


def merge_lse(outs: Sequence[Tensor], lses: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """Attention over all keys from attentions over disjoint parts of them (Milakov & Gimelshein 2018):
    ``out = sum_m exp(lse_m - lse) out_m``, ``lse = log sum_m exp(lse_m)``.

    Args:
        outs: tensors ``[..., H, Dv]``, outputs of softmax attention over parts of the keys.
        lses: their ``Stats.lse``, ``[..., H]``. A part in which a query saw no key, lse ``-inf``, adds nothing to it.

    Returns:
        ``(out, lse)``: in the dtype of the first output, and of the first lse. Where every part is ``-inf``, 0 and ``-inf``.
        Gradients go to all parts. PyTorch operations on every device.

    Raises:
        ValueError, TypeError: there is no part, their numbers differ, or a shape does not fit.
    """
    for name, given in (("outs", outs), ("lses", lses)):
        if not isinstance(given, Iterable):
            raise TypeError(f"{NAME}: {name} must be a list of tensors, got {type(given).__name__}")
    outs, lses = list(outs), list(lses)
    if len(outs) != len(lses) or not outs:
        raise ValueError(
            f"{NAME}: outs and lses must hold as many tensors, at least one, got {len(outs)} and {len(lses)}"
        )
    for name, each in (("outs", outs), ("lses", lses)):
        for i, t in enumerate(each):
            _checks.parameter(NAME, f"{name}[{i}]", t, outs[0].device, "outs[0]")
            want = outs[0].shape if name == "outs" else outs[0].shape[:-1]
            _checks.shape(
                NAME, f"{name}[{i}]", t, tuple(want), "of outs[0]" if name == "outs" else "of outs[0] but its last axis"
            )
    acc = torch.promote_types(lses[0].dtype, torch.float32)
    parts = torch.stack([t.to(acc) for t in lses])  # [M, ..., H]
    empty = parts == -torch.inf
    top = parts.detach().amax(0)
    top = top.masked_fill(top == -torch.inf, 0.0)
    shares = (parts.masked_fill(empty, 0.0) - top).exp().masked_fill(empty, 0.0)
    total = shares.sum(0)
    nobody = total == 0
    total = total.masked_fill(nobody, 1.0)
    shares = (shares / total)[..., None]
    out = sum(share * o.to(acc).masked_fill(share == 0, 0.0) for share, o in zip(shares, outs, strict=True))
    lse = (top + total.log()).masked_fill(nobody, -torch.inf)
    assert isinstance(out, Tensor)
    return out.to(outs[0].dtype), lse.to(lses[0].dtype)
