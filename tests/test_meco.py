"""The MeCo presets against the numbers of the paper and its released configurations (arXiv 2501.01956)."""

from pathlib import Path

import pytest

from mixlab import config, errors
from mixlab.data import open_sizes
from mixlab.plan import as_text, plan_of_sizes
from mixlab.training.schedules import rate_of

FILE = str(Path(__file__).parents[1] / "configs/meco.py")
PARAMETERS = {"600M": 665_371_648, "1.6B": 1_639_024_640, "3B": 3_606_752_256, "8B": 8_030_261_248}


def planned(arg):
    loaded = config.load(f"{FILE}:{arg}", [])
    return loaded, plan_of_sizes(loaded, open_sizes(loaded))


@pytest.mark.parametrize("size", PARAMETERS)
def test_parameters_and_tokens(size):
    _, plan = planned(size)
    assert plan["parameters"] == PARAMETERS[size]
    steps, cooldown = (20_000, 2_500) if size == "8B" else (40_000, 4_000)
    assert plan["total_steps"] == steps and plan["total_tokens"] == steps * 4_194_304
    assert [stage["steps"] for stage in plan["stages"]] == [steps - cooldown, cooldown]


def test_the_rate_goes_on_where_the_cooldown_begins():
    loaded, plan = planned("1.6B")
    rule = loaded.learning_rates[0][1]
    published = {
        0: 0,
        1000: 1.5e-3,
        2000: 3e-3,
        20_000: 1.761482e-3,
        36_000: 3.731467e-4,
        38_000: 3.184122e-4,
        40_000: 3e-4,
    }
    assert {step: rate_of(rule, step) for step in published} == pytest.approx(published, rel=1e-6)
    conditioned, cooldown = plan["stages"]
    assert conditioned["learning_rate_after"] == cooldown["learning_rate_first"] == pytest.approx(3.731467e-4, rel=1e-6)
    text = as_text(plan, 120)
    assert "stage cooldown: steps 36,000 to 39,999" in text and "learning rate 0.000373147 to 0.0003" in text
    assert "learning rate 0 over 0.003 to 0.000373" in text and "167,772,160,000 tokens" in text


@pytest.mark.parametrize(
    "words, expected, cooldown_steps",
    [
        ("", {}, 4000),
        ("standard", None, 0),
        ("no_cooldown", {}, 0),
        ("mixed", {"share": 0.9}, 0),
        ("cooldown_20%", {}, 8000),
        ("cooldown_30%,hashed", {"hashed": True}, 12_000),
        ("full_url", {"reduce": "url"}, 4000),
        ("top_0.2%", {"min_documents": 1000}, 4000),
        ("topics", {"columns": ("topic",), "prefix": "Topic: "}, 4000),
    ],
)
def test_variants(words, expected, cooldown_steps):
    loaded, _ = planned(f"1.6B,{words}" if words else "1.6B")
    first, *rest = loaded.stages
    assert sum(stage.steps for stage in rest) == cooldown_steps and first.steps == 40_000 - cooldown_steps
    assert all(stage.format.metadata is None and list(stage.mixture) == ["dclm_cooldown"] for stage in rest)
    found = first.format.metadata
    assert found is None if expected is None else expected.items() <= vars(found).items()
    assert loaded.stages[-1].format.cut(8192)[:4] == ("complete", True, True, 8192)


@pytest.mark.parametrize("arg", ["2B", "1.6B,hash", "1.6B,hashed,topics", "1.6B,mixed,standard", "1.6B,"])
def test_another_word_is_refused(arg, capsys):
    assert errors.run(lambda _: config.load(f"{FILE}:{arg}", []), []) == errors.EXIT_USER_ERROR
    assert "for example 1.6B,hashed" in capsys.readouterr().err
