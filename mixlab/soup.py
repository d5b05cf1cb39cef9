"""Averages the weights of checkpoints (a model soup; OLMo 2, section 5.3) into a folder to score and to start from.

python -m mixlab.soup RUN_DIR[:STEP] RUN_DIR[:STEP] ... --output=DIR [--weights=0.5,0.25,0.25]

Without STEP it is a run's newest checkpoint. The models must be the same function of their weights, with one
tokenizer; what averages well are runs that branched off one trunk. `python -m mixlab.evaluate --workdir=DIR` scores the
soup, and `--config.start.init_from=DIR` trains it further.
"""

import contextlib
import json
import math
import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from mixlab import errors
from mixlab.cli import Parser
from mixlab.errors import UserError

SUM_TOLERANCE = 1e-6


@dataclass(frozen=True)
class Ingredient:
    """A checkpoint: `named` as the user did, the run's config.json, and the checkpoint's meta."""

    named: str
    folder: Path
    config: dict[str, Any]
    meta: dict[str, Any]
    checkpoints: Any  # mixlab.training.checkpoint.Checkpoints, open


def main(arguments: list[str]) -> None:
    parser = Parser(__doc__.splitlines()[0], with_config=False)
    parser.add_argument("ingredients", nargs="+", metavar="RUN_DIR[:STEP]", help="a run's (or a soup's) folder")
    parser.add_argument("--output", type=Path, required=True, metavar="DIR", help="the soup's folder, new or empty")
    parser.add_argument("--weights", metavar="W,W,...", help="one for each ingredient, of sum 1; equal when left out")
    flags, strays = parser.parse(arguments)
    if strays:
        raise UserError(f"{strays[0]}: a soup has the configuration of its first ingredient; leave this out")
    weights = _weights(flags.weights, len(flags.ingredients))
    step, ingredients = make_soup(flags.ingredients, weights, flags.output)
    for weight, one in zip(weights, ingredients, strict=True):
        print(f"{weight:8.4f}  step {one.meta['step']:,} of {one.folder}")
    print(f"soup: {flags.output} (step {step:,}); python -m mixlab.evaluate --workdir={flags.output}")


def make_soup(named: Sequence[str], weights: Sequence[float], output: Path) -> tuple[int, list[Ingredient]]:
    """Writes the weighted average of the checkpoints `named` ("RUN_DIR" or "RUN_DIR:STEP") to `output`: config.json of
    the first, soup.json, and one checkpoint of weights alone, at the latest step among them. weights: of sum 1.

    Parameter by parameter: however many the ingredients, one model and a few copies of its largest array are held in
    memory. Returns (step, the ingredients).
    Raises UserError, before anything is written: a folder that is no run, a missing or damaged checkpoint, models or
    tokenizers that differ, an output that is not empty."""
    import jax.numpy as jnp

    from mixlab.training.checkpoint import Checkpoints
    from mixlab.training.trees import nested

    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise UserError(f"--output={output}: is a file or holds something already; name a new folder")
    with contextlib.ExitStack() as stack:
        ingredients = [_open(name, stack) for name in named]
        for other in ingredients[1:]:
            _check_alike(ingredients[0], other)
        params = {
            name: jnp.asarray(average((_read(one, name) for one in ingredients), weights))
            for name in _shapes(ingredients[0].meta)
        }
    step = max(one.meta["step"] for one in ingredients)
    record = {
        "step": step,
        "ingredients": [
            {
                "folder": str(one.folder),
                "step": one.meta["step"],
                "weight": weight,
                "tokens": one.meta["tokens"],
                "checkpoint": one.meta["sha256"],
            }
            for weight, one in zip(weights, ingredients, strict=True)
        ],
    }
    meta = {"tokens": max(one.meta["tokens"] for one in ingredients), "tokenizer": ingredients[0].meta["tokenizer"]}
    try:
        output.mkdir(parents=True, exist_ok=True)
        with Checkpoints(output / "checkpoints") as checkpoints:
            checkpoints.save(step, {"params": nested(params)}, meta)
        (output / "soup.json").write_text(json.dumps(record, indent=2) + "\n")
        (output / "config.json").write_text(json.dumps(ingredients[0].config, indent=2) + "\n")  # last: now it is whole
    except OSError as error:
        raise UserError(f"--output={output}: cannot be written ({error.strerror}); name another folder") from None
    return step, ingredients


def average(arrays: Iterable[np.ndarray], weights: Sequence[float]) -> np.ndarray:
    """The weighted mean of arrays of one shape, in the type of the first; formed in float32 (float64 of float64), one
    array at a time. Where all arrays are equal it is they, bit for bit, whatever the weights."""
    mean, total = None, 0.0
    for array, weight in zip(arrays, weights, strict=True):
        total += weight
        if mean is None:
            dtype, kind = array.dtype, np.promote_types(array.dtype, np.float32)
            mean = array.astype(kind)
            continue
        change = kind.type(weight / total) * (array.astype(kind) - mean)
        mean = np.where(change == 0, mean, mean + change)  # -0.0 + 0.0 would be 0.0
    return mean.astype(dtype)


def _weights(text: str | None, count: int) -> list[float]:
    if text is None:
        return [1 / count] * count
    try:
        weights = [float(weight) for weight in text.split(",")]
    except ValueError:
        raise UserError(f"--weights={text}: must be numbers with commas between them, such as 0.5,0.25,0.25") from None
    if len(weights) != count:
        raise UserError(f"--weights={text}: are {len(weights)} for {count} ingredients; give one for each")
    total = math.fsum(weights)
    if not all(weight > 0 for weight in weights) or not abs(total - 1) <= SUM_TOLERANCE:
        shares = ",".join(f"{weight / total:.9g}" for weight in weights) if total > 0 and min(weights) > 0 else ""
        raise UserError(
            f"--weights={text}: must be above 0 and of sum 1, and the sum is {total:.9g}"
            + (f"; in these proportions they are --weights={shares}" if shares else "")
        )
    return [weight / total for weight in weights]


def _open(named: str, stack: contextlib.ExitStack) -> Ingredient:
    from mixlab.training.checkpoint import Checkpoints
    from mixlab.training.places import checkpoints_of
    from mixlab.training.start import read_config

    name, _, step = named.rpartition(":")
    if not name or not step.isdigit() or Path(named).is_dir():
        name, step = named, ""
    folder = Path(name).absolute()
    config = read_config(folder, named)
    try:
        checkpoints = stack.enter_context(Checkpoints(checkpoints_of(folder), read_only=True))
        steps = checkpoints.steps()
        if not steps:
            raise UserError("has no checkpoint yet; train it first")
        meta = checkpoints.meta(int(step) if step else steps[-1])
    except UserError as error:
        raise UserError(f"{named}: {error}") from None
    return Ingredient(named, folder, config, meta, checkpoints)


def _check_alike(first: Ingredient, other: Ingredient) -> None:
    from mixlab.training.start import describe, model_differences

    if changed := model_differences(first.config["model"], other.config["model"]):
        listed = ", ".join(f"model.{key} is {a!r} in the one and {b!r} in the other" for key, (a, b) in changed.items())
        raise UserError(f"{first.named} and {other.named} are different models and cannot be averaged: {listed}")
    one, two = first.meta["tokenizer"], other.meta["tokenizer"]
    if one["hash"] != two["hash"]:
        raise UserError(
            f"{first.named} and {other.named} have different tokenizers, {describe(one)} and {describe(two)}, and "
            "cannot be averaged"
        )
    shapes, others = _shapes(first.meta), _shapes(other.meta)
    for name in sorted(shapes.keys() | others.keys()):
        if shapes.get(name) != others.get(name):
            raise UserError(
                f"{first.named} and {other.named} hold different weights and cannot be averaged: {name} is "
                f"{shapes.get(name, 'absent')} in the one and {others.get(name, 'absent')} in the other"
            )


def _shapes(meta: dict) -> dict[str, tuple]:
    """Name of every parameter -> (type, shape)."""
    return {
        name.removeprefix("params/"): (entry["dtype"], *entry["shape"])
        for name, entry in meta["arrays"].items()
        if name.startswith("params/")
    }


def _read(one: Ingredient, name: str) -> np.ndarray:
    from mixlab.training.checkpoint import DamagedError

    try:
        return one.checkpoints.read_param(one.meta, name)
    except DamagedError as error:
        steps = ", ".join(str(step) for step in one.checkpoints.steps() if step != one.meta["step"])
        raise UserError(
            f"{one.named}: its checkpoint of step {one.meta['step']} is damaged ({error}); "
            f"name another as {one.folder}:STEP (there are {steps or 'none'})"
        ) from None


if __name__ == "__main__":
    sys.exit(errors.run(main))
