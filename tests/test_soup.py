"""Averages of checkpoints."""

import json
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays_of

from mixlab import config as configs
from mixlab import errors, evaluate, soup
from mixlab.errors import UserError
from mixlab.training.checkpoint import Checkpoints
from tests.test_mistakes import files, told
from tests.training.test_start import meta, origin, params


@pytest.fixture(autouse=True)
def cache(trunk, monkeypatch, tmp_path):
    monkeypatch.setenv("MIXLAB_CACHE", str(trunk.parent / "cache"))
    monkeypatch.chdir(tmp_path)


def cook(*arguments):
    assert errors.run(soup.main, [str(argument) for argument in arguments]) == 0


def scores(capsys, *arguments):
    capsys.readouterr()
    assert errors.run(evaluate.main, [*map(str, arguments), "--json", "--no-record"]) == 0
    return json.loads(capsys.readouterr().out)


# --- the average ---

SHAPE = st.tuples(st.integers(1, 3), st.integers(1, 4))
ORDINARY = st.floats(-1e3, 1e3, width=32)
ANY = st.floats(width=32, allow_nan=False, allow_infinity=False)  # -0.0 and subnormals too


@settings(max_examples=60, deadline=None)
@given(arrays_of.arrays("float32", st.tuples(st.integers(1, 5), SHAPE).map(lambda s: (s[0], *s[1])), elements=ORDINARY),
       st.data())  # fmt: skip
def test_the_average_is_the_weighted_mean_in_any_order(stack, data):
    raw = data.draw(st.lists(st.floats(0.01, 1), min_size=len(stack), max_size=len(stack)))
    weights = np.array(raw) / np.sum(raw)
    expected = np.einsum("n,nij->ij", weights, stack.astype(np.float64))
    tolerance = dict(rtol=1e-6, atol=1e-6 * np.abs(stack).max(initial=1e-30))
    order = data.draw(st.permutations(range(len(stack))))
    one, other = soup.average(stack, weights), soup.average(stack[order], weights[order])
    assert one.dtype == np.float32
    np.testing.assert_allclose(one, expected, **tolerance)
    np.testing.assert_allclose(other, expected, **tolerance)


@settings(max_examples=60, deadline=None)
@given(arrays_of.arrays("float32", SHAPE, elements=ANY), st.lists(st.floats(0.01, 1), min_size=1, max_size=9),
       st.sampled_from(["float32", "bfloat16", "float16", "float64"]))  # fmt: skip
def test_the_average_of_equal_arrays_is_they_bit_for_bit(array, raw, dtype):
    with np.errstate(over="ignore"):
        array = array.astype(jnp.dtype(dtype))
    array = np.where(np.isfinite(array), array, np.ones((), array.dtype))
    mean = soup.average([array] * len(raw), np.array(raw) / np.sum(raw))
    assert mean.dtype == array.dtype and mean.tobytes() == array.tobytes()


# --- soups ---


def test_a_soup_is_scored_and_started_from_like_any_checkpoint(trunk, tmp_path, capsys):
    before = files(trunk)
    cook(f"{trunk}:7", f"{trunk}:14", trunk, "--weights=0.5,0.25,0.25", f"--output={tmp_path / 'soup'}")
    assert "step 14 of" in capsys.readouterr().out and files(trunk) == before
    mine = params(tmp_path / "soup", 20)
    expected = jax.tree.map(
        lambda a, b, c: np.float64(a) / 2 + np.float64(b) / 4 + np.float64(c) / 4,
        *(params(trunk, step) for step in (7, 14, 20)),
    )
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-7), mine, expected)

    record = json.loads((tmp_path / "soup" / "soup.json").read_text())
    assert [(one["step"], one["weight"]) for one in record["ingredients"]] == [(7, 0.5), (14, 0.25), (20, 0.25)]
    assert [one["checkpoint"] for one in record["ingredients"]] == [meta(trunk, s)["sha256"] for s in (7, 14, 20)]
    assert record["step"] == 20 and record["ingredients"][0]["folder"] == str(trunk)
    ours, theirs = (json.loads((folder / "config.json").read_text()) for folder in (tmp_path / "soup", trunk))
    assert ours == theirs

    found = scores(capsys, f"--workdir={tmp_path / 'soup'}")
    first = scores(capsys, f"--workdir={trunk}", "--step=7")
    assert found["step"] == 20 and found["eval/macro/loss"] < first["eval/macro/loss"]
    start = origin(trunk, start__init_from=tmp_path / "soup")
    assert int(start.state["step"]) == 0
    jax.tree.map(np.testing.assert_array_equal, start.state["params"], mine)
    with pytest.raises(UserError, match=r"is a soup, which has weights and no optimiser's state; use start.init_from"):
        origin(trunk, start__branch_from=tmp_path / "soup", stages__0__steps=30)


def arrays(folder, step):
    return {name: entry for name, entry in meta(folder, step)["arrays"].items() if name.startswith("params/")}


def test_a_soup_of_equal_checkpoints_is_that_checkpoint_bit_for_bit(trunk, tmp_path, capsys):
    one = f"{trunk}:14"
    cook(one, one, f"--output={tmp_path / 'two'}")
    cook(*[one] * 7, "--weights=0.3,0.1,0.1,0.1,0.1,0.1,0.2", f"--output={tmp_path / 'seven'}")
    cook(tmp_path / "two", tmp_path / "seven", one, f"--output={tmp_path / 'of soups'}")
    for name in ("two", "seven", "of soups"):
        assert meta(tmp_path / name, 14)["arrays"] == arrays(trunk, 14)
        jax.tree.map(np.testing.assert_array_equal, params(tmp_path / name, 14), params(trunk, 14))
    assert scores(capsys, f"--workdir={tmp_path / 'two'}") == scores(capsys, f"--workdir={trunk}", "--step=14")


def test_the_order_of_ingredients_is_immaterial(trunk, tmp_path):
    names = [f"{trunk}:{step}" for step in (7, 14, 20)]
    cook(*names, f"--output={tmp_path / 'one'}")
    cook(*reversed(names), f"--output={tmp_path / 'other'}")
    one, other = (params(tmp_path / name, 20) for name in ("one", "other"))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6, atol=1e-8), one, other)


def test_weights_alone_can_be_read_and_not_gone_on_from(trunk, tmp_path):
    cook(trunk, f"--output={tmp_path / 'soup'}")
    with Checkpoints(tmp_path / "soup" / "checkpoints", read_only=True) as checkpoints:
        assert [(entry.step, entry.problem) for entry in checkpoints.entries()] == [(20, None)]
        abstract = {"params": checkpoints.restore_params(None)[0], "opt_state": {}}
        with pytest.raises(UserError, match="holds the weights alone"):
            checkpoints.restore(abstract)


# --- mistakes ---


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["TRUNK:7", "TRUNK", "--weights=0.5,0.6"], "the sum is 1.1; in these proportions they are --weights=0.4545"),
        (["TRUNK:7", "TRUNK", "--weights=0.5,0.50001"], "of sum 1"),
        (["TRUNK:7", "TRUNK", "--weights=1.5,-0.5"], "must be above 0"),
        (["TRUNK:7", "TRUNK", "--weights=nan,0.5"], "must be above 0 and of sum 1"),
        (["TRUNK:7", "TRUNK", "--weights=a,b"], "must be numbers"),
        (["TRUNK:7", "TRUNK", "--weights=1"], "are 1 for 2 ingredients"),
        (["TRUNK:7", "TRUNK:8"], "has no checkpoint of step 8; it has [7, 14, 20]"),
        (["TRUNK", "nowhere"], "nowhere: there is no such folder"),
        (["TRUNK", "TRUNK/checkpoints"], "is not the folder of a run"),
        (["TRUNK", "--wieghts=1"], "did you mean --weights?"),
        (["TRUNK", "--config.seed=1"], "--config.seed=1: a soup has the configuration of its first ingredient"),
        ([], "are required: RUN_DIR[:STEP]"),
    ],
)
def test_mistakes(trunk, tmp_path, capsys, arguments, expected):
    arguments = [argument.replace("TRUNK", str(trunk)) for argument in arguments]
    assert expected in told(capsys, *arguments, f"--output={tmp_path / 'soup'}", main=soup.main)
    assert not (tmp_path / "soup").exists()


def test_weights_of_sum_1_but_for_rounding(trunk, tmp_path):
    cook(*[f"{trunk}:7"] * 3, "--weights=0.3333333,0.3333333,0.3333333", f"--output={tmp_path / 'soup'}")
    weights = [one["weight"] for one in json.loads((tmp_path / "soup" / "soup.json").read_text())["ingredients"]]
    assert sum(weights) == pytest.approx(1, abs=1e-12)


def another_run(trunk, folder, change, **other_meta):
    """A folder as of a run, with the trunk's weights of step 7, its config changed and its checkpoint's meta."""
    folder.mkdir()
    config = json.loads((trunk / "config.json").read_text())
    config["model"] |= change
    (folder / "config.json").write_text(json.dumps(config))
    kept = {key: meta(trunk, 7)[key] for key in ("tokens", "tokenizer")} | other_meta
    with Checkpoints(folder / "checkpoints") as checkpoints:
        checkpoints.save(7, {"params": params(trunk, 7)}, kept)
    return folder


def test_models_and_tokenizers_that_differ(trunk, tmp_path, capsys):
    def message(other):
        return told(capsys, str(trunk), str(other), f"--output={tmp_path / 'soup'}", main=soup.main)

    answer = message(another_run(trunk, tmp_path / "deep", {"layers": 3, "norm_eps": 1e-3, "remat": "full"}))
    assert "are different models" in answer and "model.layers is 2 in the one and 3 in the other" in answer
    assert "model.norm_eps is 1e-05 in the one" in answer and "remat" not in answer
    letters = {"name": "words", "hash": "f" * 64}
    answer = message(another_run(trunk, tmp_path / "words", {}, tokenizer=letters))
    assert "have different tokenizers, bytes (" in answer and "words (ffffffffffff…)" in answer
    assert not (tmp_path / "soup").exists()
    same = another_run(trunk, tmp_path / "same", {"remat": "full", "init_std": 0.5})
    cook(trunk, same, f"--output={tmp_path / 'soup'}")


def test_weights_of_other_shapes(trunk, tmp_path, capsys):
    other = another_run(trunk, tmp_path / "other", {})
    shutil.rmtree(other / "checkpoints")
    with Checkpoints(other / "checkpoints") as checkpoints:
        wide = jax.tree.map(lambda x: jnp.concatenate([x, x], 0), params(trunk, 7))
        checkpoints.save(7, {"params": wide}, {key: meta(trunk, 7)[key] for key in ("tokens", "tokenizer")})
    message = told(capsys, str(trunk), str(other), f"--output={tmp_path / 'soup'}", main=soup.main)
    assert "hold different weights and cannot be averaged" in message and "in the one and" in message


def test_a_damaged_ingredient_is_named_and_not_passed_over(trunk, tmp_path, capsys):
    shutil.copytree(trunk, tmp_path / "copy")
    data = (tmp_path / "copy" / "checkpoints" / "20" / "params").rglob("d/*")
    largest = max(data, key=lambda path: path.stat().st_size)
    content = bytearray(largest.read_bytes())
    content[len(content) // 2] ^= 1
    largest.write_bytes(content)
    message = told(capsys, str(trunk), str(tmp_path / "copy"), f"--output={tmp_path / 'soup'}", main=soup.main)
    assert "its checkpoint of step 20 is damaged" in message and "copy:STEP (there are 7, 14)" in message
    assert not (tmp_path / "soup").exists()


def test_an_output_that_holds_something_is_left_alone(trunk, tmp_path, capsys):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("years of work")
    for output in ("mine", "mine/thesis.txt", trunk):
        assert "name a new folder" in told(capsys, str(trunk), f"--output={output}", main=soup.main)
    assert "cannot be written" in told(capsys, str(trunk), "--output=mine/thesis.txt/soup", main=soup.main)
    assert files(tmp_path) == {"mine/thesis.txt": b"years of work"}
    (tmp_path / "empty").mkdir()
    cook(trunk, "--output=empty")
    assert configs.load_json(tmp_path / "empty" / "config.json", []).name == "small"
