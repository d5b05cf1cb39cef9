"""The proof that a control is a control: where two streams differ, and what put the difference there."""

from dataclasses import dataclass

import numpy as np

from mixlab.errors import UserError
from mixlab.stream import Batch, Stream


@dataclass(frozen=True)
class Comparison:
    """steps: those compared.   positions: tokens compared.   differing: of them, those that differ.
    insertions: of the streams' ledgers, with "differing", how many of its tokens differ; only those in the steps compared, and of
        what both insert alike none.
    noised: {"experiment", "step", "rows", "sigma", "seed", "in"}: of the steps compared, those to whose embeddings a stream adds noise
        that the other does not.
    unexplained: (step, row, offset, what) where something differs and no insertion, and no experiment's noise, is the reason.
    """

    steps: int
    positions: int
    differing: int
    insertions: list[dict]
    noised: list[dict]
    unexplained: list[tuple[int, int, int, str]]


def compare(one: Stream, other: Stream, steps: np.ndarray) -> Comparison:
    """Compares the batches of some steps, token for token, and what goes with them.

    A token may differ under an insertion of either stream; a target there and one position before; loss weights, segments and
    positions in rows that have one, whose documents it cuts; noise in steps that one stream's experiments noise otherwise than
    the other's. Raises UserError for runs that are not of one shape."""
    shapes = [[(stage.steps, stage.shapes()) for stage in stream.stages] for stream in (one, other)]
    if shapes[0] != shapes[1] or not np.array_equal(one.grid.lengths, other.grid.lengths):
        raise UserError("the runs differ in their steps, rows or lengths of rows; compare runs with the same stages")
    positions = differing = 0
    insertions: list[dict] = []
    noised: list[dict] = []
    unexplained: list[tuple[int, int, int, str]] = []
    for step in steps.tolist():
        a, b = one[step], other[step]
        differs = a.tokens != b.tokens
        positions, differing = positions + differs.size, differing + int(differs.sum())
        under = np.zeros(differs.shape, bool)
        entries = [_entries(stream, step) for stream in (one, other)]
        for side, these, those in ((0, *entries), (1, *reversed(entries))):
            for place, entry in these.items():
                row, here = entry["row"], slice(entry["offset"], entry["offset"] + entry["length"])
                under[row, here] = True
                if those.get(place) != entry:
                    insertions.append(entry | {"in": side, "differing": int(differs[row, here].sum())})
        before = under.copy()
        before[:, :-1] |= under[:, 1:]
        rows = np.broadcast_to(under.any(axis=1)[:, None], under.shape)
        allowed = {"tokens": under, "targets": before, "loss_weights": rows, "segment_ids": rows, "positions": rows}
        for what, where in allowed.items():
            for row, offset in np.argwhere((getattr(a, what) != getattr(b, what)) & ~where).tolist():
                unexplained.append((step, row, offset, what))
        noises = [_noise(stream, step) for stream in (one, other)]
        if noises[0] != noises[1]:
            noised += [noise | {"rows": len(a.tokens), "in": side} for side, noise in enumerate(noises) if noise]
        else:
            differs = (_keys(a) != _keys(b)).any(axis=1)
            unexplained += [(step, row, 0, "noise") for row in np.flatnonzero(differs).tolist()]
    return Comparison(len(steps), positions, differing, insertions, noised, unexplained)


def _noise(stream: Stream, step: int) -> dict:
    """Whose noise a step gets, and how much; {} where it gets none."""
    noise = stream.noises.get(step)
    return {"experiment": noise.name, "step": step, "sigma": noise.sigma, "seed": noise.seed} if noise else {}


def _keys(batch: Batch) -> np.ndarray:
    """uint32 [rows, 3]: key and scale of the noise of each row, 0 where there is none."""
    if batch.noise_keys is None or batch.noise_scales is None:
        return np.zeros((len(batch.tokens), 3), np.uint32)
    return np.column_stack([batch.noise_keys, batch.noise_scales.view(np.uint32)])


def _entries(stream: Stream, step: int) -> dict[tuple[int, int], dict]:
    """(row, offset) -> line of the ledger, of a step."""
    placements = stream.insertions
    if placements is None:
        return {}
    numbers = placements.of_rows(step, 0, int(stream.grid.rows[step]))
    return {(e["row"], e["offset"]): e for e in (placements.entry(number) for number in numbers.tolist())}
