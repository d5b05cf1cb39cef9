"""Exports as transformers loads them, and imports of what transformers saves. Skipped without torch and transformers."""

import json
import shutil

import numpy as np
import pytest

from mixlab import config as configs
from mixlab import errors, train
from mixlab.corpus import tokenizer as tokenizers
from mixlab.data import open_data
from tests.interop.folders import MODELS, SIZE, TEXTS, TOKENS, logits, make_run, write_letters
from tests.stores import write_store
from tools import export_hf

torch = pytest.importorskip("torch", reason="torch is not installed: the reference implementations were not run")
transformers = pytest.importorskip("transformers", reason="transformers is not installed: nothing was loaded by it")

TOKENS_BxL = np.random.default_rng(1).integers(TOKENS, size=(2, 24))


@pytest.fixture(scope="module")
def letters(tmp_path_factory):
    return write_letters(tmp_path_factory.mktemp("letters") / "tokenizer.json")


def command(*arguments):
    assert errors.run(export_hf.main, [str(argument) for argument in arguments]) == 0


def their_logits(model):
    with torch.no_grad():
        return model(torch.tensor(TOKENS_BxL)).logits.numpy()


@pytest.mark.parametrize("name", MODELS)
def test_logits_of_an_export(name, tmp_path, letters):
    run = make_run(tmp_path / "run", MODELS[name], letters)
    command(f"--workdir={run}", f"--output={tmp_path / 'out'}")
    model, report = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not any(report.values()), report
    assert model.dtype == torch.float32 and model.config.vocab_size == TOKENS
    assert type(model).__name__ == json.loads((tmp_path / "out" / "config.json").read_text())["architectures"][0]
    theirs, ours = their_logits(model), logits(run, TOKENS_BxL)
    assert theirs.std() > 0.1
    np.testing.assert_allclose(ours, theirs, atol=1e-4)


SIZES = dict(vocab_size=300, hidden_size=32, intermediate_size=40, num_hidden_layers=2, num_attention_heads=4)
SIZES |= dict(max_position_embeddings=24)
THEIRS = {
    "llama": lambda t: t.LlamaForCausalLM(t.LlamaConfig(**SIZES, num_key_value_heads=2, attention_bias=True)),
    "olmo2": lambda t: t.Olmo2ForCausalLM(t.Olmo2Config(**SIZES, tie_word_embeddings=True)),
    "gpt2": lambda t: t.GPT2LMHeadModel(t.GPT2Config(vocab_size=300, n_positions=24, n_embd=32, n_layer=2, n_head=4)),
}


@pytest.mark.parametrize("name", THEIRS)
@pytest.mark.parametrize("kind", ["float32", "bfloat16"])
def test_import_of_what_transformers_saves(name, kind, tmp_path, letters):
    torch.manual_seed(0)
    model = THEIRS[name](transformers).eval()
    for parameter in model.parameters():  # biases and norms have begun as 0 and 1
        torch.nn.init.normal_(parameter, std=0.3)
    model.to(getattr(torch, kind)).save_pretrained(tmp_path / "theirs", max_shard_size="20KB")
    wide = THEIRS[name](transformers).eval()  # the same weights in float32
    wide.load_state_dict(model.state_dict())
    assert (tmp_path / "theirs" / "model.safetensors.index.json").exists()
    (tmp_path / "theirs" / "tokenizer.json").write_text(letters.read_text())
    command(f"--import={tmp_path / 'theirs'}", f"--output={tmp_path / 'base'}")
    ours, theirs = logits(tmp_path / "base", TOKENS_BxL), their_logits(wide)
    assert ours.shape[-1] == TOKENS and theirs.shape[-1] == 300  # the last 24 belong to no token
    np.testing.assert_allclose(ours, theirs[..., :TOKENS], atol=1e-4)
    record = json.loads((tmp_path / "base" / "import.json").read_text())
    assert record["types"] == [{"float32": "F32", "bfloat16": "BF16"}[kind]]


CONFIG = """
from mixlab.model.presets import gpt2, olmo2

def get_config():
    rows = dict(mask_documents=False, restart_positions=False, loss_across_documents=True)
    return dict(
        name="continued",
        sources={{"text": {{"store": {store!r}}}}},
        model={model},
        stages=[dict(name="main", steps=3, sequence_length=24, tokens_per_step=96, format=rows)],
        schedule=dict(kind="constant", peak=1e-2, warmup_steps=0),
        start=dict(init_from={base!r}),
        evaluation=dict(every_steps=0, tokens_per_domain=100, rows=2, sample_tokens=0),
    )
"""


@pytest.mark.parametrize("name", ["olmo2", "gpt2"])
def test_training_goes_on_from_the_imported_weights(name, tmp_path, letters, monkeypatch, capsys):
    """The loss of the first step is the one of transformers on the same rows, and falls from there."""
    monkeypatch.setenv("MIXLAB_CACHE", str(tmp_path / "cache"))
    torch.manual_seed(0)
    model = THEIRS[name](transformers).eval()
    for parameter in model.parameters():
        parameter.data += 0.1 * torch.randn_like(parameter)
    model.save_pretrained(tmp_path / "theirs")
    shutil.copy(letters, tmp_path / "theirs" / "tokenizer.json")
    capsys.readouterr()
    command(f"--import={tmp_path / 'theirs'}", f"--output={tmp_path / 'base'}")
    code = capsys.readouterr().out.split(":\n", 1)[1].strip()
    store = write_store(tmp_path / "store", TEXTS * 20, tokenizers.load(tmp_path / "base" / "tokenizer.json"))
    path = tmp_path / "config.py"
    path.write_text(CONFIG.format(store=str(store), model=code, base=str(tmp_path / "base")))
    assert errors.run(train.main, [f"--config={path}", f"--workdir={tmp_path / 'run'}"]) == 0
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    losses = [line["train/loss"] for line in lines if "train/loss" in line]
    batch = open_data(configs.load(str(path), [])).stream[0]
    with torch.no_grad():
        logits_BxLxV = model(torch.tensor(batch.tokens).long()).logits.numpy().astype(np.float64)[..., :TOKENS]
    chances_BxLxV = logits_BxLxV - np.log(np.exp(logits_BxLxV).sum(-1, keepdims=True))
    nll_BxL = -np.take_along_axis(chances_BxLxV, batch.targets[..., None].astype(np.int64), -1)[..., 0]
    assert losses[0] == pytest.approx((nll_BxL * batch.loss_weights).sum() / batch.loss_weights.sum(), abs=1e-4)
    assert losses[-1] < losses[0] and abs(losses[0] - np.log(TOKENS)) > 0.01
    run = json.loads((tmp_path / "run" / "run.json").read_text())
    assert run["origin"]["kind"] == "init_from" and run["origin"]["folder"] == str(tmp_path / "base")


def test_a_base_models_folder_of_gpt2_is_imported(tmp_path, letters):
    torch.manual_seed(0)
    model = THEIRS["gpt2"](transformers).eval()
    model.transformer.save_pretrained(tmp_path / "theirs")
    path = tmp_path / "theirs" / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"architectures": ["GPT2LMHeadModel"]}))
    (tmp_path / "theirs" / "tokenizer.json").write_text(letters.read_text())
    command(f"--import={tmp_path / 'theirs'}", f"--output={tmp_path / 'base'}")
    np.testing.assert_allclose(logits(tmp_path / "base", TOKENS_BxL), their_logits(model)[..., :TOKENS], atol=1e-4)


@pytest.mark.parametrize(("name", "bos"), [("llama", False), ("olmo2", False), ("gpt2", True)])
def test_the_tokenizer_and_how_generation_ends(name, bos, tmp_path, letters):
    run = make_run(tmp_path / "run", MODELS[name], letters, bos=bos)
    command(f"--workdir={run}", f"--output={tmp_path / 'out'}")
    theirs, ours = transformers.AutoTokenizer.from_pretrained(tmp_path / "out"), tokenizers.load(letters)
    text = "  the cat,\n\nwas naïve 12345 .  "
    expected = ours.encode(text).tolist()
    assert theirs.encode(text) == [ours.bos_id] * bos + expected
    assert theirs.encode(text, add_special_tokens=False) == expected and theirs.decode(expected) == text
    assert (theirs.bos_token_id, theirs.eos_token_id, theirs.pad_token_id) == (ours.bos_id, ours.eos_id, ours.pad_id)
    assert len(theirs) == TOKENS and theirs.model_max_length == SIZE["context_length"]
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert model.generation_config.eos_token_id == model.config.eos_token_id == ours.eos_id
    prompt = theirs("the cat", return_tensors="pt")
    new = model.generate(**prompt, do_sample=False, max_new_tokens=4)[0].numpy()
    first = prompt["input_ids"].shape[1]
    after = logits(run, new[None])[0].argmax(-1)
    np.testing.assert_array_equal(new[first:], after[first - 1 : -1])
    assert len(new) == first + 4 or new[-1] == ours.eos_id
