"""Placement against worked examples, against placing one occurrence after the other, and by its properties."""

import hashlib
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mixlab.errors import UserError
from mixlab.inject.grid import Grid
from mixlab.inject.items import Group, Items, Where
from mixlab.inject.placement import place
from mixlab.inject.places import draw, first_draws

EOS = 0
TOY = Group(Items.of([[101, 102, 103], [*range(201, 206)], [*range(301, 308)]]), Where(copies=4))
WIN = Group(Items.of([[*range(900, 930)]]), Where(copies=5, start_step=16, end_step=32))
GRID = Grid.uniform(64, 1, 32)


def rows_of(placements, name=None):
    """(sequence, offset, length, item, copy), sequences counted over the run, in training order."""
    own = np.arange(len(placements)) if name is None else placements.find(name)
    steps, rows, offsets = placements.places
    columns = (steps * placements.grid.rows[steps] + rows, offsets, placements.length, placements.item, placements.copy)
    return [tuple(int(column[i]) for column in columns) for i in own]


def test_the_draws():
    assert draw(7, "toy", 0, 0) == (17273392691501054696, 8903110609753304019)
    assert draw(7, "win", 0, 0) == (1788177172705276000, 17685477656879842430)
    assert first_draws(7, "toy", 3, 4).tolist() == [list(draw(7, "toy", i, 0)) for i in range(3, 7)]


def test_exact_counts_of_the_worked_example():
    placements = place({"toy": [TOY]}, GRID, 7, EOS)
    listed = [
        (59, 13, 5, 0, 0), (56, 11, 7, 1, 0), (2, 7, 9, 2, 0), (27, 18, 5, 0, 1), (29, 2, 7, 1, 1), (38, 15, 9, 2, 1),
        (40, 5, 5, 0, 2), (57, 20, 7, 1, 2), (31, 6, 9, 2, 2), (26, 10, 5, 0, 3), (46, 9, 7, 1, 3), (35, 16, 9, 2, 3),
    ]  # fmt: skip
    assert rows_of(placements) == sorted(listed)
    text = ";".join(",".join(map(str, row)) for row in rows_of(placements))
    assert (
        hashlib.sha256(text.encode()).hexdigest() == "d70dfdc7f8858192594ab122a978b487e67df1e0f43006ab3c91b4ca06e1bdf4"
    )
    told = placements.summary()["toy"]
    assert (told["redraws"], told["insertions"], told["tokens"], told["items"]) == (2, 12, 84, 3)
    assert told["eos_tokens"] == 24 and (told["first_step"], told["last_step"]) == (2, 59)


def test_two_experiments_of_the_worked_example():
    both, alone = place({"toy": [TOY], "win": [WIN]}, GRID, 7, EOS), place({"win": [WIN]}, GRID, 7, EOS)
    by_copy = sorted(rows_of(both, "win"), key=lambda row: row[4])
    assert [row[:3] for row in by_copy] == [(s, 0, 32) for s in (17, 21, 24, 16, 30)]
    assert [row[0] for row in sorted(rows_of(alone), key=lambda row: row[4])] == [17, 21, 24, 29, 30]
    assert both.summary()["win"]["redraws"] == 1 and alone.summary()["win"]["redraws"] == 0
    assert rows_of(both, "toy") == rows_of(place({"toy": [TOY]}, GRID, 7, EOS))


@pytest.mark.parametrize("item, length", [([5] * 30, 32), ([5] * 31, 32), ([5] * 32, 32), ([0, 5, 0], 3), ([5, 0], 3)])
def test_eos_is_put_around(item, length):
    placements = place({"one": [Group(Items.of([item]))]}, GRID, 0, EOS)
    assert placements.length.tolist() == [length]
    tokens = placements.tokens(0).tolist()
    assert len(tokens) == length and (len(item) == 32 or tokens[-1] == EOS)
    assert len(item) >= 31 or tokens[0] == EOS


@pytest.mark.parametrize(
    "item, told", [([5] * 33, "has 33 tokens.*no item crosses a row"), ([], "is empty"), ([5, -1], "has token -1")]
)
def test_items_that_cannot_be(item, told):
    with pytest.raises(UserError, match=told):
        place({"one": [Group(Items.of([item]))]}, GRID, 0, EOS, vocab_size=300)


def test_places_are_uniform():
    """Worked example; and every copy of the items by itself."""
    grid = Grid.uniform(1000, 1, 64)
    items = Items.of([[5] * 6] * 50)
    placements = place({"uniform": [Group(items, Where(copies=20))]}, grid, 0, EOS)
    steps, _, offsets = placements.places
    told = placements.summary()["uniform"]
    assert (len(placements), told["tokens"], told["redraws"]) == (1000, 8000, 133)
    assert told["expected_redraws"] == pytest.approx(1000**2 / 2 * 15 / 64000)
    assert np.bincount(steps // 100).tolist() == [100, 95, 93, 105, 96, 92, 110, 91, 115, 103]
    assert chi_squared(np.bincount(offsets, minlength=57)) == pytest.approx(58.034)
    sorted_steps = np.sort((steps + 0.5) / 1000)
    empirical = np.arange(1000) / 1000
    assert max((empirical + 0.001 - sorted_steps).max(), (sorted_steps - empirical).max()) == pytest.approx(0.0215)
    for copy in range(20):
        assert chi_squared(np.bincount(steps[placements.copy == copy] // 200, minlength=5)) < 23.5  # p > 1e-4 of 4 df


def chi_squared(counts):
    expected = counts.sum() / len(counts)
    return float(((counts - expected) ** 2 / expected).sum())


def test_the_last_free_places_are_found_and_then_none():
    grid, item = Grid.uniform(4, 1, 8), Items.of([[9] * 8])
    full = place({"full": [Group(item, Where(copies=4))]}, grid, 0, EOS)
    assert [row[0] for row in rows_of(full)] == [0, 1, 2, 3]
    with pytest.raises(UserError, match=r"experiments.full: item '0', copy 4: no free place"):
        place({"full": [Group(item, Where(copies=5))]}, grid, 0, EOS)
    gap = Where(add_eos=False, positions=((0, 0, 0), (1, 0, 0), (2, 0, 0), (3, 0, 0)), copies=4)
    inside = {"gap": [Group(Items.of([[9] * 7]), gap)], "one": [Group(Items.of([[9]]), Where(copies=4, add_eos=False))]}
    placed = place(inside, Grid.uniform(4, 1, 8), 0, EOS)
    assert [row[:2] for row in rows_of(placed, "one")] == [(s, 7) for s in range(4)]


def test_fallbacks_are_counted(monkeypatch):
    monkeypatch.setattr("mixlab.inject.placement.ATTEMPTS", 1)
    item = Items.of([[9] * 8])
    placements = place({"full": [Group(item, Where(copies=4))]}, Grid.uniform(4, 1, 8), 0, EOS)
    assert len(np.unique(placements.position)) == 4 and placements.summary()["full"]["fallbacks"] > 0


def test_given_positions_that_overlap_are_refused_naming_both():
    one = Group(Items.of([[5] * 4], ["a"]), Where(positions=((3, 0, 6),), add_eos=False))
    other = Group(Items.of([[6] * 4], ["b"]), Where(positions=((3, 0, 9),), add_eos=False))
    with pytest.raises(UserError, match=r"experiments.one: item 'a'.*\(3, 0, 6\).*experiments.two: item 'b'.*overlap"):
        place({"one": [one], "two": [other]}, GRID, 0, EOS)
    steps = Group(Items.of([[5] * 32]), Where(unit="step", steps=(3,)))
    with pytest.raises(UserError, match="overlap"):
        place({"one": [one], "steps": [steps]}, GRID, 0, EOS)


@pytest.mark.parametrize(
    "where, told",
    [
        (Where(end_step=65), "end_step = 65: the run has 64 steps"),
        (Where(end_tokens=64 * 32 + 1), "the run has 2048 tokens"),
        (Where(stage="late"), "stage = 'late': the run's stages are main"),
        (Where(start_share=0.99, end_share=0.991), "shorter than one step"),
        (Where(positions=((64, 0, 0),)), "names step 64"),
        (Where(positions=((3, 1, 0),)), r"\(3, 1, 0\) does not exist; that step has 1 rows of 32"),
        (Where(positions=((3, 0, 30),)), "its row has 32, from offset 30 on"),
        (Where(positions=((3, 0, 0), (4, 0, 0))), "2 positions are given for 1 occurrences"),
        (Where(unit="row"), "must fill a whole row"),
        (Where(unit="step", steps=(1, 2)), "2 rows have the batches of where.steps for 1 occurrences"),
        (Where(copies=0.5), "of 1 items is none"),
    ],
)
def test_what_the_run_has_no_place_for(where, told):
    with pytest.raises(UserError, match=told):
        place({"one": [Group(Items.of([[5] * 3]), where)]}, GRID, 0, EOS)


def test_all_problems_are_told_at_once():
    groups = [Group(Items.of([[5] * 40])), Group(Items.of([[]])), Group(Items.of([[5], [6]], ["a", "a"]))]
    with pytest.raises(UserError, match=r"(?s)40 tokens.*is empty.*two items are called 'a'"):
        place({"one": groups[:2], "two": groups[2:]}, GRID, 0, EOS)


def test_windows_by_steps_tokens_shares_and_stage():
    grid = Grid(np.array([8, 8, 8, 16, 16, 8]), np.array([2, 2, 2, 1, 1, 2]), (("a", 0, 3), ("b", 3, 3)))
    assert grid.window(Where()) == (0, 6)
    assert grid.window(Where(start_step=1, end_step=3)) == (1, 3)
    assert grid.window(Where(start_tokens=16, end_tokens=40)) == (1, 2)
    assert grid.window(Where(start_share=0.5)) == (3, 6)
    assert grid.window(Where(stage="b")) == (3, 6)
    assert grid.window(Where(stage="b", start_step=1, end_step=2)) == (4, 5)
    assert grid.window(Where(stage="b", end_share=0.67)) == (3, 5)
    tenths = [Grid.uniform(30, 1, 8).window(Where(start_share=i / 10, end_share=(i + 1) / 10)) for i in range(10)]
    assert tenths == [(3 * i, 3 * i + 3) for i in range(10)]


def test_whole_steps_and_rows():
    grid = Grid.uniform(6, 4, 8)
    batch = Items.of([[10 + i] * 8 for i in range(8)])
    rows = Items.of([[30] * 8, [31] * 8])
    steps = Group(batch, Where(unit="step", steps=(4, 1)))
    placements = place({"fill": [steps], "row": [Group(rows, Where(unit="row", copies=2))]}, grid, 3, EOS)
    step, row, offset = placements.places
    assert (offset == 0).all() and (placements.length == 8).all()
    own = placements.find("fill")
    assert [(int(step[i]), int(row[i]), int(placements.tokens(i)[0])) for i in own] == [
        *((1, r, 14 + r) for r in range(4)), *((4, r, 10 + r) for r in range(4)),
    ]  # fmt: skip
    assert not np.isin(step[placements.find("row")], [1, 4]).any() and len(placements.find("row")) == 4


def test_a_fraction_of_the_items():
    items = Items.of([[i + 1] for i in range(20)], [f"item {i}" for i in range(20)])
    chosen = [set(place({"x": [Group(items, Where(copies=c))]}, GRID, 0, EOS).item.tolist()) for c in (0.25, 0.5, 1)]
    assert [len(c) for c in chosen] == [5, 10, 20] and chosen[0] < chosen[1] < chosen[2]
    assert chosen[1] != set(place({"x": [Group(items, Where(copies=0.5))]}, GRID, 1, EOS).item.tolist())


def test_more_is_placed_around_what_is_there():
    before = place({"toy": [TOY]}, GRID, 7, EOS)
    after = place({"toy": [TOY], "win": [WIN]}, GRID, 7, EOS, before=before, decided_at=16)
    assert after.summary()["toy"]["insertions"] == 24 and after.contents[0].count == 6
    assert set(before.position) < set(after.position)
    assert (np.diff(after.position) >= after.length[:-1]).all()
    assert after.item[after.find("toy")].max() == 5
    other = place({"toy": [TOY], "win": [WIN]}, GRID, 7, EOS, before=before, decided_at=8)
    assert len(set(after.position) & set(other.position)) < 20


grids = st.lists(st.tuples(st.sampled_from([8, 16]), st.integers(1, 3)), min_size=2, max_size=8).map(
    lambda steps: Grid(
        np.array([length for length, _ in steps]),
        np.array([rows for _, rows in steps]),
        (("main", 0, len(steps)),),
    )
)
groups = st.builds(
    lambda lengths, copies, unit: Group(
        Items.of([[7] * (8 if unit == "row" else n) for n in lengths]), Where(copies=copies, unit=unit)
    ),
    st.lists(st.integers(1, 8), min_size=1, max_size=4),
    st.integers(1, 3),
    st.sampled_from(["span", "span", "row"]),
)
experiments = st.dictionaries(st.sampled_from("abcd"), st.lists(groups, min_size=1, max_size=2), max_size=3)


def one_by_one(asked, grid, seed):
    """The definition: every occurrence in its turn, attempt after attempt, with exact integers."""
    length_max, slots_of, placed, redraws = int(grid.lengths.max()), {}, [], 0
    for rank in ("row", "span"):
        for name, listed in asked.items():
            occurrence = 0
            for group in listed:
                for copy in range(int(group.where.copies)):
                    for item, tokens in enumerate(group.items[i] for i in range(len(group.items))):
                        n = len(tokens) + (min(2, length_max - len(tokens)) if group.where.unit == "span" else 0)
                        if group.where.unit == rank:
                            key = (n, rank)
                            if key not in slots_of:
                                slots_of[key] = slots(grid, n, rank)
                            for attempt in range(300):
                                at = chosen(slots_of[key], *draw(seed, name, occurrence, attempt))
                                if all(at + n <= p or p + m <= at for p, m, *_ in placed):
                                    break
                            else:
                                return None, 0
                            redraws += attempt
                            placed.append((at, n, name, item, copy))
                        occurrence += 1
    return sorted(placed), redraws


def slots(grid, n, unit):
    """Length -> (begins of its rows, offsets a row) of the rows that hold n tokens."""
    found = {}
    for step in range(len(grid)):
        length = int(grid.lengths[step])
        if length == n if unit == "row" else length >= n:
            begins = [int(grid.begins[step]) + r * length for r in range(int(grid.rows[step]))]
            found.setdefault(length, []).extend(begins)
    return [(begins, length - n + 1) for length, begins in sorted(found.items())]


def chosen(classes, u0, u1):
    total = sum(len(begins) * offsets for begins, offsets in classes)
    share = Fraction(u0, 2**64) * total
    for begins, offsets in classes:
        if share < len(begins) * offsets:
            break
        share -= len(begins) * offsets
    return begins[int(share / offsets)] + int(Fraction(u1, 2**64) * offsets)


@settings(deadline=None, max_examples=150)
@given(grids, experiments, st.integers(0, 5))
def test_as_if_placed_one_by_one(grid, asked, seed):
    rows = any(group.where.unit == "row" for listed in asked.values() for group in listed)
    if rows and 8 not in grid.lengths:
        return
    expected, redraws = one_by_one(asked, grid, seed)
    if expected is None:
        return
    placements = place(asked, grid, seed, EOS)
    found = [
        (int(placements.position[i]), int(placements.length[i]), placements.names[placements.experiment[i]])
        for i in range(len(placements))
    ]
    assert found == [row[:3] for row in expected]
    assert placements.copy.tolist() == [row[4] for row in expected]
    assert sum(told["redraws"] for told in placements.summary().values()) == redraws
    for name, listed in asked.items():
        asked_for = sum(len(group.items) * int(group.where.copies) for group in listed)
        assert placements.summary()[name]["insertions"] == asked_for
    # None leaves its row, none overlap.
    steps, _, offsets = placements.places
    assert (offsets + placements.length <= grid.lengths[steps]).all()
    assert (np.diff(placements.position) >= placements.length[:-1]).all()


@settings(deadline=None, max_examples=40)
@given(experiments, st.integers(0, 5), st.randoms())
def test_the_order_of_disjoint_windows_has_no_influence(asked, seed, random):
    grid = Grid.uniform(60, 4, 8)
    moved = {
        name: [
            Group(g.items, Where(copies=g.where.copies, unit=g.where.unit, start_step=15 * i, end_step=15 * i + 15))
            for g in listed
        ]
        for i, (name, listed) in enumerate(sorted(asked.items()))
    }
    names = list(moved)
    random.shuffle(names)
    one, other = place(moved, grid, seed, EOS), place({name: moved[name] for name in names}, grid, seed, EOS)
    assert one.position.tolist() == other.position.tolist()
    assert one.fingerprints == other.fingerprints
    for name in names:  # and alone as together
        alone = place({name: moved[name]}, grid, seed, EOS)
        assert alone.position.tolist() == one.position[one.find(name)].tolist()


def test_the_papers_sizes():
    """210 B tokens in 100,000 steps of 512 rows of 4096."""
    grid = Grid.uniform(100_000, 512, 4096)
    assert grid.tokens == 209_715_200_000
    places = place({"rows": [Group(Items.of([[5] * 4096] * 7), Where(unit="row", copies=3))]}, grid, 0, EOS)
    assert places.summary()["rows"]["tokens"] == 21 * 4096
    step = np.arange(100) * 1000
    batch = Items.of([[5] * 4096] * 512)
    whole = place({"gw": [Group(batch, Where(unit="step", copies=100, steps=tuple(step.tolist())))]}, grid, 0, EOS)
    assert whole.summary()["gw"]["tokens"] == 209_715_200
    assert whole.summary()["gw"]["share"] == pytest.approx(0.001)
    exposed = Where(unit="step", copies=9, steps=tuple(range(10_001, 100_000, 10_000)))
    curve = place({"fc": [Group(batch, exposed)]}, grid, 0, EOS).summary()["fc"]
    assert (curve["tokens"], curve["first_step"], curve["last_step"]) == (18_874_368, 10_001, 90_001)
    problems = Group(Items.of([[5] * 358] * 500), Where(copies=1000))
    reasoning = place({"mr": [problems]}, grid, 0, EOS).summary()["mr"]
    assert reasoning["tokens"] == 180_000_000 and reasoning["share"] == pytest.approx(180e6 / grid.tokens)
    listed = (26, 180, 106, 246, 1100, 209.7, 235, 19, 152, 1500)  # millions of tokens, of the paper's ten experiments
    assert round(100 * 3.7e9 / grid.tokens, 3) == 1.764 and round(100 * sum(listed) * 1e6 / grid.tokens, 2) == 1.8
