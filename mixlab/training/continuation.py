"""Training that goes on from a checkpoint for some steps, and leaves nothing behind but what is made of its weights."""

from collections.abc import Mapping
from pathlib import Path

import jax
import numpy as np

from mixlab import loader
from mixlab.config import Config
from mixlab.data import Data
from mixlab.evals.probing import ProbedModel, Probing
from mixlab.parallel.lengths import meshes_for
from mixlab.parallel.mesh import global_batch, host_rows, make_mesh
from mixlab.training.optimizer import make_optimizer
from mixlab.training.start import load_origin
from mixlab.training.state import plan_state
from mixlab.training.step import compile_train_step, make_train_step


class Continuation:
    """Goes on from the checkpoint of `config.start.branch_from`, any number of times; the learning rate is that of the whole
    configuration. Programs are compiled once."""

    def __init__(self, config: Config):
        self._config = config
        self._optimizer = make_optimizer(config.optimizer)
        self._layout = plan_state(config.model, self._optimizer, make_mesh(config.mesh))
        self._train_step = make_train_step(config, self._optimizer, self._layout)
        self._executables: dict = {}
        self._probing: Probing | None = None

    def go_on(self, data: Data, steps: int) -> tuple[ProbedModel, list[float]]:
        """(the model after `steps` steps of data.stream, the loss of each)."""
        layout, config = self._layout, self._config
        with jax.set_mesh(layout.mesh):
            origin = load_origin(config, data, layout, self._optimizer, Path())
            if origin is None:
                raise ValueError("config.start names no run to branch from")
            state, losses = origin.state, []
            first = int(state["step"])
            meshes = self._meshes(data.stream.shapes())
            mine = {(shape.rows, shape.length): host_rows(mesh, shape.rows) for shape, mesh in meshes.items()}
            batches = loader.batches(data.stream, first, config.loader, mine)
            for _, (step, local) in zip(range(steps), batches, strict=False):
                shape = data.stream.shape(step)
                batch = global_batch(meshes[shape], local, shape.rows)
                state, metrics = self._executable(shape)(state, batch)
                losses.append(metrics["loss"])
            return self._probed(data, state["params"], first + steps), [float(loss) for loss in jax.device_get(losses)]

    def outcomes(self, model: ProbedModel, probes: Mapping[str, list]) -> dict[str, np.ndarray]:
        """Experiment -> the outcome of each of its items, of those whose probes have one."""
        with jax.set_mesh(self._layout.mesh):
            found = {}
            for name, of_experiment in probes.items():
                for probe in of_experiment:
                    details = probe.details(model) if probe.details else {}
                    if "outcome" in details:
                        found[name] = np.asarray(details["outcome"])
            return found

    def _executable(self, shape):
        if shape not in self._executables:
            layout = self._layout.on(self._meshes([shape])[shape])
            self._executables[shape] = compile_train_step(self._train_step, layout, *shape)
        return self._executables[shape]

    def _meshes(self, shapes):
        return meshes_for(self._layout.mesh, self._config.mesh, shapes, self._config.training.accumulation_steps)

    def _probed(self, data: Data, params, step: int) -> ProbedModel:
        if self._probing is None:
            begins = any(stage.format.bos for stage in self._config.stages)
            self._probing = Probing(self._config, self._layout, data.tokenizer.bos_id if begins else None)
        return self._probing.at(params, step, data.stream)
