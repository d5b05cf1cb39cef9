"""The GPU kernel's program, interpreted, with tiles small enough that a row has many of them."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mixlab.model.attention import dense
from mixlab.model.flash import Tiles, _visible_blocks, flash
from tests.model.test_attention import inputs

TILES = {"queries of two keys' blocks": Tiles(32, 16, 16), "keys of two queries' blocks": Tiles(16, 32, 16)}


@functools.cache
def compiled(tiles):
    def run(q, k, v, segments, d_out):
        function = dense if tiles is None else functools.partial(flash, tiles=TILES[tiles], interpret=True)
        out, pull = jax.vjp(lambda q, k, v: function(q, k, v, segments), q, k, v)
        return out, *pull(d_out)

    return jax.jit(run)


# Documents that end inside, at and across tiles, one of a token, padding, a row that is all padding, one document.
DOCUMENTS = [[30, 1, 33, 16, 15], [128], []]


@pytest.mark.parametrize("heads, kv_heads", [(4, 2), (3, 1), (2, 2)])
@pytest.mark.parametrize("tiles", TILES)
def test_tiles_compute_what_whole_matrices_do(tiles, heads, kv_heads):
    arguments = inputs(128, heads, kv_heads, DOCUMENTS, head_dim=12)
    for given in (arguments, (*arguments[:3], None, arguments[4])):
        for name, a, b in zip(
            ("out", "d_q", "d_k", "d_v"), compiled(tiles)(*given), compiled(None)(*given), strict=True
        ):
            np.testing.assert_allclose(a, b, atol=2e-5, err_msg=name)


def test_segments_may_come_in_any_order():
    q, k, v, _, d_out = inputs(128, 4, 2, [[128]] * 2)
    segments = np.random.default_rng(0).integers(0, 9, (2, 8)).repeat(16, axis=1).astype(np.int32)
    tiles = next(iter(TILES))
    for a, b in zip(compiled(tiles)(q, k, v, segments, d_out), compiled(None)(q, k, v, segments, d_out), strict=True):
        np.testing.assert_allclose(a, b, atol=2e-5)


@pytest.mark.parametrize("tiles", TILES)
def test_tiles_that_no_token_can_see_are_not_read(tiles):
    """What is not a number would show in every sum that it is part of, hidden or not. Rows are sparse each for itself."""
    q, k, v, segments, d_out = inputs(128, 4, 2, [[64, 32], [32, 32, 64]])
    whole = compiled(tiles)(q, k, v, segments, d_out)
    for document in (1, 2):
        others = segments != document
        spoilt = (np.where(others[..., None, None], np.nan, a) for a in (q, k, v))
        got = compiled(tiles)(*spoilt, segments, d_out)
        for a, b in zip(got, whole, strict=True):
            np.testing.assert_array_equal(np.asarray(a)[~others], np.asarray(b)[~others])


@pytest.mark.parametrize("seed", range(4))
def test_bounds_are_those_of_the_blocks_that_meet(seed):
    rng = np.random.default_rng(seed)
    ids = np.sort(rng.integers(1, 7, (3, 64)), axis=1).astype(np.int32)
    ids[1, 50:] = 0
    first, last = _visible_blocks(jnp.asarray(ids), 16, 8)
    assert first.shape == (3, 4) and last.shape == (3, 8)
    meet = (ids.reshape(3, 4, 1, 16, 1) == ids.reshape(3, 1, 8, 1, 8)).any(axis=(3, 4))
    for row in range(3):
        assert [np.flatnonzero(meet[row, i])[0] for i in range(4)] == first[row].tolist()
        assert [np.flatnonzero(meet[row, :, j])[-1] for j in range(8)] == last[row].tolist()
