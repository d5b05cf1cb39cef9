"""The OLMo 2 presets against the numbers that the paper prints (arXiv 2501.00656; its tables 1, 3, 4 and 13)."""

import json
import math
from fractions import Fraction
from functools import cache
from pathlib import Path

import numpy as np
import pytest

from configs.olmo2 import DOLMINO, MIXES, dolmino
from mixlab import config, errors, train
from mixlab.data import open_sizes
from mixlab.plan import as_text, plan_of_sizes
from mixlab.training.schedules import composed_rate
from tests.stores import some_texts, write_store
from tools import plan as plan_tool

SHORT = "--config.stages.0.steps=5000"  # quicker, where stage 1 is of no interest
FILE = str(Path(__file__).parents[1] / "configs/olmo2.py")
PARAMETERS = {"1B": 1_484_916_736, "7B": 7_298_617_344, "13B": 13_716_198_400, "32B": 32_234_279_936}
# last step of stage 1 and its tokens; tokens a step
PRETRAINED = {
    "1B": (1_907_359, 4.000e12, 2_097_152),
    "7B": (928_646, 3.895e12, 4_194_304),
    "13B": (596_057, 5.000e12, 8_388_608),
    "32B": (721_901, 6.056e12, 8_388_608),
}
ANNEALED = {
    "1B-50B": 23_842,
    "7B-50B": 11_921,
    "13B-100B": 11_921,
    "13B-300B": 35_763,
    "32B-100B": 11_921,
    "32B-300B": 35_763,
}
# Table 13's Mix %; "math" is all that DOLMINO has beyond these five.
MIX_PERCENT = {
    "50B": {"dclm_filtered": 47.2, "flan": 16.6, "stackexchange": 2.45, "pes2o": 5.85, "wiki": 7.11, "math": 20.8},
    "100B": {"dclm_filtered": 50.2, "flan": 16.7, "stackexchange": 2.47, "pes2o": 9.52, "wiki": 3.57, "math": 17.5},
    "300B": {"dclm_filtered": 51.9, "flan": 11.3, "stackexchange": 1.68, "pes2o": 19.4, "wiki": 4.86, "math": 10.8},
}
# Billions of tokens in the released lists of files.
LISTED = {
    "50B": {"dclm_filtered": 24.31, "flan": 8.54, "stackexchange": 1.26, "pes2o": 3.01, "wiki": 3.66, "all": 51.47},
    "100B": {"dclm_filtered": 51.47, "flan": 17.08, "stackexchange": 2.52, "pes2o": 9.76, "wiki": 7.32, "all": 112.94},
    "300B": {
        "dclm_filtered": 156.26,
        "flan": 34.16,
        "stackexchange": 5.04,
        "pes2o": 58.55,
        "wiki": 14.64,
        "all": 311.42,
    },
}


@cache
def planned(arg, *overrides):
    """(configuration, its stages, its plan)"""
    read = config.load(f"{FILE}:{arg}", list(overrides))
    sizes = open_sizes(read)
    return read, sizes.stages, plan_of_sizes(read, sizes)


def grouped(amounts):
    """Source -> amount, with all of mathematics as one."""
    groups = dict.fromkeys(MIX_PERCENT["50B"], 0)
    for name, amount in amounts.items():
        groups[name if name in groups else "math"] += amount
    return groups


def percent(stage):
    return grouped({name: 100 * source["tokens"] / stage["tokens"] for name, source in stage["sources"].items()})


@pytest.mark.parametrize("arg", ANNEALED)
def test_parameters_steps_and_tokens(arg):
    size, mix = arg.split("-")
    _, stages, plan = planned(arg)
    last, tokens, tokens_per_step = PRETRAINED[size]
    pretraining, anneal = plan["stages"]
    assert plan["parameters"] == PARAMETERS[size]
    assert pretraining["steps"] == anneal["first_step"] == last and pretraining["first_step"] == 0
    assert pretraining["tokens"] == last * tokens_per_step == pytest.approx(tokens, rel=2e-4)
    assert (anneal["steps"], anneal["tokens_per_step"]) == (ANNEALED[arg], tokens_per_step)
    assert 0 <= anneal["tokens"] - MIXES[mix] < tokens_per_step
    assert plan["total_steps"] == anneal["last_step"] + 1 == last + ANNEALED[arg]
    assert all(stage.sequence_length == 4096 and stage.format.mask_repetitions for stage in stages)


@pytest.mark.parametrize("size", PRETRAINED)
def test_stage_1_alone_is_stage_1(size):
    alone, both = planned(size, SHORT)[2], planned(f"{size}-50B", SHORT)[2]
    assert alone["stages"] == both["stages"][:1]
    assert set(alone["sources"]) == set(alone["stages"][0]["sources"])
    # table 4, of 3.90T tokens
    expected = {"dclm": 3.71e12, "starcoder": 83.0e9, "pes2o": 58.6e9, "arxiv": 20.8e9, "open_web_math": 12.2e9}
    expected |= {"algebraic_stack": 11.8e9, "wiki": 3.7e9}
    tokens = alone["stages"][0]["tokens"]
    for name, source in alone["stages"][0]["sources"].items():
        assert source["tokens"] / tokens == pytest.approx(expected[name] / 3.9001e12, rel=0.012)
        assert source["epochs"] == pytest.approx(tokens / 3.9e12, rel=2e-3)  # natural proportion: all equally often


@pytest.mark.parametrize("arg", ANNEALED)
def test_mix_percent_and_repeats_of_table_13(arg):
    anneal = planned(arg)[2]["stages"][1]
    mix = arg.split("-")[1]
    shares = percent(anneal)
    assert shares == pytest.approx(MIX_PERCENT[mix], abs=0.1)
    assert sum(source["tokens"] for source in anneal["sources"].values()) == anneal["tokens"]
    # The list has more tokens than the run: a source is read as often as it is listed, times the part that is read.
    part = anneal["tokens"] / sum(dolmino(mix).values())
    column = 1 + list(MIXES).index(mix)
    for name, source in anneal["sources"].items():
        copies = DOLMINO[name][column] / 100
        assert copies <= 1 or copies == int(copies)
        assert source["epochs"] == pytest.approx(copies * part, abs=4 * 4096 / source["tokens_per_epoch"])


@pytest.mark.parametrize("mix", MIXES)
def test_the_released_lists(mix):
    billions = {name: tokens / 1e9 for name, tokens in grouped(dolmino(mix, lists=True)).items()}
    expected = dict(LISTED[mix])
    assert sum(billions.values()) == pytest.approx(expected.pop("all"), abs=0.1)
    assert {name: billions[name] for name in expected} == pytest.approx(expected, abs=0.1)
    _, (_, stage), plan = planned(f"13B-{mix}-lists", SHORT)
    whole = sum(dolmino(mix, lists=True).values())
    for name, source in plan["stages"][1]["sources"].items():
        assert abs(source["tokens"] - Fraction(dolmino(mix, lists=True)[name], whole) * stage.tokens) <= 3 * 4096


@pytest.mark.parametrize("arg", ANNEALED)
def test_the_mixture_deals_these_shares(arg):
    for stage, settings in zip(planned(arg)[1], planned(arg)[0].stages, strict=True):
        whole = sum(Fraction(weight) for weight in settings.mixture.values())
        shares = {name: Fraction(weight) / whole for name, weight in settings.mixture.items()}
        mixture = stage.mixture
        assert mixture.shares == shares and sum(shares.values()) == 1
        blocks = mixture.rows // mixture.block_rows
        for block in (1, 7, blocks // 3, blocks):
            rows = block * mixture.block_rows
            for name, count in zip(mixture.names, mixture.counts(rows).tolist(), strict=True):
                assert abs(count - shares[name] * rows) < 1
        last = np.arange(mixture.rows - 3 * stage.rows_per_step, mixture.rows)
        numbers, ks = mixture.locate(last)
        totals = mixture.counts(mixture.rows)
        assert (ks < totals[numbers]).all() and totals.sum() == mixture.rows


def cosine(tokens, peak, warmup_tokens, horizon_tokens):
    """The rate as the released trainer has it, in tokens."""
    done = (tokens - warmup_tokens) / (horizon_tokens - warmup_tokens)
    return peak * (0.1 + 0.9 * 0.5 * (1 + math.cos(math.pi * min(done, 1))))


@pytest.mark.parametrize(
    ("arg", "peak", "warmup_steps", "horizon", "at_the_joint", "anneal_peak"),
    [
        ("1B-50B", 4e-4, 4000, 5e12, 7.44873e-5, 7.4487e-5),
        ("7B-50B", 3e-4, 2000, 5e12, 6.1351e-5, 6.1499e-5),
        ("13B-100B", 9e-4, 2000, 5e12, 9e-5, 9e-5),
        ("13B-300B", 9e-4, 2000, 5e12, 9e-5, 9e-5),
        ("32B-100B", 6e-4, 2000, 6.5e12, 6.6232e-5, None),
        ("32B-300B", 6e-4, 2000, 6.5e12, 6.6232e-5, None),
    ],
)
def test_learning_rates_at_the_joints(arg, peak, warmup_steps, horizon, at_the_joint, anneal_peak):
    read, _, plan = planned(arg)
    pretraining, anneal = plan["stages"]
    per_step = pretraining["tokens_per_step"]
    assert read.schedule.warmup_steps == warmup_steps and pretraining["learning_rate_first"] == 0
    assert composed_rate(read.learning_rates, warmup_steps) == pytest.approx(peak, rel=1e-12)
    assert pretraining["learning_rate_highest"] == pytest.approx(peak, rel=1e-12)
    assert composed_rate(read.learning_rates, warmup_steps // 2) == pytest.approx(peak / 2, rel=1e-12)
    formula = cosine(pretraining["tokens"], peak, warmup_steps * per_step, horizon)
    after = pretraining["learning_rate_after"]
    assert after == pytest.approx(formula, rel=2e-6)  # the horizon is of whole steps
    assert after == pytest.approx(at_the_joint, rel=4e-6)  # to the digits that are printed
    first = anneal["learning_rate_first"]
    assert first == (after if anneal_peak is None else anneal_peak)
    assert abs(first / after - 1) < 0.003
    steps = anneal["steps"]
    assert anneal["learning_rate_last"] == pytest.approx(first / steps, rel=1e-9)
    assert anneal["learning_rate_after"] == 0 and anneal["learning_rate_highest"] == first
    assert composed_rate(read.learning_rates, anneal["first_step"] - 1) == pretraining["learning_rate_last"]
    halfway = composed_rate(read.learning_rates, anneal["first_step"] + steps // 2)
    assert halfway == pytest.approx(first * (1 - (steps // 2) / steps), rel=1e-9)


def test_learning_rates_that_the_released_configuration_states():
    rates = planned("7B-50B")[0].learning_rates
    assert composed_rate(rates, 928_000) == pytest.approx(6.1499e-5, abs=5e-10)
    assert composed_rate(rates, 928_646 + 5_960) == pytest.approx(3.07521e-5, abs=5e-11)
    assert composed_rate(rates, 928_646 + 11_920) == pytest.approx(5.1589e-9, abs=5e-14)


def test_what_else_the_paper_fixes():
    read = planned("7B-50B")[0]
    optimizer = read.optimizer
    assert (optimizer.b1, optimizer.b2, optimizer.eps, optimizer.weight_decay) == (0.9, 0.95, 1e-8, 0.1)
    assert (optimizer.clip_norm, optimizer.decay_embeddings, optimizer.decay_norms_and_biases) == (1.0, False, True)
    assert read.training.z_loss == 1e-5
    for stage in read.stages:
        format = stage.format
        assert (format.mask_documents, format.loss_across_documents, format.bos, format.eos) == (
            False,
            True,
            False,
            True,
        )


def test_the_seed_of_the_anneal_leaves_stage_1_alone():
    (before, anneal), (same, other) = (
        planned("7B-50B", SHORT, *more)[1] for more in ((), ("--config.stages.1.seed=42069",))
    )
    assert (anneal.seed, other.seed) == (42, 42069)
    assert before.mixture.seed == same.mixture.seed and anneal.mixture.seed != other.mixture.seed
    assert planned("13B-100B")[1][1].seed == 1110 and planned("13B-300B")[1][1].seed == 2662


def told(capsys, main, *arguments):
    code = errors.run(main, list(arguments))
    output = capsys.readouterr()
    return code, output.out, output.err


@pytest.fixture
def elsewhere(tmp_path, monkeypatch):
    monkeypatch.setenv("MIXLAB_CACHE", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_the_tool_without_any_text(elsewhere, capsys):
    code, out, _ = told(capsys, plan_tool.main, f"--config={FILE}:7B-50B", "--json")
    assert code in (0, None) and json.loads(out) == planned("7B-50B")[2]
    assert json.loads(out)["sources"]["flan"] == {"store": "stores/flan", "declared_tokens": 17_080_000_000}
    code, out, _ = told(capsys, plan_tool.main, f"--config={FILE}:7B-50B")
    assert code in (0, None) and "SIZES DECLARED, NOT READ, of the sources marked * (18 of 18)" in out
    for width in (100, 200):
        lines = as_text(planned("7B-50B")[2], width).splitlines()
        assert max(map(len, lines)) <= width
        assert any(line.endswith("752,000,000,000 *") and "47.199%" in line for line in lines)
        assert "└── read in several stages: pes2o 1.0488 epochs, wiki 1.9703 epochs" in lines


def test_the_tool_with_some_of_the_text(elsewhere, capsys):
    texts = some_texts()
    write_store(elsewhere / "wiki", texts)
    overrides = ["--config.sources.wiki.store=wiki", "--config.model.vocab_size=259"]
    code, out, _ = told(capsys, plan_tool.main, f"--config={FILE}:7B-50B", "--json", *overrides)
    plan = json.loads(out)
    assert code in (0, None) and plan["sources"]["wiki"]["documents"] == len(texts)
    declared = {name for name, source in plan["sources"].items() if "declared_tokens" in source}
    assert declared == set(plan["sources"]) - {"wiki"} and len(declared) == 17
    read = sum(len(text.encode()) + 1 for i, text in enumerate(texts) if i % 7)  # and an end-of-document token each
    assert [stage["sources"]["wiki"]["tokens_per_epoch"] for stage in plan["stages"]] == [read, read]
    # what there is must fit, and be whole
    assert "set model.vocab_size=259" in told(capsys, plan_tool.main, f"--config={FILE}:7B", overrides[0])[2]
    (elsewhere / "wiki" / "store.json").write_text("{")
    code, _, err = told(capsys, plan_tool.main, f"--config={FILE}:7B", *overrides)
    assert code == errors.EXIT_USER_ERROR and "sources.wiki.store" in err and "store.json is damaged" in err


def test_training_needs_the_text(elsewhere, capsys):
    code, _, err = told(capsys, train.main, f"--config={FILE}:7B", "--workdir=run")
    assert code == errors.EXIT_USER_ERROR and err.startswith("error: the text is not at hand")
    assert err.count("  - sources.") == 7 and "--config.sources.NAME.store=DIR" in err
    assert not (elsewhere / "run").exists()
    code, _, err = told(capsys, plan_tool.main, f"--config={FILE}:7B", "--config.sources.wiki.declared_tokens=None")
    assert code == errors.EXIT_USER_ERROR and "sources.wiki.store: store stores/wiki: no such folder" in err
    code, _, err = told(capsys, plan_tool.main, f"--config={FILE}:7B", "--config.sources.wiki.declared_tokens=0")
    assert code == errors.EXIT_USER_ERROR and "sources.wiki.declared_tokens = 0: must be at least 1" in err


@pytest.mark.parametrize("arg", ["8B", "7B-", "7B-51B", "7B-50B-x", "7B-50B-lists-x"])
def test_arguments_that_are_none(arg):
    with pytest.raises(errors.UserError, match="write SIZE, SIZE-MIX or SIZE-MIX-lists"):
        config.load(f"{FILE}:{arg}", [])
