"""vitkern.flops: what torch's counter counts of every op."""

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode, flop_registry, sdpa_backward_flop_count, sdpa_flop_count

import vitkern
import vitkern.flops
from vitkern import DepthwiseValue, testing


def counted(run):
    with FlopCounterMode(display=False) as mode:
        run()
    return mode.get_total_flops()


def test_every_op_has_a_formula():
    names = {n.split("::")[1] for n in torch._C._dispatch_get_all_op_names() if n.startswith("vitkern::")}
    ops = {n for n in names if not n.startswith("_")}
    assert {n for n in ops if getattr(torch.ops.vitkern, n) not in flop_registry} == set()


def test_attention_counts_what_torch_counts_of_its_own():
    q, k, v = (torch.randn(2, n, 3, 8, requires_grad=True) for n in (5, 7, 7))

    def ours():
        vitkern.attention(q, k, v).sum().backward()

    shapes = [(2, 3, n, 8) for n in (5, 7, 7)]
    torchs = sdpa_flop_count(*shapes) + sdpa_backward_flop_count(shapes[0], *shapes)
    assert counted(ours) == torchs == 7 * 2 * 2 * 3 * 5 * 7 * 8


def test_windows_count_their_pads():
    q = torch.randn(2, 5, 7, 3, 8)
    want = 4 * 2 * 3 * (6 * 9) * 9 * 8
    assert counted(lambda: vitkern.window_attention(q, q, q, 3, 1)) == want
    qkv = torch.randn(2, 5, 7, 3, 3, 8, requires_grad=True)
    run = lambda: vitkern.window_attention_qkvpacked(qkv, 3, 1).sum().backward()  # noqa: E731
    assert counted(run) == int(3.5 * want)


def test_others_count_their_products():
    q = torch.randn(2, 8, 9, 3, 4)
    assert counted(lambda: vitkern.neighborhood_attention(q, q, q, 3)) == 4 * q.numel() * 9
    flat = q.flatten(1, 2)
    assert counted(lambda: vitkern.linear_attention(flat, flat, flat)) == 4 * flat.numel() * 4
    assert counted(lambda: vitkern.channel_attention(flat, flat, flat)) == 4 * flat.numel() * 4
    lepe = DepthwiseValue(torch.randn(12, 1, 3, 5), None, (8, 9))
    assert counted(lambda: lepe.of(flat)) == 2 * flat.numel() * 15
    packed = torch.randn(12, 3, 4)
    cu = torch.tensor([0, 5, 12], dtype=torch.int32)
    assert counted(lambda: vitkern.attention_varlen(packed, packed, packed, cu, cu, 7, 7)) == 4 * packed.numel() * 7


@pytest.mark.parametrize("name", sorted(testing.entries()))
def test_small_calls_of_every_op_are_counted(name):
    entry = testing.entries()[name]
    call = entry.small()[0]
    tensors = call.leaves(torch.float32, grad=entry.gradient)
    copies = {op for op, (_, factor) in vitkern.flops.FORMULAS.items() if factor == 0} | {"drop_tokens"}
    assert (counted(lambda: call.run(tensors)) > 0) == (name not in copies)
