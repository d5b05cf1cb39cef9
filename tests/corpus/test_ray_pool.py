"""A real Ray cluster of two workers on this machine, one of which is killed at work."""

import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from mixlab.corpus import tokenizer
from mixlab.corpus.prepare import prepare
from mixlab.corpus.records import Settings
from mixlab.errors import UserError
from tests.stores import some_texts

ROOT = Path(__file__).resolve().parents[2]
MARK = "MIXLAB_TEST_CLUSTER"
QUIET = {"RAY_USAGE_STATS_ENABLED": "0", "RAY_AUTH_MODE": "disabled"}  # no reports, no token in the home folder
CLUSTER = """
import ray, sys
ray.init(num_cpus=2, include_dashboard=False, object_store_memory=10**8, logging_level="ERROR")
print(ray.get_runtime_context().gcs_address, flush=True)
sys.stdin.read()
"""


@pytest.fixture(scope="module")
def cluster(tmp_path_factory):
    pytest.importorskip("ray")
    mark = str(tmp_path_factory.mktemp("ray"))
    paths = os.pathsep.join([str(ROOT), *sys.path])
    environment = os.environ | {MARK: mark, "PYTHONPATH": paths, **QUIET}
    streams = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    with subprocess.Popen([sys.executable, "-c", CLUSTER], env=environment, **streams) as process:
        address = process.stdout.readline().strip()
        assert address
        with pytest.MonkeyPatch.context() as patch:
            for name, value in (QUIET | {"RAY_ADDRESS": address}).items():
                patch.setenv(name, value)
            yield mark
        process.stdin.close()


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    """Some megabytes, and a tokenizer that takes its time."""
    folder = tmp_path_factory.mktemp("inputs")
    tokenizer.train_bpe(some_texts(200), 400).save(folder / "bpe.json")
    texts = some_texts(400)
    with open(folder / "a.jsonl", "w") as file:
        for i in range(200):
            text = " ".join(texts[(i * 7 + j) % 400] for j in range(150))
            file.write(json.dumps({"text": text, "id": str(i)}) + "\n")
    return [str(folder / "*.jsonl")], str(folder / "bpe.json"), Settings(shard_megabytes=0.3)


def files(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def kill_a_worker(mark: str, killed: list[int]) -> None:
    """Kills the first process of this cluster that is seen making a shard."""
    end = time.monotonic() + 60
    while not killed and time.monotonic() < end:
        for folder in Path("/proc").glob("[0-9]*"):
            try:
                makes = (folder / "cmdline").read_bytes().startswith(b"ray::_make_shard")
                if makes and f"{MARK}={mark}".encode() in (folder / "environ").read_bytes():
                    os.kill(int(folder.name), signal.SIGKILL)
                    killed.append(int(folder.name))
                    break
            except OSError:
                continue
        time.sleep(0.005)


@pytest.mark.skipif(not Path("/proc/self/environ").exists(), reason="needs Linux's /proc")
def test_the_same_store_even_when_a_worker_is_killed(cluster, inputs, tmp_path):
    paths, letters, settings = inputs
    killed: list[int] = []
    killer = threading.Thread(target=kill_a_worker, args=(cluster, killed))
    killer.start()
    prepare(paths, letters, tmp_path / "ray", settings, show_progress=False, engine="ray")
    killer.join()
    assert killed
    prepare(paths, letters, tmp_path / "local", settings, workers=1, show_progress=False)
    assert len(files(tmp_path / "local")) > 10
    assert files(tmp_path / "ray") == files(tmp_path / "local")


def test_no_cluster(inputs, tmp_path, monkeypatch):
    ray = pytest.importorskip("ray")

    def no_answer(*_, **__):  # the real one tries for minutes
        raise ConnectionError("Could not find any running Ray instance.\nAnd more")

    monkeypatch.setattr(ray, "init", no_answer)
    with pytest.raises(
        UserError, match=r"--engine=ray: no Ray cluster answers \(Could not find .* instance\.\); start"
    ):
        prepare(*inputs[:2], tmp_path / "out", inputs[2], show_progress=False, engine="ray")
