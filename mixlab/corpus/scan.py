"""Text that this Python installation ships: standard library, the packages mixlab needs, and their documents.

Nothing is imported or executed (but pydoc_data.topics, the language reference as a dict); files that cannot
be read or decoded are left out. The result is a function of the installation alone.
"""

import hashlib
import importlib.metadata
import os
import re
import sys
import sysconfig
import tokenize
import tomllib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from importlib.metadata import Distribution, PackageNotFoundError
from pathlib import Path
from typing import NamedTuple

from mixlab.corpus import arithmetic
from mixlab.corpus.docstrings import docstrings

DOMAINS = ("docstrings", "math", "package_code", "reference", "stdlib_code")
LEFT_OUT_FOLDERS = {
    "test",
    "tests",
    "testing",
    "testdata",
    "idle_test",
    "site-packages",
    "dist-packages",
    "__pycache__",
}
LEFT_OUT_STDLIB = {"lib2to3", "encodings", "turtledemo", "ensurepip", "pydoc_data"}
MINIMUM_CHARACTERS = 64
PARSED_BYTES = 400_000  # larger files are tables, slow to parse
DOCSTRING_TENTHS = 3  # of all modules become docstrings, the others code, so that the two never overlap
GENERATED = re.compile(r"(.*\n){0,4}.*(auto-?|automatically )generated", re.IGNORECASE)  # in the first five lines
LICENCE = re.compile(r"(^|/)(licen[cs]e|notice|copying|authors)[^/]*$", re.IGNORECASE)
SOURCE_LABELS = ("source", "source code", "repository", "github", "code", "homepage", "home")


class Document(NamedTuple):
    """group: what a document is split and, for code, given its role by; id = domain/group, made unique."""

    id: str
    text: str
    url: str
    domain: str
    group: str


@dataclass(frozen=True)
class Scope:
    """What to scan. stdlib: a folder of .py files, None: the interpreter's own; distributions: names, None:
    all that mixlab needs; package_bytes: cap on package code; math_documents: of synthetic mathematics."""

    stdlib: str | None = None
    distributions: tuple[str, ...] | None = None
    package_bytes: int = 24_000_000
    math_documents: int = 2500


def scan(scope: Scope) -> list[Document]:
    """All documents, sorted by (domain, id), without exact duplicates, code that says it was generated, and those under
    64 characters."""
    documents = [*_stdlib(scope), *_packages(scope), *_topics(), *_math(scope)]
    seen, kept = set(), []
    for document in sorted(documents, key=lambda d: (d.domain, d.id)):
        digest = hashlib.sha256(document.text.encode()).digest()
        if len(document.text) >= MINIMUM_CHARACTERS and digest not in seen:
            seen.add(digest)
            kept.append(document)
    return kept


def identity(scope: Scope) -> dict:
    """What the scan depends on, without scanning: Python and the distributions with their versions."""
    distributions = {_name(d.metadata["Name"]): d.version for d in distributions_of(scope)}
    return {"python": sys.version, "stdlib": scope.stdlib or "", "distributions": distributions}


def distributions_of(scope: Scope) -> list[Distribution]:
    """The distributions to scan, by name: those mixlab needs and what they need in turn, extras and mixlab
    left out."""
    if scope.distributions is not None:
        todo, follow = list(scope.distributions), False
    else:
        todo, follow = _requirements(), True
    found: dict[str, Distribution] = {}
    while todo:
        requirement = todo.pop()
        if re.search(r"\bextra\s*==", requirement):
            continue
        name = _name(re.match(r"[A-Za-z0-9._-]*", requirement).group())
        if name in found or name == "mixlab":
            continue
        try:
            found[name] = importlib.metadata.distribution(name)
        except PackageNotFoundError:  # for another platform
            continue
        todo += (found[name].requires or []) if follow else []
    return [found[name] for name in sorted(found)]


def _requirements() -> list[str]:
    try:
        return importlib.metadata.requires("mixlab") or []
    except PackageNotFoundError:  # run from a checkout that is not installed
        project = Path(__file__).parents[2] / "pyproject.toml"
        return tomllib.loads(project.read_text())["project"]["dependencies"] if project.is_file() else []


def _name(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def hash_of(text: str) -> int:
    """The first 32 bits of sha256, the source of every choice here."""
    return int(hashlib.sha256(text.encode()).hexdigest()[:8], 16)


def _becomes_docstrings(group: str) -> bool:
    return hash_of(f"role:{group}") % 10 < DOCSTRING_TENTHS


def _read_source(path: str) -> str | None:
    try:
        with tokenize.open(path) as file:  # honours the file's declared encoding
            text = file.read()
        text.encode()
        return text
    except (OSError, SyntaxError, ValueError):
        return None


def _module(path: str, group: str, domain: str, code_url: str, docs_url: str) -> Document | None:
    as_docstrings = _becomes_docstrings(group)
    if as_docstrings and os.path.getsize(path) > PARSED_BYTES:
        return None
    text = _read_source(path)
    if text is None or GENERATED.match(text):  # tables of up to 300,000 tokens, a sixth of a first run
        return None
    if not as_docstrings:
        return Document(f"{domain}/{group}", text, code_url, domain, group)
    text = docstrings(text)
    return Document(f"docstrings/{group}", text, docs_url, "docstrings", group) if text else None


def _stdlib(scope: Scope) -> Iterator[Document]:
    root = Path(scope.stdlib or sysconfig.get_path("stdlib"))
    version = ".".join(map(str, sys.version_info[:3]))
    for folder, folders, files in os.walk(root):
        top = Path(folder) == root
        folders[:] = [f for f in folders if f not in LEFT_OUT_FOLDERS and not (top and f in LEFT_OUT_STDLIB)]
        for file in files:
            if not file.endswith(".py"):
                continue
            path = os.path.join(folder, file)
            group = Path(path).relative_to(root).as_posix()
            code = f"https://github.com/python/cpython/blob/v{version}/Lib/{group}"
            docs = f"https://docs.python.org/3/library/{group.split('/')[0].removesuffix('.py')}.html"
            document = _module(path, group, "stdlib_code", code, docs)
            if document:
                yield document


def _packages(scope: Scope) -> Iterator[Document]:
    modules = {}
    for distribution in distributions_of(scope):
        url = _project_url(distribution)
        files = [f for f in distribution.files or () if not LEFT_OUT_FOLDERS & set(f.parts) and ".." not in f.parts]
        for file in files:
            if file.suffix == ".py" and not re.match(r"test_|.*_test\.py", file.name):
                modules[file.as_posix()] = (str(distribution.locate_file(file)), f"{url}/{file.as_posix()}")
        yield from _reference(distribution, url, files)
    left = scope.package_bytes
    for group in sorted(modules, key=lambda g: (hash_of(g), g)):
        path, url = modules[group]
        try:
            size = 0 if _becomes_docstrings(group) else os.path.getsize(path)
            if size > left:
                continue
            document = _module(path, group, "package_code", url, url)
        except OSError:
            continue
        if document:
            left -= size
            yield document


def _reference(
    distribution: Distribution, url: str, files: Iterable[importlib.metadata.PackagePath]
) -> Iterator[Document]:
    name = _name(distribution.metadata["Name"])
    readme = distribution.metadata.get("Description") or distribution.metadata.get_payload()
    if isinstance(readme, str):
        yield Document(f"reference/{name}/README", _clean(readme), url, "reference", name)
    for file in files:
        path = file.as_posix()
        if file.suffix in (".md", ".rst") or LICENCE.search(path):
            text = _read_text(str(distribution.locate_file(file)))
            if text:
                yield Document(f"reference/{name}/{path}", text, f"{url}/{path}", "reference", name)


def _read_text(path: str) -> str | None:
    try:
        return Path(path).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError):
        return None


def _clean(text: str) -> str:
    return text.encode("utf-8", "replace").decode()


def _project_url(distribution: Distribution) -> str:
    labelled = [entry.partition(",") for entry in distribution.metadata.get_all("Project-URL") or ()]
    links = {label.strip().lower(): link.strip().rstrip("/") for label, _, link in labelled}
    found = next((links[label] for label in SOURCE_LABELS if links.get(label, "").startswith("http")), None)
    home = (distribution.metadata.get("Home-page") or "").rstrip("/")
    if found or home.startswith("http"):
        return found or home
    return f"pkg:pypi/{_name(distribution.metadata['Name'])}@{distribution.version}"


def _topics() -> Iterator[Document]:
    try:
        from pydoc_data.topics import topics
    except ImportError:
        return
    for topic, text in topics.items():
        url = f"https://docs.python.org/3/reference/{topic}"
        yield Document(f"reference/python/{topic}", text, url, "reference", f"topic:{topic}")


def _math(scope: Scope) -> Iterator[Document]:
    for number in range(scope.math_documents):
        topic, text = arithmetic.document(0, number)
        group = f"{topic}/{number:05d}"
        yield Document(f"math/{group}", text, f"https://mathematics.invalid/{group}", "math", group)
