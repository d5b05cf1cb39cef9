"""Probes: how an experiment looks at the model while it is trained."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np


class Model(Protocol):
    """What a probe may ask of the model at one step. Contexts, targets and prompts are lists of int token arrays of any
    lengths.

    step: updates done so far.   width: dimensions of an input embedding.
    """

    step: int
    width: int

    def read(self, step: int) -> np.ndarray:
        """int32 [rows, length]: the tokens that the model's run reads at a step, what experiments have inserted included."""

    def log_probabilities(self, contexts: Sequence[np.ndarray], targets: Sequence[np.ndarray]) -> list[np.ndarray]:
        """float32 [len(target)] for each: natural logarithm of p(token | context, the target's tokens before it).

        With an empty context the first token is scored after BOS where the model is trained with one, else it is NaN."""

    def greedy(self, prompts: Sequence[np.ndarray], tokens: int) -> np.ndarray:
        """int32 [N, tokens]: the likeliest token after every prompt, and so on."""

    def sample(
        self, prompts: Sequence[np.ndarray], tokens: int, temperature: float, seed: int, samples: int = 1
    ) -> np.ndarray:
        """int32 [N, samples, tokens]: continuations drawn at the temperature; the same for the same seed."""

    def input_gradients(self, rows: np.ndarray) -> np.ndarray:
        """rows: int32 [N, L] -> float32 [N, L, D]: gradient of each row's mean loss over its tokens 2 … L with respect to
        its input embeddings."""

    def noise(self, keys: np.ndarray, length: int) -> np.ndarray:
        """keys: uint32 [N, 2] -> float32 [N, length, D]: the standard normal noise that training adds, times a watermark's
        sigma, to the embeddings of a row of that length and key."""


@dataclass(frozen=True)
class Probe:
    """A measurement of the model.

    name: short; unique within the experiment.
    run: model -> numbers by metric; they are logged as probe/<experiment>/<metric>.
    every_steps: at its multiples; 0 for none.   at_steps: these too.   at_start, at_end: before step 0, after the last.
    details: model -> arrays of one number an item, by metric, for tests that pair items between runs.
    """

    name: str
    run: Callable[[Model], dict[str, float]]
    every_steps: int = 0
    at_steps: tuple[int, ...] = ()
    at_start: bool = True
    at_end: bool = True
    details: Callable[[Model], dict[str, np.ndarray]] | None = None

    def due(self, step: int, steps: int) -> bool:
        """Whether it is run when `step` of `steps` updates are done."""
        if step == 0:
            return self.at_start or 0 in self.at_steps
        if step == steps and self.at_end:
            return True
        return step in self.at_steps or bool(self.every_steps and step % self.every_steps == 0)
