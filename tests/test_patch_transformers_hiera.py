"""vitkern.patch on transformers' Hiera: units, pooled queries, and attention over all tokens."""

import libraries  # noqa: F401
import patch_cases
import pytest
import torch

import vitkern

transformers = pytest.importorskip("transformers")
from transformers.models.hiera.modeling_hiera import HieraMaskUnitAttention  # noqa: E402


def hiera():
    config = transformers.HieraConfig(
        embed_dim=8, image_size=(64, 64), depths=[1, 2, 2, 1], num_heads=[1, 2, 2, 4], drop_path_rate=0.0
    )
    return patch_cases.randomize(transformers.HieraModel(config))


@pytest.mark.parametrize("train", [False, True])
def test_hiera_matches(train):
    model = hiera()
    kinds = {
        (m.use_mask_unit_attn, m.query_stride > 1) for m in model.modules() if isinstance(m, HieraMaskUnitAttention)
    }
    assert len(kinds) == 4, kinds  # units and all tokens, pooled and not
    noise = torch.rand(2, 4, generator=torch.Generator().manual_seed(1))

    class Given(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.model = model

        def forward(self, x):
            return self.model(x, noise=noise.to(x.dtype)).last_hidden_state

    patch_cases.check(Given(), (64, 64), replaced=6, train=train)


@pytest.mark.parametrize("units, stride", [(True, 4), (True, 1), (False, 4), (False, 1)])
def test_one_attention_in_every_form(units, stride):
    module = patch_cases.randomize(HieraMaskUnitAttention(12, 16, 2, stride, 4, units))

    class Tokens(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.module = module

        def forward(self, x):
            return self.module(x.flatten(2).mT)[0]

    patch_cases.check(Tokens(), (8, 16), (4, 4 * stride), channels=12, replaced=1)
    patch_cases.check_autocast(Tokens(), 8, 16, channels=12)


def test_weights_that_are_asked_for_are_those_of_the_module():
    module = patch_cases.randomize(HieraMaskUnitAttention(12, 16, 2, 4, 4, True)).eval()
    x = torch.randn(2, 64, 12)
    want = module(x, output_attentions=True)
    with vitkern.patched(module):
        for a, b in zip(module(x, output_attentions=True), want, strict=True):
            torch.testing.assert_close(a, b)


def test_equal_queries_give_their_gradient_to_the_first():
    module = patch_cases.randomize(HieraMaskUnitAttention(12, 16, 2, 4, 4, True))
    x = torch.randn(1, 1, 12).expand(1, 32, 12).clone()  # all tokens alike
    grads = []
    for patched in (False, True):
        leaf = x.clone().requires_grad_()
        report = vitkern.patch(module) if patched else None
        module(leaf)[0].square().sum().backward()
        grads.append(leaf.grad)
        if report is not None:
            report.undo()
    torch.testing.assert_close(grads[1], grads[0])
