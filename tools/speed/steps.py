"""Train steps: one setting built, compiled and timed. The work counted is the model's own: see `FORMULA`."""

import contextlib
import time
from dataclasses import dataclass
from pathlib import Path

import jax
import numpy as np

from mixlab.config import Config
from mixlab.model.config import ModelConfig
from mixlab.model.size import flops_per_token, parameter_count
from mixlab.parallel.mesh import MeshConfig, global_batch, make_mesh
from mixlab.schedule.stages import StageConfig
from mixlab.training.optimizer import OptimizerConfig, make_optimizer
from mixlab.training.state import create_state, plan_state
from mixlab.training.step import compile_train_step, make_train_step
from speed import clock
from speed import profile as profiles

FORMULA = (
    "FLOPs a token = 6 x (matrix parameters of the layers + d_model x vocabulary) + 6 x layers x heads x head_dim x length: "
    "forward and backward, causal attention counted as half of the square, recomputation and masked work not counted"
)


@dataclass(frozen=True)
class Setting:
    """A model and the shape of its batches. document_tokens: None: every row is one document, and nothing is masked; else
    rows are packed with documents of about so many tokens."""

    model: ModelConfig
    rows: int
    length: int
    document_tokens: int | None = None
    optimizer: str = "adamw"


class Step:
    """A compiled train step with its state and one batch; `run` makes one update."""

    def __init__(self, setting: Setting):
        self.setting = setting
        config = Config(
            model=setting.model,
            stages=(StageConfig("main", 1000, setting.length, setting.rows * setting.length),),
            optimizer=OptimizerConfig(name=setting.optimizer),
        )
        self._mesh = make_mesh(MeshConfig(), jax.devices()[:1])  # one device, as the peak is one's
        optimizer = make_optimizer(config.optimizer)
        layout = plan_state(config.model, optimizer, self._mesh)
        self._batch = _batch(setting)
        masked = "segment_ids" in self._batch
        began = time.process_time(), time.perf_counter()
        with jax.set_mesh(self._mesh):
            function = make_train_step(config, optimizer, layout)
            self.compiled = compile_train_step(function, layout, setting.rows, setting.length, masked)
        self.compile_seconds = {"cpu": time.process_time() - began[0], "wall": time.perf_counter() - began[1]}
        self.state = create_state(config.model, optimizer, layout, 0)

    def run(self):
        batch = global_batch(self._mesh, self._batch, self.setting.rows)
        self.state, metrics = self.compiled(self.state, batch)
        return metrics


def measure(setting: Setting, repeats: int, profile: Path | None = None) -> dict:
    """Median times of a step, tokens a second, share of the peak, memory; a trace in `profile`, if asked for."""
    step, which = Step(setting), clock.clock()
    times = clock.timed(step.run, repeats)
    if profile:
        profiles.trace(profile, step.run)
    tokens = setting.rows * setting.length
    peak, source = clock.peak(setting.model.compute_dtype)
    rate = tokens / times.of(which)
    memory = step.compiled.memory_analysis()
    found = {
        "parameters": parameter_count(setting.model),
        "tokens a step": tokens,
        "compile, seconds": step.compile_seconds["wall"],
        f"seconds a step by {which} time, min..max": times.spread(which),
        f"seconds a step by {which} time": times.of(which),
        "wall seconds a step": times.of("wall"),
        f"tokens a second of {which} time": rate,
        f"share of the peak ({source})": rate * flops_per_token(setting.model, setting.length) / peak,
        "loss": float(step.run()["loss"]),
    }
    with contextlib.suppress(AttributeError):  # not every backend's compiler tells
        found["memory: state and batch, MiB"] = memory.argument_size_in_bytes / 2**20
        found["memory: temporary, MiB"] = memory.temp_size_in_bytes / 2**20
    return found


def _batch(setting: Setting) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)
    B, L = setting.rows, setting.length
    grid = rng.integers(0, setting.model.vocab_size, (B, L + 1)).astype(np.int32)
    positions = np.broadcast_to(np.arange(L, dtype=np.int32), (B, L))
    batch = {"tokens": grid[:, :-1], "targets": grid[:, 1:], "loss_weights": np.ones((B, L), np.float32)}
    if setting.document_tokens is None:
        return batch | {"positions": positions}
    begins = rng.random((B, L)) < 1 / setting.document_tokens
    begins[:, 0] = True
    first = np.maximum.accumulate(np.where(begins, positions, 0), axis=1)
    return batch | {"segment_ids": np.cumsum(begins, axis=1, dtype=np.int32), "positions": positions - first}
