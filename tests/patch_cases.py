"""Models to patch, small, with random weights that are not close to zero; what every library's patch test checks."""

import copy

import torch
from torch.utils._python_dispatch import TorchDispatchMode

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


def run(model, x, dtype, grad, autocast=None, nudge=None):
    """Outputs and gradients of the image and every parameter, by name. `nudge` moves image and parameters by up to one unit in the
    last place, under autocast by half a unit of bfloat16, another way for each value: what rounding alone can do to the result."""
    model = copy.deepcopy(model).to(dtype)
    x = x.to(dtype)
    if nudge is not None:
        generator = torch.Generator().manual_seed(nudge)
        unit = (
            torch.finfo(torch.bfloat16).eps / 2 if autocast else torch.finfo(dtype).eps
        )  # as much as its casts move it
        with torch.no_grad():
            for p in model.parameters():
                p.mul_(1 + unit * (torch.rand(p.shape, generator=generator) * 2 - 1))
        x = x * (1 + unit * (torch.rand(x.shape, generator=generator) * 2 - 1))
    x = x.detach().requires_grad_(grad)
    with torch.set_grad_enabled(grad), torch.autocast("cpu", torch.bfloat16, enabled=autocast is not None):
        found = {f"output {i}": t for i, t in enumerate(outputs(model, x))}
    if grad:
        generator = torch.Generator().manual_seed(
            5
        )  # random weights: the mean square of a LayerNorm's output is constant
        sum((t.double() * torch.randn(t.shape, generator=generator)).mean() for t in found.values()).backward()
        leaves = {"of the image": x} | dict(model.named_parameters())
        found |= {f"grad {n}": p.grad for n, p in leaves.items() if p.grad is not None}
    return {n: t.detach() for n, t in found.items()}


class Called(TorchDispatchMode):
    """Counts the calls of one op of vitkern."""

    def __init__(self, name):
        super().__init__()
        self.name, self.count = name, 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count += func.name() in (f"vitkern::{self.name}", f"vitkern::{self.name}_fwd")
        return func(*args, **(kwargs or {}))


class Yardstick:
    """A model's own results on one image: in float64, in float32 (or under autocast), and what rounding does to them."""

    def __init__(self, model, x, grad=True, autocast=None):
        self.oracle = run(model, x, torch.float64, grad)
        self.eager = run(model, x, torch.float32, grad, autocast)
        # rounding at random, and rounding that agrees over the whole image: sums over it show that most
        self.moved = [run(model, x, torch.float32, grad, autocast, nudge=time) for time in (1, 2)]
        if not autocast:
            images = [torch.nextafter(x, torch.full_like(x, end)) for end in (-100.0, 100.0)]
            self.moved += [run(model, image, torch.float32, grad) for image in images]

    def hold(self, title, got):
        """Holds every output and gradient of another run to the oracle rule."""
        assert got.keys() == self.eager.keys(), got.keys() ^ self.eager.keys()
        for name, value in got.items():
            moved = tuple(m[name] for m in self.moved)
            is_grad = name.startswith("grad")
            assert_close_to_oracle(f"{title} {name}", value, self.oracle[name], self.eager[name], is_grad, moved)


def check(model, *sizes, grad=True, replaced=None, channels=3, batch=2, train=False):
    """Patched and unpatched agree by the oracle rule on images of every size; then everything is undone."""
    model.train(train)
    before = {n: t.clone() for n, t in model.state_dict().items()}
    for size in sizes:
        x = torch.randn(batch, channels, *size, generator=torch.Generator().manual_seed(3))
        yardstick = Yardstick(model, x, grad)
        with vitkern.patched(model) as report:
            assert replaced is None or len(report.replaced) == replaced, str(report)
            got = run(model, x, torch.float32, grad)
        yardstick.hold(f"{type(model).__name__} {size}", got)
    assert not any("forward" in m.__dict__ for m in model.modules()), "undo left a forward behind"
    after = model.state_dict()
    assert before.keys() == after.keys() and all(torch.equal(before[n], after[n]) for n in before)
    return report


def check_autocast(model, *size, channels=3, train=False):
    """Patched and unpatched agree by the oracle rule under autocast in bfloat16, gradients too."""
    model.train(train)
    x = torch.randn(2, channels, *size, generator=torch.Generator().manual_seed(3))
    yardstick = Yardstick(model, x, autocast=True)
    with vitkern.patched(model):
        yardstick.hold("autocast", run(model, x, torch.float32, True, autocast=True))
