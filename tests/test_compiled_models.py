"""Patched models compiled whole and once for all sizes, exported, packaged, and exported without an op of vitkern."""

import subprocess
import sys
from typing import NamedTuple

import libraries  # noqa: F401
import pytest
import torch
import torch._dynamo.testing
from patch_cases import outputs, randomize

import vitkern
from vitkern import merging

timm = pytest.importorskip("timm")
transformers = pytest.importorskip("transformers")
pytestmark = pytest.mark.filterwarnings("ignore:Importing from timm")


class Case(NamedTuple):
    """A model on the ops, sizes of images for it, which axes of the images a graph leaves open, and one op that it runs."""

    model: torch.nn.Module
    sizes: tuple[tuple[int, ...], ...]
    open: tuple[int, ...]
    op: str

    def images(self, size):
        return torch.randn(size, generator=torch.Generator().manual_seed(3), dtype=torch.float64)


class Patches(timm.layers.PatchEmbed):
    """The projection alone: timm's own forward formats the image's size into a sentence, which fixes it in any graph."""

    def forward(self, x):
        return self.proj(x).permute(0, 2, 3, 1)


def swin(depth=2):
    sizes = {"depths": [depth], "num_heads": [2], "embed_dim": 8, "window_size": 3, "image_size": 16, "patch_size": 2}
    model = transformers.SwinModel(transformers.SwinConfig(**sizes))
    return model, ((2, 3, 16, 20), (3, 3, 26, 22), (5, 3, 34, 28)), (0, 2, 3), "window_attention", depth


def sam():
    """An encoder for images of one size, which its class checks."""
    config = transformers.SamVisionConfig(
        hidden_size=8, output_channels=8, num_hidden_layers=2, num_attention_heads=2, image_size=32, patch_size=4,
        window_size=3, global_attn_indexes=[1], mlp_ratio=2.0,
    )  # fmt: skip
    model = transformers.models.sam.modeling_sam.SamVisionEncoder(config)
    return model, ((2, 3, 32, 32), (3, 3, 32, 32), (5, 3, 32, 32)), (0,), "attention", 2


def efficientvit():
    kind = timm.models.efficientvit_mit.EfficientVit
    model = kind(widths=(8, 8, 8, 16), depths=(0, 0, 0, 1), head_dim=8, head_widths=(8, 8), num_classes=5)
    return model, ((2, 3, 64, 96), (3, 3, 96, 128), (5, 3, 160, 64)), (0, 2, 3), "linear_attention", 1


def merged():
    model = timm.models.vision_transformer.VisionTransformer(
        img_size=32, patch_size=8, embed_dim=24, depth=2, num_heads=3, num_classes=5, dynamic_img_size=True,
        pos_embed="none", embed_layer=Patches,
    )  # fmt: skip
    merging.apply(model, r=3)
    return model, ((2, 3, 32, 48), (3, 3, 40, 56), (25, 3, 64, 72)), (0, 2, 3), "merge_tokens", 0


MODELS = pytest.mark.parametrize("name", ["swin", "sam", "efficientvit", "merged"])


@pytest.fixture(scope="module")
def cases():
    def made(make):
        torch.manual_seed(0)
        model, sizes, free, op, layers = make()
        model = randomize(model).double().eval()
        assert not layers or len(vitkern.patch(model).replaced) == layers
        return Case(model, sizes, free, op)

    return {make.__name__: made(make) for make in (swin, sam, efficientvit, merged)}


@MODELS
def test_one_graph_trains_at_every_size(cases, name):
    case = cases[name]

    def loss(x):
        return sum(t.sin().sum() for t in outputs(case.model, x))

    weights = [p for p in case.model.parameters() if p.requires_grad]
    torch._dynamo.reset()
    # Swin alone with floats that a graph leaves open at first, as is the default: it is traced twice for them
    quick = {} if name == "swin" else {"specialize_float": True}
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(loss, backend=counter, fullgraph=True, dynamic=True)
    for number, size in enumerate(case.sizes):
        x = case.images(size).requires_grad_()
        with torch._dynamo.config.patch(error_on_recompile=number > 0, **quick):
            got = compiled(x)
        for a, b in zip(
            *(torch.autograd.grad(f, [x, *weights], allow_unused=True) for f in (got, loss(x))), strict=True
        ):
            torch.testing.assert_close(a, b)
    assert any(case.op in str(n.target) for g in counter.graphs for n in g.graph.nodes)


@pytest.mark.compile
def test_inductor_takes_linear_attention_of_maps_of_any_size():
    """The sides of a map behind strided convolutions are quotients of symbols, of which inductor takes no product apart."""
    down = [torch.nn.Conv2d(3, 8, 3, 2, 1), torch.nn.Conv2d(8, 8, 3, 2, 1)]
    module = torch.nn.Sequential(*down, vitkern.nn.LiteMLA(8, 8, dim=4)).eval()
    torch._dynamo.reset()
    compiled = torch.compile(module, fullgraph=True, dynamic=True)
    with torch.no_grad():
        for number, size in enumerate(((2, 3, 16, 24), (3, 3, 20, 36))):
            with torch._dynamo.config.patch(error_on_recompile=number > 0):
                torch.testing.assert_close(compiled(x := torch.randn(size)), module(x))


# export ---------------------------------------------------------------------------------------------------------------

ALLOWED = {"aten", "getitem", "add", "sub", "mul", "floordiv", "mod", "neg", "sym_min", "sym_max", "sym_size"}

RUNNER = """
import sys
import torch, vitkern

folder, names = sys.argv[1], sys.argv[2:]
for name in names:
    if name.endswith(".package"):
        run = torch._inductor.aoti_load_package(f"{folder}/{name}.pt2")
    else:
        run = torch.export.load(f"{folder}/{name}.pt2").module()
    with torch.no_grad():
        torch.save([run(x) for x in torch.load(f"{folder}/{name}.images")], f"{folder}/{name}.outputs")
assert not {"timm", "transformers"} & set(sys.modules), "a program asked for the library of its model"
"""


class First(torch.nn.Module):
    """The first output of a model, as a tensor."""

    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, x):
        return outputs(self.model, x)[0]


def export(module, x, axes):
    """The program of an inference, with these axes of x left open."""
    open_axes = {axis: torch.export.Dim.DYNAMIC for axis in axes}
    with torch.no_grad():
        return torch.export.export(module, (x,), dynamic_shapes=(open_axes,), strict=False)


def targets(program):
    """What the calls of a program are of: a namespace of ops, or a name of Python's."""
    called = {n.target for n in program.graph.nodes if n.op == "call_function"}
    return {getattr(target, "namespace", getattr(target, "__name__", str(target))) for target in called}


class Window(torch.nn.Module):
    """One op: a map of any sides, with a table and pads."""

    def __init__(self):
        super().__init__()
        self.table = torch.nn.Parameter(torch.randn(25, 2))
        self.pad = torch.nn.Parameter(torch.randn(2, 8))

    def forward(self, qkv):
        bias, pads = vitkern.bias.RelativePosition(self.table), (self.pad, self.pad)
        return vitkern.window_attention_qkvpacked(qkv, 3, 1, bias=bias, pad_kv=pads)


def package(path):
    """Packages of AOTInductor by name: their modules and images of three sizes."""
    model, sizes, *_ = swin(depth=1)  # without a shift, which the other has
    vitkern.patch(model)
    sides = ((2, 5, 7), (3, 9, 4), (4, 6, 11))
    made = {
        "swin.package": (First(randomize(model).eval()), [torch.randn(size) for size in sizes], (0, 2, 3)),
        "window.package": (Window(), [torch.randn(*side, 3, 2, 8) for side in sides], (0, 1, 2)),
    }
    quick = {"aot_inductor.compile_wrapper_opt_level": "O0"}
    for name, (module, images, axes) in made.items():
        program = export(module, images[0], axes)
        torch._inductor.aoti_compile_and_package(
            program, package_path=str(path / f"{name}.pt2"), inductor_configs=quick
        )
    return {name: (module, images) for name, (module, images, _) in made.items()}


@pytest.fixture(scope="module")
def elsewhere(cases, tmp_path_factory):
    """Modules, images and what their programs gave in a process that knows torch and vitkern alone, by name."""
    path = tmp_path_factory.mktemp("programs")
    made = package(path)
    for name, case in cases.items():
        images = [case.images(size) for size in case.sizes]
        program = export(First(case.model), images[0], case.open)
        assert "vitkern" in targets(program)
        with torch.no_grad():
            for x in images:  # what a graph asks of sizes is looked at here, and no longer where it was loaded
                program.module()(x)
        torch.export.save(program, path / f"{name}.pt2")
        made[name] = First(case.model), images
    for name, (_, images) in made.items():
        torch.save(images, path / f"{name}.images")
    done = subprocess.run([sys.executable, "-c", RUNNER, str(path), *made], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    return {name: (*given, torch.load(path / f"{name}.outputs")) for name, given in made.items()}


@pytest.mark.compile
@pytest.mark.parametrize("name", ["swin", "sam", "efficientvit", "merged", "swin.package", "window.package"])
def test_saved_programs_and_packages_run_where_the_model_is_unknown(elsewhere, name):
    module, images, found = elsewhere[name]
    with torch.no_grad():
        for x, out in zip(images, found, strict=True):
            torch.testing.assert_close(out, module(x))


@MODELS
def test_the_reference_exports_aten_alone(cases, name):
    """Before and after decomposition: what ONNX and C++ without vitkern read."""
    module, x = First(cases[name].model), cases[name].images(cases[name].sizes[0])
    with vitkern.use_backend("reference"):
        program = export(module, x, ())
    assert targets(program) <= ALLOWED
    decomposed = program.run_decompositions()
    assert targets(decomposed) <= ALLOWED
    with torch.no_grad():
        torch.testing.assert_close(decomposed.module()(x), module(x))
