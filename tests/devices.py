"""Several devices simulated on one machine's cores, and several processes that meet there."""

import random
import socket

# Where devices outnumber cores and the machine is busy, one may reach a collective minutes after the first.
PATIENCE = "--xla_cpu_collective_call_terminate_timeout_seconds=600"


def simulated(devices: int) -> dict[str, str]:
    """Environment variables of a process that shall have so many devices."""
    return {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": f"--xla_force_host_platform_device_count={devices} {PATIENCE}"}


def free_port() -> int:
    """A port where processes can meet. Below those that systems give to whoever asks for any, so that nobody takes it before."""
    for port in random.SystemRandom().sample(range(10_000, 32_000), 100):
        with socket.socket() as tried:
            try:
                tried.bind(("localhost", port))
            except OSError:
                continue
            return port
    raise OSError("no free port among 100")
