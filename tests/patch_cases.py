"""Models to patch, small, with random weights that are not close to zero; what every library's patch test checks."""

import copy

import torch

import vitkern
from vitkern.testing import assert_close_to_oracle


def randomize(model, seed=0):
    """Parameters drawn so that biases, tables and pads matter: a fresh Swin has tables of 0.02 and zero biases."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, p in model.named_parameters():
            spread = 0.5 if "table" in name or p.dim() == 1 and "norm" not in name else None
            if "logit_scale" in name:
                continue
            if spread:
                p.copy_(torch.randn(p.shape, generator=generator) * spread)
            elif p.dim() > 1:
                p.copy_(torch.randn(p.shape, generator=generator) * (1.5 / p.shape[1:].numel() ** 0.5))
    return model


def outputs(model, x):
    """The tensors of a model's output, whatever it is wrapped in."""
    result = model(x)
    if isinstance(result, torch.Tensor):
        return [result]
    if hasattr(result, "to_tuple"):
        result = result.to_tuple()
    elif isinstance(result, dict):
        result = tuple(result.values())
    parts = [t for part in result for t in (part if isinstance(part, (tuple, list)) else (part,))]
    return [t for t in parts if isinstance(t, torch.Tensor)]


def run(model, x, dtype, grad, autocast=None):
    """Outputs and gradients of every parameter, by name."""
    model = copy.deepcopy(model).to(dtype)
    x = x.to(dtype)
    with torch.set_grad_enabled(grad), torch.autocast("cpu", torch.bfloat16, enabled=autocast is not None):
        found = {f"output {i}": t for i, t in enumerate(outputs(model, x))}
    if grad:
        sum(t.double().square().mean() for t in found.values()).backward()
        found |= {f"grad {n}": p.grad for n, p in model.named_parameters() if p.grad is not None}
    return {n: t.detach() for n, t in found.items()}


def check(model, *sizes, grad=True, replaced=None, channels=3, batch=2, train=False):
    """Patched and unpatched agree by the oracle rule on images of every size; then everything is undone."""
    model.train(train)
    before = {n: t.clone() for n, t in model.state_dict().items()}
    for size in sizes:
        x = torch.randn(batch, channels, *size, generator=torch.Generator().manual_seed(3))
        oracle = run(model, x, torch.float64, grad)
        eager = run(model, x, torch.float32, grad)
        with vitkern.patched(model) as report:
            assert replaced is None or len(report.replaced) == replaced, str(report)
            got = run(model, x, torch.float32, grad)
        assert got.keys() == eager.keys(), got.keys() ^ eager.keys()
        for name, value in got.items():
            assert_close_to_oracle(f"{type(model).__name__} {size} {name}", value, oracle[name], eager[name], "grad" in name)
    assert not any("forward" in m.__dict__ for m in model.modules()), "undo left a forward behind"
    after = model.state_dict()
    assert before.keys() == after.keys() and all(torch.equal(before[n], after[n]) for n in before)
    return report
