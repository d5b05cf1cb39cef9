"""A step's temporary memory is not asked of the system again for every step."""

import os
import platform
import subprocess
import sys

import pytest

PROGRAM = """
import ctypes, resource, sys
import jax, jax.numpy as jnp
from mixlab.parallel import host_memory

ctypes.CDLL(None).prctl(41, 1, 0, 0, 0)  # PR_SET_THP_DISABLE: a fault is a page
if sys.argv[1] == "kept":
    host_memory.keep_freed()
x = jnp.zeros((4096, 8))
step = jax.jit(lambda x: (x @ x.T) @ x).lower(x).compile()  # 64 MiB between the two, soon made
for turn in range(30):
    if turn == 10:
        began = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    jax.block_until_ready(step(x))
faults = resource.getrusage(resource.RUSAGE_SELF).ru_minflt - began
print(faults * resource.getpagesize() / 20 / step.memory_analysis().temp_size_in_bytes)
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="what is set is glibc's")
def test_temporary_memory_stays_with_the_process():
    shares = {}
    for how in ("returned", "kept"):
        program = [sys.executable, "-c", PROGRAM, how]
        done = subprocess.run(
            program, env=os.environ | {"JAX_PLATFORMS": "cpu"}, capture_output=True, text=True, timeout=300
        )
        assert done.returncode == 0, done.stderr
        shares[how] = float(done.stdout)
    assert shares["kept"] < 0.3 < 0.9 < shares["returned"], shares
