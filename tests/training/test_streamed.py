"""Checkpoints written parameter by parameter."""

import weakref

import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays_of

from mixlab.errors import UserError
from mixlab.training import checksums
from mixlab.training.checkpoint import Checkpoints
from mixlab.training.streamed import Deferred, save_streamed
from mixlab.training.trees import nested

SHAPES = {"embedding": (9, 4), "blocks/mlp/up/kernel": (3, 4, 5), "blocks/norm/scale": (3, 4)}


def values(name):
    return np.random.default_rng(len(name)).normal(size=SHAPES[name]).astype(np.float32)


@settings(max_examples=40, deadline=None)
@given(arrays_of.arrays("float32", st.tuples(st.integers(1, 5), st.integers(1, 6))),
       st.sampled_from(["float32", "bfloat16", "int8", "bool"]), st.integers(1, 9))  # fmt: skip
def test_checksums_piece_by_piece_are_those_of_the_whole(array, dtype, piece):
    with np.errstate(all="ignore"), pytest.MonkeyPatch.context() as patch:
        array = array.astype(jnp.dtype(dtype))
        patch.setattr(checksums, "PIECE", piece)
        assert checksums.host_checksum(array) == checksums.checksums({"x": jnp.asarray(array)})["x"]


def test_it_is_what_checkpoints_of_weights_alone_are_and_one_parameter_is_held_at_a_time(tmp_path):
    alive, held = [], []

    def load(name):
        held.append(sum(reference() is not None for reference in alive))
        array = values(name)
        alive.append(weakref.ref(array))
        return array

    params = {name: Deferred(shape, np.dtype("float32"), lambda n=name: load(n)) for name, shape in SHAPES.items()}
    save_streamed(tmp_path / "streamed", 3, params, {"tokens": 5})
    assert len(held) == 2 * len(SHAPES) and max(held) <= 1  # the last may not be collected yet
    with Checkpoints(tmp_path / "whole") as checkpoints:
        checkpoints.save(3, {"params": nested({name: jnp.asarray(values(name)) for name in SHAPES})}, {"tokens": 5})
    with Checkpoints(tmp_path / "whole") as one, Checkpoints(tmp_path / "streamed", read_only=True) as two:
        assert two.meta() == one.meta()
        assert [(entry.step, entry.problem) for entry in two.entries()] == [(3, None)]
        params, meta = two.restore_params(None)
        np.testing.assert_array_equal(params["blocks"]["mlp"]["up"]["kernel"], values("blocks/mlp/up/kernel"))
        for name in SHAPES:
            np.testing.assert_array_equal(two.read_param(meta, name), values(name))


def test_a_folder_that_cannot_be_written(tmp_path):
    (tmp_path / "file").write_text("")
    params = {"embedding": Deferred(SHAPES["embedding"], np.dtype("float32"), lambda: values("embedding"))}
    with pytest.raises(UserError, match=r"cannot save step 0 in .*: Not a directory"):
        save_streamed(tmp_path / "file" / "checkpoints", 0, params, {})
