import base64
import json
import math
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path

import matplotlib
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mixlab.errors import UserError
from mixlab.report import plots, tables, text
from mixlab.report.charts import charts, set_charts
from mixlab.report.page import write_report
from mixlab.report.runs import Series, labels, read_run, read_runs
from mixlab.report.spikes import spike_scores

REPOSITORY = Path(__file__).resolve().parents[2]
TOKENS_PER_STEP = 64


def bits(offset, domain, step):
    return offset + domain + 4 / (1 + step)


def make_run(path, name="tiny", offset=1.0, error=0.03, evaluates=True, files=True):
    """A run of 60 steps in two stages that recorded its loss every step (null at step 7) and two evaluation
    sets every 20; the set of index d has `bits(offset, d, step)` bits per byte."""
    path.mkdir(parents=True)
    lines = []
    for step in range(61):
        record = {"step": step, "tokens": step * TOKENS_PER_STEP}
        if step:
            record |= {
                "train/loss": None if step == 7 else 2 + 6 / step,
                "train/grad_norm": 1.0 + 1 / step,
                "train/learning_rate": 0.01 * min(1, step / 10),
                "perf/tokens_per_second": 1000.0,
                "perf/step_seconds": 0.5 if step <= 40 else 1.0,
            }
        if evaluates and step % 20 == 0:
            for domain, key in enumerate(["code", "odd/name $x$ <b>"]):
                record |= {
                    f"eval/{key}/bits_per_byte": bits(offset, domain, step),
                    f"eval/{key}/bits_per_byte_se": error,
                    f"eval/{key}/loss": 2.5,
                    f"eval/{key}/tokens": 4321,
                }
            record["eval/macro/bits_per_byte"] = bits(offset, 0.5, step)
            record["eval/macro/bits_per_byte_se"] = error / 2
        lines.append(json.dumps(record) + "\n")
    (path / "metrics.jsonl").write_text("".join(lines))
    (path / "config.json").write_text(
        json.dumps({"name": name, "seed": 3, "model": {"layers": [1, {"width": offset}]}})
    )
    if not files:
        return path
    source = {
        "weight": 0.75,
        "tokens": 1440,
        "epochs": 1.5,
        "documents_per_epoch": 12,
        "dropped_tokens_per_epoch": 77,
    }
    stages = [
        {
            "name": "main",
            "steps": 40,
            "tokens": 2560,
            "sources": {"web": source | {"metadata": {"documents": 9}}, "books": source | {"tokens": 480}},
        },
        {"name": "cooldown", "steps": 20, "tokens": 1280, "sources": {"books": source}},
    ]
    values = {
        "plan.json": {"total_tokens": 3840, "total_steps": 60, "stages": stages, "sources": {"web": "f00d"}},
        "samples.json": {
            "step": 60,
            "samples": [
                {"prompt": "Dear <i>", "text": "Dear <i>reader<script>alert(1)</script>\x00"},
                {"prompt": "one", "text": " two\n  three & \ud800"},
            ],
        },
        "baselines.json": {"unigram": {"code": 4.0, "macro": 4.5}, "bigram": {"code": 3.0, "macro": 3.25}},
        "run.json": {
            "started": "2026-01-05T10:00:00+00:00",
            "finished": "2026-01-05T11:02:03+00:00",
            "parameters": 1234567,
            "devices": ["accelerator", "accelerator"],
            "command": ["python", "-m", "mixlab.train", "--config=a b.py"],
            "exit": "complete",
        },
    }
    for file, value in values.items():
        (path / file).write_text(json.dumps(value))
    return path


class Page(HTMLParser):
    """A report's elements: pictures, tables (lists of rows of cell texts), texts by class, and tags seen."""

    VOID = ("meta", "img", "source", "br", "link")

    def __init__(self, path):
        super().__init__()
        self.pictures, self.tables, self.tags, self.texts, self.addresses = [], [], [], {}, []
        self._open, self.all = [], ""
        self.feed(path.read_text(encoding="utf-8"))
        assert not self._open, "every element is closed"

    def handle_starttag(self, tag, attributes):
        attributes = dict(attributes)
        self.tags.append(tag)
        self.addresses += [attributes[key] for key in ("src", "srcset", "href") if key in attributes]
        if tag == "figure":
            self.pictures.append(attributes["id"])
        elif tag == "table":
            self.tables.append([])
        elif tag == "tr":
            self.tables[-1].append([])
        elif tag in ("td", "th"):
            self.tables[-1][-1].append("")
        if tag not in self.VOID:
            self._open.append((tag, attributes.get("class", "")))
            if attributes.get("class"):
                self.texts.setdefault(attributes["class"], []).append("")

    def handle_endtag(self, tag):
        assert self._open.pop()[0] == tag

    def handle_data(self, data):
        self.all += data
        if any(tag in ("td", "th") for tag, _ in self._open):
            self.tables[-1][-1][-1] += data
        for _, name in self._open:
            if name:
                self.texts[name][-1] += data

    def row(self, first):
        return next(row for table in self.tables for row in table if row[0] == first)


@pytest.fixture(scope="module")
def single(tmp_path_factory):
    run = make_run(tmp_path_factory.mktemp("single") / "run")
    return write_report([run], run / "report")


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    root = tmp_path_factory.mktemp("pair")
    runs = [make_run(root / "a" / "run", error=0.03), make_run(root / "b" / "run", offset=1.25, error=0.04)]
    return write_report(runs, root / "report")


def test_headline_facts_and_baselines(single):
    page = Page(single)
    for shown in ("tiny", "1.23 M", "3,840", "1 h 02 min", "2 × accelerator", "complete", "2026-01-05 10:00"):
        assert shown in page.all, shown
    assert text.decimal(bits(1, 0.5, 60), 3) in page.all
    assert "± 0.015" in page.all and "bigram 3.250" in page.all and "unigram 4.500" in page.all


def test_table_of_evaluation_sets(single):
    page = Page(single)
    assert page.row("code") == [
        "code",
        f"{bits(1, 0, 60):.4f} ± 0.0300",
        "3.0000",
        "4.0000",
        "2.5000",
        "4,321",
    ]
    assert page.row("odd/name $x$ <b>")[1:4] == [f"{bits(1, 1, 60):.4f} ± 0.0300", "–", "–"]
    assert page.row("macro")[1] == f"{bits(1, 0.5, 60):.4f} ± 0.0150"


def test_breakdowns_are_tables_of_their_own_and_no_sets(tmp_path):
    path = make_run(tmp_path / "run")
    lines = [json.loads(line) for line in (path / "metrics.jsonl").read_text().splitlines()]
    for key, bits_per_byte in {"by_length/64": 2.5, "by_length/2048": 2.0, "by_position/1": 4.0}.items():
        lines[-1] |= {f"eval/{key}/bits_per_byte": bits_per_byte, f"eval/{key}/loss": 3.0, f"eval/{key}/tokens": 99}
    (path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    page = Page(write_report([path], tmp_path / "report"))
    by_length, by_position = (t for t in page.tables if t[0][0].endswith("tokens"))
    assert [row[:2] for row in by_length[1:]] == [["64 to 127", "2.5000"], ["2,048 to 4,095", "2.0000"]]
    assert [row[:2] for row in by_position[1:]] == [["0 to 1", "4.0000"]] and by_position[1][3] == "99"
    run = read_run(path)
    assert run.evaluation_sets() == ["code", "odd/name $x$ <b>"]
    assert {row["set"] for row in tables.evaluations(run)} == {"code", "odd/name $x$ <b>", "macro"}


def test_what_is_read(single):
    page = Page(single)
    assert page.row("web") == ["web", "75.0%", "1,440", "1.5", "12", "77", "–", "–"]
    assert page.texts["card stage"][1].split()[0] == "cooldown"
    assert "metadata before documents of web" in page.texts["card stage"][0]
    assert "metadata" not in page.texts["card stage"][1]


def test_samples_are_escaped_and_split(single):
    page = Page(single)
    assert "script" not in page.tags
    assert page.texts["prompt"][1:] == ["Dear <i>", "one"]
    assert page.texts["continuation"][1] == "reader<script>alert(1)</script>␀"
    assert page.texts["continuation"][2].startswith(" two\n  three & ")


def test_config_and_command(single):
    page = Page(single)
    assert "'--config=a b.py'" in page.all and '"width": 1.0' in page.all and "details" in page.tags


@pytest.mark.parametrize("name", ["single", "pair"])
def test_opens_offline_with_all_its_pictures(name, request):
    index = request.getfixturevalue(name)
    page = Page(index)
    pictures = {file.name for file in index.parent.glob("*.png")}
    held = [base64.b64decode(address.removeprefix("data:image/png;base64,")) for address in page.addresses]
    assert set(held) == {(index.parent / picture).read_bytes() for picture in pictures}
    assert len(pictures) == len(held) == 2 * (7 + 2) and all(picture.startswith(b"\x89PNG") for picture in held)
    assert not {"link", "iframe", "object"} & set(page.tags)


def test_two_runs_side_by_side(pair):
    page = Page(pair)
    assert "tiny (a/run)" in page.all and "tiny (b/run)" in page.all
    first, second, difference = page.row("code")[1:]
    assert first == f"{bits(1, 0, 60):.4f} ± 0.0300" and second == f"{bits(1.25, 0, 60):.4f} ± 0.0400"
    assert difference == "+0.2500 ± 0.0500"  # 3-4-5
    assert page.row("model.layers.1.width") == ["model.layers.1.width", "1.0", "1.25"]
    assert "root of the sum of the two squared standard errors" in page.all
    assert "The same as tiny (a/run)" in page.all and len(page.texts["card stage"]) == 2


def test_held_out_rows_of_different_lengths_are_told(pair, tmp_path):
    told = "scored in rows of different lengths"
    assert told not in Page(pair).all
    runs = [make_run(tmp_path / name) for name in "abc"]
    for run, evaluation in zip(runs, ({}, {"sequence_length": 64}, {"sequence_length": 32}), strict=True):
        stages = [{"sequence_length": 128}, {"sequence_length": 64}]
        (run / "config.json").write_text(json.dumps({"stages": stages, "evaluation": evaluation}))
    assert told not in Page(write_report(runs[:2], tmp_path / "alike")).all
    page = Page(write_report(runs, tmp_path / "other")).all
    assert told in page and "a 64, b 64, c 32 tokens" in page


def test_differences_have_signs_and_are_marked_beyond_two_standard_errors(tmp_path):
    runs = read_runs(make_run(tmp_path / str(i), offset=offset) for i, offset in enumerate([1.0, 0.9, 1.05]))
    row = tables.comparison(runs)[0]
    assert [(d.value, d.error, d.clear) for d in row["differences"]] == [
        ("−0.1000", "0.0424", True),
        ("+0.0500", "0.0424", False),
    ]


def test_run_that_has_only_begun(tmp_path):
    run = make_run(tmp_path / "run", evaluates=False, files=False)
    metrics = (run / "metrics.jsonl").read_bytes().splitlines(keepends=True)[:3]
    (run / "metrics.jsonl").write_bytes(b"".join(metrics)[:-9])  # the last line is being written
    page = Page(write_report([run], run / "report"))
    assert "No evaluation has been recorded" in page.all and "still running, or interrupted" in page.all
    assert "note" not in page.texts and "did not record its command" in page.all
    (run / "metrics.jsonl").unlink()
    page = Page(write_report([run], run / "report"))
    assert page.addresses == [] and [file.name for file in (run / "report").iterdir()] == ["index.html"]


def test_a_run_that_never_had_a_finite_loss(tmp_path):
    run = make_run(tmp_path / "run", files=False)
    records = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    records = [r | {"train/loss": None, "eval/macro/bits_per_byte": None} for r in records]
    (run / "metrics.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    page = Page(write_report([run], tmp_path / "out"))
    assert "loss" not in page.pictures and "learning_rate" in page.pictures
    assert page.row("macro")[1] == "– ± 0.0150"


def test_one_evaluated_run_beside_one_that_was_not(tmp_path):
    runs = [make_run(tmp_path / "with"), make_run(tmp_path / "without", evaluates=False)]
    page = Page(write_report(runs, tmp_path / "out"))
    assert page.row("code")[2:] == ["–", "–"] and "tiny (without): not evaluated" in page.all


def spiking_run(path, name):
    """A run of 1,200 steps whose loss spikes at 1,101 and 1,151, and its gradient norm at 201 and 1,151."""
    values = np.tile([2.0, 2.1], 600), np.tile([1.0, 1.1], 600)
    values[0][[1100, 1150]] = 9.0
    values[1][[200, 1150]] = 9.0
    make_run(path, name, files=False)
    lines = [
        json.dumps({"step": step, "tokens": step, "train/loss": loss, "train/grad_norm": norm}) + "\n"
        for step, (loss, norm) in enumerate(zip(*(v.tolist() for v in values), strict=True), 1)
    ]
    (path / "metrics.jsonl").write_text("".join(lines))
    return path


def test_spike_scores_of_a_run(tmp_path):
    long, short = spiking_run(tmp_path / "long", "long"), make_run(tmp_path / "short", name="short")
    expected = {"loss": 1.0, "grad_norm": 0.5, "stability_total": 3 / 1200, "stability_recent": None}
    assert spike_scores(read_run(long)) == expected
    with (long / "metrics.jsonl").open("a") as file:  # what a resumed run does again counts once
        file.write((long / "metrics.jsonl").read_text()[-20_000:].partition("\n")[2])
    assert spike_scores(read_run(long)) == expected
    assert set(spike_scores(read_run(short)).values()) == {None}
    facts = {fact.label: fact for fact in tables.facts(read_run(long), None)}
    assert facts["Spike score, loss"].value == "1%" and "gradient norm 0.5%" in facts["Spike score, loss"].detail
    assert facts["Unstable steps"].value == "0.25%" and "10,000" not in facts["Unstable steps"].detail
    page = Page(write_report([long], tmp_path / "one"))
    assert "Spike score, loss" in page.all and "0.25%" in page.all
    page = Page(write_report([long, short], tmp_path / "two"))
    assert [cell[:5] for cell in page.row("Unstable steps")[1:]] == ["0.25%", "–know"]
    assert [cell[:4] for cell in page.row("Spike score, loss")[1:]] == ["1%of", "–kno"]


def test_metrics_as_columns(tmp_path):
    run = read_run(make_run(tmp_path / "run"))
    loss = run.series("train/loss")
    assert loss.steps.tolist() == list(range(1, 61)) and loss.steps.dtype == np.int64
    assert np.isnan(loss.values[6]) and loss.values[59] == 2.1 and loss.tokens[59] == 60 * TOKENS_PER_STEP
    assert (run.last_step, run.last_tokens, run.seconds) == (60, 3840, 3723)
    assert run.evaluation_sets() == ["code", "odd/name $x$ <b>"]
    assert run.evaluated("code", "bits_per_byte") == (bits(1, 0, 60), 0.03, 60)
    assert len(run.series("train/absent")) == 0 and math.isnan(run.series("train/absent").last)


def test_a_resumed_run_counts_its_later_lines_and_reports_torn_ones(tmp_path):
    path = make_run(tmp_path / "run")
    with (path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 61, "tok\n')  # torn by a kill, then resumed from step 40
        file.write('{"step": 41, "tokens": 2624, "train/loss": 1.5, "note": "text", "train/flag": true}\n[1]\n')
        file.write('{"step": 62, "tokens": 1, "train/l')
    run = read_run(path)
    loss = run.series("train/loss")
    assert loss.at(41) == 1.5 and loss.steps.tolist() == list(range(1, 61)) and "note" not in run.metrics
    assert run.notes == ("metrics.jsonl: 2 lines could not be read",)
    (path / "plan.json").write_text('{"stages": [')
    assert "plan.json could not be read" in read_run(path).notes and read_run(path).stages == []


def test_time_spent_training(tmp_path):
    run = read_run(make_run(tmp_path / "run"))
    assert run.training_seconds(np.array([0, 1, 40, 60, 61])).tolist()[:4] == [0, 0.5, 20, 40]
    assert np.isnan(run.training_seconds(np.array([61]))).all()
    assert plots._by_time([run]) == [("main", 20), ("cooldown", 20)]  # one lasts 40 steps, the other 20
    assert [chart.stem for chart in charts([run]) if chart.by_time] == ["bits_per_byte_by_time", "loss_by_time"]
    timeless = read_run(make_run(tmp_path / "timeless"))
    del timeless.metrics["perf/step_seconds"]
    assert not [chart for chart in charts([timeless]) if chart.by_time]
    assert [plots.draw(chart, [timeless, run], ["a", "b"], plots.LIGHT)[:4] for chart in charts([timeless, run])]


def test_labels_add_as_much_folder_as_needed(tmp_path):
    paths = [make_run(tmp_path / place, name, evaluates=False, files=False) for place, name in
             [("x/run", "same"), ("y/run", "same"), ("z/other", "same"), ("w/run", "alone")]]  # fmt: skip
    assert labels(read_runs(paths)) == ["same (x/run)", "same (y/run)", "same (other)", "alone"]
    assert labels(read_runs(paths[:1])) == ["same"]


def test_not_a_run_folder(tmp_path):
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="no such folder"):
        read_run(tmp_path / "missing")
    with pytest.raises(UserError, match="not a run folder"):
        read_run(tmp_path / "empty")
    run = make_run(tmp_path / "run", files=False)
    with pytest.raises(UserError, match="jsonl: a file"):  # what a pattern may match beside the runs
        read_run(run / "metrics.jsonl")
    with pytest.raises(UserError, match="given twice"):
        read_runs([run, tmp_path / "empty" / ".." / "run"])


def test_a_report_replaces_a_report_and_nothing_else(tmp_path):
    run, out = make_run(tmp_path / "run"), tmp_path / "out"
    write_report([run], out)
    before = {file.name for file in out.iterdir()}
    lines = (run / "metrics.jsonl").read_text().replace("eval/code/", "other/code/")
    (run / "metrics.jsonl").write_text(lines)
    write_report([run], out)  # one set fewer: no pictures of single sets
    assert before - {file.name for file in out.iterdir()} == {
        "set_000.png", "set_000-dark.png", "set_001.png", "set_001-dark.png"
    }  # fmt: skip
    for name, content in [
        ("notes.txt", b"mixlab report"),
        ("loss.png", b"my own picture"),
        ("index.html", b"mine"),
    ]:
        kept = tmp_path / f"mine-{name}"
        kept.mkdir()
        (kept / name).write_bytes(content)
        with pytest.raises(UserError, match=name):
            write_report([run], kept)
        assert [file.name for file in kept.iterdir()] == [name] and (kept / name).read_bytes() == content
    with pytest.raises(UserError, match="is a file"):
        write_report([run], run / "config.json")
    with pytest.raises(UserError, match="nothing was written"):
        write_report([run], run)


def test_the_caller_s_matplotlib_is_left_alone(tmp_path, monkeypatch):
    monkeypatch.setitem(matplotlib.rcParams, "font.size", 17.5)  # not what an earlier report may have left
    before = dict(matplotlib.rcParams)
    run = make_run(tmp_path / "run", files=False)
    write_report([run], tmp_path / "out")
    assert dict(matplotlib.rcParams) == before


def test_pictures_only_of_what_was_recorded(tmp_path):
    runs = read_runs([make_run(tmp_path / "run", evaluates=False)])
    assert [c.stem for c in charts(runs)] == ["loss", "learning_rate", "gradient_norm", "speed", "loss_by_time"]
    assert set_charts(runs) == []


@given(st.lists(st.floats(-1e6, 1e6) | st.just(math.nan), max_size=400))
def test_smoothing_stays_within_the_values_and_keeps_gaps(values):
    values = np.array(values, np.float64)
    steps = np.arange(len(values))
    line, window = Series(steps, steps.astype(float), values).smoothed()
    assert line.shape == values.shape and window % 2 == 1
    assert np.array_equal(np.isnan(line), np.isnan(values))
    for i in np.flatnonzero(~np.isnan(values)):
        near = values[max(0, i - window // 2) : i + window // 2 + 1]
        assert np.isclose(line[i], np.nanmean(near), rtol=1e-9, atol=1e-6)


@pytest.mark.parametrize(
    ("value", "shown"),
    [(0, "0"), (9999, "9,999"), (3050.3, "3,050"), (2.5, "2.5"), (12345, "12.3 k"), (999_960, "1 M"), (3_276_800, "3.28 M"), (7e12, "7 T"),
     (1e30, "1e+30"), (None, "–"), (math.nan, "–"), ("many", "–")],
)  # fmt: skip
def test_counts(value, shown):
    assert text.count(value) == shown


@pytest.mark.parametrize(
    ("seconds", "shown"),
    [(3, "3 s"), (59.6, "1 min 00 s"), (3723, "1 h 02 min"), (100_000, "1 d 03 h"), (math.nan, "–")],
)
def test_durations(seconds, shown):
    assert text.duration(seconds) == shown


def command(*arguments, code=None):
    start = ["-c", code] if code else [REPOSITORY / "tools" / "report.py"]
    return subprocess.run(
        [sys.executable, *start, *map(str, arguments)], capture_output=True, text=True, cwd=REPOSITORY
    )


def test_command_line(tmp_path):
    run, other = make_run(tmp_path / "run", files=False), make_run(tmp_path / "other", files=False)
    done = command(run)
    assert done.returncode == 0 and done.stdout.strip() == str(run / "report" / "index.html"), done.stderr
    for arguments, message in [
        ([run, "--color=red"], "--color=red"),
        ([tmp_path / "missing"], "no such folder"),
        ([run, other], "--output is missing"),
        ([], "RUN_DIR"),
    ]:
        refused = command(*arguments)
        assert refused.returncode == 2 and message in refused.stderr and "Traceback" not in refused.stderr
        assert refused.stderr.count("error:") == 1 and refused.stdout == ""


def test_needs_neither_jax_nor_a_display():
    code = "import sys, mixlab.report.page; print([m for m in ('jax', 'matplotlib.pyplot') if m in sys.modules])"
    assert command(code=code).stdout.strip() == "[]"


@pytest.mark.parametrize(
    ("line", "entry"), [([6.0, 4.0, 3.0], 5.0), ([math.nan, 6.0, 4.0], 15.0), ([4.0, 3.0, 2.0], 0.0)]
)
def test_where_a_curve_comes_into_the_picture(line, entry):
    line, x = np.array(line), np.array([0.0, 10.0, 20.0])
    curve = plots._Curve(0, x, line, line, np.zeros(3), "k", "-", 1.0)
    assert plots._entry(curve, 5.0) == entry  # between two records, not at the first that is inside
