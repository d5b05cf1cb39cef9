"""A checkpoint to be read by what is outside of training: with its configuration and its tokenizer."""

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from mixlab import config as configs
from mixlab.config import Config
from mixlab.corpus.tokenizer import Tokenizer
from mixlab.data import open_tokenizer
from mixlab.errors import UserError
from mixlab.training.checkpoint import Checkpoints, DamagedError
from mixlab.training.places import checkpoints_of


@dataclass(frozen=True)
class Trained:
    """`folder` of a run, a soup or an import; `meta` of one of its checkpoints."""

    folder: Path
    config: Config
    tokenizer: Tokenizer
    checkpoints: Checkpoints
    meta: dict[str, Any]

    @property
    def begins_with_bos(self) -> bool:
        """Whether documents began with BOS in training, at its end."""
        return self.config.stages[-1].format.bos

    def read(self, name: str) -> np.ndarray:
        """One parameter ("blocks/mlp/up/kernel"), in host memory. UserError when it is damaged."""
        try:
            return self.checkpoints.read_param(self.meta, name)
        except DamagedError as error:
            others = ", ".join(str(step) for step in self.checkpoints.steps() if step != self.meta["step"])
            raise UserError(
                f"{self.folder}: its checkpoint of step {self.meta['step']} is damaged ({error}); name another with "
                f"--step=N (there are {others or 'none'})"
            ) from None


@contextlib.contextmanager
def open_trained(folder: Path, step: int | None = None) -> Iterator[Trained]:
    """The checkpoint of `step`, or the newest. UserError: the folder is none of a run, a soup or an import, it has no such
    checkpoint, or its text is now of another tokenizer."""
    path = folder / "config.json"
    if not path.is_file():
        raise UserError(f"{folder}: has no config.json; name a folder that mixlab.train or mixlab.soup has written")
    config = configs.load_json(path, [])
    with Checkpoints(checkpoints_of(folder), read_only=True) as checkpoints:
        meta = checkpoints.meta(step)
        if meta is None:
            raise UserError(f"{folder}: has no checkpoint yet; train it first")
        tokenizer = open_tokenizer(config)
        if meta["tokenizer"]["hash"] != tokenizer.hash:
            raise UserError(
                f"{folder}: was trained with tokenizer {meta['tokenizer']['name']} ({meta['tokenizer']['hash'][:12]}…), "
                f"and what its config.json names is now {tokenizer.name} ({tokenizer.hash[:12]}…); put that one back"
            )
        yield Trained(folder, config, tokenizer, checkpoints, meta)
