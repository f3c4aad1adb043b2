"""A patched model under what training does to models: checkpoints of activations, averages, processes side by side, pickles."""

import copy
import pickle
import socket
from functools import partial

import libraries  # noqa: F401
import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch.nn.parallel import DistributedDataParallel
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from torch.utils.checkpoint import checkpoint

import vitkern

transformers = pytest.importorskip("transformers")
SIZES = {"depths": [2], "num_heads": [2], "embed_dim": 8, "window_size": 3, "image_size": 16, "patch_size": 2}


def swin(dropout=0.0):
    torch.manual_seed(0)
    config = transformers.SwinConfig(**SIZES, drop_path_rate=0.0, attention_probs_dropout_prob=dropout)
    return transformers.SwinModel(config)


def images(count=4):
    return torch.rand(count, 3, 16, 16, generator=torch.Generator().manual_seed(1))


def gradients(model, x):
    model.zero_grad()
    model(x).last_hidden_state.square().sum().backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("reentrant", [False, True])
def test_a_checkpointed_layer_drops_the_same_weights_twice(reentrant):
    model = swin(dropout=0.5).train()
    vitkern.patch(model)
    torch.manual_seed(3)
    want = gradients(model, images())
    layer = model.encoder.layers[0]
    own = layer.forward
    layer.forward = lambda *args, **options: checkpoint(partial(own, **options), *args, use_reentrant=reentrant)
    torch.manual_seed(3)
    found = gradients(model, images())
    assert found.keys() == want.keys() and all(torch.equal(found[n], g) for n, g in want.items())


def test_an_averaged_copy_is_patched_and_follows():
    model = swin()
    vitkern.patch(model)
    average = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.5))
    block = average.module.encoder.layers[0].blocks[0]
    assert "forward" in vars(block) and vars(block)["forward"].module is block
    with torch.no_grad():
        for p in model.parameters():
            p.mul_(0.5)
    average.update_parameters(model)  # the first one copies
    torch.testing.assert_close(average(images()).last_hidden_state, model(images()).last_hidden_state)


def test_a_pickle_holds_the_model_unpatched():
    model = swin().eval()
    want = model(images()).last_hidden_state
    vitkern.patch(model)
    again = pickle.loads(pickle.dumps(model))
    assert all(m.forward.__func__ is type(m).forward for m in again.encoder.layers[0].blocks)
    torch.testing.assert_close(again(images()).last_hidden_state, want)


def test_state_and_buffers_are_those_of_the_model():
    model = swin()
    before = {name: t.clone() for name, t in model.state_dict().items()}
    report = vitkern.patch(model)
    assert model.state_dict().keys() == before.keys()
    copy.deepcopy(model).load_state_dict(before, strict=True)
    report.undo()
    assert not any("forward" in vars(m) for m in model.encoder.layers[0].blocks)


def _process(rank, port, results):
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=2)
    model = swin()
    vitkern.patch(model)
    parallel = DistributedDataParallel(model, find_unused_parameters=True)
    parallel.zero_grad()
    parallel(images()[rank * 2 : rank * 2 + 2]).last_hidden_state.square().sum().backward()
    if rank == 0:
        torch.save({n: p.grad for n, p in model.named_parameters() if p.grad is not None}, results)
    dist.destroy_process_group()


def test_two_processes_sum_the_gradients_of_one(tmp_path):
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    results = tmp_path / "gradients.pt"
    mp.spawn(_process, args=(port, results), nprocs=2)
    model = swin()
    vitkern.patch(model)
    want, found = gradients(model, images()), torch.load(results)
    for name, g in want.items():
        torch.testing.assert_close(2 * found[name], g)  # DistributedDataParallel gives the mean of the processes
