"""Where a run begins that does not begin with fresh weights: on another run's checkpoint.

`init_from` takes weights alone and begins at step 0. `branch_from` takes weights, optimiser and step: any number of
runs go on from one trunk, each with stages, seed and schedule of its own, and none copies it.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import optax

from mixlab.config import Config
from mixlab.data import Data
from mixlab.errors import UserError
from mixlab.schema import differences, plain
from mixlab.training.checkpoint import Checkpoints
from mixlab.training.history import History, Stretch, first_difference
from mixlab.training.places import checkpoint_place, checkpoints_of, has_checkpoints
from mixlab.training.state import Layout, State

# Keys of the model that do not change the function that given weights compute, …
FREE_MODEL_KEYS = (
    "compute_dtype", "remat", "layer_loop", "attention", "sequence_attention", "init_std", "init_cutoff", "init_scale_residual",
)  # fmt: skip
# … and those that a run may change on purpose, to go on with longer rows.
LONGER_ROWS_KEYS = ("context_length", "rope_base")


@dataclass(frozen=True)
class Origin:
    """The beginning of a run. `record`: what run.json keeps of it.   read: what the weights were trained on, as far as
    it counts as steps of this run.   notes: what to tell the user."""

    state: State
    record: dict[str, Any]
    read: list[Stretch]
    notes: tuple[str, ...]


def load_origin(
    config: Config, data: Data, layout: Layout, optimizer: optax.GradientTransformation, workdir: Path
) -> Origin | None:
    """The state that `config.start` names, verified and on this run's mesh; None for a run that begins by itself, or
    that has checkpoints of its own in `workdir` to go on from: the origin is not needed any more.

    Raises UserError: the folder is no run, has no such checkpoint or a damaged one, is of another model or tokenizer,
    or has come further than this run goes."""
    kind = "branch_from" if config.start.branch_from is not None else "init_from"
    named = getattr(config.start, kind)
    if named is None or has_checkpoints(checkpoint_place(config.checkpoint.directory, workdir)):
        return None
    folder, key = Path(named).absolute(), f"start.{kind} = {named}"
    there = read_config(folder, key)
    changed = model_differences(there["model"], plain(config.model))
    longer = {name: changed.pop(name) for name in LONGER_ROWS_KEYS if name in changed}
    if changed:
        raise UserError(f"{key}: is another model: {as_words(changed)}; use the model of that run")
    if kind == "branch_from" and (folder / "soup.json").exists():
        raise UserError(f"{key}: is a soup, which has weights and no optimiser's state; use start.init_from")
    branch, fresh = kind == "branch_from", kind == "init_from" or config.start.reset_optimizer
    was, now = there["optimizer"]["name"], config.optimizer.name
    if not fresh and was != now:
        raise UserError(
            f"{key}: was trained with optimizer.name = {was!r}, whose state {now!r} cannot take over; set "
            "start.reset_optimizer=True to begin with fresh moments"
        )
    recorded = _recorded(workdir, kind, folder)
    step = recorded.get("step") if config.start.step is None else config.start.step
    with jax.set_mesh(layout.mesh):
        state, meta = _load(folder, key, step, layout, weights_alone=fresh)
        if recorded.get("step") == meta["step"] and recorded["checkpoint"] != meta["sha256"]:
            raise UserError(
                f"{key}: its checkpoint of step {meta['step']} is not the one that {workdir} began with; put that one "
                "back, or name another --workdir"
            )
        if meta["tokenizer"]["hash"] != data.tokenizer.hash:
            raise UserError(
                f"{key}: was trained with tokenizer {describe(meta['tokenizer'])}, this run reads "
                f"{data.tokenizer.name} ({data.tokenizer.hash[:12]}…); use the tokenizer of that run"
            )
        if branch and meta["step"] >= config.total_steps:
            raise UserError(
                f"{key}: its checkpoint is of step {meta['step']}, and this run ends at step {config.total_steps}; "
                "give the stages more steps, or name an earlier checkpoint with start.step"
            )
        if fresh:
            state |= _fresh(optimizer, layout, state["params"], meta["step"] if branch else 0)
    read = meta["read"] if branch else []
    apart = first_difference(read, History(data.stream).until(meta["step"])) if branch else None
    record = {
        "kind": kind,
        "folder": str(folder),
        "step": meta["step"],
        "tokens": meta["tokens"],
        "checkpoint": meta["sha256"],
        "reset_optimizer": fresh,
        "data_differ_from_step": apart,
    }
    return Origin(state, record, read, _notes(named, record, longer))


def _load(folder: Path, key: str, step: int | None, layout: Layout, weights_alone: bool) -> tuple[State, dict]:
    """({"params"} or the whole state, meta)."""
    try:
        with Checkpoints(checkpoints_of(folder), read_only=True) as checkpoints:
            if not weights_alone:
                found = checkpoints.restore(layout.abstract, step)
            elif params := checkpoints.restore_params(layout.abstract["params"], step):
                found = {"params": params[0]}, params[1]
            else:
                found = None
    except UserError as error:
        raise UserError(f"{key}: {error}") from None
    if found is None:
        raise UserError(f"{key}: has no checkpoint yet; train it first")
    return found


def _fresh(optimizer: optax.GradientTransformation, layout: Layout, params, step: int) -> State:
    def create(params):
        return {"opt_state": optimizer.init(params), "step": jnp.int32(step)}

    return jax.jit(create, out_shardings={key: layout.shardings[key] for key in ("opt_state", "step")})(params)


def _notes(named: str, record: dict, longer: dict) -> tuple[str, ...]:
    step, apart = record["step"], record["data_differ_from_step"]
    moments = "fresh moments" if record["reset_optimizer"] else "the optimiser's state goes on"
    if record["kind"] == "init_from":
        notes = [f"beginning with the weights of {named}, step {step:,}"]
    else:
        notes = [f"branching off {named} at step {step:,}; {moments}"]
    if apart is not None:
        notes.append(
            f"note: the data before the branch point differ: in steps {apart:,} to {step - 1:,} {named} read other "
            f"than this run's stages say. The weights come from what it read; these stages hold from step {step:,} on"
        )
    if longer:
        notes.append(f"note: the model is adjusted: {as_words(longer)}")
    return tuple(notes)


def _recorded(workdir: Path, kind: str, folder: Path) -> dict:
    """The origin that an attempt has begun with which came to no checkpoint of its own: by now, the newest one of a
    run that goes on is another."""
    path = workdir / "run.json"
    origin = (json.loads(path.read_text()) if path.exists() else {}).get("origin") or {}
    return origin if (origin.get("kind"), origin.get("folder")) == (kind, str(folder)) else {}


def read_config(folder: Path, key: str) -> dict:
    """config.json of a run or a soup; UserError, beginning with `key`, when the folder is neither."""
    try:
        return json.loads((folder / "config.json").read_text())
    except (OSError, ValueError) as error:
        what = "there is no such folder" if not folder.is_dir() else "is not the folder of a run: it has no config.json"
        if not isinstance(error, FileNotFoundError):
            what = f"its config.json cannot be read ({error})"
        raise UserError(f"{key}: {what}; name a folder that mixlab.train or mixlab.soup has written") from None


def model_differences(one: dict, other: dict) -> dict[str, tuple]:
    """Keys in which two models (config.json's "model") are different functions of the same weights."""
    return {key: pair for key, pair in differences(one, other).items() if key not in FREE_MODEL_KEYS}


def as_words(changed: dict[str, tuple]) -> str:
    return ", ".join(f"model.{key} is {one!r} there and {other!r} here" for key, (one, other) in changed.items())


def describe(tokenizer: Mapping[str, str]) -> str:
    return f"{tokenizer['name']} ({tokenizer['hash'][:12]}…)"
