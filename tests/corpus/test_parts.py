import itertools

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from mixlab.corpus.filters import id_hashes, in_part
from mixlab.corpus.store import TokenStore
from tests.stores import some_texts, write_store


@settings(max_examples=20, deadline=None)
@given(st.lists(st.floats(0, 1), min_size=1, max_size=4))
def test_parts_side_by_side_share_no_document_and_leave_none_out(tmp_path_factory, cuts):
    store = TokenStore.open(write_store(tmp_path_factory.mktemp("store"), some_texts(200)))
    bounds = [0.0, *sorted(cuts), 1.0]
    parts = [in_part(store, part) for part in itertools.pairwise(bounds) if part[0] < part[1]]
    assert (np.sum(parts, axis=0) == 1).all()


def test_a_part_has_its_share_and_depends_on_ids_alone(tmp_path):
    store = TokenStore.open(write_store(tmp_path / "a", some_texts(2000)))
    fewer = TokenStore.open(write_store(tmp_path / "b", some_texts(500)))
    part = in_part(store, (0.0, 0.3))
    assert abs(part.mean() - 0.3) < 4 * np.sqrt(0.21 / 2000)
    assert np.array_equal(in_part(fewer, (0.0, 0.3)), part[:500])
    assert len(np.unique(id_hashes(store))) == 2000
