"""Experiments inside a stream: the control is a control, in every format, on any number of hosts and workers."""

import dataclasses
import json

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from mixlab.comparison import compare
from mixlab.config import Config, LoaderConfig, SourceConfig
from mixlab.data import open_data
from mixlab.errors import UserError
from mixlab.inject.experiments import Forgetting, Knowledge, Texts, Verbatim
from mixlab.inject.experiments.verbatim import write_strings
from mixlab.inject.items import Group, Items, Where
from mixlab.inject.ledger import write_ledger
from mixlab.inject.placement import place
from mixlab.loader import batches
from mixlab.model.presets import llama
from mixlab.schedule.curriculum import CurriculumConfig
from mixlab.schedule.stages import StageConfig
from mixlab.sequences.format import FormatConfig
from mixlab.sequences.metadata import MetadataConfig
from mixlab.stream import Kind
from tests.inject.fakes import BYTES
from tests.stores import write_store

STEPS, ROWS, LENGTH = 12, 4, 32
METADATA = MetadataConfig(columns=("domain",), reduce=None, prefix="D ", suffix=" ")
FORMATS = {
    "concat_chunk": FormatConfig(),
    "across": FormatConfig(mask_documents=False, restart_positions=False, loss_across_documents=True),
    "best_fit": FormatConfig(kind="best_fit"),
    "decompose": FormatConfig(kind="decompose", min_length=8),
    "complete": FormatConfig(kind="complete", bos=True),
    "metadata": FormatConfig(kind="complete", bos=True, metadata=METADATA),
    "metadata_chunks": FormatConfig(bos=True, metadata=METADATA),
}


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    folder = tmp_path_factory.mktemp("treatment")
    rng = np.random.default_rng(0)
    texts = [bytes(rng.integers(97, 123, n).astype(np.uint8)).decode() for n in rng.integers(5, 200, 200)]
    write_store(folder / "one", texts[:100])
    write_store(folder / "other", texts[100:])
    with (folder / "texts.jsonl").open("w") as file:
        file.writelines(json.dumps({"text": "item number"[: 2 + i]}) + "\n" for i in range(8))
    return folder


def config_of(home, format="concat_chunk", steps=STEPS, **settings):
    curriculum = CurriculumConfig() if format == "decompose" else None
    stage = StageConfig(
        steps=steps,
        sequence_length=LENGTH,
        tokens_per_step=ROWS * LENGTH,
        mixture={"one": 0.5, "other": 0.5},
        format=FORMATS[format],
        curriculum=curriculum,
    )
    sources = {name: SourceConfig(str(home / name)) for name in ("one", "other")}
    model = llama(layers=1, d_model=16, heads=2, vocab_size=259, context_length=LENGTH)
    return Config(model=model, sources=sources, stages=(stage,), **settings)


@pytest.fixture(scope="module")
def controls(home):
    return {format: open_data(config_of(home, format)).stream for format in FORMATS}


wheres = st.builds(
    Where,
    copies=st.integers(1, 3),
    isolated=st.booleans(),
    add_eos=st.booleans(),
    start_step=st.none() | st.integers(0, 5),
    end_share=st.none(),
)
asked = st.dictionaries(
    st.sampled_from("abc"),
    st.lists(
        st.builds(
            lambda lengths, where: Group(Items.of([[97 + n % 26] * n for n in lengths]), where),
            st.lists(st.integers(1, 8), min_size=1, max_size=5),
            wheres,
        ),
        min_size=1,
        max_size=2,
    ),
    min_size=1,
    max_size=3,
)


@settings(deadline=None, max_examples=30, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.sampled_from(sorted(FORMATS)), asked, st.integers(0, 3))
def test_treatment_is_control_but_for_the_ledger(controls, format, groups, seed):
    control = controls[format]
    placements = place(dict(sorted(groups.items())), control.grid, seed, 257, 259)
    treated = control.with_insertions(placements)
    every = np.arange(len(control))
    found = compare(treated, control, every)
    assert not found.unexplained
    assert len(found.insertions) == len(placements)
    # Exact counts and content, and nothing moved: tokens that are not under an insertion are where they were.
    counted = {name: sum(len(g.items) * int(g.where.copies) for g in listed) for name, listed in groups.items()}
    assert {name: told["insertions"] for name, told in placements.summary().items()} == counted
    seen = []
    for step in every.tolist():
        whole = treated[step]
        assert whole.tokens.size == control[step].tokens.size
        for span in whole.spans[whole.spans["kind"] == Kind.INSERTED]:
            entry = placements.entry(int(span["document"]))
            row, here = int(span["row"]), slice(span["offset"], span["offset"] + span["length"])
            assert (entry["step"], entry["row"], entry["offset"]) == (step, row, int(span["offset"]))
            assert np.array_equal(whole.tokens[row, here], placements.tokens(int(span["document"])))
            assert entry["experiment"] == placements.names[span["source"]]
            seen.append(int(span["document"]))
        # Any host's rows are those of the whole batch; untouched ones the control's, in everything.
        half = len(whole.tokens) // 2
        parts = [treated.rows(step, 0, half), treated.rows(step, half, len(whole.tokens) - half)]
        plain = control[step]
        for name, array in whole.arrays().items():
            assert np.array_equal(np.concatenate([part.arrays()[name] for part in parts]), array)
            untouched = np.setdiff1d(np.arange(len(whole.tokens)), [e["row"] for e in entries(placements, step)])
            assert np.array_equal(array[untouched], plain.arrays()[name][untouched])
        assert sum(len(part.spans) for part in parts) == len(whole.spans)
        # Whoever masks nothing else masks an isolated insertion.
        isolated = any(placements.isolated[n] for n in placements.of_rows(step, 0, len(whole.tokens)))
        assert treated.shape(step).masked == (control.shape(step).masked or (isolated and format == "decompose"))
        assert treated.shape(step) in treated.shapes()
    assert sorted(seen) == list(range(len(placements)))


def entries(placements, step):
    return [placements.entry(int(n)) for n in placements.of_rows(step, 0, 10**6)]


def test_metadata_are_cut_and_never_trained_on(controls):
    control = controls["metadata"]
    items = Items.of([[97] * 4])
    grid = control.grid
    everywhere = tuple((step, row, 3) for step in range(len(grid)) for row in range(ROWS))
    where = Where(positions=everywhere, copies=len(everywhere), add_eos=False)
    treated = control.with_insertions(place({"x": [Group(items, where)]}, grid, 0, 257))
    for step in range(len(grid)):
        a, b = treated[step], control[step]
        outside = np.ones(a.tokens.shape, bool)
        outside[:, 2:7] = False
        assert (a.loss_weights[outside] <= b.loss_weights[outside]).all()
        assert (a.loss_weights[:, 3:6] == 1).all()


def test_workers_and_hosts_read_the_same(home):
    texts = Texts(files=(str(home / "texts.jsonl"),), where=Where(copies=3))
    stream = open_data(config_of(home, experiments={"texts": texts})).stream
    whole = [stream[step] for step in range(STEPS)]
    rows = len(whole[0].tokens)
    for workers, hosts in ((0, 4), (2, 1)):
        parts = [
            [arrays for _, arrays in batches(stream, 0, LoaderConfig(workers=workers), {(rows, LENGTH): mine})]
            for mine in np.split(np.arange(rows), hosts)
        ]
        for step in range(STEPS):
            joined = np.concatenate([part[step]["tokens"] for part in parts])
            assert np.array_equal(joined, whole[step].tokens)


def test_the_configuration_decides(home):
    texts = Texts(files=(str(home / "texts.jsonl"),), where=Where(copies=2))
    curve = Forgetting(steps=(3, 7))
    both = {"texts": texts, "curve": curve}
    plain = open_data(config_of(home)).stream
    data = open_data(config_of(home, experiments=both))
    control = open_data(config_of(home, experiments=both, experiments_enabled=())).stream
    assert control.fingerprint() == plain.fingerprint() and control.identity() == plain.identity()
    assert data.stream.fingerprint() != plain.fingerprint()
    turned = open_data(config_of(home, experiments=dict(reversed(both.items())))).stream
    assert turned.fingerprint() == data.stream.fingerprint()
    assert list(data.experiments) == ["curve", "texts"]
    # Whole batches are replaced by fresh text, the same when another experiment is absent.
    alone = open_data(config_of(home, experiments=both, experiments_enabled=("curve",))).stream
    told = alone.insertions.summary()["curve"]
    assert told["tokens"] == 2 * ROWS * LENGTH and told["eos_tokens"] == 0
    for step in (3, 7):
        assert np.array_equal(alone[step].tokens, data.stream[step].tokens)
        assert not np.array_equal(alone[step].tokens, plain[step].tokens)
    once_more = open_data(config_of(home, experiments={"curve": curve})).stream
    assert once_more.fingerprint() == alone.fingerprint()
    # What is inserted decides the stream's identity.
    more = dataclasses.replace(texts, where=Where(copies=3))
    assert open_data(config_of(home, experiments=both | {"texts": more})).stream.fingerprint() not in (
        data.stream.fingerprint(),
        plain.fingerprint(),
    )
    # A whole batch of masks it was not: shapes stay those of the run.
    assert data.stream.shapes() == plain.shapes()


@pytest.mark.parametrize("format", ["concat_chunk", "best_fit", "decompose", "complete"])
def test_unread_text_is_read_nowhere(home, format):
    data = open_data(config_of(home, format, steps=4, experiments={"curve": Forgetting(steps=(1,))}))
    material = data.experiments["curve"][1]
    control = data.stream.with_insertions(place({}, data.stream.grid, 0, 257))
    assert control.insertions is None
    read = {source: set() for source in range(2)}
    for step in range(4):
        spans = control[step].spans
        for span in spans[spans["kind"] == Kind.TEXT]:
            read[int(span["source"])].add(int(span["document"]))
    texts = {source: {} for source in range(2)}
    for source, name in enumerate(control.names):
        for document in read[source]:
            texts[source][document] = data.stores[name][document]
    fresh = material.unseen(20, 16, "test")
    assert fresh.shape == (20, 16) and np.array_equal(fresh, material.unseen(20, 16, "test"))
    other = material.unseen(20, 16, "another")
    assert not {row.tobytes() for row in fresh} & {row.tobytes() for row in other}
    running = b" ".join(t.astype(np.int32).tobytes() for side in texts.values() for t in side.values())
    inner = [row for row in fresh if not (row >= 256).any()]
    assert len(inner) > 3 and not any(row.tobytes() in running for row in inner)
    with pytest.raises(UserError, match=r"(?s)experiments.curve needs 9999 rows.*are left"):
        material.unseen(9999, 32, "much")


def test_mistakes_are_told_at_once_before_anything_is_trained(home, tmp_path):
    (tmp_path / "long.jsonl").write_text(json.dumps({"text": "x" * 40}) + "\n" + json.dumps({"text": ""}))
    experiments = {
        "absent": Texts(files=(str(tmp_path / "none.jsonl"),)),
        "late": Forgetting(steps=(99,)),
    }
    with pytest.raises(UserError, match=r"(?s)experiments\.absent\.files.*experiments\.late\.steps: 99"):
        open_data(config_of(home, experiments=experiments))
    experiments = {
        "long": Texts(files=(str(tmp_path / "long.jsonl"),)),
        "window": Texts(files=(str(home / "texts.jsonl"),), where=Where(end_step=99)),
    }
    with pytest.raises(UserError, match=r"(?s)experiments\.long: item 'long:2' is empty.*window.*end_step = 99"):
        open_data(config_of(home, experiments=experiments))
    much = {"much": Texts(files=(str(home / "texts.jsonl"),), where=Where(copies=100))}
    with pytest.raises(UserError, match=r"(?s)experiments insert .* tokens.*most is of much"):
        open_data(config_of(home, experiments=much))


def test_what_may_be_decided_later_is_searched_too(home, tmp_path):
    control = open_data(config_of(home)).stream
    string = control[2].tokens[1, 4:16]
    write_strings(tmp_path / "strings.json", string[None], 4, BYTES.hash)
    (tmp_path / "queries.jsonl").write_text(json.dumps({"input": "a", "target": "b"}))
    held, kept_out = BYTES.decode(string), Verbatim(strings=str(tmp_path / "strings.json"))
    assert len(held) == 12

    def opened(*texts):
        pool = tmp_path / f"pool-{len(texts)}-{len(texts[-1])}.jsonl"
        pool.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
        facts = Knowledge(every_steps=4, first_texts=1, texts=(str(pool),), queries=(str(tmp_path / "queries.jsonl"),))
        return open_data(config_of(home, experiments={"facts": facts, "kept": kept_out}))

    treated = opened("one", "two", "three", held[1:]).stream
    assert treated.insertions.summary()["kept"]["insertions"] >= 1
    with pytest.raises(UserError, match=r"experiments\.facts: item \S+ holds a text that experiments\.kept keeps out"):
        opened("one", "two", "three", f"and {held}")
    opened(*["one", "two", "three"] * 3, held)  # the tenth of a pool, of which no decision can reach more than 7


def test_documents_are_found_where_insertions_leave_them(home, controls):
    control = controls["concat_chunk"]
    everywhere = tuple((step, row, 5) for step in range(STEPS) for row in range(ROWS))
    where = Where(positions=everywhere, copies=len(everywhere), add_eos=False)
    treated = control.with_insertions(place({"x": [Group(Items.of([[97] * 7]), where)]}, control.grid, 0, 257))
    for document in (1, 2, 3):
        before, after = control.find("one", document), treated.find("one", document)
        covered = sum(len(range(max(p.offset, 5), min(p.offset + p.length, 12))) for p in before)
        assert sum(p.length for p in after) == sum(p.length for p in before) - covered
        for place_ in after:
            batch = treated[place_.step]
            text = batch.spans[(batch.spans["row"] == place_.row) & (batch.spans["offset"] == place_.offset)]
            assert text["kind"][0] != Kind.INSERTED and text["document"][0] == document


def test_the_ledger_as_a_file(home, tmp_path):
    from pyarrow import parquet

    texts = Texts(files=(str(home / "texts.jsonl"),), where=Where(copies=2))
    placements = open_data(config_of(home, experiments={"texts": texts})).stream.insertions
    write_ledger(placements, tmp_path / "ledger.parquet")
    table = parquet.read_table(tmp_path / "ledger.parquet")
    assert table.column_names == ["experiment", "item", "copy", "step", "row", "offset", "length", "stage"]
    assert table.to_pylist() == [placements.entry(number) for number in range(len(placements))]
    assert {row["item"] for row in table.to_pylist()} == {f"texts:{i}" for i in range(1, 9)}
