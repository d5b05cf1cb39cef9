"""The default corpus: what it holds, how it is split, frozen and cached. Scans are kept small by a scope."""

import gzip
import hashlib
import json
import os
import subprocess
import sys
from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from mixlab.corpus import arithmetic, embedded
from mixlab.corpus import scan as S
from mixlab.corpus.docstrings import docstrings
from mixlab.corpus.prepare import prepare
from mixlab.corpus.records import Settings, metadata_fields
from mixlab.corpus.scan import Document, Scope
from mixlab.errors import UserError

ROOT = Path(__file__).parents[2]


@pytest.fixture
def library(tmp_path):
    """A small standard library."""
    root = tmp_path / "library"
    for i in range(30):
        folder = root / ("asyncio" if i % 3 else "json") / f"module_{i}.py"
        folder.parent.mkdir(parents=True, exist_ok=True)
        folder.write_text(f'"""Module {i} documented at some length, for the reader."""\n\nVALUE_{i} = {i}\n' * 2)
    for left_out in ("test/test_x.py", "asyncio/tests/y.py", "site-packages/z.py", "lib2to3/w.py"):
        (root / left_out).parent.mkdir(parents=True, exist_ok=True)
        (root / left_out).write_text("SECRET = 'never read'  # " + "x" * 100)
    (root / "latin.py").write_bytes(b"# -*- coding: latin-1 -*-\n# caf\xe9 " + b"z" * 80 + b"\n")
    (root / "broken.py").write_bytes(b"# \xff\xfe not decodable " + b"z" * 80)
    (root / "tiny.py").write_text("x = 1\n")
    return root


@pytest.fixture
def scope(library):
    return Scope(stdlib=str(library), distributions=("absl-py", "tqdm"), math_documents=60)


@pytest.fixture
def documents(scope):
    return S.scan(scope)


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("MIXLAB_CACHE", str(tmp_path / "cache"))


def test_documents_are_sorted_unique_and_of_every_domain(documents):
    assert set(S.DOMAINS) == {d.domain for d in documents}
    assert documents == sorted(documents, key=lambda d: (d.domain, d.id))
    assert len({d.id for d in documents}) == len({d.text for d in documents}) == len(documents)
    assert min(len(d.text) for d in documents) >= 64
    assert not any("never read" in d.text for d in documents)
    assert all(d.url.split(":")[0] in ("https", "http", "pkg") for d in documents)


def test_a_module_is_code_or_docstrings_never_both(documents):
    roles = Counter()
    for d in documents:
        if d.domain in ("docstrings", "stdlib_code", "package_code"):
            salted = hashlib.sha256(f"role:{d.group}".encode()).hexdigest()
            role = "docstrings" if int(salted[:8], 16) % 10 < 3 else "code"
            assert d.domain == role or d.domain.endswith(f"_{role}")
            roles[role] += 1
    assert roles["docstrings"] > 3 and roles["code"] > 20
    groups = Counter(d.group for d in documents if d.domain != "reference")
    assert set(groups.values()) == {1}


def test_encodings_are_honoured_and_undecodable_files_left_out(documents):
    texts = {d.id: d.text for d in documents}
    assert not any("not decodable" in text for text in texts.values())
    latin = [text for text in texts.values() if "café" in text]
    assert len(latin) == (role_of("latin.py") == "code")


def role_of(group):
    return "docstrings" if S.hash_of(f"role:{group}") % 10 < 3 else "code"


def test_urls(documents):
    version = ".".join(map(str, sys.version_info[:3]))
    for d in documents:
        if d.domain == "stdlib_code":
            assert d.url == f"https://github.com/python/cpython/blob/v{version}/Lib/{d.group}"
        if d.domain == "docstrings" and d.group.startswith("asyncio/"):
            assert d.url == "https://docs.python.org/3/library/asyncio.html"
        if d.domain == "package_code" and d.group.startswith("absl/"):
            assert d.url == f"https://github.com/abseil/abseil-py/{d.group}"
    topics = [d for d in documents if d.group.startswith("topic:")]
    assert len(topics) > 50
    assert all(d.url.startswith("https://docs.python.org/3/reference/") for d in topics)


def test_package_code_stops_at_its_cap(scope):
    small = Scope(**{**scope.__dict__, "package_bytes": 60_000})
    few = [d for d in S.scan(small) if d.domain == "package_code"]
    many = {d.id for d in S.scan(scope) if d.domain == "package_code"}
    assert 0 < sum(len(d.text.encode()) for d in few) <= 60_000
    assert {d.id for d in few} < many


def test_closure_is_what_mixlab_needs_without_extras_and_without_itself():
    names = [S._name(d.metadata["Name"]) for d in S.distributions_of(Scope())]
    assert {"jax", "jaxlib", "numpy", "flax", "tokenizers", "pyarrow", "ml-dtypes"} <= set(names)
    assert not {"mixlab", "pytest", "hypothesis", "torch", "ruff"} & set(names)
    assert names == sorted(set(names))


def test_docstrings_keep_signatures_and_drop_code():
    source = '''"""About the module."""
SECRET = 1
class Shape(Base):
    """A shape."""
    def area(self, scale: float = 1.0, *, unit="m") -> float:
        """Its area.

        In square units."""
        return SECRET * scale
    def undocumented(self): pass
async def fetch(url, *rest):
    "Fetches."
'''
    assert docstrings(source) == (
        "About the module.\n\n"
        "class Shape(Base):\nA shape.\n\n"
        "def Shape.area(self, scale: float=1.0, *, unit='m') -> float:\nIts area.\n\nIn square units.\n\n"
        "def fetch(url, *rest):\nFetches."
    )
    assert docstrings("x = 1") == ""
    assert docstrings("def (") is None
    assert docstrings("x = '\0'") is None


def fake(domain, group, i=0):
    return Document(f"{domain}/{group}/{i}", f"text {domain} {group} {i}", "", domain, group)


def test_groups_are_split_whole_and_every_domain_has_validation_documents():
    many = [fake("a", f"g{g}", i) for g in range(1000) for i in range(2)]
    few = [fake("b", f"h{g}") for g in range(20)]
    tiny = [fake("c", f"k{g}") for g in range(3)]
    documents = many + few + tiny
    split = dict(zip(documents, embedded.splits(documents), strict=True))
    for d in many:
        expected = int(hashlib.sha256(f"split-v1:{d.group}".encode()).hexdigest()[:8], 16) % 1000 < 50
        assert (split[d] == "validation") == expected
    held_out = [d for d in few if split[d] == "validation"]
    assert len(held_out) >= 4
    lowest = sorted(few, key=lambda d: S.hash_of(f"split-v1:{d.group}"))
    assert set(held_out) == set(lowest[: len(held_out)])
    assert sum(split[d] == "validation" for d in tiny) == 1
    assert embedded.splits(documents[::-1]) == embedded.splits(documents)[::-1]


def test_fingerprint_is_over_ids_and_texts():
    documents = [fake("a", "x"), fake("a", "y")]
    digest = hashlib.sha256()
    for d in documents:
        digest.update(d.id.encode() + b"\0" + hashlib.sha256(d.text.encode()).digest())
    assert embedded.fingerprint(documents) == digest.hexdigest()


def test_store_is_built_once(scope, documents, capsys):
    store = embedded.store("bpe:300", scope)
    assert "building the default corpus" in capsys.readouterr().err
    tokenizer = store.tokenizer()
    assert [tokenizer.decode(store[d]) for d in range(len(store))] == [d.text for d in documents]
    assert store.column_names == ["id", "split", "bytes", "url", "domain", "group"]
    assert store.column("id").to_pylist() == [d.id for d in documents]
    assert store.column("split").to_pylist() == embedded.splits(documents)
    assert store.manifest["preparation"]["fingerprint"] == embedded.fingerprint(documents)
    again = embedded.store("bpe:300", scope)
    assert capsys.readouterr().err == ""
    assert (again.path, again.fingerprint) == (store.path, store.fingerprint)
    other = embedded.store("bytes", scope)
    assert other.path != store.path and other.vocab_size == 259
    assert len(list((store.path.parent).glob("embedded-*[0-9a-f]"))) == 2


def test_a_damaged_cache_is_built_again(scope, capsys):
    store = embedded.store("bytes", scope)
    shard = store.path / "tokens" / "00000.bin"
    shard.write_bytes(shard.read_bytes()[:-1])
    capsys.readouterr()
    rebuilt = embedded.store("bytes", scope)
    assert "tokens/00000.bin" in capsys.readouterr().err
    assert rebuilt.fingerprint == store.fingerprint
    assert rebuilt[0].tolist() == list(S.scan(scope)[0].text.encode())


def test_processes_that_build_at_once_share_one_store(scope):
    code = (
        "from mixlab.corpus import embedded; from mixlab.corpus.scan import Scope;"
        f"s = embedded.store('bpe:280', {scope!r}); print(s.fingerprint, s[len(s) - 1].sum())"
    )
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    processes = [
        subprocess.Popen([sys.executable, "-c", code], stdout=-1, stderr=-1, text=True, env=environment)
        for _ in range(3)
    ]
    results = [process.communicate() for process in processes]
    assert [process.returncode for process in processes] == [0, 0, 0], results
    assert len({out for out, _ in results}) == 1
    assert sum("building" in err for _, err in results) == 1


def test_an_unusable_cache_folder_is_named(scope, tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("MIXLAB_CACHE", str(tmp_path / "file" / "below"))
    with pytest.raises(UserError, match="set MIXLAB_CACHE"):
        embedded.store("bytes", scope)


def test_frozen_corpus_makes_the_same_store_elsewhere(scope, tmp_path, documents):
    frozen = tmp_path / "frozen.jsonl.gz"
    assert embedded.freeze(frozen, scope) == len(documents)
    with gzip.open(frozen, "rt", encoding="utf-8") as file:
        rows = [json.loads(line) for line in file]
    assert [Document(**{k: r[k] for k in Document._fields}) for r in rows] == documents
    settings = Settings(split_field="split", metadata_fields=metadata_fields("url,domain,group"))
    carried, _ = prepare([str(frozen)], "bytes", tmp_path / "out", settings, 1, show_progress=False)
    direct = embedded.store("bytes", scope)
    for column in direct.column_names:
        assert carried.column(column).to_pylist() == direct.column(column).to_pylist()
    np.testing.assert_array_equal(carried.offsets, direct.offsets)
    embedded.freeze(tmp_path / "again.jsonl.gz", scope)
    assert (tmp_path / "again.jsonl.gz").read_bytes() == frozen.read_bytes()
    with pytest.raises(UserError, match="exists already"):
        embedded.freeze(frozen, scope)
    with pytest.raises(UserError, match=r"name the file \.jsonl\.gz"):
        embedded.freeze(tmp_path / "x.json", scope)


def test_store_at_a_chosen_place(scope, tmp_path):
    store, was_there = embedded.write_store("bytes", tmp_path / "out", scope)
    assert not was_there and store.path == tmp_path / "out"
    assert embedded.write_store("bytes", tmp_path / "out", scope)[1]
    with pytest.raises(UserError, match="holds another store"):
        embedded.write_store("bpe:300", tmp_path / "out", scope)
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("precious")
    with pytest.raises(UserError, match="not a token store"):
        embedded.write_store("bytes", tmp_path / "mine", scope)
    assert [p.name for p in tmp_path.glob(".*")] == []


def test_without_python_sources_it_says_so(tmp_path, capsys):
    (tmp_path / "nothing").mkdir()
    bare = Scope(stdlib=str(tmp_path / "nothing"), distributions=(), math_documents=20)
    store = embedded.store("bytes", bare)
    assert "no .py sources" in capsys.readouterr().err
    assert set(store.column("domain").to_pylist()) == {"math", "reference"}
    assert len(store.documents("validation")) >= 8


def test_mathematics_is_right_and_the_same_everywhere():
    texts = [arithmetic.document(0, i)[1] for i in range(300)]
    assert hashlib.sha256("\n".join(texts).encode()).hexdigest() == MATHEMATICS
    assert len({arithmetic.document(0, i)[0] for i in range(300)}) == len(arithmetic.TOPICS)
    checked = 0
    for text in texts:
        for line in text.splitlines():
            sides = line.rstrip(".").split(" = ")
            if len(sides) > 1 and all(set(side) <= set("0123456789 +-*/") for side in sides):
                values = [eval(side) for side in sides]  # whole numbers and fractions of small ones
                assert max(values) == pytest.approx(min(values), rel=1e-12), line
                checked += 1
    assert checked > 500


MATHEMATICS = "29058e2a60b0b790006632ef7aa3c9eff6cf3f55d1aaef48e44c5e2c9a7b63d2"
