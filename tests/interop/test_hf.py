"""Folders of transformers: written, read back, and held against transformers itself where it is installed."""

import json
import shutil

import numpy as np
import pytest
from safetensors import numpy as safetensors

from mixlab import errors
from mixlab.corpus import tokenizer as tokenizers
from mixlab.errors import UserError
from mixlab.interop.export import export
from mixlab.interop.hf import architecture_of
from mixlab.model.presets import gpt2, llama, olmo2
from mixlab.trained import open_trained
from mixlab.training.checkpoint import Checkpoints
from tests.interop.folders import MODELS, SIZE, TOKENS, make_run, write_letters
from tests.test_mistakes import files, told
from tools import export_hf


@pytest.fixture(scope="module")
def letters(tmp_path_factory):
    return write_letters(tmp_path_factory.mktemp("letters") / "tokenizer.json")


def command(*arguments):
    assert errors.run(export_hf.main, [str(argument) for argument in arguments]) == 0


@pytest.fixture
def run(tmp_path, letters):
    return make_run(tmp_path / "run", MODELS["llama"], letters)


@pytest.fixture
def exported(run, tmp_path):
    command(f"--workdir={run}", f"--output={tmp_path / 'exported'}")
    return tmp_path / "exported"


# --- there and back ---


@pytest.mark.parametrize("name", MODELS)
def test_exported_imported_and_exported_again_is_the_same_bit_for_bit(name, tmp_path, letters, monkeypatch):
    model = MODELS[name]
    run = make_run(tmp_path / "run", model, letters, bos=name == "gpt2")
    monkeypatch.chdir(tmp_path)
    command("--workdir=run", "--output=one")
    command("--import=one", "--output=back")
    command("--workdir=back", "--output=two")
    one, two = files(tmp_path / "one"), files(tmp_path / "two")
    assert one.keys() == two.keys()
    assert [name for name in one if one[name] != two[name]] == ["mixlab.json"]
    with open_trained(tmp_path / "back") as back, open_trained(run) as trained:
        assert back.config.model == model and back.begins_with_bos == trained.begins_with_bos
        for full in trained.meta["arrays"]:
            ours, again = trained.read(full.removeprefix("params/")), back.read(full.removeprefix("params/"))
            if full == "params/embedding":
                ours, again = ours[:TOKENS], again[:TOKENS]
            if full == "params/head":
                ours, again = ours[:, :TOKENS], again[:, :TOKENS]
            np.testing.assert_array_equal(ours, again, err_msg=full)
    assert [entry.problem for entry in Checkpoints(tmp_path / "back" / "checkpoints", read_only=True).entries()] == [
        None
    ]


def test_files_are_of_at_most_the_given_size(run, tmp_path, exported):
    whole = safetensors.load_file(exported / "model.safetensors")
    largest = max(array.nbytes for array in whole.values())
    with open_trained(run) as trained:
        export(trained, tmp_path / "split", shard_bytes=largest)
    index = json.loads((tmp_path / "split" / "model.safetensors.index.json").read_text())
    parts = {file: safetensors.load_file(tmp_path / "split" / file) for file in set(index["weight_map"].values())}
    assert len(parts) > 3 and all(sum(a.nbytes for a in part.values()) <= largest for part in parts.values())
    assert index["metadata"]["total_size"] == sum(array.nbytes for array in whole.values())
    for name, file in index["weight_map"].items():
        np.testing.assert_array_equal(parts[file].pop(name), whole.pop(name))
    assert not whole and not any(parts.values())
    command(f"--import={tmp_path / 'split'}", f"--output={tmp_path / 'from split'}")
    command(f"--import={exported}", f"--output={tmp_path / 'from whole'}")
    one, two = (Checkpoints(tmp_path / n / "checkpoints", read_only=True).meta() for n in ("from split", "from whole"))
    assert one["arrays"] == two["arrays"]


def test_an_export_is_replaced_and_no_other_folder(run, tmp_path, exported, capsys, caplog):
    assert [
        record for record in caplog.get_records("setup") if record.levelname == "WARNING"
    ] == []  # orbax's, on reading
    before = files(exported)
    command(f"--workdir={run}", f"--output={exported}")
    assert files(exported) == before
    (exported / "notes.txt").write_text("mine")
    assert "holds notes.txt, not of an export" in told(
        capsys, f"--workdir={run}", f"--output={exported}", main=export_hf.main
    )
    other = tmp_path / "other"
    shutil.copytree(exported, other)
    (other / "mixlab.json").unlink()
    before = files(other)
    assert "name another folder" in told(capsys, f"--workdir={run}", f"--output={other}", main=export_hf.main)
    assert files(other) == before and not list(tmp_path.glob("*.partial"))


def test_a_run_starts_from_an_import(tmp_path, letters, exported):
    from mixlab import config as configs
    from mixlab.data import open_data
    from mixlab.parallel.mesh import make_mesh
    from mixlab.training.optimizer import make_optimizer
    from mixlab.training.start import load_origin
    from mixlab.training.state import plan_state
    from tests.stores import some_texts, write_store

    command(f"--import={exported}", f"--output={tmp_path / 'base'}")
    store = write_store(tmp_path / "store", some_texts(), tokenizers.load(tmp_path / "base" / "tokenizer.json"))
    flags = [f"--config.sources.text.store={store}", "--config.tokenizer=None"]
    flags += [f"--config.start.init_from={tmp_path / 'base'}", "--config.stages.0.tokens_per_step=48"]
    config = configs.load_json(tmp_path / "base" / "config.json", flags)
    optimizer = make_optimizer(config.optimizer)
    layout = plan_state(config.model, optimizer, make_mesh(config.mesh))
    start = load_origin(config, open_data(config), layout, optimizer, tmp_path / "new")
    with open_trained(tmp_path / "base") as base:
        np.testing.assert_array_equal(
            start.state["params"]["blocks"]["mlp"]["up"]["kernel"], base.read("blocks/mlp/up/kernel")
        )


# --- what has no counterpart ---


@pytest.mark.parametrize(
    ("model", "expected"),
    [
        (llama(**SIZE, qk_norm=True), "model.qk_norm = True, where it has False"),
        (llama(**SIZE, activation="gelu"), "model.activation = 'gelu', where it has 'swiglu'"),
        (olmo2(**SIZE, mlp_bias=True), "model.mlp_bias = True, where it has False"),
        (olmo2(**SIZE, qk_norm=False), "model.norm_placement = 'post', where it has 'pre'"),
        (gpt2(**SIZE, kv_heads=2), "model.kv_heads = 2, where it has as many as heads, 4"),
        (gpt2(**SIZE, head_dim=16), "model.head_dim = 16"),
        (llama(**SIZE | {"heads": 3}, head_dim=8), "model.heads = 3 does not divide model.d_model = 32"),
    ],
)
def test_models_that_transformers_does_not_have(model, expected):
    with pytest.raises(UserError, match="no architecture of transformers computes this model") as error:
        architecture_of(model)
    assert expected in str(error.value) and str(error.value).count("  - ") == 1


def change(name, **values):
    def apply(folder):
        path = folder / name
        path.write_text(json.dumps(json.loads(path.read_text()) | values))

    return apply


def change_tensors(edit):
    def apply(folder):
        tensors = safetensors.load_file(folder / "model.safetensors")
        edit(tensors)
        safetensors.save_file(tensors, folder / "model.safetensors")

    return apply


def cut(folder):
    data = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(data[: len(data) // 2])


def lose_a_file(folder):
    (folder / "model.safetensors.index.json").write_text(
        json.dumps({"weight_map": {"lm_head.weight": "model-7.safetensors"}})
    )


UP, BIAS = "model.layers.1.mlp.up_proj.weight", "model.layers.0.self_attn.q_proj.bias"
NO_HEAD = change_tensors(lambda t: t.pop("lm_head.weight"))


@pytest.mark.parametrize(
    ("damage", "expected"),
    [
        (change("config.json", architectures=["MambaForCausalLM"]), "MambaForCausalLM cannot be imported; LlamaForCausalLM,"),
        (change("config.json", rope_scaling={"type": "linear"}), "rope_scaling = {'type': 'linear'}: only None can"),
        (change("config.json", rope_parameters={"rope_type": "yarn"}), "rope_scaling = 'yarn'"),
        (change("config.json", sliding_window=128), "sliding_window = 128: only None can be taken over"),
        (change("config.json", hidden_act="gelu"), "hidden_act = 'gelu': only 'silu' or 'swish'"),
        (change("config.json", attention_bias=True), f"{BIAS} is missing"),
        (change("config.json", vocab_size=275), "vocab_size = 275, but its tokenizer has 276 tokens"),
        (change("config.json", vocab_size=300), "has shape [276, 32] and should have [300, 32]"),
        (change("config.json", num_hidden_layers=3), "model.layers.2.input_layernorm.weight is missing"),
        (change("config.json", num_hidden_layers=1), "model.layers.1.input_layernorm.weight has no place in it"),
        (change("config.json", hidden_size="wide"), "d_model = 'wide' must be an int"),
        (change("config.json", tie_word_embeddings=True), "tie_word_embeddings = True, but lm_head.weight is not"),
        (NO_HEAD, "lm_head.weight is missing, and tie_word_embeddings = False"),
        (change_tensors(lambda t: t.update({UP: t[UP].T.copy()})), f"{UP} has shape [32, 40] and should have [40, 32]"),
        (change_tensors(lambda t: t.update({UP: t[UP].astype(np.float64)})), f"{UP} is of type F64"),
        (change_tensors(lambda t: t.update({BIAS: np.zeros(32, np.float32)})), f"{BIAS} has no place in it"),
        (cut, "model.safetensors: cannot be read"),
        (lose_a_file, "lacks model-7.safetensors, which its index names"),
        (lambda folder: (folder / "model.safetensors").unlink(), "has no model.safetensors"),
        (lambda folder: (folder / "tokenizer.json").unlink(), "has no tokenizer.json"),
        (lambda folder: (folder / "config.json").write_text("{"), "config.json: cannot be read"),
        (shutil.rmtree, "there is no such file"),
    ],
)  # fmt: skip
def test_folders_that_cannot_be_imported(exported, tmp_path, capsys, damage, expected):
    damage(exported)
    assert expected in told(capsys, f"--import={exported}", f"--output={tmp_path / 'base'}", main=export_hf.main)
    assert not (tmp_path / "base").exists()


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["--workdir=nowhere"], "has no config.json; name a folder"),
        (["--workdir=RUN", "--step=7"], "has no checkpoint of step 7; it has [1]"),
        (["--workdir=RUN", "--import=RUN"], "give either --workdir=RUN_DIR, to export, or --import=DIR"),
        (["--import=RUN", "--step=7"], "--step: belongs to --workdir"),
        (["--workdir=RUN", "--config.seed=1"], "a checkpoint has its own configuration"),
        (["--import=RUN", "--output=RUN"], "holds something already"),
    ],
)
def test_mistakes(run, tmp_path, capsys, arguments, expected):
    arguments = [argument.replace("RUN", str(run)) for argument in arguments]
    before = files(run)
    assert expected in told(capsys, f"--output={tmp_path / 'out'}", *arguments, main=export_hf.main)
    assert files(run) == before and not (tmp_path / "out").exists()


def test_a_damaged_checkpoint_is_not_exported(run, tmp_path, capsys):
    largest = max((run / "checkpoints" / "1" / "params").rglob("*"), key=lambda path: path.stat().st_size)
    data = bytearray(largest.read_bytes())
    data[len(data) // 2] ^= 1
    largest.write_bytes(bytes(data))
    message = told(capsys, f"--workdir={run}", f"--output={tmp_path / 'out'}", main=export_hf.main)
    assert "its checkpoint of step 1 is damaged" in message and not (tmp_path / "out").exists()
