"""Verbatim memorisation without verbatim exposure (Liu et al. 2025; Bordt and Pawelczyk 2025, section 4.4): does a model
complete texts that a run like it has memorised, when every row that holds them is taken out?"""

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np

from mixlab.batch import Batch, Kind
from mixlab.errors import UserError
from mixlab.inject.analysis.memorisation import extracted
from mixlab.inject.checks import at_least
from mixlab.inject.items import Group, Items, Material, Where
from mixlab.inject.ngrams import Ngrams, items_holding
from mixlab.inject.probe import Model, Probe


@dataclass(frozen=True)
class Verbatim:
    """strings: the file of texts that a finished run completes, as tools/select_verbatim.py writes it from that run.
    every_steps: between probes, besides those at start and end; 0 for none.

    Every row of this run that holds one of the strings, its last target included, is replaced by an unseen row. Unseen rows
    that hold one are left out, for all experiments; items that the others take from files must hold none. The whole run is
    searched for this before it starts.

    Metrics: completed (share of the strings whose target follows greedily from its prefix, token by token), completed_se, loss
    (of the target given the prefix, nats a token). Details: the same for each string.

    The paper: 1000 strings of 25 + 25 tokens.
    """

    kind: Literal["verbatim"] = "verbatim"
    strings: str = ""
    every_steps: int = 0

    def problems(self, where: str) -> list[str]:
        found = [] if self.strings else [f"{where}.strings: name a file of tools/select_verbatim.py"]
        return found + at_least(self, where, every_steps=0)

    def groups(self, material: Material) -> list[Group]:
        strings = self.kept_out(material)
        hits: dict[int, list[tuple[int, int, int]]] = {}  # length of rows -> (step, row, 0)
        for step in range(material.steps):
            rows = material.read(step)
            found = np.flatnonzero(strings.within(rows)).tolist()
            hits.setdefault(rows.shape[1] - 1, []).extend((step, row, 0) for row in found)
        return [
            Group(
                Items.of(
                    list(material.unseen(len(places), length, f"rows of {length} tokens")),
                    [f"{length}:{i}" for i in range(len(places))],
                ),
                Where(unit="row", positions=tuple(places)),
            )
            for length, places in sorted(hits.items())
            if places
        ]

    def kept_out(self, material: Material) -> Ngrams:
        """What must be in no unseen row either, for whichever experiment it is drawn."""
        return Ngrams(self._read(material)[0])

    def objections(self, material: Material, inserted: Mapping[str, Sequence[Group]]) -> list[str]:
        """What speaks against a run that inserts these, name of the experiment -> groups: items that hold a string."""
        strings = self.kept_out(material)
        return [
            f"experiments.{name}: item {group.items.ids[i]} holds a text that experiments.{material.name} keeps out of the "
            "run; take it out of the one or of the other"
            for name, groups in inserted.items()
            for group in groups
            for i in items_holding(strings, group.items)
        ]

    def probes(self, material: Material) -> list[Probe]:
        strings, prefix = self._read(material)
        prompts, targets = list(strings[:, :prefix]), strings[:, prefix:]

        def details(model: Model) -> dict[str, np.ndarray]:
            scored = model.log_probabilities(prompts, list(targets))
            return {
                "completed": completes(model, strings, prefix),
                "loss": np.array([-values.astype(np.float64).mean() for values in scored]),
            }

        def run(model: Model) -> dict[str, float]:
            found = details(model)
            share = float(found["completed"].mean())
            error = float(np.sqrt(share * (1 - share) / len(targets)))
            return {"completed": share, "completed_se": error, "loss": float(found["loss"].mean())}

        return [Probe("completion", run, every_steps=self.every_steps, details=details)]

    def _read(self, material: Material) -> tuple[np.ndarray, int]:
        """(strings int32 [K, n], how many tokens of them are the prefix)."""
        where = f"experiments.{material.name}.strings = {self.strings}"
        try:
            values = json.loads(Path(self.strings).read_text())
            prefix, tokenizer = int(values["prefix_tokens"]), values["tokenizer"]
            strings = np.array(values["strings"], np.int32)
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise UserError(f"{where}: cannot be read ({error}); name a file of tools/select_verbatim.py") from None
        if strings.ndim != 2 or not 0 < prefix < strings.shape[1]:
            raise UserError(f"{where}: holds no strings of one length with a prefix; write it anew")
        if tokenizer != material.tokenizer.hash:
            raise UserError(f"{where}: was made with another tokenizer; make it from a run with this one")
        return strings, prefix


def completes(model: Model, strings: np.ndarray, prefix_tokens: int) -> np.ndarray:
    """bool [N]: of int [N, n], whether the model greedily completes the first `prefix_tokens` by the others."""
    targets = strings[:, prefix_tokens:]
    return extracted(model.greedy(list(strings[:, :prefix_tokens]), targets.shape[1]), targets)


def memorised(model: Model, batches: Iterable[Batch], count: int, prefix_tokens: int, target_tokens: int) -> np.ndarray:
    """int32 [up to count, prefix + target]: beginnings of documents in the batches that the model completes; each once, in the
    order of the batches, which are read until there are enough."""
    length = prefix_tokens + target_tokens
    seen: set[bytes] = set()
    found = np.zeros((0, length), np.int32)
    for batch in batches:
        spans = batch.spans[(batch.spans["kind"] == Kind.TEXT) & (batch.spans["start"] == 0)]
        spans = spans[spans["length"] >= length]
        rows = batch.tokens[spans["row"][:, None], spans["offset"][:, None] + np.arange(length)]
        rows = rows[[row.tobytes() not in seen for row in rows]]
        if len(rows):
            rows = np.unique(rows, axis=0)
            seen |= {row.tobytes() for row in rows}
            found = np.concatenate([found, rows[completes(model, rows, prefix_tokens)]])
        if len(found) >= count:
            break
    return found[:count]


def write_strings(path: str | Path, strings: np.ndarray, prefix_tokens: int, tokenizer_hash: str) -> None:
    """The file that `Verbatim.strings` names."""
    values = {"prefix_tokens": prefix_tokens, "tokenizer": tokenizer_hash, "strings": np.asarray(strings).tolist()}
    Path(path).write_text(json.dumps(values) + "\n")
