"""How often must a fact be read to be known in the end? Dynamic knowledge acquisition (Bordt and Pawelczyk 2025, section 4.1
and algorithm 1): at an interval the probability that the model gives to the facts is measured, and with a wish for its growth,
linear in the step, decides how many texts that state them the next interval has."""

from dataclasses import dataclass
from functools import lru_cache
from typing import Literal

import numpy as np

from mixlab.errors import UserError
from mixlab.inject import facts as made_up
from mixlab.inject import files
from mixlab.inject.checks import at_least
from mixlab.inject.cloze import Cloze, completions, partial_ratio, target_log_probabilities
from mixlab.inject.items import Group, Items, Material
from mixlab.inject.probe import Model, Probe
from mixlab.seeds import seed_of

MOST_TEXTS = 8192  # in an interval
TOLERANCE = 0.05
ANSWER_TOKENS = 25


@dataclass(frozen=True)
class Knowledge:
    """every_steps: between decisions.   target: wanted probability at the end of the run.
    first_texts: inserted in the first interval.
    caps: (from_step, texts): from this step on, an interval has at most so many texts more or fewer than the one before;
        without a cap before the first.
    texts: JSON-lines files with a "text" each (or `text_key`), the pool that is inserted in order and over again.
    queries: JSON-lines files with "input" and "target".
    facts, paraphrases: without files: so many made-up facts in so many texts each.
    """

    kind: Literal["knowledge"] = "knowledge"
    every_steps: int = 1000
    target: float = 0.08
    first_texts: int = 64
    caps: tuple[tuple[int, int], ...] = ()
    texts: tuple[str, ...] = ()
    text_key: str = "text"
    queries: tuple[str, ...] = ()
    facts: int = 4
    paraphrases: int = 10_000

    def problems(self, where: str) -> list[str]:
        found = at_least(self, where, every_steps=1, facts=1, paraphrases=1)
        if not 1 <= self.first_texts <= MOST_TEXTS:
            found.append(f"{where}.first_texts = {self.first_texts}: must be between 1 and {MOST_TEXTS}")
        if not 0 < self.target <= 1:
            found.append(f"{where}.target = {self.target}: is a probability, above 0 and at most 1")
        if bool(self.texts) != bool(self.queries):
            found.append(f"{where}: texts and queries belong together; give both, or none for made-up facts")
        steps = [step for step, _ in self.caps]
        if steps != sorted(set(steps)) or any(step < 0 or cap < 1 for step, cap in self.caps):
            found.append(
                f"{where}.caps: (from_step, texts) pairs with rising steps, from 0 on, and texts of at least 1"
            )
        return found

    def groups(self, material: Material) -> list[Group]:
        """None: what is inserted is decided during the run. UserError for files that could not be inserted then."""
        self._text(material, 0)
        return []

    def decide(
        self, state: dict, probe: dict[str, float], step: int, steps: int
    ) -> tuple[dict[str, int], dict[str, int]]:
        """(state, decision): how many texts go into the interval that begins at `step`, and from which on.

        state: {} at first, then {"texts": in the last interval, "emitted": so far}.   probe: with "probability"."""
        texts = state.get("texts", self.first_texts)
        if step > 0:
            texts = next_texts(texts, probe["probability"], step, steps, self.target, self._cap(step))
        first = state.get("emitted", 0)
        return {"texts": texts, "emitted": first + texts}, {"first": first, "texts": texts}

    def groups_of(self, decision: dict[str, int], material: Material) -> list[Group]:
        """The texts that a decision stands for; the pool begins again after its end."""
        numbers = range(decision["first"], decision["first"] + decision["texts"])
        names, texts = zip(*(self._text(material, number) for number in numbers), strict=True)
        ids = [f"{name}@{number}" for name, number in zip(names, numbers, strict=True)]
        return [Group(Items.of(material.tokenizer.encode_batch(texts), ids))]

    def pool(self, material: Material) -> Group:
        """Every text that may be inserted in this run: those of decisions that never reach their target."""
        state: dict[str, int] = {}
        for step in range(0, material.steps, self.every_steps):
            state, _ = self.decide(state, {"probability": 0.0}, step, material.steps)
        there = len(_pool(*self._files(material))) if self.texts else self.facts * self.paraphrases
        return self.groups_of({"first": 0, "texts": min(state["emitted"], there)}, material)[0]

    def probes(self, material: Material) -> list[Probe]:
        """probability: mean over the queries of p(target | input); accuracy: of greedy answers that contain the target;
        similarity: 0 … 100, of the answers' most similar parts to the targets."""
        clozes, tokenizer = self.clozes(material), material.tokenizer

        def details(model: Model) -> dict[str, np.ndarray]:
            answers = completions(model, tokenizer, [cloze.input for cloze in clozes], ANSWER_TOKENS)
            both = list(zip(clozes, answers, strict=True))
            return {
                "outcome": np.array([cloze.target.lower() in answer.lower() for cloze, answer in both]),
                "similarity": np.array([partial_ratio(cloze.target, answer) for cloze, answer in both]),
                "log_probability": target_log_probabilities(model, tokenizer, clozes),
            }

        def run(model: Model) -> dict[str, float]:
            found = details(model)
            return {
                "probability": float(np.mean(np.exp(found["log_probability"]))),
                "accuracy": float(np.mean(found["outcome"])),
                "similarity": float(np.mean(found["similarity"])),
            }

        return [Probe("control", run, self.every_steps, details=details)]

    def clozes(self, material: Material) -> list[Cloze]:
        if not self.queries:
            return [cloze for fact in range(self.facts) for cloze in made_up.clozes(self._seed(material), fact)]
        found = files.records(self.queries, ("input", "target"), f"experiments.{material.name}.queries")
        return [Cloze(record.text("input").strip(), record.text("target").strip()) for record in found]

    def _text(self, material: Material, number: int) -> tuple[str, str]:
        """(name, text) of number `number` of the pool, which begins again after its end."""
        if self.texts:
            pool = _pool(*self._files(material))
            return pool[number % len(pool)]
        number %= self.facts * self.paraphrases
        fact, paraphrase = number % self.facts, number // self.facts
        return f"fact-{fact}:{paraphrase}", made_up.text(self._seed(material), fact, paraphrase)

    def _files(self, material: Material) -> tuple[tuple[str, ...], str, str]:
        return self.texts, self.text_key, f"experiments.{material.name}.texts"

    def _seed(self, material: Material) -> int:
        return seed_of(material.seed, "facts", material.name)

    def _cap(self, step: int) -> int | None:
        return next((cap for since, cap in reversed(self.caps) if step >= since), None)


def next_texts(texts: int, probability: float, step: int, steps: int, target: float, cap: int | None) -> int:
    """Algorithm 1: texts of the next interval after one of `texts`: half as many when the probability is above the line from 0
    to `target` at the end of the run, twice as many when it is below; no more than `cap` more or fewer (None: any)."""
    wanted, after = target * step / steps, texts
    if probability > (1 + TOLERANCE) * wanted:
        after = texts // 2
    elif probability < (1 - TOLERANCE) * wanted:
        after = 2 * texts
    if cap is not None:
        after = max(min(after, texts + cap), texts - cap)
    return max(min(after, MOST_TEXTS), 1)


@lru_cache(maxsize=2)
def _pool(patterns: tuple[str, ...], key: str, where: str) -> list[tuple[str, str]]:
    found = list(files.texts(patterns, key, where).items())
    if not found:
        raise UserError(f"{where}: the files have no texts; name others")
    return found
