"""Tensors in a folder of safetensors, read one at a time."""

import json
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import jax  # noqa: F401  so that numpy, and with it safetensors, knows bfloat16
import numpy as np
from safetensors import SafetensorError, safe_open

from mixlab.errors import UserError

BASE = "transformer."  # GPT-2's own folders leave out this name of the model within the model with a head


@dataclass(frozen=True)
class Weights:
    """files: tensor -> (its file, its name there)."""

    files: dict[str, tuple[Path, str]]

    @cached_property
    def facts(self) -> dict[str, tuple[tuple[int, ...], str]]:
        """Tensor -> (shape, type such as "BF16"), from the headers of the files."""
        found = {}
        for path in {path for path, _ in self.files.values()}:
            with safe_open(path, framework="np") as file:
                for tensor in (tensor for tensor, (where, _) in self.files.items() if where == path):
                    part = file.get_slice(self.files[tensor][1])
                    found[tensor] = (tuple(part.get_shape()), part.get_dtype())
        return found

    def read(self, tensor: str) -> np.ndarray:
        path, name = self.files[tensor]
        with safe_open(path, framework="np") as file:  # anew every time: what is mapped into memory is given back
            return file.get_tensor(name)


def open_weights(folder: Path) -> Weights:
    """The weights of a model, in one file or in several with an index. UserError: there are none, or some of the files that
    the index names are missing, cannot be read or lack a tensor."""
    index, single = folder / "model.safetensors.index.json", folder / "model.safetensors"
    if index.is_file():
        weight_map = read_json(index).get("weight_map")
        if not isinstance(weight_map, dict) or not weight_map:
            raise UserError(f"{index}: has no weight_map; copy it again")
        files = {tensor: folder / str(name) for tensor, name in weight_map.items()}
    elif single.is_file():
        files = dict.fromkeys(_tensors(single), single)
    else:
        raise UserError(f"{folder}: has no model.safetensors; save the model as safetensors, with save_pretrained")
    paths = sorted(set(files.values()))
    if missing := [path.name for path in paths if not path.is_file()]:
        raise UserError(f"{folder}: lacks {', '.join(missing)}, which its index names; copy the folder whole")
    there = {path: set(_tensors(path)) for path in paths}
    if astray := [tensor for tensor, path in files.items() if tensor not in there[path]]:
        raise UserError(f"{files[astray[0]]}: has no {astray[0]}, which the index says it has; copy the folder whole")
    prefix = BASE if "wte.weight" in files else ""
    return Weights({prefix + tensor: (path, tensor) for tensor, path in files.items()})


def _tensors(path: Path) -> list[str]:
    try:
        with safe_open(path, framework="np") as file:
            return list(file.keys())
    except (OSError, SafetensorError) as error:
        raise UserError(f"{path}: cannot be read ({error}); copy it again") from None


def read_json(path: Path) -> dict[str, Any]:
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        what = "there is no such file" if isinstance(error, FileNotFoundError) else f"cannot be read ({error})"
        raise UserError(f"{path}: {what}; name a folder that save_pretrained has written") from None
    if not isinstance(values, dict):
        raise UserError(f"{path}: is not a JSON object; name a folder that save_pretrained has written")
    return values
