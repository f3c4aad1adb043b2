"""Run by `make compat` with the built wheel on another torch: the registry's small calls, then torch.compile."""

import torch

import vitkern
from vitkern import testing

for entry in testing.entries().values():
    for call in entry.small():
        for dtype in (torch.float32, torch.bfloat16, torch.float64):
            testing.assert_matches(entry, call, dtype, "cpu")
    for call in entry.small()[:3]:
        tensors = call.leaves(torch.float32)
        torch._dynamo.reset()
        compiled = torch.compile(lambda t, call=call: call.run(t, "cpu"), backend="aot_eager", fullgraph=True)(tensors)
        assert all(torch.equal(a, b) for a, b in zip(compiled, call.run(tensors, "cpu"), strict=True)), str(call)

info = vitkern.info()
names = ", ".join(testing.entries())
print(f"torch {info['torch']}: {names}: forward, backward and compiled agree ({info['instruction set']})")
