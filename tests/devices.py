"""Several devices simulated on one machine's cores, for programs run in a process of their own."""

# Where devices outnumber cores and the machine is busy, one may reach a collective minutes after the first.
PATIENCE = "--xla_cpu_collective_call_terminate_timeout_seconds=600"


def simulated(devices: int) -> dict[str, str]:
    """Environment variables of a process that shall have so many devices."""
    return {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": f"--xla_force_host_platform_device_count={devices} {PATIENCE}"}
