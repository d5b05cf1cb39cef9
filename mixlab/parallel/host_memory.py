"""Memory of a process that trains on CPU.

XLA on CPU takes a step's temporary memory from malloc as one block and gives it back after the step. glibc returns so large a block
to the system each time, which then hands out every page again, zeroed: a fifth of a step's time.
"""

import contextlib
import ctypes

from mixlab.parallel.xla_flags import accelerators

# Of mallopt(3): never return memory, take none outside the heap, one heap for all threads (the others' are small).
TRIM_THRESHOLD, MMAP_MAX, ARENA_MAX = -1, -4, -8


def keep_freed() -> None:
    """This process keeps the memory that it frees, for its next step. Nothing changes where an accelerator may do the work, or
    without glibc. Call it before JAX starts its threads."""
    if accelerators():
        return
    with contextlib.suppress(OSError, AttributeError, TypeError):  # another C library
        mallopt = ctypes.CDLL(None).mallopt
        for option, value in ((ARENA_MAX, 1), (MMAP_MAX, 0), (TRIM_THRESHOLD, -1)):
            mallopt(option, value)
