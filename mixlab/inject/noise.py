"""Watermarks of Gaussian noise: which rows of a run get noise on their input embeddings, and from which keys it is made.

Train Once, Answer All (arXiv 2509.23383), appendix E.6. The noise itself is not kept: it is a function of its key, computed
where the model is (`mixlab/model/noise.py`), the same for training and for the test of the model afterwards.
"""

from dataclasses import dataclass

import numpy as np

from mixlab.draws import draws
from mixlab.seeds import seed_of


@dataclass(frozen=True)
class Noise:
    """One experiment's noise: on every row of the global batches of `steps`, with standard deviation `sigma`.

    name: of the experiment.   seed: of the run."""

    name: str
    seed: int
    sigma: float
    steps: tuple[int, ...]

    def keys(self, step: int, rows: np.ndarray) -> np.ndarray:
        """uint32 [R, 2]: the keys of these rows of the global batch of a step, whatever else is noised."""
        drawn = draws(seed_of(self.seed, "noise", self.name, step), rows)
        return np.stack([drawn >> np.uint64(32), drawn & np.uint64(0xFFFFFFFF)], axis=1).astype(np.uint32)
