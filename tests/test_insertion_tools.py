"""The tools on a run with experiments: plan, inspect, compare."""

import importlib
import json

import numpy as np
import pytest

from mixlab import config as configs
from mixlab import errors
from mixlab.comparison import compare
from mixlab.data import open_data
from mixlab.inject.noise import Noise
from tests.stores import some_texts, write_config, write_store


@pytest.fixture(scope="module")
def config(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tools")
    lines = [json.dumps({"text": text}) for text in ("first item", "second")]
    (folder / "few.jsonl").write_text("\n".join(lines))
    path = folder / "config.py"
    write_config(path, write_store(folder / "store", some_texts()), 12)
    experiments = {
        "few": {"kind": "texts", "files": [str(folder / "few.jsonl")], "where": {"copies": 3}},
        "curve": {"kind": "forgetting", "steps": [5]},
    }
    path.write_text(path.read_text().replace("        model=", f"        experiments={experiments!r},\n        model="))
    return f"--config={path}"


@pytest.fixture
def tool(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "160")  # tables as wide as they need

    def call(name, *arguments):
        code = errors.run(importlib.import_module(f"tools.{name}").main, list(arguments))
        captured = capsys.readouterr()
        return code, captured.out, captured.err

    return call


def test_the_plan_tells_of_experiments(tool, config):
    code, out, _ = tool("plan", config, "--json")
    told = json.loads(out)["experiments"]
    assert code == 0 and list(told) == ["curve", "few"]
    assert told["few"]["insertions"] == 6 and told["few"]["tokens"] == 3 * (12 + 8) and told["few"]["enabled"]
    assert told["curve"]["tokens"] == 128 and (told["curve"]["first_step"], told["curve"]["last_step"]) == (5, 5)
    text = tool("plan", config)[1]
    assert "few" in text and "WARNING: they replace 12.2% of the tokens" in text
    assert "not enabled" in tool("plan", config, "--config.experiments_enabled=()")[1]


def test_where_items_are_and_what_is_in_a_step(tool, config):
    code, out, _ = tool("inspect_stream", config, "--experiment=few", "--item=few:2", "--json")
    found = json.loads(out)["insertions"]
    assert code == 0 and sorted(entry["copy"] for entry in found) == [0, 1, 2]
    entry = found[0]
    code, out, _ = tool("inspect_stream", config, f"--step={entry['step']}", f"--row={entry['row']}", "--json")
    (row,) = json.loads(out)["rows"]
    (span,) = [s for s in row["spans"] if s["kind"] == "inserted" and s["offset"] == entry["offset"]]
    assert (span["experiment"], span["item"], span["copy"]) == ("few", "few:2", entry["copy"])
    assert "second" in span["text"] and span["length"] == entry["length"] == 8
    assert "few: item few:2" in tool("inspect_stream", config, f"--step={entry['step']}")[1]
    assert len(tool("inspect_stream", config, "--experiment=few")[1].splitlines()) == 7
    nothing = tool("inspect_stream", config, "--experiment=few", "--config.experiments_enabled=()")[1]
    assert "inserts nothing in this run" in nothing


@pytest.mark.parametrize(
    "arguments, told",
    [
        (["--experiment=fwe"], "did you mean 'few'?"),
        (["--experiment=few", "--item=none"], "--item=none: few inserts no item of this name"),
        (["--item=few:1"], "give one of"),
        (["--step=1", "--item=few:1"], "--item belongs to --experiment"),
        (["--step=1", "--experiment=few"], "give one of"),
        (["--step=1", "--workdir=runs/x"], "either --config=FILE.py or --workdir=RUN_DIR"),
    ],
)
def test_what_cannot_be_shown(tool, config, arguments, told):
    code, _, err = tool("inspect_stream", config, *arguments)
    assert code == errors.EXIT_USER_ERROR and told in err


def test_the_proof_that_a_control_is_one(tool, config):
    code, out, _ = tool("compare_streams", config, "--json")
    found = json.loads(out)
    assert code == 0 and found["steps"] == 12 and found["unexplained"] == []
    assert len(found["insertions"]) == 6 + 4 and 0 < found["differing"] <= 60 + 128
    assert found["differing"] == sum(entry["differing"] for entry in found["insertions"])
    assert "every difference is an insertion's" in tool("compare_streams", config)[1]
    path = config.partition("=")[2]
    assert json.loads(tool("compare_streams", config, f"--against={path}", "--json")[1])["insertions"] == []
    code, out, _ = tool("compare_streams", config, f"--against={path}", "--config.seed=1")
    assert code == 1 and "differences that no insertion explains" in out
    code, _, err = tool("compare_streams", config, f"--against={path}", "--config.stages.0.steps=13")
    assert code == 2 and "the same stages" in err


def test_noise_is_shown_and_compared(tool, config):
    marked = "--config.experiments.mark={'kind': 'watermark', 'steps': (2, 9), 'sigma': 0.1}"
    code, out, _ = tool("compare_streams", config, marked, "--json")
    noised = json.loads(out)["noised"]
    assert code == 0 and [(n["experiment"], n["step"], n["sigma"], n["in"]) for n in noised] == [
        ("mark", 2, 0.1, 0), ("mark", 9, 0.1, 0),
    ]  # fmt: skip
    out = tool("compare_streams", config, marked)[1]
    assert "noise on all 4 rows, sigma 0.1  mark" in out and "every difference is an insertion's or noise" in out
    assert json.loads(tool("inspect_stream", config, marked, "--experiment=mark", "--json")[1])["noised_steps"] == [
        2,
        9,
    ]
    assert "noise on the embeddings of steps 2, 9" in tool("inspect_stream", config, marked, "--experiment=mark")[1]
    assert json.loads(tool("plan", config, marked, "--json")[1])["experiments"]["mark"]["noised_steps"] == [2, 9]
    assert "noise on 2 batches" in tool("plan", config, marked)[1]
    told = [tool("inspect_stream", config, marked, f"--step={step}")[1] for step in (1, 2)]
    assert ["sigma 0.1: mark" in text for text in told] == [False, True]


def test_noise_that_no_experiment_explains_is_told(config):
    given = configs.load(config.partition("=")[2], ["--config.experiments.mark={'kind': 'watermark', 'steps': (2, 9)}"])
    stream = open_data(given).stream

    class Other(Noise):
        def keys(self, step, rows):
            return super().keys(step, rows) ^ np.uint32(rows[:, None] == 1)

    (noise,) = set(stream.noises.values())
    other = stream.with_noise({9: Other(noise.name, noise.seed, noise.sigma, (9,)), 2: noise})
    assert compare(stream, other, np.arange(12)).unexplained == [(9, 1, 0, "noise")]
    assert compare(stream, stream, np.arange(12)).noised == []


@pytest.mark.parametrize(
    "override, told",
    [
        ("--config.experiments.few.kind=text", "experiments.few.kind = 'text'; did you mean 'texts'?"),
        ("--config.experiments.few.where.copies=1.5", "experiments.few.where.copies = 1.5"),
        ("--config.experiments.few.copies=2", "unknown key 'experiments.few.copies'"),
        ("--config.experiments_enabled=('fwe',)", "experiments_enabled names 'fwe'"),
        ("--config.experiments.Few={'kind': 'texts', 'files': ['x']}", "by case alone"),
        ("--config.experiments.a|b={'kind': 'texts', 'files': ['x']}", "rename it"),
        ("--config.experiments.none={'kind': 'texts'}", "experiments.none.files"),
        ("--config.experiments.none={'files': ['x']}", "experiments.none.kind: must be set"),
    ],
)
def test_mistakes_in_the_configuration(tool, config, override, told):
    code, _, err = tool("plan", config, override)
    assert code == errors.EXIT_USER_ERROR and told in err
