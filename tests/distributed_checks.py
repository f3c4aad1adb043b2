"""What the processes of tests/test_distributed.py check. Each check is a function of the mesh's processes; what it raises is the
result of that test."""

import datetime
import traceback

import distributed_models  # noqa: F401
import libraries  # noqa: F401
import torch
import torch.distributed as dist
from distributed_ops import CHECKS
from torch.distributed.device_mesh import init_device_mesh

import vitkern
import vitkern.distributed


def run(rank, size, folder):
    """One process of two on a mesh of one axis, or of four on one of two."""
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", init_method=f"file://{folder}/store", rank=rank, world_size=size, timeout=datetime.timedelta(seconds=60)
    )
    mesh = init_device_mesh("cpu", (2,) if size == 2 else (2, 2))
    vitkern.distributed.register_sharding()
    failures = {}
    for name in NAMES[size]:
        try:
            CHECKS[name](mesh)
        except Exception:
            failures[name] = traceback.format_exc()
    torch.save(failures, f"{folder}/failures{rank}.pt")
    dist.destroy_process_group()


FLAT = {
    name
    for name in CHECKS
    if name.startswith(
        ("cuts", "public", "every_op_over_the", "every_op_over_its", "windows_over", "matches", "tensor", "fully")
    )
}
DEEP = {"every_op_over_batch_and_heads"}
NAMES = {2: sorted(CHECKS.keys() - DEEP), 4: sorted(CHECKS.keys() - FLAT)}
