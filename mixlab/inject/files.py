"""What experiments read from files: records with names."""

import json
from collections.abc import Iterator, Sequence
from pathlib import PurePosixPath
from typing import NamedTuple

from mixlab.corpus import readers
from mixlab.errors import UserError


class Record(NamedTuple):
    """name: "<file without endings>:<line>".   place: file and line, for messages.   values: the JSON object."""

    name: str
    place: str
    values: dict

    def text(self, key: str) -> str:
        """The string at `key`, a dotted path; UserError when there is none."""
        value = readers.lookup(self.values, key)
        if not isinstance(value, str):
            raise UserError(f"{self.place}: no text at {key!r}; its keys are {', '.join(map(str, self.values))}")
        return value


def records(patterns: Sequence[str], keys: Sequence[str], where: str) -> Iterator[Record]:
    """The objects of JSON-lines or Parquet files (of these only the columns `keys`), also compressed, in the order of paths
    and lines; of a text file, one with its "text". patterns: paths, globs or folders; `where` names them, for messages.

    UserError: no such file, unreadable, a line that is not a JSON object."""
    try:
        files = readers.find(patterns)
    except UserError as error:
        raise UserError(f"{where}: {error}") from None
    for file in files:
        stem = PurePosixPath(file.name).name.split(".")[0]
        for block in readers.blocks(file, keys, 1 << 20):
            for number, raw in enumerate(block.records, block.first):
                if block.kind == "text":
                    yield Record(stem, file.path, {"text": raw.decode(errors="replace")})
                elif raw.strip():
                    place = f"{file.path}, line {number}"
                    yield Record(f"{stem}:{number}", place, _object(raw, place))


def texts(patterns: Sequence[str], key: str, where: str) -> dict[str, str]:
    """name -> text of every record, in order."""
    return {record.name: record.text(key) for record in records(patterns, (key,), where)}


def _object(raw: bytes, place: str) -> dict:
    try:
        value = json.loads(raw)
    except ValueError as error:
        raise UserError(f"{place}: not JSON ({error}); write one object a line") from None
    if not isinstance(value, dict):
        raise UserError(f"{place}: a {type(value).__name__}, not a JSON object; write one object a line")
    return value
