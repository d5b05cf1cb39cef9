"""I.i.d. replacements (Bordt and Pawelczyk 2025, appendix E.10): text of the run's own kind takes the place of other such
text, so that it is known what was read when, and nothing else is different."""

from dataclasses import dataclass
from typing import Literal

import numpy as np

from mixlab.draws import draws
from mixlab.errors import UserError
from mixlab.inject.checks import at_least
from mixlab.inject.items import Group, Items, Material, Where
from mixlab.inject.ngrams import Ngrams
from mixlab.inject.probe import Model, Probe
from mixlab.inject.scoring import inserted_loss, losses
from mixlab.seeds import seed_of

REFILLS = 20


@dataclass(frozen=True)
class Iid:
    """Unseen rows are inserted in three ways.

    random_share: of the run's tokens; beginnings of rows, of any length from 2 tokens to the whole row, anywhere.
    decile_batches: for each tenth of the run, as many rows as so many batches have, as whole rows within it.
    unique_batches: as many rows as so many batches have, as whole rows anywhere; none of their parts of `unique_tokens`
        tokens, taken one after the other, occurs in anything that the run reads of its sources. All of that is searched
        before it starts; what experiments insert is not, which is text of other kinds unless it was taken from them.
    0 leaves any of them out.
    probe_rows: of each part, and of rows never inserted, that losses are taken of.
    every_steps: between probes, besides those at start and end; 0 for none.

    Metrics: loss/random, loss/decile-0 … loss/decile-9, loss/unique and loss/holdout, nats a token. Details: the same for each
    item; outcome: minus the losses of all that was inserted.

    The paper: 0.2 % of the tokens, 50 batches a tenth, 10 batches.
    """

    kind: Literal["iid"] = "iid"
    random_share: float = 0.002
    decile_batches: int = 50
    unique_batches: int = 10
    unique_tokens: int = 50
    probe_rows: int = 100
    every_steps: int = 0

    def problems(self, where: str) -> list[str]:
        found = at_least(
            self,
            where,
            random_share=0,
            decile_batches=0,
            unique_batches=0,
            unique_tokens=1,
            probe_rows=1,
            every_steps=0,
        )
        if self.random_share >= 1:
            found.append(f"{where}.random_share = {self.random_share}: must be below 1")
        if not (self.random_share or self.decile_batches or self.unique_batches):
            found.append(f"{where}: nothing is inserted; set random_share, decile_batches or unique_batches")
        return found

    def groups(self, material: Material) -> list[Group]:
        self._holdout(material)  # so that it is known before training whether there is enough text
        return list(self._parts(material).values())

    def probes(self, material: Material) -> list[Probe]:
        texts = {
            name: [part.items[i] for i in range(min(len(part.items), self.probe_rows))]
            for name, part in self._parts(material).items()
        }
        holdout = self._holdout(material)

        def details(model: Model) -> dict[str, np.ndarray]:
            found = {f"loss/{name}": losses(model, part) for name, part in texts.items()}
            outcome = -np.concatenate(list(found.values()))
            return found | {"loss/holdout": losses(model, holdout), "outcome": outcome}

        def run(model: Model) -> dict[str, float]:
            everything = texts | {"holdout": holdout}
            return {f"loss/{name}": inserted_loss(model, part, material.eos_id) for name, part in everything.items()}

        return [Probe("loss", run, every_steps=self.every_steps, details=details)]

    def _parts(self, material: Material) -> dict[str, Group]:
        found = {}
        if self.random_share:
            found["random"] = Group(self._beginnings(material), Where())
        if self.decile_batches > material.steps // 10:
            raise UserError(
                f"experiments.{material.name}.decile_batches = {self.decile_batches}: a tenth of the run has "
                f"{material.steps // 10} steps; take fewer batches, or 0"
            )
        for tenth in range(10 if self.decile_batches else 0):
            rows = self._rows(material, self.decile_batches, f"decile {tenth}")
            where = Where(unit="row", start_share=tenth / 10, end_share=(tenth + 1) / 10)
            found[f"decile-{tenth}"] = Group(Items.of(list(rows)), where)
        if self.unique_batches:
            found["unique"] = Group(Items.of(list(self._unique(material))), Where(unit="row"))
        return found

    def _holdout(self, material: Material) -> list[np.ndarray]:
        return list(material.unseen(self.probe_rows, material.row_length, "holdout"))

    def _rows(self, material: Material, batches: int, purpose: str) -> np.ndarray:
        return material.unseen(batches * material.rows_per_step, material.row_length, purpose)

    def _beginnings(self, material: Material) -> Items:
        """Of rows, of lengths drawn evenly, until the share would be exceeded."""
        budget, longest = int(self.random_share * material.tokens), material.row_length
        most = 4 * budget // longest + 8  # twice what is needed on average
        seed = seed_of(material.seed, material.name, "lengths")
        lengths = 2 + (draws(seed, np.arange(most)) % np.uint64(longest - 1)).astype(np.int64)
        lengths = lengths[np.cumsum(lengths) <= budget]
        if not len(lengths):
            raise UserError(
                f"experiments.{material.name}.random_share = {self.random_share}: {budget} tokens hold no row's beginning; "
                "raise it, or set 0"
            )
        rows = material.unseen(len(lengths), longest, "random")
        return Items.of([row[:length] for row, length in zip(rows, lengths, strict=True)])

    def _unique(self, material: Material) -> np.ndarray:
        wanted, length = self.unique_batches * material.rows_per_step, min(self.unique_tokens, material.row_length)
        rows = np.zeros((0, material.row_length), np.int32)
        for attempt in range(REFILLS):
            drawn = material.unseen(wanted - len(rows), material.row_length, f"unique, {attempt}")
            parts = drawn[:, : material.row_length // length * length].reshape(-1, length)
            strings, known = Ngrams(parts), np.zeros(len(parts), bool)
            for step in range(material.steps):
                known |= strings.occurring(material.read(step))
            rows = np.concatenate([rows, drawn[~known.reshape(len(drawn), -1).any(axis=1)]])
            if len(rows) == wanted:
                return rows
        raise UserError(
            f"experiments.{material.name}.unique_tokens = {length}: nearly all unseen rows share so many tokens with the run, "
            f"{len(rows)} of {wanted} were found; raise it"
        )
