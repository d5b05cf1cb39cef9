import json

import pytest

from mixlab import config, schema
from mixlab.errors import UserError

FILE = """
from ml_collections import ConfigDict
from mixlab.model.presets import llama

def get_config(arg="64"):
    return ConfigDict(dict(
        name="small",
        tokenizer="bytes",
        model=llama(layers=2, d_model=int(arg), heads=2, vocab_size=259, context_length=128),
        stages=[dict(name="main", steps=10, sequence_length=128, tokens_per_step=1024)],
    ))
"""


@pytest.fixture
def file(tmp_path):
    path = tmp_path / "small.py"
    path.write_text(FILE)
    return str(path)


def refused(file, *overrides):
    with pytest.raises(UserError) as caught:
        config.load(file, list(overrides))
    return str(caught.value)


def test_file_defaults_argument_and_overrides(file):
    plain = config.load(file, [])
    assert (plain.name, plain.seed, plain.stages[0].steps, plain.model.d_model) == ("small", 0, 10, 64)
    changed = config.load(
        file + ":32",
        [
            "--config.stages.0.steps=50",
            "--config.stages[0].tokens_per_step=2048",
            "--config.optimizer.clip_norm=None",
            "--config.schedule.peak=1",
            "--config.logging.tensorboard=true",
            "--config.evaluation.sample_prompts=('a', 'b')",
            "--config.sources.text.store=/some/where",
        ],
    )
    assert (changed.stages[0].steps, changed.stages[0].tokens_per_step, changed.model.d_model) == (50, 2048, 32)
    assert changed.optimizer.clip_norm is None and changed.schedule.peak == 1.0
    assert changed.logging.tensorboard and changed.evaluation.sample_prompts == ("a", "b")
    assert changed.sources["text"].store == "/some/where"


@pytest.mark.parametrize(
    ("override", "told"),
    [
        ("--config.model.d_modl=32", "unknown key 'model.d_modl'; did you mean 'model.d_model'?"),
        ("--config.modle.d_model=32", "unknown key 'modle'; did you mean 'model'?"),
        ("--config.sed=1", "did you mean 'seed'?"),
        ("--config.stages.0.stpes=5", "did you mean 'stages.0.steps'?"),
        ("--config.stages.1.steps=5", "the list has entries 0 to 0"),
        ("--config.seed=1.5", "seed = 1.5: must be of type int"),
        ("--config.seed=abc", "seed = 'abc': must be of type int"),
        ("--config.seed", "write it as --config.seed=VALUE"),
        ("--config.logging.tensorboard=3", "logging.tensorboard = 3: must be of type bool"),
        ("--config.training.on_non_finite=explode", "use one of 'skip', 'stop'"),
        ("--config.stages.0.mixture.web=1.0", "names 'web', which is not among the sources (text)"),
        ("--config.stages.0.tokens_per_step=1000", "not a multiple of sequence_length 128; use 896 or 1024"),
        ("--config.stages.0.steps=0", "stages.0.steps = 0: must be at least 1"),
        ("--config.stages.0.sequence_length=256", "longer than model.context_length = 128"),
        (
            "--config.evaluation.sequence_length=256",
            "evaluation.sequence_length = 256 is longer than model.context_length",
        ),
        ("--config.training.accumulation_steps=3", "does not divide the 8 rows"),
        ("--config.model.kv_heads=3", "model.kv_heads = 3 must divide model.heads = 2"),
        ("--config.optimizer.b1=2.0", "optimizer.b1"),
        ("--config.model=7", "model = 7: is a group of keys"),
        ("--config.name=a/b", "name = 'a/b'"),
        ("--config.tokenizer=None", "the embedded corpus needs one"),
    ],
)
def test_what_is_wrong_is_named(file, override, told):
    assert told in refused(file, override)


def test_all_problems_come_at_once(file):
    message = refused(file, "--config.seed=x", "--config.modle=1", "--config.stages.0.steps=y")
    assert message.count("\n  - ") == 3


def test_files_that_cannot_be_used(tmp_path, file):
    assert "there is no file" in refused(str(tmp_path / "smal.py")) and "small.py?" in refused(
        str(tmp_path / "smal.py")
    )
    (tmp_path / "broken.py").write_text("def get_config():\n    return 1 / 0\n")
    assert "(line 2) failed with ZeroDivisionError" in refused(str(tmp_path / "broken.py"))
    (tmp_path / "empty.py").write_text("x = 1\n")
    assert "does not define get_config()" in refused(str(tmp_path / "empty.py"))
    (tmp_path / "modelless.py").write_text("def get_config():\n    return {}\n")
    assert "model: must be set" in refused(str(tmp_path / "modelless.py"))


def test_what_config_json_holds_can_be_compared(file):
    a, b = config.load(file, []), config.load(file, ["--config.stages.0.steps=20", "--config.seed=3"])
    old, new = json.loads(config.to_json(a)), schema.plain(b)
    assert schema.differences(old, schema.plain(a)) == {}
    assert schema.differences(old, new) == {"seed": (0, 3), "stages.0.steps": (10, 20)}
    assert schema.differences({"a": {"x": 1}}, {"a": {}}) == {"a.x": (1, "(absent)")}


def test_keys_added_since_a_run_was_made_have_their_defaults(file):
    now = schema.plain(config.load(file, []))
    then = {key: value for key, value in now.items() if key != "loader"}
    then["training"] = {"z_loss": 0.5}
    filled = config.with_defaults(then)
    assert schema.differences(filled, now) == {"training.z_loss": (0.5, 0.0)}
    assert config.with_defaults(then | {"gone": 1}) == then | {"gone": 1}
