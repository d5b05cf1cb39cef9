"""Insertions over rows: the worked examples' streams, and treatment against control outside the insertions."""

import hashlib

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mixlab.batch import SPAN, Kind, Layout, finish
from mixlab.inject.grid import Grid
from mixlab.inject.overlay import Insertion, insertions_in, overlay
from mixlab.inject.placement import place
from mixlab.sequences.format import FormatConfig
from tests.inject.test_placement import EOS, GRID, TOY, WIN


def layout_of(numbers, tokens=None):
    """Rows of documents with these numbers (0 for padding), the last column being the target."""
    numbers = np.array(numbers, np.int32)
    rows, width = numbers.shape
    begins = np.ones(numbers.shape, bool)
    begins[:, 1:] = numbers[:, 1:] != numbers[:, :-1]
    columns = np.arange(width, dtype=np.int32)
    positions = columns - np.maximum.accumulate(np.where(begins, columns, 0), axis=1)
    begins[:, -1] = False
    spans = np.zeros(begins.sum(), SPAN)
    spans["row"], spans["offset"] = np.nonzero(begins)
    linear = spans["row"] * (width - 1) + spans["offset"]
    spans["length"] = np.diff(linear, append=rows * (width - 1))
    spans["document"] = numbers[spans["row"], spans["offset"]]
    spans["kind"] = np.where(spans["document"] > 0, Kind.TEXT, Kind.PADDING)
    if tokens is None:
        tokens = 1000 + np.arange(rows * width, dtype=np.int32).reshape(rows, width)
    return Layout(tokens, numbers, positions, lambda: spans)


def worked_stream(placements=None):
    base = (1000 + np.arange(64 * 32) % 7919).astype(np.int32).reshape(64, 32)
    layout = layout_of(np.ones((64, 33), int), np.concatenate([base, base[:, :1]], axis=1))
    if placements is not None:
        for step in range(64):
            row = layout_of(np.ones((1, 33), int), layout.tokens[step : step + 1].copy())
            layout.tokens[step] = overlay(row, insertions_in(placements, step, 0, 1)).tokens[0]
    return layout.tokens[:, :32]


def hash_of(tokens):
    return hashlib.sha256(np.ascontiguousarray(tokens, "<u4").tobytes()).hexdigest()


def test_the_streams_of_the_worked_examples():
    before = worked_stream()
    assert hash_of(before) == "6569dccc03179bd46cbfa705231f013e23409ee8d9827120605ee3adc835acc0"
    after = worked_stream(place({"toy": [TOY]}, GRID, 7, EOS))
    assert hash_of(after) == "d04f602d173354c2cae7c43acfc8501579e4e68739c6661ae6663001eb34066d"
    assert (before != after).sum() == 84
    assert after[59, 10:21].tolist() == [2898, 2899, 2900, 0, 101, 102, 103, 0, 2906, 2907, 2908]
    both = worked_stream(place({"toy": [TOY], "win": [WIN]}, GRID, 7, EOS))
    assert hash_of(both) == "5150208b5c5c93e2c7553f9b493f860de7875a50ca939fc56e3c4c2e6708a6a1"
    assert (before != both).sum() == 244


@pytest.mark.parametrize("hosts", [1, 2, 4, 8])
@pytest.mark.parametrize("strided", [False, True])
def test_the_worked_stream_on_any_hosts(hosts, strided):
    """Batches of 8 rows, each host with a part of every one."""
    grid, rows, whole = Grid.uniform(8, 8, 32), worked_stream(), np.zeros((64, 32), np.int32)
    placements = place({"toy": [TOY]}, grid, 7, EOS)
    for step, host in np.ndindex(8, hosts):
        mine = np.arange(host, 8, hosts) if strided else np.arange(8).reshape(hosts, -1)[host]
        for block in np.split(mine, np.flatnonzero(np.diff(mine) != 1) + 1):
            here = step * 8 + block
            layout = layout_of(np.ones((len(block), 33), int), np.pad(rows[here], ((0, 0), (0, 1))))
            whole[here] = overlay(layout, insertions_in(placements, step, int(block[0]), len(block))).tokens[:, :32]
    assert hash_of(whole) == "d04f602d173354c2cae7c43acfc8501579e4e68739c6661ae6663001eb34066d"


FORMAT = FormatConfig()


def spans_of(batch):
    return [(Kind(s["kind"]).name[0], *(int(s[k]) for k in ("row", "offset", "length", "start"))) for s in batch.spans]


def test_an_isolated_insertion_cuts_its_host_in_two():
    layout = overlay(layout_of([[1, 1, 1, 1, 1, 1, 2, 2, 2]]), [Insertion(0, 1, np.array([7, 8]), True, 3, 5)])
    batch = finish(layout, FORMAT)
    assert batch.tokens.tolist() == [[1000, 7, 8, 1003, 1004, 1005, 1006, 1007]]
    assert batch.positions.tolist() == [[0, 0, 1, 0, 1, 2, 0, 1]]
    assert segments(batch) == [[0, 1, 1, 2, 2, 2, 3, 3]]
    assert batch.loss_weights.tolist() == [[0, 1, 0, 1, 1, 0, 1, 1]]
    assert spans_of(batch) == [("T", 0, 0, 1, 0), ("I", 0, 1, 2, 0), ("T", 0, 3, 3, 3), ("T", 0, 6, 2, 0)]
    assert (int(batch.spans["source"][1]), int(batch.spans["document"][1])) == (3, 5)


def segments(batch):
    """The segments of each row, numbered as they come."""
    return [[list(dict.fromkeys(row)).index(s) for s in row] for row in batch.segment_ids.tolist()]


def test_one_in_context_belongs_to_the_document_it_begins_in():
    layout = overlay(layout_of([[1, 1, 1, 1, 1, 1, 2, 2, 2]]), [Insertion(0, 1, np.array([7, 8]), False)])
    batch = finish(layout, FORMAT)
    assert batch.tokens[0, 1:3].tolist() == [7, 8]
    assert batch.positions.tolist() == [[0, 1, 2, 3, 4, 5, 0, 1]] and segments(batch) == [[0] * 6 + [1] * 2]
    layout = overlay(layout_of([[1, 1, 1, 1, 1, 1, 2, 2, 2]]), [Insertion(0, 5, np.array([7, 8]), False)])
    batch = finish(layout, FORMAT)
    assert batch.positions.tolist() == [[0, 1, 2, 3, 4, 5, 6, 1]] and segments(batch) == [[0] * 7 + [1]]


@pytest.mark.parametrize("isolated", [True, False])
def test_padding_takes_insertions_and_stays_padding(isolated):
    layout = overlay(layout_of([[1, 1, 0, 0, 0, 0, 0, 0, 0]]), [Insertion(0, 4, np.array([7, 8, 9]), isolated)])
    batch = finish(layout, FORMAT)
    assert (batch.segment_ids > 0).tolist() == [[True, True, False, False, True, True, True, False]]
    assert batch.positions[0, 4:7].tolist() == [0, 1, 2]
    assert batch.loss_weights.tolist() == [[1, 0, 0, 0, 1, 1, 0, 0]]


def test_without_document_masking_an_insertion_is_a_document_like_others():
    format = FormatConfig(mask_documents=False, restart_positions=False, loss_across_documents=True)
    batch = finish(overlay(layout_of([[1] * 9]), [Insertion(0, 2, np.array([7, 8]))]), format)
    assert (batch.segment_ids == 1).all() and (batch.loss_weights == 1).all()
    assert batch.positions.tolist() == [list(range(8))]
    assert batch.targets.tolist() == [[1001, 7, 8, 1004, 1005, 1006, 1007, 1008]]


def test_repetitions_are_looked_for_in_what_is_read():
    format = FormatConfig(mask_repetitions=True)
    repeated = layout_of([[1] * 65], np.full((1, 65), 5, np.int32))
    assert finish(repeated, format).loss_weights.sum() == 0
    cured = overlay(repeated, [Insertion(0, 20, np.arange(100, 125))])
    assert finish(cured, format).loss_weights.sum() > 0
    ill = overlay(layout_of([[1] * 65]), [Insertion(0, 20, np.full(40, 5))])
    assert finish(ill, format).loss_weights.sum() == 0


@st.composite
def rows_with_insertions(draw):
    width = draw(st.integers(3, 12))
    numbers, insertions = [], []
    for row in range(draw(st.integers(1, 3))):
        cuts = draw(st.lists(st.integers(1, width), max_size=3, unique=True).map(sorted))
        numbers.append([1 + sum(c <= i for c in cuts) for i in range(width)])
        if draw(st.booleans()):
            pad = draw(st.integers(1, width))
            numbers[-1][pad:] = [0] * (width - pad)
        at = 0
        while at < width - 1 and draw(st.booleans()):
            at += draw(st.integers(0, 3))
            length = draw(st.integers(1, 4))
            if at + length >= width:
                break
            tokens = np.arange(length) + 10 * at
            insertions.append(Insertion(row, at, tokens, draw(st.booleans()), 1, len(insertions)))
            at += length
    return numbers, insertions


@settings(deadline=None, max_examples=200)
@given(rows_with_insertions(), st.booleans(), st.booleans())
def test_only_what_lies_under_an_insertion_changes(rows, across, masked):
    numbers, insertions = rows
    format = FormatConfig(loss_across_documents=across, mask_documents=masked)
    control = finish(layout_of(numbers), format)
    batch = finish(overlay(layout_of(numbers), insertions), format)
    length = control.tokens.shape[1]
    under = np.zeros(control.tokens.shape, bool)
    for one in insertions:
        here = slice(one.offset, one.offset + len(one.tokens))
        under[one.row, here] = True
        assert np.array_equal(batch.tokens[one.row, here], one.tokens)
        segment = batch.segment_ids[one.row, here]
        assert (segment == segment[0]).all() and segment[0] > 0
        steps = np.diff(batch.positions[one.row, here])
        assert (steps == 1).all()
        if one.isolated and masked:
            assert batch.positions[one.row, one.offset] == 0
            assert (batch.segment_ids[one.row] == segment[0]).sum() == len(one.tokens)
    before = under.copy()
    before[:, :-1] |= under[:, 1:]
    assert np.array_equal(batch.tokens[~under], control.tokens[~under])
    assert np.array_equal(batch.targets[~before], control.targets[~before])
    # The token behind an insertion may be in another document than before; all else bears loss as it did.
    assert np.array_equal(batch.loss_weights[~before], control.loss_weights[~before])
    untouched = ~under.any(axis=1)
    for name in control.arrays():
        assert np.array_equal(batch.arrays()[name][untouched], control.arrays()[name][untouched])
    # Segments are told apart as documents are: every segment is one stretch, and the same tokens go together as before.
    if masked:
        for row in range(len(numbers)):
            ids = batch.segment_ids[row]
            starts = np.flatnonzero(np.diff(ids, prepend=-1) != 0)
            real = [int(ids[s]) for s in starts if ids[s]]
            assert len(real) == len(set(real))
            assert (batch.positions[row, starts][ids[starts] > 0] == 0).sum() >= len(real) - sum(
                not one.isolated for one in insertions
            )
            same = ~under[row, 1:] & ~under[row, :-1]
            assert np.array_equal((ids[1:] == ids[:-1])[same], (np.diff(control.segment_ids[row]) == 0)[same])
    # Every position lies in one span, whose tokens are where it says.
    covered = np.zeros(under.shape, int)
    for span in batch.spans:
        here = (span["row"], slice(span["offset"], span["offset"] + span["length"]))
        covered[here] += 1
        assert (under[here] == (span["kind"] == Kind.INSERTED)).all()
        if span["kind"] == Kind.TEXT:
            row = numbers[span["row"]]
            assert row[span["offset"]] == span["document"]
            assert row.index(span["document"]) + span["start"] == span["offset"]
    assert (covered == 1).all() and covered.shape[1] == length
