"""Preparing a corpus: every format, every kind of bad record, the same store however it came to be made."""

import gzip
import hashlib
import json
import os
import resource
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import zstandard

from mixlab.corpus import prepare as P
from mixlab.corpus import shards
from mixlab.corpus.records import Settings, hash_split, metadata_fields
from mixlab.corpus.store import TokenStore
from mixlab.errors import UserError

ROOT = Path(__file__).parents[2]
TOOL = [sys.executable, str(ROOT / "tools" / "prepare_corpus.py")]
ENVIRONMENT = {**os.environ, "PYTHONPATH": str(ROOT)}


def records(n, first=0):
    return [
        {
            "id": f"doc-{i}",
            "text": f"Document number {i}. " + "word " * (i % 50) + "été",
            "url": f"https://example.org/{i}",
            "meta": {"source": f"s{i % 3}", "rank": i},
        }
        for i in range(first, first + n)
    ]


def lines(rows):
    return b"".join(json.dumps(row).encode() + b"\n" for row in rows)


def make(inputs, output, tokenizer="bytes", workers=1, settings=None, **specials):
    inputs = [str(i) for i in inputs]
    return P.prepare(inputs, tokenizer, output, settings, workers, show_progress=False, **specials)[0]


def contents(store_path):
    files = sorted(p for p in Path(store_path).rglob("*") if p.is_file())
    return {str(p.relative_to(store_path)): hashlib.sha256(p.read_bytes()).hexdigest() for p in files}


def texts(store):
    tokenizer = store.tokenizer()
    return [tokenizer.decode(store[d]) for d in range(len(store))]


def write_zst(path, data):
    path.write_bytes(zstandard.ZstdCompressor().compress(data))


def test_every_format_gives_the_same_documents(tmp_path):
    rows = records(40)
    (tmp_path / "a.jsonl").write_bytes(lines(rows))
    (tmp_path / "a.json.gz").write_bytes(gzip.compress(lines(rows[:9])) + gzip.compress(lines(rows[9:])))
    write_zst(tmp_path / "a.jsonl.zst", lines(rows))
    write_zst(tmp_path / "a.json.zst", lines(rows))
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "a.parquet", row_group_size=7)
    settings = Settings(metadata_fields=metadata_fields("url,meta.source,place=meta.rank"))
    for path in sorted(tmp_path.iterdir()):
        store = make([path], tmp_path / "out" / path.name, settings=settings)
        assert texts(store) == [row["text"] for row in rows], path.name
        assert store.column_names == ["id", "split", "bytes", "url", "source", "place"]
        assert store.column("id").to_pylist() == [row["id"] for row in rows]
        assert store.column("source").to_pylist() == [row["meta"]["source"] for row in rows]
        assert store.column("place").to_pylist() == [str(i) for i in range(40)]
        assert store.column("bytes").to_pylist() == [len(row["text"].encode()) for row in rows]
        assert store.column("split").to_pylist() == [hash_split(row["id"], 20) for row in rows]


def test_folder_of_text_files(tmp_path):
    (tmp_path / "in" / "deep").mkdir(parents=True)
    (tmp_path / "in" / "b.txt").write_text("second é\n")
    (tmp_path / "in" / "deep" / "a.md").write_text("third\nline")
    (tmp_path / "in" / "a.txt.gz").write_bytes(gzip.compress(b"first"))
    (tmp_path / "in" / "picture.png").write_bytes(b"\x89PNG")
    (tmp_path / "in" / "empty.txt").write_text(" \n")
    store = make([tmp_path / "in"], tmp_path / "out")
    assert store.column("id").to_pylist() == ["a.txt.gz", "b.txt", "deep/a.md"]
    assert texts(store) == ["first", "second é\n", "third\nline"]
    assert store.manifest["preparation"]["skipped"] == {"empty": {"count": 1, "first": "empty.txt"}}


def test_files_are_sorted_and_taken_once(tmp_path):
    for name, first in (("b.jsonl", 3), ("a.jsonl", 0)):
        (tmp_path / name).write_bytes(lines(records(3, first)))
    store = make([tmp_path / "b.jsonl", f"{tmp_path}/*.jsonl", tmp_path / "a.jsonl"], tmp_path / "out")
    assert store.column("id").to_pylist() == [f"doc-{i}" for i in range(6)]


def test_splits_by_field_and_by_share(tmp_path):
    rows = records(5)
    for row, split in zip(rows, ["train", "validation", "dev", "test", None], strict=True):
        row["split"] = split
    (tmp_path / "a.jsonl").write_bytes(lines(rows))
    store = make([tmp_path / "a.jsonl"], tmp_path / "field", settings=Settings(split_field="split"))
    assert store.column("split").to_pylist() == ["train", "validation", "validation"]
    assert sum(s["count"] for s in store.manifest["preparation"]["skipped"].values()) == 2
    for share, expected in ((0, 0), (1000, 5)):
        settings = Settings(validation_per_mille=share)
        store = make([tmp_path / "a.jsonl"], tmp_path / f"share{share}", settings=settings)
        assert len(store.documents("validation")) == expected
    many = [hash_split(f"doc-{i}", 20) for i in range(20_000)]
    assert 300 < many.count("validation") < 500


BAD = {
    "not UTF-8": b'{"text": "\xff"}\n',
    "not JSON": b'{"text": "cut off\n',
    "without field 'text'": b'{"body": "other field"}\n',
    "whose 'text' is no string": b'{"text": 17}\n',
    "empty": b'{"text": "  "}\n',
    "not Unicode": b'{"text": "half \\ud800 pair"}\n',
}


def test_bad_records_are_counted_with_the_first_place(tmp_path):
    good = lines(records(2))
    (tmp_path / "a.jsonl").write_bytes(good + b"".join(BAD.values()) + b"\n\n" + b"".join(BAD.values()))
    (tmp_path / "b.jsonl").write_bytes(BAD["empty"] + b"[1, 2]\n" + lines(records(1, 2)))
    settings = Settings(shard_megabytes=1e-4)  # so that the counts of several shards are added
    store = make([tmp_path / "*.jsonl"], tmp_path / "out", settings=settings)
    skipped = store.manifest["preparation"]["skipped"]
    assert len(store.manifest["shards"]) > 1
    assert {r: s["count"] for r, s in skipped.items()} == dict.fromkeys(BAD, 2) | {
        "empty": 3,
        "without field 'text'": 3,
    }
    for line, reason in enumerate(BAD, 3):
        assert skipped[reason]["first"].startswith(f"a.jsonl:{line}")
    assert "body" in skipped["without field 'text'"]["first"]
    assert len(store) == 3


def test_parquet_with_bytes_that_are_no_text(tmp_path):
    valid = pa.array([b"good one", b"bad \xff", b"good two"], pa.binary())
    text = pa.Array.from_buffers(pa.string(), 3, valid.buffers())
    pq.write_table(pa.table({"text": text, "other": [1, 2, 3]}), tmp_path / "a.parquet")
    store = make([tmp_path / "a.parquet"], tmp_path / "out")
    assert texts(store) == ["good one", "good two"]
    skipped = store.manifest["preparation"]["skipped"]
    assert skipped == {"not UTF-8": {"count": 1, "first": "a.parquet:2"}}
    assert store.column("id").to_pylist() == ["a.parquet:1", "a.parquet:3"]


def test_missing_and_duplicate_ids_are_counted(tmp_path):
    rows = [
        {"text": "one", "id": "x"},
        {"text": "two", "id": "x"},
        {"text": "three"},
        {"text": "four", "id": 7},
    ]
    (tmp_path / "a.jsonl").write_bytes(lines(rows))
    store = make([tmp_path / "a.jsonl"], tmp_path / "out")
    assert store.column("id").to_pylist() == ["x", "x", "a.jsonl:3", "7"]
    assert store.manifest["preparation"]["duplicate_ids"] == 1
    assert store.manifest["preparation"]["ids_made"] == 1


def test_nothing_usable(tmp_path):
    (tmp_path / "a.jsonl").write_bytes(b'{"body": "x"}\n' * 3)
    with pytest.raises(UserError, match=r"3 without field 'text' \(first: a\.jsonl:1 \(fields: body\)\)"):
        make([tmp_path / "a.jsonl"], tmp_path / "out")
    make([tmp_path / "a.jsonl"], tmp_path / "out", settings=Settings(text_field="body"))
    (tmp_path / "empty.jsonl").write_bytes(b"")
    with pytest.raises(UserError, match="the files are empty"):
        make([tmp_path / "empty.jsonl"], tmp_path / "out2")
    with pytest.raises(UserError, match=r"absent\.jsonl.*no file matches"):
        make([tmp_path / "absent.jsonl"], tmp_path / "out3")
    (tmp_path / "a.pdf").write_bytes(b"%PDF")
    with pytest.raises(UserError, match=r"a\.pdf: unsupported"):
        make([tmp_path / "a.pdf"], tmp_path / "out3")


@pytest.mark.parametrize("name", ["a.jsonl.gz", "a.jsonl.zst", "a.parquet"])
def test_a_truncated_file_is_named(tmp_path, name):
    rows = records(3000)
    path = tmp_path / name
    if name.endswith("gz"):
        path.write_bytes(gzip.compress(lines(rows)))
    elif name.endswith("zst"):
        write_zst(path, lines(rows))
    else:
        pq.write_table(pa.Table.from_pylist(rows), path)
    path.write_bytes(path.read_bytes()[: path.stat().st_size * 2 // 3])
    with pytest.raises(UserError, match=f"{name}: damaged"):
        make([path], tmp_path / "out")


def test_metadata_field_lists():
    assert metadata_fields("") == ()
    assert metadata_fields("url, a.b.c,x=a.b") == (("url", "url"), ("c", "a.b.c"), ("x", "a.b"))
    for wrong in ("url,,x", "a.id", "x,y.x", "bytes", "=a"):
        with pytest.raises(UserError, match="--metadata-fields"):
            metadata_fields(wrong)
    for twice, remedy in (("url,url", "url_2=url"), ("a.url,b.url", "b_url=b.url"), ("a=x,a=y", "y=y")):
        with pytest.raises(UserError, match=f"exists already; name another, as in {remedy}$"):
            metadata_fields(twice)


@pytest.fixture
def corpus(tmp_path):
    (tmp_path / "in").mkdir()
    for part in range(3):
        data = lines(records(1000, 1000 * part)) + BAD["not JSON"]
        (tmp_path / "in" / f"{part}.jsonl.gz").write_bytes(gzip.compress(data, mtime=0))
    return tmp_path / "in"


def repeating(n):
    """Records of which 10 i + 3 repeats 3 bytes 32 times; 10 i + 4 does so 31 times, 10 i + 5 has 32 times 14 bytes."""
    rows = records(n)
    for row in rows:
        row["text"] = row["text"].replace("word " * 20, "")
    for i in range(0, n, 10):
        rows[i + 3]["text"] = "before " + "ab " * 32
        rows[i + 4]["text"] = "before " + ("ab " * 32)[:-3] + "the end"
        rows[i + 5]["text"] = "fourteen bytes" * 40
        rows[i + 6]["text"] = "a" * 20  # with what follows it would be 40
        rows[i + 7]["text"] = "a" * 20
    return rows


def test_documents_that_repeat_are_left_out_when_asked(tmp_path):
    rows = repeating(2000)
    (tmp_path / "a.jsonl").write_bytes(lines(rows))
    settings = Settings(shard_megabytes=0.05, drop_repetitions=True)
    one = make([tmp_path / "a.jsonl"], tmp_path / "one", workers=1, settings=settings)
    two = make([tmp_path / "a.jsonl"], tmp_path / "two", workers=2, settings=settings)
    assert contents(one.path) == contents(two.path) and len(one.manifest["shards"]) > 2
    assert texts(one) == [row["text"] for i, row in enumerate(rows) if i % 10 != 3]
    reason = "with 1 to 13 tokens 32 times or more in a row"
    assert one.manifest["preparation"]["skipped"] == {reason: {"count": 200, "first": "doc-3"}}
    every = make([tmp_path / "a.jsonl"], tmp_path / "every", settings=Settings(shard_megabytes=0.05))
    assert len(every) == 2000 and every.manifest["preparation"]["skipped"] == {}


def test_a_store_with_repetitions_is_not_one_without(tmp_path, corpus):
    (tmp_path / "a.jsonl").write_bytes(lines(repeating(20)))
    dropping = Settings(drop_repetitions=True)
    for name, made, other in (("with", None, dropping), ("without", dropping, None)):
        make([tmp_path / "a.jsonl"], tmp_path / name, settings=made)
        with pytest.raises(UserError, match="another drop_repetitions; nothing was changed"):
            make([tmp_path / "a.jsonl"], tmp_path / name, settings=other)
    interrupted(corpus, tmp_path / "begun")
    with pytest.raises(UserError, match="unfinished work made with another drop_repetitions"):
        make([corpus], tmp_path / "begun", settings=replace(SMALL_SHARDS, drop_repetitions=True))


def test_work_from_before_the_setting_existed_goes_on(tmp_path, corpus):
    def forget(path):
        manifest = json.loads(path.read_text())
        del (manifest["preparation"]["settings"] if "preparation" in manifest else manifest)["drop_repetitions"]
        path.write_text(json.dumps(manifest))

    interrupted(corpus, tmp_path / "out")
    forget(tmp_path / "out" / "preparing" / "settings.json")
    assert len(make([corpus], tmp_path / "out", settings=SMALL_SHARDS)) == 3000
    forget(tmp_path / "out" / "store.json")
    assert P.prepare([str(corpus)], "bytes", tmp_path / "out", SMALL_SHARDS, 1, show_progress=False)[1]
    with pytest.raises(UserError, match="another drop_repetitions"):
        make([corpus], tmp_path / "out", settings=replace(SMALL_SHARDS, drop_repetitions=True))


SMALL_SHARDS = Settings(metadata_fields=(("url", "url"),), shard_megabytes=0.05)


def test_any_number_of_workers_and_any_place_give_the_same_bytes(tmp_path, corpus):
    one = make([corpus], tmp_path / "one", "bpe:300", 1, SMALL_SHARDS)
    three = make([corpus], tmp_path / "three", "bpe:300", 3, SMALL_SHARDS)
    assert contents(one.path) == contents(three.path)
    assert len(one.manifest["shards"]) > 5
    moved = corpus.rename(tmp_path / "elsewhere")
    assert contents(make([moved], tmp_path / "moved", "bpe:300", 1, SMALL_SHARDS).path) == contents(one.path)
    assert texts(one) == [row["text"] for row in records(3000)]
    TokenStore.open(three.path, verify=True)


def arguments(corpus, output, *more):
    fixed = ["--tokenizer=bytes", "--metadata-fields=url", "--shard-megabytes=0.05"]
    return [*TOOL, f"--input={corpus}", f"--output={output}", *fixed, *more]


def test_killed_and_run_again(tmp_path, corpus):
    make([corpus], tmp_path / "whole", settings=SMALL_SHARDS)
    output = tmp_path / "killed"
    # It waits after three shards, so that the kill comes in the middle.
    code = (
        "import sys, time; from mixlab.corpus import shards, prepare; make = shards.make_shard\n"
        "def waiting(task): time.sleep(600 * (task.index > 2)); return make(task)\n"
        "shards.make_shard = waiting\n"
        "from mixlab.corpus.records import Settings\n"
        f"settings = Settings(metadata_fields=(('url', 'url'),), shard_megabytes=0.05)\n"
        f"prepare.prepare([{str(corpus)!r}], 'bytes', {str(output)!r}, settings, 1)"
    )
    process = subprocess.Popen([sys.executable, "-c", code], env=ENVIRONMENT)
    notes = output / "preparing"
    deadline = time.monotonic() + 60
    while len(list(notes.glob("[0-9]*.json"))) < 3 and time.monotonic() < deadline:
        time.sleep(0.005)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    assert not (output / "store.json").exists()
    with pytest.raises(UserError, match="unfinished"):
        TokenStore.open(output)
    (output / "tokens" / ".00004.bin.1.tmp").write_bytes(b"left by the kill")
    kept = {p: p.stat().st_mtime_ns for p in (output / "tokens").glob("0000[012].bin")}
    done = subprocess.run(arguments(corpus, output, "--workers=2"), env=ENVIRONMENT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert len(kept) == 3
    assert kept == {p: p.stat().st_mtime_ns for p in kept}, "a finished shard was made again"
    assert contents(output) == contents(tmp_path / "whole")


def test_workers_end_when_their_parent_is_killed(tmp_path, corpus):
    big = lines(records(40_000))
    (corpus / "big.jsonl").write_bytes(big * 5)
    process = subprocess.Popen(
        arguments(corpus, tmp_path / "out", "--workers=2"), env=ENVIRONMENT, stdout=subprocess.DEVNULL
    )
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children")
    deadline = time.monotonic() + 60
    while not list((tmp_path / "out" / "preparing").glob("[0-9]*.json")) and time.monotonic() < deadline:
        time.sleep(0.01)
    workers = children.read_text().split()
    process.kill()
    process.wait()
    assert len(workers) >= 2

    def alive(pid):
        try:
            return Path(f"/proc/{pid}/stat").read_text().split()[2] != "Z"
        except OSError:
            return False

    while any(map(alive, workers)) and time.monotonic() < deadline:
        time.sleep(0.02)
    assert not any(map(alive, workers))


def interrupted(corpus, output, after=3):
    """Leaves an unfinished store with `after` finished shards."""
    made = []

    def stopping(task):
        if len(made) == after:
            raise KeyboardInterrupt
        made.append(task.index)
        return original(task)

    original, shards.make_shard = shards.make_shard, stopping
    try:
        with pytest.raises(UserError, match="stopped; the same command goes on"):
            make([corpus], output, settings=SMALL_SHARDS)
    finally:
        shards.make_shard = original


def test_changed_input_and_lost_files_are_redone(tmp_path, corpus):
    output = tmp_path / "out"
    interrupted(corpus, output)
    (output / "tokens" / "00001.bin").write_bytes(b"short")
    (corpus / "0.jsonl.gz").write_bytes(gzip.compress(lines(records(900, 50)), mtime=0))
    make([corpus], output, settings=SMALL_SHARDS)
    make([corpus], tmp_path / "whole", settings=SMALL_SHARDS)
    assert contents(output) == contents(tmp_path / "whole")


def test_unfinished_work_with_other_settings_is_refused(tmp_path, corpus):
    interrupted(corpus, tmp_path / "out")
    before = contents(tmp_path / "out")
    with pytest.raises(UserError, match="unfinished work made with another metadata_fields"):
        make([corpus], tmp_path / "out", settings=Settings(shard_megabytes=0.05))
    with pytest.raises(UserError, match="another tokenizer"):
        make([corpus], tmp_path / "out", "bpe:300", settings=SMALL_SHARDS)
    assert contents(tmp_path / "out") == before


def test_finished_store_is_kept(tmp_path, corpus):
    output = tmp_path / "out"
    make([corpus], output, settings=SMALL_SHARDS)
    before = contents(output)
    store, was_there = P.prepare([str(corpus)], "bytes", output, SMALL_SHARDS, 2, show_progress=False)
    assert was_there and len(store) == 3000
    with pytest.raises(UserError, match="another text_field; nothing was changed"):
        make([corpus], output, settings=Settings("url", "id", (("url", "url"),), shard_megabytes=0.05))
    with pytest.raises(UserError, match="another tokenizer"):
        make([corpus], output, "bpe:300", settings=SMALL_SHARDS)
    data = (corpus / "1.jsonl.gz").read_bytes()
    (corpus / "1.jsonl.gz").write_bytes(data[:-9] + bytes([data[-9] ^ 1]) + data[-8:])  # same name, same size
    with pytest.raises(UserError, match="another input; nothing was changed"):
        make([corpus], output, settings=SMALL_SHARDS)
    assert contents(output) == before


def test_output_that_holds_something_else(tmp_path, corpus):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("precious")
    with pytest.raises(UserError, match="not a token store"):
        make([corpus], tmp_path / "mine")
    with pytest.raises(UserError, match="not a token store"):
        make([corpus], tmp_path / "mine" / "thesis.txt")
    with pytest.raises(UserError, match="cannot be written"):
        make([corpus], tmp_path / "mine" / "thesis.txt" / "below")
    assert [p.name for p in (tmp_path / "mine").iterdir()] == ["thesis.txt"]
    (tmp_path / "empty").mkdir()
    make([corpus], tmp_path / "empty")


def test_a_full_disk_gives_one_message_and_keeps_finished_shards(tmp_path, corpus):
    """A limit on file size stands for the full disk: the big shards fail, the first small one does not."""
    (corpus / "9.jsonl").write_bytes(lines([{"id": "long", "text": "x" * 300_000}]))
    code = "import sys; from mixlab import errors; sys.path.insert(0, 'tools'); import prepare_corpus as t; "
    code += "sys.exit(errors.run(t.main, sys.argv[1:]))"
    command = [sys.executable, "-c", code, *arguments(corpus, tmp_path / "out", "--workers=1")[2:]]
    done = subprocess.run(
        command,
        env=ENVIRONMENT,
        cwd=ROOT,
        capture_output=True,
        text=True,
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (200_000, 200_000)),
    )
    assert done.returncode == 2
    assert done.stderr.count("error:") == 1 and "Traceback" not in done.stderr
    assert f"--output={tmp_path / 'out'}: cannot be written (File too large)" in done.stderr
    assert len(list((tmp_path / "out" / "tokens").glob("*.bin"))) > 3
    assert not list((tmp_path / "out" / "tokens").glob(".*"))
    make([corpus], tmp_path / "out", settings=SMALL_SHARDS)
    make([corpus], tmp_path / "whole", settings=SMALL_SHARDS)
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")


def test_bpe_is_trained_on_training_documents_only(tmp_path):
    rows = [{"id": f"t{i}", "text": "aaaa bbbb " * 20, "split": "train"} for i in range(5)]
    rows += [{"id": f"v{i}", "text": "zqzqzqzq " * 50, "split": "validation"} for i in range(5)]
    (tmp_path / "a.jsonl").write_bytes(lines(rows))
    store = make([tmp_path / "a.jsonl"], tmp_path / "out", "bpe:300", settings=Settings(split_field="split"))
    definition = store.tokenizer().definition
    assert '"aaaa"' in definition and '"zq"' not in definition


def test_command_line(tmp_path, corpus):
    def run(*flags):
        return subprocess.run([*TOOL, *flags], env=ENVIRONMENT, capture_output=True, text=True)

    done = run(f"--input={corpus}/*.gz", "--tokenizer=bytes", f"--output={tmp_path / 'out'}", "--workers=1")
    assert done.returncode == 0, done.stderr
    assert "3,000 documents" in done.stdout and "3 not JSON (first: 0.jsonl.gz:1001)" in done.stdout
    again = run(f"--input={corpus}/*.gz", "--tokenizer=bytes", f"--output={tmp_path / 'out'}")
    assert again.returncode == 0 and "finished already" in again.stdout
    odd = [{"text": "a", "url": "https://a.org"}, {"text": "b", "url": None}, {"text": "c"}]
    (tmp_path / "odd.jsonl").write_text("".join(json.dumps(line) + "\n" for line in odd))
    fields = "--metadata-fields=url,site=urll"
    told = run(f"--input={tmp_path}/odd.jsonl", "--tokenizer=bytes", f"--output={tmp_path}/o", fields).stdout
    assert "without a value of 'url': 2 documents" in told
    assert "of 'site': no document has one; is --metadata-fields right?" in told
    (tmp_path / "ha.jsonl").write_bytes(lines(repeating(20)))
    shorter = run(f"--input={tmp_path}/ha.jsonl", "--tokenizer=bytes", f"--output={tmp_path}/s", "--drop-repetitions")
    assert "18 documents" in shorter.stdout
    assert "skipped: 2 with 1 to 13 tokens 32 times or more in a row (first: doc-3)" in shorter.stdout
    for flags, message in {
        ("--embedded", "--tokenizer=bytes", "--output=x", "--drop-repetitions"): "goes with --input",
        ("--inptu=x",): "did you mean --input",
        (f"--input={corpus}", "--output=x"): "--tokenizer is missing",
        (f"--input={corpus}", "--tokenizer=nope.json", "--output=x"): "nope.json",
        (f"--input={corpus}", "--tokenizer=bpe:x", "--output=x"): "bpe:8192",
        (f"--input={corpus}", "--embedded"): "either",
    }.items():
        done = run(*flags)
        assert done.returncode == 2, flags
        assert message in done.stderr and "Traceback" not in done.stderr
    assert not Path("x").exists()


def test_a_store_of_many_shards_reads_across_them(tmp_path, corpus):
    store = make([corpus], tmp_path / "out", settings=SMALL_SHARDS)
    every = np.arange(len(store))
    lengths = np.diff(store.offsets)
    out = np.empty(store.n_tokens, np.int32)
    store.read(every, np.zeros_like(every), lengths, out)
    assert bytes(out.astype(np.uint8)).decode() == "".join(row["text"] for row in records(3000))
