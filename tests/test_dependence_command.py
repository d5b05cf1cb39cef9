"""The command that tests whether experiments depend on each other, on a small run."""

import json

import numpy as np
import pytest

from mixlab import dependence, errors
from mixlab.inject.analysis.dependence import Dependence

EXPERIMENTS = """

def get_config(arg="", trunk=get_config):
    return trunk() | dict(
        experiments=dict(
            numbers=dict(kind="texts", files=({numbers!r},)),
            letters=dict(kind="texts", files=({letters!r},)),
            mark=dict(kind="watermark", steps=(1,), rows_per_window=4),
        ),
    )
"""


@pytest.fixture(scope="module")
def place(trunk, tmp_path_factory):
    """A folder with experiments.py for the run trunk; parts of a test of it are kept there in out/."""
    place = tmp_path_factory.mktemp("dependence")
    rng = np.random.default_rng(0)
    for name, low, high in (("numbers", 48, 58), ("letters", 65, 91)):
        texts = [bytes(rng.integers(low, high, 24).tolist()).decode() for _ in range(8)]
        (place / f"{name}.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    files = {name: str(place / f"{name}.jsonl") for name in ("numbers", "letters")}
    (place / "experiments.py").write_text((trunk.parent / "config.py").read_text() + EXPERIMENTS.format(**files))
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MIXLAB_CACHE", str(trunk.parent / "cache"))
        yield place


def command(place, trunk, *arguments):
    given = [f"--workdir={trunk}", f"--config={place / 'experiments.py'}", "--step=7", "--steps=12", "--share=0.15"]
    return errors.run(dependence.main, [*given, f"--output={place / 'out'}", *arguments])


def test_the_matrix_of_a_run(place, trunk, capsys):
    assert command(place, trunk) == 0
    assert "| ALL |" in capsys.readouterr().out
    values = json.loads((place / "out" / "dependence.json").read_text())
    matrix = Dependence.from_json(json.dumps(values["matrix"]))
    assert matrix.names == ("letters", "mark", "numbers") and matrix.effects.shape == (4, 3)
    assert np.isfinite(matrix.effects).all() and (values["step"], values["steps"]) == (7, 12)
    assert (matrix.effects[[0, 2], [0, 2]] > 0.1).all() and (matrix.p_values[[0, 2], [0, 2]] < 0.05).all()  # was read
    assert (matrix.effects[3, [0, 2]] > 0.1).all()
    losses = {part: np.array(of_part) for part, of_part in values["losses"].items()}
    assert set(losses) == {"(baseline)", "(all)", "letters", "mark", "numbers"}
    assert all(len(of_part) == 12 for of_part in losses.values())
    assert losses["mark"][0] != losses["(baseline)"][0]  # the first batch of the stretch has noise
    assert (place / "out" / "index.html").exists()

    # finished parts are kept; one that is missing comes out the same
    parts = {path.stem: path for path in (place / "out" / "parts").iterdir()}
    assert set(parts) == {"(before)", *losses}
    written = {name: path.stat().st_mtime_ns for name, path in parts.items()}
    parts["letters"].unlink()
    assert command(place, trunk) == 0
    assert [name for name, path in parts.items() if path.stat().st_mtime_ns != written[name]] == ["letters"]
    assert json.loads((place / "out" / "dependence.json").read_text()) == values


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["--share=0.1"], "name a"),
        (["--steps=14"], "the configuration ends at step 20"),
        (["--step=8"], "no checkpoint of step 8"),
        (["--config.experiments_enabled=()"], "there is none to test"),
        (["--share=0"], "--share above 0"),
    ],
)
def test_mistakes_are_told(place, trunk, capsys, arguments, told):
    (place / "out" / "parts").mkdir(parents=True, exist_ok=True)  # if need be, a folder that holds something
    capsys.readouterr()
    assert command(place, trunk, *arguments) == 2
    error = capsys.readouterr().err
    assert told in error and "Traceback" not in error
