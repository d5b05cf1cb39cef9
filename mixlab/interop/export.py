"""A checkpoint as a folder that Hugging Face's transformers loads: weights, configuration and tokenizer.

Weights are float32, as they are trained; rows of the vocabulary that are padding are left out. Parameters are read one after
the other, so memory is a few times the largest, and a file of weights. PyTorch is not needed.
"""

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import tokenizers
from safetensors.numpy import save_file
from tokenizers import processors

from mixlab.corpus.tokenizer import Tokenizer
from mixlab.errors import UserError
from mixlab.interop.hf import Architecture, Place, architecture_of, config_json, place
from mixlab.model.config import ModelConfig
from mixlab.trained import Trained

SHARD_BYTES = 2**31  # of a file of weights at most, unless one tensor is larger
RECORD = "mixlab.json"  # tells that a folder was written here, and which of its files


def export(trained: Trained, output: Path, shard_bytes: int = SHARD_BYTES) -> dict[str, Any]:
    """Writes the folder `output`; returns what its mixlab.json records. An export that is there already is replaced, any
    other folder left alone. UserError: transformers has no such model, the checkpoint is damaged, `output` holds something
    else."""
    architecture = architecture_of(trained.config.model)
    _check_ours(output)
    partial = output.with_name(output.name + ".partial")
    _check_ours(partial)
    try:
        _remove(partial)
        partial.mkdir(parents=True)
        record = {
            "run": trained.config.name,
            "step": trained.meta["step"],
            "tokens": trained.meta["tokens"],
            "checkpoint": trained.meta["sha256"],
            "architecture": architecture.name,
        }
        _write(partial, RECORD, record | {"files": []})
        _write_weights(partial, trained, architecture, shard_bytes)
        _write_settings(partial, trained)
        record["files"] = sorted(path.name for path in partial.iterdir())
        _write(partial, RECORD, record)
        _remove(output)
        partial.rename(output)
    except OSError as error:
        raise UserError(f"--output={output}: cannot be written ({error.strerror}); name another folder") from None
    return record


def _check_ours(folder: Path) -> None:
    """UserError unless the folder is absent, empty or an export with nothing added."""
    if not folder.exists():
        return
    names = {path.name for path in folder.iterdir()} if folder.is_dir() else {folder.name}
    if not names or (folder.is_dir() and folder.suffix == ".partial" and RECORD in names):
        return
    try:
        ours = set(json.loads((folder / RECORD).read_text())["files"])
    except (OSError, ValueError, KeyError, TypeError):
        ours = set()
    if strangers := sorted(names - ours):
        raise UserError(f"--output={folder}: holds {', '.join(strangers[:3])}, not of an export; name another folder")


def _remove(folder: Path) -> None:
    if folder.exists():
        shutil.rmtree(folder)


def _write(folder: Path, name: str, values: dict) -> None:
    (folder / name).write_text(json.dumps(values, indent=2) + "\n")


# --- weights ---

# A tensor of theirs ("{}" for the layer's number), the parameters of ours that are its parts, and where they stand in it.
Entry = tuple[str, list[str], Place]


def _write_weights(folder: Path, trained: Trained, architecture: Architecture, shard_bytes: int) -> None:
    entries = _entries(trained.meta, architecture)
    sizes = {
        name: size for entry in entries for name, size in _sizes(entry, trained.meta, trained.config.model).items()
    }
    shards = _shards(sizes, shard_bytes)
    files = ["model.safetensors"]
    if len(shards) > 1:
        files = [f"model-{i + 1:05}-of-{len(shards):05}.safetensors" for i in range(len(shards))]
        weight_map = {name: file for file, names in zip(files, shards, strict=True) for name in names}
        index = {"metadata": {"total_size": sum(sizes.values())}, "weight_map": dict(sorted(weight_map.items()))}
        _write(folder, "model.safetensors.index.json", index)
    waiting = list(zip(files, shards, strict=True))
    held: dict[str, np.ndarray] = {}
    for entry in entries:
        for name, tensor in _tensors(entry, trained):
            held[name] = tensor
            if len(held) == len(waiting[0][1]):
                path = folder / waiting.pop(0)[0]
                save_file(held, path, metadata={"format": "pt"})
                path.chmod((folder / RECORD).stat().st_mode)  # it is written for the owner's eyes only
                held = {}


def _entries(meta: dict, architecture: Architecture) -> list[Entry]:
    found: dict[str, list[str]] = {}
    places: dict[str, Place] = {}
    for name in (name.removeprefix("params/") for name in meta["arrays"] if name.startswith("params/")):
        where = place(architecture, name)
        found.setdefault(where.tensor, []).append(name)
        places[name] = where
    for names in found.values():
        names.sort(key=lambda name: places[name].part)
    return [(tensor, names, places[names[0]]) for tensor, names in found.items()]


def _sizes(entry: Entry, meta: dict, config: ModelConfig) -> dict[str, int]:
    """Bytes of each of its tensors."""
    tensor, names, _ = entry
    elements = sum(int(np.prod(meta["arrays"][f"params/{name}"]["shape"])) for name in names)
    if "{}" in tensor:
        return {tensor.format(layer): 4 * elements // config.layers for layer in range(config.layers)}
    if names[0] in ("embedding", "head"):
        elements = config.vocab_size * config.d_model
    return {tensor: 4 * elements}


def _shards(sizes: dict[str, int], limit: int) -> list[list[str]]:
    """The names in their order, in groups of at most `limit` bytes."""
    shards: list[list[str]] = [[]]
    held = 0
    for name, size in sizes.items():
        if shards[-1] and held + size > limit:
            shards.append([])
            held = 0
        shards[-1].append(name)
        held += size
    return shards


def _tensors(entry: Entry, trained: Trained) -> Iterator[tuple[str, np.ndarray]]:
    tensor, names, where = entry
    arrays = [trained.read(name) for name in names]
    if "{}" in tensor:
        for layer in range(trained.config.model.layers):
            parts = [where.to_theirs(array[layer]) for array in arrays]
            yield tensor.format(layer), np.ascontiguousarray(np.concatenate(parts, axis=-1))
        return
    whole = where.to_theirs(arrays[0])
    if names[0] in ("embedding", "head"):
        whole = whole[: trained.config.model.vocab_size]
    yield tensor, np.ascontiguousarray(whole)


# --- configuration and tokenizer ---


def _write_settings(folder: Path, trained: Trained) -> None:
    tokenizer, model = trained.tokenizer, trained.config.model
    ids = {"bos_token_id": tokenizer.bos_id, "eos_token_id": tokenizer.eos_id, "pad_token_id": tokenizer.pad_id}
    _write(folder, "config.json", config_json(model, ids))
    _write(folder, "generation_config.json", {name: i for name, i in ids.items() if i is not None})
    names = {name.removesuffix("_id"): tokenizer.token(i) for name, i in ids.items() if i is not None}
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        **names,
        "model_max_length": model.context_length,
        "clean_up_tokenization_spaces": False,
    }
    _write(folder, "tokenizer_config.json", settings)
    _write(folder, "special_tokens_map.json", names)
    definition = _with_bos(tokenizer) if trained.begins_with_bos else tokenizer.definition
    (folder / "tokenizer.json").write_text(definition, encoding="utf-8")


def _with_bos(tokenizer: Tokenizer) -> str:
    """The definition, so that it puts BOS before a text when special tokens are asked for, as was done in training."""
    if adds_bos(tokenizer):
        return tokenizer.definition
    model, bos = tokenizers.Tokenizer.from_str(tokenizer.definition), tokenizer.token(tokenizer.bos_id)
    template = processors.TemplateProcessing(
        single=f"{bos} $A", pair=f"{bos} $A {bos}:1 $B:1", special_tokens=[(bos, tokenizer.bos_id)]
    )
    before = model.post_processor
    model.post_processor = template if before is None else processors.Sequence([before, template])
    return model.to_str()


def adds_bos(tokenizer: Tokenizer) -> bool:
    """Whether the definition puts BOS before a text when special tokens are asked for."""
    ids = tokenizers.Tokenizer.from_str(tokenizer.definition).encode("a").ids
    return tokenizer.bos_id is not None and ids[:1] == [tokenizer.bos_id]
