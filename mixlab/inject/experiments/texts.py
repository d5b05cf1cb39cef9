"""Texts from files, inserted as they are: the plainest experiment. How well are they known afterwards?"""

from dataclasses import dataclass
from typing import Literal

import numpy as np

from mixlab.inject.checks import at_least
from mixlab.inject.files import texts
from mixlab.inject.items import Group, Items, Material, Where
from mixlab.inject.probe import Model, Probe


@dataclass(frozen=True)
class Texts:
    """files: JSON lines, Parquet or plain text, a text each record; paths or globs.   field: of the text.
    where: how often and where each is inserted.
    every_steps: between probes, besides those at start and end; 0 for none.   probe_texts: at most so many are probed.
    prefix_tokens, completion_tokens: of a text's beginning that the model is given, and that it must continue word for word.

    Metrics: loss, nats a token of the texts but for their first; completed, the share of the texts, of those long enough,
    whose next completion_tokens tokens after the first prefix_tokens are the likeliest each (Carlini et al. 2023).
    Details: loss, completed (NaN where too short), a number a text; outcome: minus the loss.
    """

    kind: Literal["texts"] = "texts"
    files: tuple[str, ...] = ()
    field: str = "text"
    where: Where = Where()
    every_steps: int = 0
    probe_texts: int = 1000
    prefix_tokens: int = 25
    completion_tokens: int = 25

    def problems(self, where: str) -> list[str]:
        found = [] if self.files else [f"{where}.files: name the files that hold the texts"]
        found += self.where.problems(f"{where}.where")
        return found + at_least(self, where, every_steps=0, probe_texts=1, prefix_tokens=1, completion_tokens=1)

    def groups(self, material: Material) -> list[Group]:
        tokens = self._tokens(material)
        return [Group(Items.of(list(tokens.values()), list(tokens)), self.where)]

    def probes(self, material: Material) -> list[Probe]:
        probed = [tokens for tokens in self._tokens(material).values() if len(tokens) > 1][: self.probe_texts]
        cut, end = self.prefix_tokens, self.prefix_tokens + self.completion_tokens
        long = np.array([len(tokens) >= end for tokens in probed], bool)

        def details(model: Model) -> dict[str, np.ndarray]:
            scored = model.log_probabilities([tokens[:1] for tokens in probed], [tokens[1:] for tokens in probed])
            loss = np.array([-np.mean(answer, dtype=np.float64) for answer in scored])
            completed = np.full(len(probed), np.nan)
            if long.any():
                whole = [tokens for tokens, enough in zip(probed, long, strict=True) if enough]
                said = model.greedy([tokens[:cut] for tokens in whole], self.completion_tokens)
                completed[long] = (said == np.stack([tokens[cut:end] for tokens in whole])).all(axis=1)
            return {"loss": loss, "completed": completed, "outcome": -loss}

        def run(model: Model) -> dict[str, float]:
            found = details(model)
            metrics = {"loss": float(found["loss"].mean())}
            return metrics | ({"completed": float(found["completed"][long].mean())} if long.any() else {})

        return [Probe("texts", run, every_steps=self.every_steps, details=details)] if probed else []

    def _tokens(self, material: Material) -> dict[str, np.ndarray]:
        """Name -> tokens."""
        found = texts(self.files, self.field, f"experiments.{material.name}.files")
        return dict(zip(found, material.tokenizer.encode_batch(list(found.values())), strict=True))
