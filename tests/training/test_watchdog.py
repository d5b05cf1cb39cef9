"""Real processes: one that hangs in a computation, one that is slow and is stopped for a while."""

import signal
import subprocess
import sys
import textwrap
import time

from mixlab.errors import EXIT_AGAIN

HANGS = """
    import sys, time
    from pathlib import Path
    import jax, jax.numpy as jnp
    from mixlab.training.watchdog import Watchdog

    def never(x):
        time.sleep(600)
        return x

    with Watchdog(1.0, Path(sys.argv[1])) as watchdog:
        watchdog.watch("compilation", 600)
        step = jax.jit(lambda x: jax.pure_callback(never, x, x)).lower(jnp.ones(3)).compile()
        watchdog.watch("step 7")
        step(jnp.ones(3)).block_until_ready()
"""

SLOW = """
    import sys, time
    from pathlib import Path
    from mixlab.training.watchdog import BETWEEN, Watchdog

    with Watchdog(2.0, Path(sys.argv[1])) as watchdog, Watchdog(0, Path(sys.argv[1])) as off:
        print("up", flush=True)
        for step in range(12):
            watchdog.watch(f"step {step}")
            off.watch(f"step {step}")
            time.sleep(0.25)
        watchdog.watch("saving", BETWEEN)
        time.sleep(3)
"""


def start(body, folder):
    command = [sys.executable, "-c", textwrap.dedent(body), str(folder)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def test_a_step_that_hangs_and_one_that_does_not(tmp_path):
    with start(HANGS, tmp_path) as hanging, start(SLOW, tmp_path) as slow:
        assert slow.stdout.readline() == "up\n"
        slow.send_signal(signal.SIGSTOP)  # a machine that sleeps: not the step's fault
        _, said = hanging.communicate(timeout=120)
        time.sleep(2)
        slow.send_signal(signal.SIGCONT)
        _, nothing = slow.communicate(timeout=120)
    assert slow.returncode == 0 and nothing == ""
    assert hanging.returncode == EXIT_AGAIN
    written = (tmp_path / "stacks-0.txt").read_text()
    for text in (said, written):
        assert "step 7 has not ended" in text and "in never" in text
