"""Memorisation patterns (Panda et al. 2025; Bordt and Pawelczyk 2025, section 4.3): dialogues that end in a canary, a suffix
that no text has; and how well loss tells those that were trained on from those that were not."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np

from mixlab.draws import draws
from mixlab.errors import UserError
from mixlab.inject.analysis.membership import attack
from mixlab.inject.analysis.memorisation import exposure
from mixlab.inject.checks import at_least
from mixlab.inject.counting import count, rarest
from mixlab.inject.files import texts
from mixlab.inject.items import Group, Items, Material, Where
from mixlab.inject.probe import Model, Probe
from mixlab.inject.synthetic import TICKETS, dialogue
from mixlab.schedule.shuffle import permute
from mixlab.seeds import seed_of

RARE_OTHERS = 100  # rare tokens that only dialogues of the holdout end in, at most
CANDIDATES = 256  # tokens that a model is asked about


@dataclass(frozen=True)
class Canaries:
    """files: of the dialogues, JSON lines or text; () for synthetic ones.   field: of a record's text.
    items: dialogues of each condition, no two conditions having one in common.   holdout: dialogues never inserted.
    suffixes, suffix_tokens, copies: the conditions are every suffix of every length, every so often: 30 in the paper.
        plain        none, whatever the lengths
        rare         one rare token repeated, another one in each condition; dialogues of the holdout end in others yet
        random       tokens drawn evenly, for each dialogue anew
        model_based  those least likely after the dialogue: by the pairs of tokens counted in what the run reads, a
                     substitute for the trained model of the paper; or by any model, from the file `unlikely` that
                     `write_unlikely` writes
    where: when they are inserted; its copies must be left at 1.
    every_steps: between probes, besides those at start and end; 0 for none.

    Metrics of every condition, such as tpr/rare-8-x4: tpr (at 1 % false positives, with tpr_low and tpr_high of the bootstrap),
    auc, p_value, exposure (mean, bits, among the holdout), loss (mean); all from the loss summed over the suffix, or over
    the whole dialogue where it is plain. Details: loss/<condition> and loss/holdout-<suffix> for each item, from which
    `membership` makes calibrated scores too, with those of the control run; outcome: minus the losses of all conditions.

    The paper: items=4000, holdout=34907.
    """

    kind: Literal["canaries"] = "canaries"
    files: tuple[str, ...] = ()
    field: str = "text"
    items: int = 100
    holdout: int = 500
    suffixes: tuple[Literal["plain", "rare", "random", "model_based"], ...] = ("plain", "rare", "random", "model_based")
    suffix_tokens: tuple[int, ...] = (1, 8, 32)
    copies: tuple[int, ...] = (1, 4, 16)
    unlikely: str | None = None
    where: Where = Where()
    every_steps: int = 0

    def problems(self, where: str) -> list[str]:
        found = self.where.problems(f"{where}.where")
        if self.where.copies != 1:
            found.append(
                f"{where}.where.copies = {self.where.copies:g}: say it with {where}.copies, for all conditions"
            )
        for key in ("suffixes", "suffix_tokens", "copies"):
            values = getattr(self, key)
            if not values or len(set(values)) < len(values):
                found.append(f"{where}.{key} = {values}: name one at least, and none twice")
            if key != "suffixes" and min(values, default=1) < 1:
                found.append(f"{where}.{key} = {values}: must be at least 1")
        if self.unlikely is not None and "model_based" not in self.suffixes:
            found.append(f"{where}.unlikely: belongs to the suffix 'model_based'; add it to suffixes, or set None")
        return found + at_least(self, where, items=1, holdout=2, every_steps=0)

    def conditions(self) -> "list[Condition]":
        forms = [Form("plain", 0)] if "plain" in self.suffixes else []
        forms += [Form(suffix, n) for suffix in self.suffixes if suffix != "plain" for n in self.suffix_tokens]
        return [Condition(form, copies) for form in forms for copies in self.copies]

    def groups(self, material: Material) -> list[Group]:
        return [
            Group(
                Items.of([np.concatenate(canary) for canary in canaries], names),
                replace(self.where, copies=condition.copies),
            )
            for condition, names, canaries in self._members(material)
        ]

    def probes(self, material: Material) -> list[Probe]:
        members = {str(condition): canaries for condition, _, canaries in self._members(material)}
        others = {str(form): canaries for form, canaries in self._others(material)}

        def details(model: Model) -> dict[str, np.ndarray]:
            found = {f"loss/{name}": _losses(model, canaries) for name, canaries in members.items()}
            outcome = -np.concatenate(list(found.values()))
            found |= {f"loss/holdout-{name}": _losses(model, canaries) for name, canaries in others.items()}
            return found | {"outcome": outcome}

        def run(model: Model) -> dict[str, float]:
            return membership(details(model), material.seed)

        return [Probe("membership", run, every_steps=self.every_steps, details=details)]

    def _members(self, material: Material) -> "Iterator[tuple[Condition, list[str], list[Canary]]]":
        """Every condition with the names of its dialogues, and these with their suffixes."""
        suffix = _Suffixes(self, material)
        conditions = self.conditions()
        dialogues = list(self._dialogues(material).items())
        for i, condition in enumerate(conditions):
            own = dialogues[i * self.items : (i + 1) * self.items]
            token = [c.form.suffix for c in conditions[:i]].count("rare")  # its own
            canaries = [Canary(text, suffix(condition.form, name, text, token)) for name, text in own]
            yield condition, [name for name, _ in own], canaries

    def _others(self, material: Material) -> "Iterator[tuple[Form, list[Canary]]]":
        """The holdout with each form of suffix."""
        suffix = _Suffixes(self, material)
        conditions = self.conditions()
        rest = list(self._dialogues(material).items())[len(conditions) * self.items :]
        rare = sum(condition.form.suffix == "rare" for condition in conditions)
        for form in dict.fromkeys(condition.form for condition in conditions):
            yield form, [Canary(text, suffix(form, name, text, rare + i)) for i, (name, text) in enumerate(rest)]

    def _dialogues(self, material: Material) -> dict[str, np.ndarray]:
        """Name -> tokens of as many dialogues as are needed: those of the conditions one after the other, then the holdout."""
        needed = len(self.conditions()) * self.items + self.holdout
        longest = material.row_length - 2 - max((c.form.tokens for c in self.conditions()), default=0)
        where = f"experiments.{material.name}"
        if self.files:
            found = texts(self.files, self.field, f"{where}.files")
        else:
            found = {f"dialogue-{i}": dialogue(material.seed, i) for i in range(min(needed, TICKETS))}
        tokens = material.tokenizer.encode_batch(list(found.values()))
        fitting = [(name, text) for name, text in zip(found, tokens, strict=True) if 2 <= len(text) <= longest]
        if len(fitting) < needed:
            raise UserError(
                f"{where}: {len(fitting)} of {len(found)} dialogues fit into rows with their suffixes (2 to {longest} "
                f"tokens), but conditions and holdout take {needed}; take fewer items, other files or longer rows"
            )
        order = permute(np.arange(needed), len(fitting), seed_of(material.seed, material.name, "dialogues"))
        return dict(fitting[k] for k in order.tolist())


def membership(
    details: Mapping[str, np.ndarray], seed: int, reference: Mapping[str, np.ndarray] | None = None
) -> dict[str, float]:
    """The metrics, from the details of a probe.

    reference: details of the same probe of a model that has read none of the dialogues, the control run's: the score is then
    the loss less that under the reference. Without it a rare token that is in all members of a condition, but in none of
    the holdout, tells them apart by itself, once it is no longer rare."""
    losses = {key.removeprefix("loss/"): value for key, value in details.items() if key.startswith("loss/")}
    if reference is not None:
        losses = {name: values - reference[f"loss/{name}"] for name, values in losses.items()}
    metrics: dict[str, float] = {}
    for name, own in losses.items():
        if not name.startswith("holdout-"):
            others = losses[f"holdout-{name.rpartition('-x')[0]}"]
            values = vars(attack(own, others, seed=seed))
            values |= {"exposure": float(exposure(own, others).mean()), "loss": float(own.mean())}
            metrics |= {f"{key}/{name}": value for key, value in values.items()}
    return metrics


class Form(NamedTuple):
    """A suffix of so many tokens."""

    suffix: str
    tokens: int

    def __str__(self) -> str:
        return f"{self.suffix}-{self.tokens}" if self.tokens else self.suffix


class Condition(NamedTuple):
    form: Form
    copies: int

    def __str__(self) -> str:
        return f"{self.form}-x{self.copies}"


class Canary(NamedTuple):
    """Tokens, int32 each."""

    dialogue: np.ndarray
    suffix: np.ndarray


class _Suffixes:
    """What dialogues end in."""

    def __init__(self, settings: Canaries, material: Material):
        rare = sum(condition.form.suffix == "rare" for condition in settings.conditions())
        self.counts, self.seed, where = count(material), material.seed, f"experiments.{material.name}"
        tokens = rarest(self.counts, material)
        longest = max(settings.suffix_tokens)
        kept = min(RARE_OTHERS, (len(tokens) - rare) // 2)
        if len(tokens) - rare - kept < max(longest, 2):
            raise UserError(
                f"{where}.suffix_tokens: the vocabulary has {len(tokens)} tokens of text, too few for suffixes of {longest}"
            )
        self.rare, self.rest = tokens[: rare + (kept if rare else 0)], tokens[rare + kept if rare else 0 :]
        self.members = rare
        self.given = _read_unlikely(settings.unlikely, f"{where}.unlikely") if settings.unlikely is not None else None

    def __call__(self, form: Form, name: str, text: np.ndarray, number: int) -> np.ndarray:
        """int32 [form.tokens], for the dialogue `name`; number: of the rare token, those of the holdout after those of the
        conditions."""
        if form.suffix == "plain":
            return np.zeros(0, np.int32)
        if form.suffix == "rare":
            others = len(self.rare) - self.members
            at = number if number < self.members else self.members + (number - self.members) % others
            return np.full(form.tokens, self.rare[at], np.int32)
        if form.suffix == "random":
            numbers = draws(seed_of(self.seed, "suffix", name, form.tokens), np.arange(form.tokens))
            return self.rest[numbers % np.uint64(len(self.rest))].astype(np.int32)
        if self.given is None:
            return self.candidates(name, text)[: form.tokens]
        if name not in self.given or len(self.given[name]) < form.tokens:
            raise UserError(f"the file of unlikely suffixes has none of {form.tokens} tokens for {name}; write it anew")
        return self.given[name][: form.tokens]

    def candidates(self, name: str, text: np.ndarray) -> np.ndarray:
        """int32: tokens from the least likely on to follow `text`, by counting; equal ones in an order of the seed."""
        likely = self.counts.probabilities(text[-1], self.rest)
        order = np.lexsort((draws(seed_of(self.seed, "unlikely", name), self.rest), likely))
        return self.rest[order].astype(np.int32)


def write_unlikely(path: str | Path, model: Model, settings: Canaries, material: Material) -> None:
    """Writes the file for `unlikely`: for every dialogue the tokens that `model` finds least likely to follow it, among the
    256 that counting does. An .npz of "names", str [K], and "tokens", int32 [K, longest suffix]."""
    suffixes, longest = _Suffixes(replace(settings, unlikely=None), material), max(settings.suffix_tokens)
    names, rows = [], []
    for name, text in settings._dialogues(material).items():
        candidates = suffixes.candidates(name, text)[:CANDIDATES]
        scored = model.log_probabilities([text] * len(candidates), list(candidates[:, None]))
        names.append(name)
        rows.append(candidates[np.argsort(np.concatenate(scored), kind="stable")[:longest]])
    np.savez(path, names=np.array(names), tokens=np.array(rows, np.int32))


def _read_unlikely(path: str, where: str) -> dict[str, np.ndarray]:
    try:
        with np.load(path) as file:
            return dict(zip(file["names"].tolist(), file["tokens"].astype(np.int32), strict=True))
    except (OSError, ValueError, KeyError) as error:
        raise UserError(f"{where} = {path}: cannot be read ({error}); name a file of write_unlikely, or None") from None


def _losses(model: Model, canaries: list[Canary]) -> np.ndarray:
    """float64 [N]: minus the log-probability of each suffix after its dialogue; of the whole dialogue but its first token
    where there is no suffix."""
    cut = [(c.dialogue, c.suffix) if len(c.suffix) else (c.dialogue[:1], c.dialogue[1:]) for c in canaries]
    scored = model.log_probabilities([context for context, _ in cut], [target for _, target in cut])
    return np.array([-values.astype(np.float64).sum() for values in scored])
