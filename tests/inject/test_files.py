import gzip
import json

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from mixlab.errors import UserError
from mixlab.inject.files import records, texts


def test_records_of_several_kinds_of_files_have_names(tmp_path):
    lines = [json.dumps({"story": "one"}), "", json.dumps({"story": "two"})]
    (tmp_path / "b.jsonl.gz").write_bytes(gzip.compress("\n".join(lines).encode()))
    (tmp_path / "a.txt").write_text("three")
    pq.write_table(pa.table({"story": ["four"], "rest": [1]}), tmp_path / "c.parquet")
    names = [str(tmp_path / "b.jsonl.gz"), str(tmp_path / "c.parquet")]
    assert texts(names, "story", "here") == {"b:1": "one", "b:3": "two", "c:1": "four"}
    assert texts([str(tmp_path / "a.txt")], "text", "here") == {"a": "three"}


@pytest.mark.parametrize(
    "line, told", [("[1]", "line 2: a list"), ("{", "line 2: not JSON"), ('{"story": 5}', "line 2: no text at 'text'")]
)
def test_what_cannot_be_read_is_named(tmp_path, line, told):
    path = tmp_path / "a.jsonl"
    path.write_text('{"text": "fine"}\n' + line + "\n")
    with pytest.raises(UserError, match=told):
        texts([str(path)], "text", "here")


def test_a_missing_file_is_told_by_its_key(tmp_path):
    with pytest.raises(UserError, match=r"experiments\.x\.files: .*no file matches"):
        list(records([str(tmp_path / "none.jsonl")], (), "experiments.x.files"))
