"""A folder of Hugging Face's transformers as a checkpoint that a run begins with (start.init_from).

Weights become float32. The vocabulary is the tokenizer's: rows beyond it, which no text can become, are left out. Parameters
are read, stacked and written one after the other, so memory is a few times the largest.
"""

import json
import re
from functools import partial
from pathlib import Path

import numpy as np
from flax import nnx

from mixlab.config import Config, check, to_json
from mixlab.corpus.tokenizer import Tokenizer, load
from mixlab.errors import UserError
from mixlab.interop.export import adds_bos
from mixlab.interop.hf import Architecture, model_of, place
from mixlab.interop.weights import Weights, open_weights, read_json
from mixlab.model.config import ModelConfig
from mixlab.model.transformer import Transformer
from mixlab.parallel.mesh import abstract_params
from mixlab.schedule.stages import StageConfig
from mixlab.sequences.format import FormatConfig
from mixlab.training.streamed import Deferred, save_streamed
from mixlab.training.trees import flat

DTYPES = ("F32", "BF16", "F16")
CONSTANTS = (".rotary_emb.inv_freq", ".attn.bias", ".attn.masked_bias")  # what old versions saved besides the weights
SHOWN = 6  # problems with tensors that a message lists

Shape = tuple[int, ...]


def import_folder(folder: Path, output: Path) -> Config:
    """Writes `output`: config.json, tokenizer.json, import.json and the checkpoint of step 0. Returns the configuration.

    Raises UserError before anything is written: no such folder, an unknown architecture or setting, no tokenizer.json, a
    missing or damaged file of weights, tensors that are missing, left over or of another shape or type than config.json
    says, an output that is not empty."""
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise UserError(f"--output={output}: is a file or holds something already; name a new folder")
    values = read_json(folder / "config.json")
    tokenizer = _tokenizer(folder)
    try:
        architecture, model = model_of(values, tokenizer.vocab_size)
    except UserError as error:
        raise UserError(f"{folder / 'config.json'}:\n{error}") from None
    weights = open_weights(folder)
    shapes = _shapes(model)
    if problems := _problems(weights, architecture, model, shapes, values["vocab_size"]):
        more = [f"… and {len(problems) - SHOWN} more"] if len(problems) > SHOWN else []
        raise UserError(
            f"{folder}: its weights are not those of the {architecture.name} of its config.json:\n"
            + "\n".join(f"  - {problem}" for problem in problems[:SHOWN] + more)
            + "\nSave the model again with save_pretrained"
        )
    config = _config(folder, output, model, adds_bos(tokenizer))
    params = {
        name: Deferred(
            shape, np.dtype(np.float32), partial(_read, weights, architecture, model.vocab_size, name, shape)
        )
        for name, shape in shapes.items()
    }
    meta = {"tokens": 0, "tokenizer": {"name": tokenizer.name, "hash": tokenizer.hash}}
    types = sorted({kind for _, kind in weights.facts.values()})
    record = {"folder": str(folder.absolute()), "architecture": architecture.name, "types": types}
    try:
        output.mkdir(parents=True, exist_ok=True)
        tokenizer.save(output / "tokenizer.json")
        save_streamed(output / "checkpoints", 0, params, meta)
        (output / "import.json").write_text(json.dumps(record, indent=2) + "\n")
        (output / "config.json").write_text(to_json(config))  # last: now it is whole
    except OSError as error:
        raise UserError(f"--output={output}: cannot be written ({error.strerror}); name another folder") from None
    return config


def _tokenizer(folder: Path) -> Tokenizer:
    path = folder / "tokenizer.json"
    if not path.is_file():
        raise UserError(
            f"{folder}: has no tokenizer.json, without which its tokens are unknown; save the tokenizer there too, with "
            "AutoTokenizer.from_pretrained(...).save_pretrained(...)"
        )
    return load(path)


def _config(folder: Path, output: Path, model: ModelConfig, bos: bool) -> Config:
    """Of a run that would train this model on the embedded corpus: what scores it and what starts from it."""
    length = model.context_length
    config = Config(
        name=re.sub(r"[^\w.-]", "-", folder.absolute().name) or "imported",
        model=model,
        tokenizer=str((output / "tokenizer.json").absolute()),
        stages=(StageConfig(steps=1000, sequence_length=length, tokens_per_step=length, format=FormatConfig(bos=bos)),),
    )
    if problems := check(config):
        raise UserError(f"{folder}: its model cannot be used:\n" + "\n".join(f"  - {problem}" for problem in problems))
    return config


def _shapes(model: ModelConfig) -> dict[str, Shape]:
    """Of every parameter ("blocks/mlp/up/kernel")."""
    params = abstract_params(lambda: Transformer(model, rngs=nnx.Rngs(0)))[1]
    return {name: x.shape for name, x in flat(nnx.to_pure_dict(params)).items()}


def _problems(
    weights: Weights, architecture: Architecture, model: ModelConfig, shapes: dict[str, Shape], rows: int
) -> list[str]:
    """What is wrong with the tensors of a folder whose embedding has so many rows."""
    expected: dict[str, Shape] = {}
    for name, shape in shapes.items():
        where = place(architecture, name)
        own = list(shape[1:] if name.startswith("blocks/") else shape)
        own[-1] *= where.part[1]
        if name in ("embedding", "head"):
            own[0 if name == "embedding" else 1] = rows
        theirs = tuple(reversed(own)) if where.transposed else tuple(own)
        expected |= dict.fromkeys(_tensors(architecture, name, shape), theirs)
    found = {name: fact for name, fact in weights.facts.items() if not name.endswith(CONSTANTS)}
    head, embedding = architecture.modules["head"] + ".weight", architecture.modules["embedding"] + ".weight"
    problems = []
    if model.tied_head and head in found:
        if embedding in found and not np.array_equal(weights.read(head), weights.read(embedding)):
            problems.append(f"tie_word_embeddings = True, but {head} is not {embedding}")
        del found[head]
    for name in sorted(expected.keys() | found.keys()):
        if name not in found:
            why = ", and tie_word_embeddings = False" if name == head else ""
            problems.append(f"{name} is missing{why}")
        elif name not in expected:
            problems.append(f"{name} has no place in it")
        elif found[name][0] != expected[name]:
            problems.append(f"{name} has shape {list(found[name][0])} and should have {list(expected[name])}")
        elif found[name][1] not in DTYPES:
            problems.append(f"{name} is of type {found[name][1]}; {', '.join(DTYPES)} can be taken over")
    return problems


def _tensors(architecture: Architecture, name: str, shape: Shape) -> list[str]:
    """Their tensors that a parameter of ours is made from: one, or one a layer."""
    tensor = place(architecture, name).tensor
    return [tensor.format(layer) for layer in range(shape[0])] if name.startswith("blocks/") else [tensor]


def _read(weights: Weights, architecture: Architecture, vocab_size: int, name: str, shape: Shape) -> np.ndarray:
    """One parameter, float32, with zeros where its vocabulary is padded."""
    where, tensors = place(architecture, name), _tensors(architecture, name, shape)
    array = np.empty(shape, np.float32)
    if name.startswith("blocks/"):
        for layer, tensor in enumerate(tensors):
            array[layer] = where.to_ours(weights.read(tensor))
    elif name == "embedding":
        array[:vocab_size], array[vocab_size:] = weights.read(tensors[0])[:vocab_size], 0
    elif name == "head":
        array[:, :vocab_size], array[:, vocab_size:] = weights.read(tensors[0])[:vocab_size].T, 0
    else:
        array[...] = where.to_ours(weights.read(tensors[0]))
    return array
