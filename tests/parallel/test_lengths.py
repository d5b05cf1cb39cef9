"""Which mesh serves which rows, and how devices are arranged."""

from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mixlab.errors import UserError
from mixlab.model.presets import gpt2
from mixlab.parallel import lengths
from mixlab.parallel.mesh import MeshConfig, arrange

MODEL = gpt2(layers=1, d_model=24, heads=12, ffn_width=8, vocab_size=64, context_length=64)


def stage(*shapes):
    return SimpleNamespace(shapes=lambda: list(shapes))


def shares(mesh):
    return mesh.fsdp, mesh.sequence


def test_rows_that_are_too_few_are_cut():
    """Eight devices and 256 tokens a step: the table of meshes by length."""
    mesh = MeshConfig(data=1, fsdp=8, by_length=True)
    found = {length: shares(lengths.sizes_for(mesh, 256 // length, length, 1)) for length in (8, 16, 32, 64, 128)}
    assert found == {8: (8, 1), 16: (8, 1), 32: (8, 1), 64: (4, 2), 128: (2, 4)}
    assert lengths.sizes_for(MeshConfig(1, 8), 4, 64, 1) is None
    assert shares(lengths.sizes_for(mesh, 8, 32, 2)) == (4, 2)  # in two parts, there are four at a time


@given(
    fsdp=st.integers(1, 24), data=st.integers(1, 3), sequence=st.integers(1, 3), rows=st.integers(1, 60),
    length=st.integers(1, 100), parts=st.integers(1, 3),
)  # fmt: skip
def test_what_serves_rows_divides_them(fsdp, data, sequence, rows, length, parts):
    mesh = MeshConfig(data, fsdp, sequence=sequence, by_length=True)
    found = lengths.sizes_for(mesh, rows, length, parts)
    if found is None:
        assert lengths.problems(mesh, MODEL, [stage((rows, length))], parts)
        return
    assert np.prod(found.sizes) == np.prod(mesh.sizes) and found.data == data
    assert rows % (parts * data * found.fsdp) == 0 and (found.sequence == 1 or length % (2 * found.sequence) == 0)
    assert found == mesh or rows % (parts * data * fsdp) or length % (2 * sequence)


@pytest.mark.parametrize(
    ("mesh", "shapes", "parts", "model", "said"),
    [
        (MeshConfig(3), [(8, 16), (4, 32)], 2, {}, "4 rows of 32 tokens a step cannot be split over data x fsdp = 3 devices in "
         "2 accumulation steps; use tokens_per_step=192, fewer devices"),
        (MeshConfig(1, 8), [(12, 32)], 1, {}, "use tokens_per_step=256 or tokens_per_step=512, mesh.fsdp=4 with mesh.sequence=2, "),
        (MeshConfig(1, sequence=4), [(4, 20)], 1, {}, "rows of 20 tokens cannot be cut over mesh.sequence = 4 devices, two pieces "
         "each; use a sequence_length of 16 or 24, or a smaller mesh.sequence"),
        (MeshConfig(1, tensor=2, sequence=4), [(4, 32)], 1, {"sequence_attention": "all_to_all"}, "divides the 6 heads that a "
         "device has over mesh.sequence = 4"),
    ],
)  # fmt: skip
def test_what_cannot_be_divided(mesh, shapes, parts, model, said):
    settings = gpt2(layers=1, d_model=24, heads=12, ffn_width=8, vocab_size=64, context_length=64, **model)
    (problem,) = lengths.problems(mesh, settings, [stage(*shapes)], parts)
    assert said in problem


def test_the_longest_rows_of_a_run_are_divided():
    assert lengths.problems(MeshConfig(2), MODEL, [stage((16, 8), (4, 32))], 2) == []


def device(number, **attributes):
    kind = {"platform": "cpu", "device_kind": "cpu", "id": number}
    return SimpleNamespace(**(kind | {"process_index": number // 4} | attributes))


def test_slices_are_told_by_devices():
    """Data crosses slices, and what it does not cross is divided by fsdp; all else stays within."""
    devices = [device(n, slice_index=n % 2) for n in range(8)]
    slices = np.vectorize(lambda d: d.slice_index)
    across = slices(arrange((2, 1, 2, 1, 2), None, devices))
    assert across.shape == (2, 1, 2, 1, 2) and (across[0] == 0).all() and (across[1] == 1).all()
    across = slices(arrange((1, 1, 4, 1, 2), None, devices))
    assert (across[:, :, :2] == 0).all() and (across[:, :, 2:] == 1).all()
    with pytest.raises(UserError, match=r"cannot be divided over 2 slices; use a multiple of 2 for data or fsdp"):
        arrange((1, 1, 1, 1, 9), None, devices)
    with pytest.raises(UserError, match=r"mesh\.slices = 4: the devices come in 2 slices; use 2"):
        arrange((8, 1, 1, 1, 1), 4, devices)


def test_processes_are_slices_where_asked():
    devices = [device(n) for n in (0, 4, 1, 5, 2, 6, 3, 7)]
    across = np.vectorize(lambda d: d.process_index)(arrange((2, 1, 4, 1, 1), 2, devices))
    assert (across[0] == 0).all() and (across[1] == 1).all()
    assert arrange((8, 1, 1, 1, 1), None, devices).size == 8
    with pytest.raises(UserError, match=r"the devices come in 2 processes; use 2, or"):
        arrange((8, 1, 1, 1, 1), 3, devices)
