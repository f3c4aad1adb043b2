"""apply: one tower of blocks at a time, its sizes from block to block, and what it reports."""

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from vitkern.merging._blocks import KINDS, Kind
from vitkern.merging._schedule import parse_r
from vitkern.ops import _checks
from vitkern.ops.bipartite_match import bipartite_match
from vitkern.ops.merge_plan import ORDERS, merge_plan
from vitkern.ops.merge_tokens import REDUCTIONS, merge_tokens
from vitkern.patch import Kept, PatchReport, Replaced, _foreign, _Forward
from vitkern.tokens import MergePlan

NAME = "merging.apply"


@dataclass
class MergeReport(PatchReport):
    """What :func:`apply` did, and what the last forward pass merged.

    ``tokens``: tokens after each block (the most of any sample). ``flops_saved``: the share of the blocks' operations that
    the last pass did not do. ``plan``: from the first block's tokens to the last one's, with ``trace=True``.
    """

    towers: list["Tower"] = field(default_factory=list, repr=False)
    pooled: list[nn.Module] = field(default_factory=list, repr=False)

    @property
    def tokens(self) -> list[int]:
        return [n for tower in self.towers for n in tower.tokens]

    @property
    def plan(self) -> MergePlan | None:
        return self.towers[0].plan if self.towers else None

    @property
    def flops_saved(self) -> float:
        done = sum(tower.flops(merged=True) for tower in self.towers)
        plain = sum(tower.flops(merged=False) for tower in self.towers)
        return 1.0 - done / plain if plain else 0.0

    def undo(self) -> None:
        super().undo()
        for tower in self.towers:
            for handle in tower.handles:
                handle.remove()
            tower.handles.clear()
        for model in self.pooled:
            model.__dict__.pop("pool", None)
        self.pooled.clear()


class Tower:
    """The blocks of one encoder and the state that travels between them during a forward pass."""

    def __init__(self, blocks: list[tuple[nn.Module, Kind]], options: dict[str, Any]) -> None:
        self.blocks, self.options = blocks, options
        self.handles: list[Any] = []
        self.tokens: list[int] = []
        self.start(0)

    def start(self, tokens: int) -> None:
        self.first = tokens
        self.size: Tensor | None = None
        self.mask: Tensor | None = None
        self.keys: Tensor | None = None
        self.plan: MergePlan | None = None
        self.tokens = []

    def log_size(self, x: Tensor) -> Tensor | None:
        """What is added to every score of a key, [B, N]: the logarithm of its size, -inf where there is no token."""
        if self.size is None or (self.mask is None and not self.options["prop_attn"]):
            return None
        size = self.size
        if not self.options["prop_attn"]:
            size = (size > 0).to(size.dtype)
        return size.to(torch.promote_types(x.dtype, torch.float32)).log()

    def watch(self, block: nn.Module, kind: Kind) -> None:
        """Keeps the keys [B, N, H, D] of the block's attention as they are projected."""
        heads = kind.heads(block)

        def projected(module: nn.Module, inputs: Any, out: Tensor) -> None:
            keys = out.unflatten(-1, (3, heads, -1))[:, :, 1] if kind.packed else out.unflatten(-1, (heads, -1))
            self.keys = keys.detach()

        def normalised(module: nn.Module, inputs: Any, out: Tensor) -> None:
            self.keys = out.detach().transpose(1, 2)

        norm = kind.key_norm(block) if self.options["metric"] == "k_norm" else None
        place, hook = (block.get_submodule(kind.key), projected) if norm is None else (norm, normalised)
        self.handles.append(place.register_forward_hook(hook))

    def pool(self, x: Tensor, first: int) -> Tensor:
        """The mean of the patches behind the `first` tokens, [B, C], each counted as often as its size says."""
        if self.size is None:
            return x[:, first:].mean(1)
        weight = self.size[:, first:, None].to(torch.promote_types(x.dtype, torch.float32))
        return ((x[:, first:] * weight).sum(1) / weight.sum(1)).to(x.dtype)

    def merge(self, x: Tensor, layer: int) -> Tensor:
        o = self.options
        metric = x if o["metric"] == "x" else self.keys
        self.keys = None
        tokens = x.shape[1]
        r = o["r"][layer] if o["r"] is not None else None
        if o["ratio"] is not None:
            r = int((tokens - o["protect"]) * o["ratio"])
        if r != 0:
            match = bipartite_match(metric, protect=o["protect"], mask=self.mask)
            plan = merge_plan(match, r=r, threshold=o["threshold"], order=o["order"], clip=True)
            if o["threshold"] is not None:
                plan = _cut(plan)
            x, self.size = merge_tokens(x, plan, weight=self.size, reduce=o["reduce"])
            self.size = self.size.detach()
            self.mask = plan.key_mask
            if o["trace"]:
                self.plan = plan if self.plan is None else self.plan.compose(plan)
        self.tokens.append(x.shape[1])
        return x

    def flops(self, merged: bool) -> float:
        """Operations of the blocks for one sample: linear layers, and two products of attention."""
        total, before = 0.0, self.first
        for (block, _), after in zip(self.blocks, self.tokens, strict=False):
            after = after if merged else self.first
            linear = {n: m.weight.numel() for n, m in block.named_modules() if isinstance(m, nn.Linear)}
            inside = sum(v for n, v in linear.items() if n.startswith("mlp"))
            width = next(m.in_features for m in block.modules() if isinstance(m, nn.Linear))
            total += (
                2.0 * before * (sum(linear.values()) - inside) + 4.0 * before * before * width + 2.0 * after * inside
            )
            before = after
        return total


def _cut(plan: MergePlan) -> MergePlan:
    """The plan with as many slots as the longest sample uses: one read on the host."""
    n = int(plan.lengths.max()) if plan.lengths.numel() else plan.n_out
    token_map = plan.token_map.clamp(max=n)
    return MergePlan(token_map, plan.perm, plan.offsets[:, : n + 1].contiguous(), plan.lengths, n, True)


def apply(
    model: nn.Module,
    r: Any = None,
    *,
    ratio: float | None = None,
    threshold: float | None = None,
    metric: str = "k",
    prop_attn: bool = True,
    protect: int | None = None,
    pool: str = "model",
    reduce: str = "mean",
    order: str = "split",
    trace: bool = False,
) -> MergeReport:
    r"""Merges tokens in every block of ``model``, in place and reversibly (Bolya et al. 2023).

    Between attention and MLP the most similar tokens are merged, weighted by their sizes; the sizes enter the next
    attention as the logarithm of each key's size. Everything else of a block is its own: LayerScale, drop path, query and
    key norms, class, distillation and register tokens.

    Args:
        model: a model of timm's VisionTransformer family, or ViT, DeiT, DINOv2 or CLIP of transformers.
        r: tokens to merge per block: an int, ``(r, f)`` for a linear schedule, or a list. More than can merge is lowered.
        ratio: in place of r: the share of the unprotected tokens, in (0, 1).
        threshold: in place of r, or with it the smaller: merges what is at least so similar; samples then differ.
        metric: ``"k"``: the keys as projected, mean over heads; ``"k_norm"``: after the model's key norm; ``"x"``: the tokens.
        prop_attn: whether a token of size s counts s times as a key.
        protect: the first tokens that never merge; None: what the model has in front of its patches.
        pool: ``"size"``: the model's mean over patches counts each token as often as its size says (ToMe for MAE);
            ``"model"``: it is left as it is.
        reduce: of the tokens, see :func:`vitkern.merge_tokens`.
        order: of the remaining tokens, see :func:`vitkern.merge_plan`.
        trace: keeps the composed plan in ``report.plan``, for pictures.

    Returns:
        :class:`MergeReport`: what was replaced, what was not and why; ``report.undo()`` restores the model.
    """
    _check(r, ratio, threshold, metric, protect, pool, reduce, order)
    options = {"r": r, "ratio": ratio, "threshold": threshold, "metric": metric, "prop_attn": prop_attn}
    options |= {"protect": protect, "reduce": reduce, "order": order, "trace": trace}
    report = MergeReport()
    groups: dict[str, list[tuple[str, nn.Module, Kind]]] = {}
    for path, module in model.named_modules():
        kind = KINDS.get(f"{type(module).__module__}.{type(module).__qualname__}")
        if kind is not None:
            groups.setdefault(path.rpartition(".")[0], []).append((path, module, kind))
    for found in groups.values():
        reasons = {path: _refusal(module, kind) for path, module, kind in found}
        if any(reasons.values()):
            report.kept += [
                Kept(p, type(m).__qualname__, reasons[p] or "another block of its tower cannot merge")
                for p, m, _ in found
            ]
            continue
        _serve(model, found, report, dict(options), pool)
    if not report.replaced and not report.kept:
        raise ValueError(f"{NAME}: model must hold blocks that merging serves ({', '.join(KINDS)}), it holds none")
    return report


def _check(r: Any, ratio: Any, threshold: Any, metric: Any, protect: Any, pool: Any, reduce: Any, order: Any) -> None:
    if (r is None) == (ratio is None) and (threshold is None or r is not None):
        raise ValueError(f"{NAME}: r must be given, or ratio, or threshold; got r={r!r}, ratio={ratio!r}")
    if ratio is not None and not 0.0 < ratio < 1.0:
        raise ValueError(f"{NAME}: ratio must lie in (0, 1), got {ratio!r}")
    if metric not in ("k", "k_norm", "x"):
        raise ValueError(f"{NAME}: metric must be 'k', 'k_norm' or 'x', got {metric!r}")
    if pool not in ("model", "size"):
        raise ValueError(f"{NAME}: pool must be 'model' or 'size', got {pool!r}")
    if protect is not None:
        _checks.integer(NAME, "protect", protect, 0, "None or an int")
    if reduce not in REDUCTIONS:
        raise ValueError(f"{NAME}: reduce must be 'mean', 'sum', 'max', 'first' or 'mlerp', got {reduce!r}")
    if order not in ORDERS:
        raise ValueError(f"{NAME}: order must be 'split', 'score' or 'position', got {order!r}")


def _refusal(block: nn.Module, kind: Kind) -> str | None:
    return _foreign(block) or kind.refusal(block)


def _serve(
    model: nn.Module,
    found: list[tuple[str, nn.Module, Kind]],
    report: MergeReport,
    options: dict[str, Any],
    pool: str,
) -> None:
    if options["r"] is not None:
        options["r"] = parse_r(len(found), options["r"])
    if options["protect"] is None:
        owner = next((m for m in model.modules() if isinstance(getattr(m, "num_prefix_tokens", None), int)), None)
        options["protect"] = found[0][2].prefix(found[0][1], owner)
    tower = Tower([(module, kind) for _, module, kind in found], options)
    if pool == "size":
        _pool_by_size(model, tower, report)
    report.towers.append(tower)
    for layer, (path, module, kind) in enumerate(found):
        tower.watch(module, kind)
        report._modules.append(module)
        module.__dict__["forward"] = _Forward(module, _block_forward(tower, layer, kind))
        report.replaced.append(Replaced(path, type(module).__qualname__, "merge_tokens"))


def _pool_by_size(model: nn.Module, tower: Tower, report: MergeReport) -> None:
    """Gives timm's models that average their patches a `pool` that knows the sizes."""
    if getattr(model, "global_pool", None) != "avg" or not callable(getattr(model, "pool", None)):
        raise ValueError(
            f"{NAME}: pool='size' must go with a model of timm whose global_pool is 'avg', got {type(model).__name__}"
        )

    def pool(x: Tensor, pool_type: str | None = None) -> Tensor:
        return (
            tower.pool(x, model.num_prefix_tokens)
            if pool_type in (None, "avg")
            else type(model).pool(model, x, pool_type)
        )

    model.__dict__["pool"] = pool
    report.pooled.append(model)


def _block_forward(tower: Tower, layer: int, kind: Kind) -> Any:
    def merging_forward(block: nn.Module, x: Tensor, *masks: Any, **options: Any) -> Tensor:
        if any(isinstance(m, Tensor) for m in (*masks, options.get("attn_mask"), options.get("attention_mask"))):
            raise ValueError(f"{NAME}: attn_mask must be None in a model that merges tokens, got a tensor")
        if torch.is_grad_enabled() and getattr(block, "gradient_checkpointing", False) and block.training:
            raise ValueError(f"{NAME}: gradient_checkpointing must be False in a model that merges tokens, got True")
        if layer == 0:
            tower.start(x.shape[1])
        return kind.forward(block, tower, layer, x)

    return merging_forward
