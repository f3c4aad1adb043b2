"""vitkern.layers: what Hugging Face's `kernels` library loads from a local repository, and what it makes of a model."""

import copy

import libraries  # noqa: F401
import patch_cases
import pytest
import torch
from torch import nn

import vitkern
from vitkern import layers
from vitkern.patch import table

kernels = pytest.importorskip("kernels")
MODE = kernels.Mode.TRAINING | kernels.Mode.TORCH_COMPILE


@pytest.fixture(scope="module")
def repository(tmp_path_factory):
    return layers.write_repository(tmp_path_factory.mktemp("layers"))


def swin(**options):
    module = pytest.importorskip("transformers.models.swin.modeling_swin")
    given = {"embed_dim": 12, "depths": [2], "num_heads": [2], "window_size": 4, "image_size": 48} | options
    return patch_cases.randomize(module.SwinModel(module.SwinConfig(**given))).eval()


def kernelized(model, repository):
    with kernels.use_kernel_mapping(layers.mapping(model, repository), inherit_mapping=False):
        return kernels.kernelize(copy.deepcopy(model), mode=MODE, device="cpu")


def test_a_kernelized_model_is_the_patched_one(repository):
    model, x = swin(), torch.randn(2, 3, 48, 40, generator=torch.Generator().manual_seed(0))
    given = kernelized(model, repository)
    with patch_cases.Called("window_attention") as calls:
        got = patch_cases.run(given, x, torch.float32, True)
    assert calls.count > 0
    with vitkern.patched(model):
        want = patch_cases.run(model, x, torch.float32, True)
    assert got.keys() == want.keys() and all(torch.equal(got[name], want[name]) for name in got)


def test_a_kernelized_model_compiles_in_one_graph(repository):
    model, x = kernelized(swin(), repository), torch.randn(1, 3, 48, 40)
    with torch.no_grad():
        compiled = torch.compile(model, backend="aot_eager", fullgraph=True)(x).last_hidden_state
        torch.testing.assert_close(compiled, model(x).last_hidden_state)


def test_a_module_that_patch_keeps_keeps_its_forward(repository):
    module = pytest.importorskip("transformers.models.levit.modeling_levit")
    model = nn.Sequential(*(module.LevitAttention(16, 8, 2, 2, 4) for _ in range(2)))
    model[1].attention_bias_idxs = model[1].attention_bias_idxs.flip(0)
    given = kernelized(model, repository)
    x = torch.randn(1, 16, 16)
    assert layers._SERVED in given[0].__dict__ and layers._SERVED not in given[1].__dict__
    torch.testing.assert_close(given(x), model(x))


@pytest.mark.parametrize("kind", [kind for _, kind, _ in table.served()])
def test_the_layer_of_every_served_class_keeps_the_contract(kind, repository):
    module, _, name = kind.rpartition(".")
    source = getattr(pytest.importorskip(module), name)
    layer = kernels.LocalLayerRepository(repository, layer_name=kind)
    kernels.layer.layer._validate_layer(check_cls=source, cls=layer.load(), repo=layer)


def test_a_layer_of_vitkern_nn_runs_in_a_model_that_names_it(repository):
    class Own(vitkern.nn.XCA):
        kernel_layer_name, kernel_condition = "XCA", staticmethod(lambda module: True)

        def forward(self, x):
            raise AssertionError("the layer's forward runs")

    model, x = Own(16, 2), torch.randn(2, 9, 16)
    places = {"XCA": {"cpu": kernels.LocalLayerRepository(repository, layer_name="XCA")}}
    with kernels.use_kernel_mapping(places, inherit_mapping=False):
        given = kernels.kernelize(model, mode=MODE, device="cpu", use_fallback=False)
    assert torch.equal(given(x), vitkern.nn.XCA.forward(model, x))


@pytest.mark.parametrize("name", [name for name in vitkern.nn.__all__ if name[0].isupper()])
def test_every_module_of_vitkern_nn_is_a_layer(name):
    layer = getattr(layers, name)
    assert layer.__init__ is nn.Module.__init__ and layer.can_torch_compile and layer.has_backward


def test_an_unknown_layer_is_a_sentence():
    with pytest.raises(
        AttributeError, match="vitkern.layers has no SwinLayer: neither vitkern.nn nor patch serves a class"
    ):
        layers.SwinLayer  # noqa: B018
