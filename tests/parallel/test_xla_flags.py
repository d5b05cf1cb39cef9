"""The compiler flags that training sets: that XLA knows them, and that what the user has set wins."""

import json
import os
import subprocess
import sys

import pytest

from mixlab.parallel import xla_flags
from mixlab.parallel.xla_flags import FLAGS, LIBTPU, XLA, Flag, add, set_flags


def starts(words: str) -> subprocess.CompletedProcess:
    environment = os.environ | {"XLA_FLAGS": words, "JAX_PLATFORMS": "cpu"}
    program = [sys.executable, "-c", "import jax; jax.devices()"]
    return subprocess.run(program, env=environment, capture_output=True, text=True, timeout=300)


def test_the_installed_xla_knows_every_flag_and_refuses_others():
    """A jaxlib for CPU knows those for GPUs too. Those for TPUs are libtpu's own, and cannot be tried here."""
    flags = [flag for backend in FLAGS.values() for flag in backend if flag.variable == XLA]
    assert len(flags) >= 4
    done = starts(" ".join(map(str, flags)))
    assert done.returncode == 0, done.stderr
    done = starts(" ".join(map(str, (*flags, Flag(XLA, "xla_gpu_enable_nonsense", "true", "", "")))))
    assert done.returncode != 0 and "Unknown flag in XLA_FLAGS: --xla_gpu_enable_nonsense" in done.stderr


def test_what_the_user_has_set_stays():
    first, *others = FLAGS["gpu"]
    environment = {XLA: f"--xla_dump_to=/x --{first.name}=false"}
    add(FLAGS["gpu"], environment)
    assert environment[XLA].split() == ["--xla_dump_to=/x", f"--{first.name}=false", *map(str, others)]
    again = dict(environment)
    add(FLAGS["gpu"], again)
    assert again == environment


@pytest.mark.parametrize(
    ("platforms", "expected"), [(None, {XLA, LIBTPU}), ("cpu", set()), ("cuda,cpu", {XLA}), ("tpu", {LIBTPU})]
)
def test_flags_are_set_for_the_backends_there_may_be(monkeypatch, platforms, expected):
    def installed(gpu, tpu):
        monkeypatch.setattr(xla_flags, "PLUGINS", {"gpu": (("cuda", "gpu"), gpu), "tpu": (("tpu",), tpu)})
        environment = {} if platforms is None else {"JAX_PLATFORMS": platforms}
        set_flags(environment)
        return environment.keys() - {"JAX_PLATFORMS"}

    assert installed(("no_such_package", "json"), ("os",)) == expected
    assert installed(("no_such_package",), ("nor_this",)) == set()


def test_a_run_tells_the_flags_in_force(trunk):
    assert json.loads((trunk / "run.json").read_text())["flags"] == {XLA: os.environ[XLA]}
