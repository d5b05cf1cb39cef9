"""Repetition of articles, whole and in paragraphs: the nine conditions that Bordt and Pawelczyk (2025, appendix E.9) made of
MUSE-News (Shi et al. 2025), on any text."""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Literal, NamedTuple

import numpy as np

from mixlab.draws import draws
from mixlab.errors import UserError
from mixlab.inject.checks import at_least
from mixlab.inject.files import texts
from mixlab.inject.items import Group, Items, Material, Where
from mixlab.inject.probe import Model, Probe
from mixlab.inject.scoring import inserted_loss, losses
from mixlab.schedule.shuffle import permute
from mixlab.seeds import seed_of


@dataclass(frozen=True)
class Repetition:
    """files: of articles, JSON lines or text.   field: of a record's text. Those longer than a row with EOS around it, or
        shorter than their paragraphs, are left out.
    articles: of each condition, no two conditions having one in common.   holdout: articles never inserted.
    copies: the conditions are, for each of these numbers,
        whole        the article, so often
        paragraphs   its parts, each so often and where it may: one division at random into `paragraphs` parts
        redivided    the parts of so many divisions at random, each once
    where: when they are inserted; its copies must be left at 1.
    every_steps: between probes, besides those at start and end; 0 for none.

    Metrics: loss/<condition>, such as loss/whole-x10, and loss/holdout: of the whole articles, nats a token. Details: the same
    for each article; outcome: minus the losses of all conditions.
    """

    kind: Literal["repetition"] = "repetition"
    files: tuple[str, ...] = ()
    field: str = "text"
    articles: int = 100
    holdout: int = 100
    copies: tuple[int, ...] = (1, 10, 100)
    paragraphs: int = 7
    where: Where = Where()
    every_steps: int = 0

    def problems(self, where: str) -> list[str]:
        found = [] if self.files else [f"{where}.files: name the files of the articles"]
        found += self.where.problems(f"{where}.where")
        if self.where.copies != 1:
            found.append(
                f"{where}.where.copies = {self.where.copies:g}: say it with {where}.copies, for all conditions"
            )
        if not self.copies or len(set(self.copies)) < len(self.copies) or min(self.copies, default=1) < 1:
            found.append(f"{where}.copies = {self.copies}: name one number at least, none twice and none below 1")
        return found + at_least(self, where, articles=1, holdout=1, paragraphs=2, every_steps=0)

    def groups(self, material: Material) -> list[Group]:
        seed = seed_of(material.seed, material.name, "paragraphs")
        found = []
        for condition, articles in self._conditions(material):
            parts: dict[str, np.ndarray] = {}
            for name, text in articles.items():
                divisions = condition.copies if condition.kind == "redivided" else 1
                for division in range(divisions):
                    if condition.kind == "whole":
                        parts[name] = text
                        continue
                    pieces = _divide(text, self.paragraphs, seed_of(seed, name, division))
                    parts |= {f"{name}/{division}/{i}": piece for i, piece in enumerate(pieces)}
            copies = 1 if condition.kind == "redivided" else condition.copies
            found.append(Group(Items.of(list(parts.values()), list(parts)), replace(self.where, copies=copies)))
        return found

    def probes(self, material: Material) -> list[Probe]:
        articles = {str(condition): list(found.values()) for condition, found in self._conditions(material)}
        conditions = len(articles) * self.articles
        articles["holdout"] = list(self._articles(material).values())[conditions:]

        def details(model: Model) -> dict[str, np.ndarray]:
            found = {f"loss/{name}": losses(model, group) for name, group in articles.items()}
            return found | {
                "outcome": -np.concatenate([found[f"loss/{name}"] for name in articles if name != "holdout"])
            }

        def run(model: Model) -> dict[str, float]:
            return {f"loss/{name}": inserted_loss(model, group, material.eos_id) for name, group in articles.items()}

        return [Probe("loss", run, every_steps=self.every_steps, details=details)]

    def _conditions(self, material: Material) -> "Iterator[tuple[Condition, dict[str, np.ndarray]]]":
        """Every condition, and its articles by name."""
        articles = list(self._articles(material).items())
        conditions = [
            Condition(kind, copies) for kind in ("whole", "paragraphs", "redivided") for copies in self.copies
        ]
        for i, condition in enumerate(conditions):
            yield condition, dict(articles[i * self.articles : (i + 1) * self.articles])

    def _articles(self, material: Material) -> dict[str, np.ndarray]:
        """Name -> tokens: the articles of the conditions, one after the other, then the holdout."""
        where = f"experiments.{material.name}"
        found = texts(self.files, self.field, f"{where}.files")
        tokens = material.tokenizer.encode_batch(list(found.values()))
        least, most = max(2, self.paragraphs), material.row_length - 2
        fitting = [(name, text) for name, text in zip(found, tokens, strict=True) if least <= len(text) <= most]
        needed = 3 * len(self.copies) * self.articles + self.holdout
        if len(fitting) < needed:
            raise UserError(
                f"{where}.files: {len(fitting)} of {len(found)} articles have {least} to {most} tokens, but conditions and "
                f"holdout take {needed}; add files, take fewer articles or train on longer rows"
            )
        order = permute(np.arange(needed), len(fitting), seed_of(material.seed, material.name, "articles"))
        return dict(fitting[k] for k in order.tolist())


class Condition(NamedTuple):
    kind: str
    copies: int

    def __str__(self) -> str:
        return f"{self.kind}-x{self.copies}"


def _divide(text: np.ndarray, parts: int, seed: int) -> list[np.ndarray]:
    """Parts of one token at least, cut at places drawn evenly."""
    cuts = np.sort(np.argsort(draws(seed, np.arange(len(text) - 1)), kind="stable")[: parts - 1] + 1)
    return np.split(text, cuts)
