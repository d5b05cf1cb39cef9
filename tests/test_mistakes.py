"""Whatever a user gets wrong: one message that names it and the remedy, exit code 2, nothing lost."""

import os
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest

from mixlab import errors, evaluate, train
from mixlab.corpus import tokenizer
from tests.stores import some_texts, write_config, write_store


@pytest.fixture
def place(tmp_path, monkeypatch):
    monkeypatch.setenv("MIXLAB_CACHE", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)
    write_store(tmp_path / "store", some_texts())
    write_config(tmp_path / "config.py", tmp_path / "store")
    return tmp_path


def told(capsys, *arguments, main=train.main):
    code = errors.run(main, list(arguments))
    message = capsys.readouterr().err
    assert code == errors.EXIT_USER_ERROR and message.startswith("error: ") and "Traceback" not in message
    return message


def files(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


@pytest.mark.parametrize(
    ("flag", "expected"),
    [
        ("--config.modle.layers=3", "unknown key 'modle'; did you mean 'model'?"),
        ("--confg.seed=3", "stray argument '--confg.seed=3'"),
        ("--work-dir=x", "did you mean --workdir?"),
        ("extra", "stray argument 'extra'"),
        ("--config.model.vocab_size=300", "set model.vocab_size=259"),
        ("--config.sources.text.store=nowhere", "sources.text.store: store nowhere: no such folder"),
        ("--config.stages.0.sequence_length=30", "not a multiple"),
        ("--config.stages.0.format.bos=3", "must be of type bool"),
        ("--config.mesh.data=3", "mesh"),
        ("--config.tokenizer=other.json", "tokenizer other.json: cannot be read"),
    ],
)
def test_flags_and_keys(place, capsys, flag, expected):
    assert expected in told(capsys, "--config=config.py", "--workdir=run", flag)
    assert not (place / "run").exists()


def test_no_config(place, capsys):
    assert "--config" in told(capsys)
    assert "there is no file confg.py; did you mean config.py?" in told(capsys, "--config=confg.py")


def spoil_manifest(store):
    (store / "store.json").write_text("{")


def truncate_shard(store):
    os.truncate(store / "tokens/00000.bin", 100)


def flip_a_byte(store):
    content = bytearray((store / "tokens/00000.bin").read_bytes())
    content[50] ^= 1
    (store / "tokens/00000.bin").write_bytes(content)


def lose_metadata(store):
    (store / "metadata/00000.arrow").unlink()


@pytest.mark.parametrize(
    ("spoil", "expected"),
    [
        (spoil_manifest, "store.json is damaged"),
        (truncate_shard, "tokens/00000.bin has 100 bytes, not"),
        (flip_a_byte, "tokens/00000.bin is damaged"),
        (lose_metadata, "metadata/00000.arrow is missing"),
    ],
)
def test_a_damaged_store(place, capsys, spoil, expected):
    spoil(place / "store")
    assert expected in told(capsys, "--config=config.py", "--workdir=run")


def test_a_tokenizer_that_is_not_the_stores(place, capsys):
    tokenizer.train_bpe(some_texts(), 300).save(place / "other.json")
    message = told(capsys, "--config=config.py", "--config.tokenizer=other.json")
    assert "is not the one that sources.text was prepared with" in message


def test_two_stores_of_different_tokenizers(place, capsys):
    write_store(place / "store2", some_texts(), tokenizer.train_bpe(some_texts(), 300))
    message = told(capsys, "--config=config.py", f"--config.sources.more.store={place / 'store2'}")
    assert "prepared with different tokenizers" in message
    assert f"prepare more again with --tokenizer={place / 'store'}/tokenizer.json" in message


def test_too_little_text_and_nothing_to_evaluate(place, capsys):
    write_store(place / "tiny", ["ab"] * 8)
    message = told(capsys, "--config=config.py", f"--config.sources.text.store={place / 'tiny'}")
    assert "sources.text" in message and "less than one row of 32" in message
    write_store(place / "all", ["held out"] * 4, validation_every=1)
    assert "no training documents" in told(capsys, "--config=config.py", f"--config.sources.text.store={place / 'all'}")


def test_folders_that_are_not_a_runs(place, capsys):
    (place / "mine").mkdir()
    (place / "mine" / "thesis.txt").write_text("years of work")
    before = files(place / "mine")
    assert "holds thesis.txt" in told(capsys, "--config=config.py", "--workdir=mine")
    assert files(place / "mine") == before
    assert "is a file" in told(capsys, "--config=config.py", "--workdir=config.py")
    assert "cannot be written" in told(capsys, "--config=config.py", "--workdir=config.py/run")
    assert "has no config.json" in told(capsys, "--workdir=mine", main=evaluate.main)


@pytest.fixture
def small_disk(tmp_path):
    """A file system of 800 kB, which a checkpoint of the small model and its report do not fit in."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=800k", "tmpfs", str(folder)], capture_output=True)
    if mounted.returncode:
        pytest.skip("mounting a small file system needs root")
    yield folder
    subprocess.run(["umount", "-l", str(folder)], check=True)


def test_a_full_disk_while_saving(place, capsys, small_disk):
    message = told(capsys, "--config=config.py", f"--workdir={small_disk / 'run'}")
    assert "No space left" in message and "run again to go on" in message


def test_a_full_disk_while_recording(place, capsys):
    """Whoever meets the full disk first, the record or a checkpoint in the background: the remedy is the same."""
    assert train.main(["--config=config.py", "--workdir=run"]) == 0
    shutil.rmtree("run/checkpoints")
    (place / "run/metrics.jsonl").unlink()
    (place / "run/metrics.jsonl").symlink_to("/dev/full")
    message = told(capsys, "--config=config.py", "--workdir=run")
    assert "cannot write run: No space left" in message and "run again to go on" in message
    (place / "run/metrics.jsonl").unlink()
    assert train.main(["--config=config.py", "--workdir=run"]) == 0


def test_an_empty_corpus(place, capsys):
    from tools import prepare_corpus

    (place / "empty.jsonl").write_text('{"text": ""}\n{"other": 1}\nnot json\n')
    message = told(capsys, "--input=empty.jsonl", "--tokenizer=bytes", "--output=out", main=prepare_corpus.main)
    assert "empty.jsonl" in message or "no document" in message
    assert not (place / "out" / "store.json").exists()


def test_inspection_and_plan(place, capsys):
    from tools import inspect_stream, plan

    main = inspect_stream.main
    assert "give one of --step" in told(capsys, "--config=config.py", main=main)
    assert "steps 0 to 9" in told(capsys, "--config=config.py", "--step=10", main=main)
    assert "rows 0 to 3" in told(capsys, "--config=config.py", "--step=1", "--row=4", main=main)
    assert "no document with this id" in told(capsys, "--config=config.py", "--document=text:nix", main=main)
    assert "SOURCE:ID with a source of text" in told(capsys, "--config=config.py", "--document=web:1", main=main)
    flip_a_byte(place / "store")
    assert "damaged" in told(capsys, "--config=config.py", "--verify", main=plan.main)


def test_random_bytes_as_config(place, capsys):
    (place / "noise.py").write_bytes(np.random.default_rng(0).bytes(200))
    assert "failed with" in told(capsys, "--config=noise.py")
