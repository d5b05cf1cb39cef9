import json

import numpy as np
import pytest

from mixlab import errors
from mixlab.batch import render
from mixlab.errors import UserError
from mixlab.inject.experiments.verbatim import Verbatim, completes, memorised, write_strings
from mixlab.inject.items import Group, Items
from mixlab.inject.ngrams import Ngrams
from mixlab.sequences.documents import Documents
from mixlab.sequences.format import FormatConfig
from mixlab.sequences.index import Pieces
from tests.inject.fakes import BYTES, Memory, inserted, material

STEPS, ROWS, LENGTH = 6, 4, 40


@pytest.fixture()
def run():
    rows = np.random.default_rng(1).integers(97, 123, (STEPS * ROWS, LENGTH + 1)).astype(np.int32)
    strings = rows[[3, 9], 5:15].copy()
    rows[14, 31:41] = strings[0]  # ends in the last target
    rows[20, :10] = strings[1]
    return rows, strings


@pytest.fixture()
def experiment(run, tmp_path):
    write_strings(tmp_path / "strings.json", run[1], 5, BYTES.hash)
    return Verbatim(strings=str(tmp_path / "strings.json"))


def the_material(rows, **changes):
    return material(rows=rows, steps=STEPS, rows_per_step=ROWS, row_length=LENGTH, **changes)


def test_nothing_of_the_run_holds_a_string_any_more(run, experiment):
    rows, strings = run
    (group,) = experiment.groups(the_material(rows))
    assert group.where.unit == "row" and [step * ROWS + row for step, row, _ in group.where.positions] == [3, 9, 14, 20]
    changed = rows.copy()
    for (step, row, _), item in zip(group.where.positions, inserted([group]), strict=True):
        changed[step * ROWS + row] = [*item, 0]
    assert not Ngrams(strings).within(changed).any() and Ngrams(strings).within(rows).sum() == 4
    untouched = np.delete(np.arange(len(rows)), [3, 9, 14, 20])
    assert (changed[untouched] == rows[untouched]).all()


def test_items_of_others_that_hold_a_string_are_objected_to(run, experiment):
    rows, strings = run
    clean = Group(Items.of([strings[0][:9], strings[0][9:], rows[0]], ["a", "b", "c"]))  # not even when they meet
    dirty = Group(Items.of([rows[1], [1, 2, *strings[1], 3]], ["d", "e"]))
    assert experiment.objections(the_material(rows), {"other": [clean]}) == []
    (told,) = experiment.objections(the_material(rows), {"other": [clean, dirty]})
    assert told.startswith("experiments.other: item e holds")


def test_completion_is_counted(run, experiment):
    rows, strings = run
    (probe,) = experiment.probes(the_material(rows))
    memory = Memory(strings[:1])
    assert completes(memory, strings, 5).tolist() == [True, False]
    found = probe.run(memory)
    assert found["completed"] == 0.5 and found["completed_se"] == pytest.approx(0.5 / np.sqrt(2))
    assert probe.details(memory)["loss"][0] == pytest.approx(-np.log(0.9), rel=1e-3)


def test_a_wrong_file_is_told(run, tmp_path):
    with pytest.raises(UserError, match=r"experiments\.x\.strings = .*: cannot be read"):
        Verbatim(strings=str(tmp_path / "none.json")).groups(the_material(run[0]))
    write_strings(tmp_path / "other.json", run[1], 5, "another")
    with pytest.raises(UserError, match="another tokenizer"):
        Verbatim(strings=str(tmp_path / "other.json")).probes(the_material(run[0]))
    assert "strings" in Verbatim().problems("experiments.x")[0]


def test_what_a_model_completes_is_found_among_the_beginnings_of_documents(memory_store):
    documents = Documents(memory_store([30, 9, 30, 30]), np.arange(4), (), (0,))
    pieces = Pieces(np.array([0, 0, 1, 1]), np.array([0, 1, 2, 3]), np.array([0, 0, 4, 0]), np.array([30, 10, 10, 30]))
    batch = render(pieces, documents, FormatConfig(), 2, 40)
    texts = [documents.store.texts[d] for d in range(4)]
    wanted = np.array([texts[0][:10], texts[3][:10]])
    model = Memory(texts, vocab_size=10_000)  # knows all; but 1 is too short and 2 begins elsewhere
    assert memorised(model, [batch, batch], 5, 4, 6).tolist() == wanted.tolist()
    assert len(memorised(model, [batch], 1, 4, 6)) == 1
    assert memorised(Memory(texts[3:], vocab_size=10_000), [batch], 5, 4, 6).tolist() == wanted[1:].tolist()


def test_the_command_selects_from_a_run(trunk, tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("MIXLAB_CACHE", str(trunk.parent / "cache"))
    from tools import select_verbatim

    output = tmp_path / "strings.json"
    arguments = [f"--workdir={trunk}", f"--output={output}", "--prefix-tokens=4", "--target-tokens=1", "--count=3"]
    code = errors.run(select_verbatim.main, arguments)
    told = capsys.readouterr()
    assert code == 0, told.err
    values = json.loads(output.read_text())
    assert 1 <= len(values["strings"]) <= 3 and {len(s) for s in values["strings"]} == {5}
    assert "texts, completed by step 20" in told.out
    assert errors.run(select_verbatim.main, arguments) == errors.EXIT_USER_ERROR  # nothing is overwritten
