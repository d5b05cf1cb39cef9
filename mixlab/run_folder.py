"""A run's folder: what stands in it before training starts, and whether an earlier run there may go on."""

import json
import os
import platform
import sys
from datetime import datetime
from importlib.metadata import version
from pathlib import Path

import jax

from mixlab.config import FREE_KEYS, Config, to_json, with_defaults
from mixlab.errors import UserError
from mixlab.parallel import distributed, xla_flags
from mixlab.schema import differences, plain

VERSIONS = ("mixlab", "jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "grain", "numpy")


class RunFolder:
    """Opens `path` for a run of `config` that reads what `plan` says.

    allow_change: keys (or groups of keys) that the user names as changed on purpose when a run goes on.
    Raises UserError: the folder cannot be written, holds something else, or holds a run that read or computed something
    else, with every difference. Nothing is changed in those cases. Every process opens the folder; process 0 writes."""

    def __init__(self, path: Path, config: Config, plan: dict, allow_change: tuple[str, ...] = ()):
        self.path = path
        self.resumed = (path / "config.json").exists()
        changes = self._changes(config, plan, allow_change) if self.resumed else {}
        if not self.resumed:
            self._check_empty()
        distributed.wait("the run's folder is checked")  # before process 0 changes it
        distributed.first_alone(lambda: self._begin(config, plan, changes))

    def _begin(self, config: Config, plan: dict, changes: dict) -> None:
        path = self.path
        try:
            path.mkdir(parents=True, exist_ok=True)
            for old in path.glob("failed-*.json"):  # what ended an earlier attempt
                old.unlink()
            now = datetime.now().astimezone().isoformat(timespec="seconds")
            facts = self.facts() or {"started": now, "seconds": 0.0, "changes": []}
            changed = [
                {"at": now, "step": None, "key": key, "from": was, "to": is_now}
                for key, (was, is_now) in changes.items()
            ]
            self.write("config.json", to_json(config))
            self.write("plan.json", json.dumps(plan, indent=2) + "\n")
            self.note(
                started=facts["started"],
                seconds=facts["seconds"],
                changes=facts["changes"] + changed,
                command=" ".join([Path(sys.executable).name, *sys.orig_argv[1:]]),
                machine=f"{platform.machine()}, {os.cpu_count()} cores, {platform.system()}",
                devices=f"{jax.device_count()} x {jax.devices()[0].device_kind}",
                parameters=plan["parameters"],
                flags=xla_flags.in_force(),
                versions={name: version(name) for name in VERSIONS} | {"python": platform.python_version()},
                finished=None,
                exit="running",
            )
        except OSError as error:
            raise UserError(f"--workdir={path}: cannot be written ({error.strerror}); name another folder") from None

    def goes_on_from(self, step: int) -> None:
        """Notes from which step on the changes hold that were allowed since the run last went on."""
        changes = self.facts()["changes"]
        if any(change.get("step", 0) is None for change in changes):
            self.note(changes=[c | {"step": step} if c.get("step", 0) is None else c for c in changes])

    def _check_empty(self) -> None:
        if self.path.exists() and not self.path.is_dir():
            raise UserError(f"--workdir={self.path}: is a file; name a folder")
        names = sorted(p.name for p in self.path.iterdir()) if self.path.is_dir() else []
        others = [name for name in names if not name.endswith(".partial")]
        if others:
            raise UserError(
                f"--workdir={self.path}: holds {', '.join(others[:3])} and no config.json, so it is not a run's; name another folder"
            )

    def _changes(self, config: Config, plan: dict, allow_change: tuple[str, ...]) -> dict:
        """What differs from the run in the folder and was allowed to; UserError for what was not."""
        try:
            old = with_defaults(json.loads((self.path / "config.json").read_text()))
            old_plan = json.loads((self.path / "plan.json").read_text())
        except (OSError, ValueError) as error:
            raise UserError(
                f"--workdir={self.path}: its config.json or plan.json cannot be read ({error}); put it back, or name "
                "another folder"
            ) from None
        found = differences(old, plain(config))
        found = {key: change for key, change in found.items() if not key.startswith(FREE_KEYS)}
        found |= differences(_content(old_plan), _content(plan))
        refused = {k: v for k, v in found.items() if not any(k == a or k.startswith(a + ".") for a in allow_change)}
        if refused:
            listed = "\n".join(f"  - {key}: was {was!r}, is now {now!r}" for key, (was, now) in refused.items())
            raise UserError(
                f"--workdir={self.path} holds a run of something else:\n{listed}\nName another --workdir, or, where the "
                f"change is meant, go on with --allow-change={','.join(refused)}"
            )
        return found

    def write(self, name: str, text: str) -> None:
        """Writes a file of the folder, whole or not at all; process 0 does."""
        if not distributed.is_first():
            return
        partial = self.path / (name + ".partial")
        partial.write_text(text)
        partial.replace(self.path / name)

    def facts(self) -> dict:
        """What run.json holds."""
        return json.loads((self.path / "run.json").read_text()) if (self.path / "run.json").exists() else {}

    def note(self, **facts) -> None:
        """Adds to run.json."""
        if distributed.is_first():
            self.write("run.json", json.dumps(self.facts() | facts, indent=2) + "\n")


def _content(plan: dict) -> dict:
    """What a plan says of the text itself, as against the configuration."""
    return {
        "corpus": {name: source["fingerprint"] for name, source in plan["sources"].items()},
        "tokenizer_hash": plan["tokenizer"]["hash"],
    }
