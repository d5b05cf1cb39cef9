"""experiments/meco: its runs differ in what they should and in nothing else, and its summary is right."""

import gzip
import json
from pathlib import Path

import numpy as np
import pytest

from experiments.meco import analyse, run
from experiments.meco.config import ARMS, CORPORA, cooldown_steps
from mixlab import config as configs
from mixlab import schema
from mixlab.errors import UserError

FILE = str(Path(__file__).parents[1] / "experiments/meco/config.py")
WORDS = {"text": "", "embedded": "embedded,"}


def load(corpus, arm):
    return configs.load(f"{FILE}:{WORDS[corpus]}{arm}", [])


@pytest.mark.parametrize("corpus", CORPORA)
def test_arms_differ_in_metadata_alone(corpus):
    standard = schema.plain(load(corpus, "standard"))
    for arm in ARMS:
        loaded = load(corpus, arm)
        found = schema.differences(standard, schema.plain(loaded))
        assert all(
            key == "name" or ".format.metadata" in key or key.startswith("evaluation.metadata.template")
            for key in found
        )
        trunk, cooldown = loaded.stages
        assert (trunk.format.metadata is None) == (arm == "standard")
        assert (cooldown.format.metadata is None) == (arm != "no_cooldown")
        assert cooldown.steps == cooldown_steps(trunk.steps + cooldown.steps) == loaded.total_steps // 10
        assert loaded.checkpoint.every_steps == trunk.steps
    sources = load(corpus, "meco").sources
    assert sources["trunk"].part[1] == sources["cooldown"].part[0]


@pytest.mark.parametrize("corpus", CORPORA)
def test_seeds_change_the_seed_alone(corpus):
    a, b = (schema.plain(load(corpus, f"hashed,{seed}")) for seed in (1, 3))
    assert set(schema.differences(a, b)) == {"name", "seed"}
    assert load(corpus, "meco,steps=40").total_steps == 40


@pytest.mark.parametrize("arg", ["meco,hashed", "meco,1,2", "mecco", "embedded", "", "meco,steps=x"])
def test_a_wrong_argument_is_told(arg):
    from experiments.meco.config import get_config

    with pytest.raises(UserError, match="give one of standard, meco, no_cooldown, hashed, loss"):
        get_config(arg)


def test_no_host_has_more_than_its_share_of_documents(tmp_path, monkeypatch):
    monkeypatch.setattr(run, "DOCUMENTS_PER_HOST", 3)
    folders = [pattern.partition("/")[0] for pattern in run.FILES]
    for folder in folders:
        (tmp_path / "data" / folder).mkdir(parents=True)
        with gzip.open(tmp_path / "data" / folder / "some.jsonl.gz", "wt") as file:
            for i in range(5):
                url = f"https://{folder}.org/{i}"
                file.write(
                    json.dumps({"id": f"{folder}-{i}", "text": f"text {i} " * 9, "url": url, "domain": folder}) + "\n"
                )
    (tmp_path / "work").mkdir()
    with gzip.open(run.sample_hosts(tmp_path / "data", tmp_path / "work"), "rt") as lines:
        urls = [json.loads(line)["url"] for line in lines]
    assert len(urls) == 3 * len(folders) and all(sum(f"//{f}.org" in url for url in urls) == 3 for f in folders)
    with pytest.raises(UserError, match="holds no web_c4"):
        run.sample_hosts(tmp_path, tmp_path)


def records(*scores, step=10, **end):
    """Records of plain scores every `step` steps; `end`: bits per byte of the variants at the end."""
    lines = [
        {"step": step * i, "tokens": 100 * step * i, analyse.PLAIN: score, "eval/web/bits_per_byte": score}
        for i, score in enumerate(scores)
    ]
    for variant, value in end.items():
        lines[-1][f"eval_metadata/{variant}/macro/bits_per_byte"] = value
    for decade, value in (("0", 0.1), ("10", -0.2)):
        lines[-1] |= {
            f"eval_metadata/true_minus_none/seen_{decade}/loss": value,
            f"eval_metadata/true_minus_none/seen_{decade}/documents": 4,
        }
    return lines


def test_summary_of_known_numbers():
    runs = {
        "standard": {
            1: records(4, 3, 2, none=2.0, true=2.1, wrong=2.2),
            2: records(4, 3, 2.2, none=2.2, true=2.3, wrong=2.4),
        },
        "meco": {
            1: records(4, 3, 1.5, none=1.5, true=1.3, wrong=1.9),
            2: records(4, 3, 2.3, none=2.3, true=2.1, wrong=2.7),
        },
        "loss": {1: records(4, 3, 2, none=2.0, true=2.1, wrong=2.2)},  # one seed alone has no interval
    }
    summary = analyse.summarise(runs)
    assert list(summary["arms"]) == ["standard", "meco"]
    meco = summary["arms"]["meco"]
    assert meco["plain"]["mean"] == pytest.approx(1.9) and meco["true - none"]["mean"] == pytest.approx(-0.2)
    assert meco["true - none"]["half"] == pytest.approx(0, abs=1e-9)  # paired: both seeds gain alike
    assert meco["plain - standard"]["mean"] == pytest.approx(-0.2)
    assert meco["tokens_to_standard"] == [pytest.approx(1000 + 1000 * 2 / 3), None]
    assert meco["seen"][10]["mean"] == pytest.approx(-0.2) and list(meco["seen"]) == [0, 10]
    assert summary["sets"] == {"web": {"standard": pytest.approx(2.1), "meco": pytest.approx(1.9)}}
    assert "1 of 2 seeds" in analyse.table(summary) and "| standard | 2.100" in analyse.table(summary)


def test_from_a_folder_of_runs_to_results(tmp_path, capsys):
    """What run.py leaves, written by hand: the record, the table and the figure come of it."""
    rng = np.random.default_rng(0)

    def write(arm, seed, lines):
        folder = tmp_path / f"runs/{arm}-{seed}"
        folder.mkdir(parents=True)
        (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
        (folder / "config.json").write_text(configs.to_json(load("embedded", f"{arm},{seed}")))
        fact = {
            "finished": "2026-01-02T03:04",
            "machine": "m",
            "devices": "d",
            "versions": {},
            "seconds": 1.0,
            "exit": "complete",
        }
        (folder / "run.json").write_text(json.dumps(fact))
        plan = {"parameters": 5, "tokenizer": {"name": "t"}, "stages": [{"name": "trunk", "tokens": 9}]}
        (folder / "plan.json").write_text(json.dumps(plan | {"conditioned_and_plain": [{"in_both": 0}]}))

    for seed in (1, 2):
        for arm in ("standard", "meco"):
            write(arm, seed, records(*rng.uniform(2, 3, 3), none=2.0, true=1.9, wrong=2.1))
        late = records(2.5, 2.4, none=2.0, true=1.9, wrong=2.1)
        write(
            "no_cooldown", seed, [line | {"step": line["step"] + 18, "tokens": line["tokens"] + 1800} for line in late]
        )
    assert analyse.main([str(tmp_path / "runs"), f"--output={tmp_path / 'results'}"]) == 0
    record = json.loads((tmp_path / "results/embedded.json").read_text())
    assert record["seeds"]["meco"] == [1, 2] and record["documents"][0]["in_both"] == 0
    assert list(record["arms"]["no_cooldown"]["curve"]) == ["0", "1000", "1800", "2800"]  # meco's trunk comes before
    assert "metadata throughout" in capsys.readouterr().out
    assert (tmp_path / "results/embedded.png").read_bytes()[:4] == b"\x89PNG"


def test_analysing_before_running_is_told(tmp_path):
    with pytest.raises(UserError, match=r"run experiments/meco/run\.py first"):
        analyse.read(tmp_path)
