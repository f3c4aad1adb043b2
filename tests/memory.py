"""How much memory a call needs beyond its inputs, measured in a process of its own: a peak never falls, and what getrusage
gives begins at that of the process that starts it."""

import subprocess
import sys

PROGRAM = """
import torch, vitkern

def peak():
    return next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith("VmHWM")) * 1024

{setup}
before = peak()
{run}
print(peak() - before)
"""


def grown(setup: str, run: str) -> int:
    """Bytes by which the peak grows while `run` runs; `setup` has made the inputs and called the op once, small."""
    program = PROGRAM.format(setup=setup, run=run)
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    return int(done.stdout)
