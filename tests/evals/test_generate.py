"""Drawing among the likeliest tokens, and the command that continues prompts."""

import io
import json
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays_of

from mixlab import errors
from mixlab.evals.generate import narrow
from tools import generate

NARROW = jax.jit(narrow)


@settings(max_examples=60, deadline=None)
@given(
    arrays_of.arrays("float32", 12, elements=st.integers(-9, 9)), st.integers(1, 12), st.floats(0.015625, 1, width=32)
)
def test_the_fewest_likeliest_tokens_that_hold_the_probability_are_kept(logits, top_k, top_p):
    descending = np.sort(logits.astype(np.float64))[::-1][:top_k]
    shares = np.cumsum(np.exp(descending) / np.exp(descending).sum())
    assume(abs(shares - top_p).min() > 1e-5 or top_p == 1)  # where rounding decides
    least = descending[min(int(np.searchsorted(shares, top_p)), len(descending) - 1)]
    kept = np.asarray(NARROW(jnp.asarray(logits), top_k, top_p))
    np.testing.assert_array_equal(kept, np.where(logits >= least, logits, -np.inf))


@pytest.fixture
def ask(trunk, monkeypatch, capsys):
    monkeypatch.setenv("MIXLAB_CACHE", str(trunk.parent / "cache"))

    def ask(*arguments, code=0):
        capsys.readouterr()
        assert errors.run(generate.main, [f"--workdir={trunk}", *arguments]) == code
        out, err = capsys.readouterr()
        return out if code == 0 else err

    return ask


def answers(text):
    return [json.loads(line) for line in text.splitlines()]


def test_prompts_are_continued_together_as_one_by_one(ask, tmp_path, monkeypatch):
    together = answers(ask("ab", "so it goes", "--tokens=6", "--json"))
    assert [answer["prompt"] for answer in together] == ["ab", "so it goes"]
    assert answers(ask("so it goes", "--tokens=6", "--json")) == together[1:]
    (tmp_path / "p.jsonl").write_text('{"prompt": "ab"}\n{"prompt": "so it goes"}\n')
    assert answers(ask(f"--prompts={tmp_path / 'p.jsonl'}", "--tokens=6", "--json")) == together
    (tmp_path / "p.txt").write_text("so it\ngoes\n")
    (answer,) = answers(ask(f"--prompts={tmp_path / 'p.txt'}", "--tokens=6", "--json"))
    assert answer["prompt"] == "so it\ngoes"
    monkeypatch.setattr(sys, "stdin", io.StringIO("ab\n"))
    assert ask("--prompts=-", "--tokens=6") == "ab" + together[0]["text"] + "\n"


def test_what_is_drawn_depends_on_the_settings(ask):
    greedy = ask("ab", "--tokens=8")
    assert ask("ab", "--tokens=8", "--temperature=1", "--top-k=1") == greedy
    assert ask("ab", "--tokens=8", "--temperature=1", "--top-p=0.0001") == greedy
    drawn = [ask("ab", "--tokens=8", "--temperature=1", f"--seed={seed}") for seed in (1, 2, 1)]
    assert drawn[0] == drawn[2] != drawn[1]
    three = answers(ask("ab", "--tokens=8", "--temperature=1", "--samples=3", "--json"))
    assert len({answer["text"] for answer in three}) == 3


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ([], "give a prompt as an argument"),
        (["a", "--tokens=0", "--temperature=-1", "--top-p=0"], "--top-p=0.0: must be above 0"),
        (["a", "--top-k=5", "--samples=2"], "--top-k, --samples: nothing is drawn at temperature 0"),
        (["a", "--metadata=a.org"], "has metadata, so the model knows none"),
        (["a", "--tokens=32"], "use --tokens=31"),
        (["a" * 40, "--tokens=4"], "shorten the prompt"),
        (["a", "--step=3"], "has no checkpoint of step 3"),
        (["--prompts=gone.txt"], "--prompts=gone.txt: cannot be read"),
        (["--prompts=bad.jsonl"], "bad.jsonl: line 2 must be an object"),
        (["a", "--config.seed=1"], "has its own configuration"),
    ],
)
def test_mistakes(ask, tmp_path, monkeypatch, arguments, expected):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "bad.jsonl").write_text('{"prompt": "a"}\n{"text": "b"}\n')
    assert expected in ask(*arguments, code=errors.EXIT_USER_ERROR)
