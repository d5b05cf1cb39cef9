"""The training loop: the only place where stream, step, state, evaluation and checkpoints meet."""

import hashlib
import json
import time
from collections.abc import Callable
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path

import jax
from jax.sharding import Mesh

from mixlab.config import Config, to_json
from mixlab.corpus.cache import cache_folder
from mixlab.data import Data
from mixlab.errors import EXIT_DIVERGED, EXIT_PREEMPTED, UserError
from mixlab.evals.benchmarks import Benchmarks, open_benchmarks
from mixlab.evals.evaluation import Evaluation
from mixlab.evals.items import write_items
from mixlab.evals.norms import compile_weight_norms
from mixlab.evals.probes import Probed, ProbeRunner, open_probes
from mixlab.inject.control_log import ControlLog, read_log
from mixlab.parallel import lengths
from mixlab.parallel.distributed import is_first
from mixlab.parallel.mesh import global_batch, make_mesh
from mixlab.plan import as_text, make_plan
from mixlab.report.page import write_report
from mixlab.report.runs import read_run
from mixlab.report.spikes import spike_scores
from mixlab.run_folder import RunFolder
from mixlab.stream import BatchShape
from mixlab.training.checkpoint import Checkpoints
from mixlab.training.control import Control
from mixlab.training.guard import Diverged, Guard, RollBack
from mixlab.training.history import History, first_difference
from mixlab.training.metrics import MetricsLog
from mixlab.training.optimizer import make_optimizer
from mixlab.training.places import check_place, checkpoint_place
from mixlab.training.progress import Progress
from mixlab.training.recorder import Recorder
from mixlab.training.signals import StopSignal
from mixlab.training.start import load_origin
from mixlab.training.state import Layout, State, create_state, plan_state
from mixlab.training.step import compile_pass_over, compile_train_step, make_train_step
from mixlab.training.watchdog import BETWEEN, Watchdog


def train(config: Config, data: Data, workdir: Path, allow_change: tuple[str, ...] = ()) -> int:
    """Trains to the end of the plan, from the newest good checkpoint in `workdir` if there is one, else from where
    `config.start` says, and writes the report.

    Returns 0 when the run is complete, EXIT_PREEMPTED when it was asked to stop and has saved, EXIT_DIVERGED when the loss
    is not finite, or spikes, and the policy says stop. Raises UserError before the first step for whatever can be known by then."""
    began = time.monotonic()
    plan = make_plan(config, data)
    mesh = make_mesh(config.mesh)
    sizes, parts = lengths.resolved(config.mesh, mesh), config.training.accumulation_steps
    if problems := lengths.problems(sizes, config.model, data.stream.stages, parts):
        raise UserError("\n".join(problems))
    benchmarks = open_benchmarks(config, data)
    optimizer = make_optimizer(config.optimizer)
    layout = plan_state(config.model, optimizer, mesh)
    _keep_compiled()
    origin = load_origin(config, data, layout, optimizer, workdir)
    place = checkpoint_place(config.checkpoint.directory, workdir)
    check_place(place, workdir)
    folder = RunFolder(workdir, config, plan, allow_change)
    if origin:
        folder.note(origin=origin.record)
    print(as_text(plan), flush=True)
    settings = config.checkpoint
    with (
        jax.set_mesh(mesh),
        Checkpoints(place, keep_last=settings.keep_last, keep_every_steps=settings.keep_every_steps) as checkpoints,
        StopSignal(checkpoints.reached_preemption) as stop,
    ):
        restored = checkpoints.restore(layout.abstract)
        if restored:
            state, meta = restored
            _check_stream(meta, data, allow_change)
        elif origin:
            state, meta = origin.state, {"read": origin.read}
        else:
            state, meta = create_state(config.model, optimizer, layout, config.seed), {"read": []}
        first = int(state["step"])
        folder.goes_on_from(first)
        control = _control(config, data, meta, workdir)
        tools = _Tools.make(config, data, layout, optimizer, control, benchmarks, workdir)
        with (
            MetricsLog(
                workdir,
                resume_step=first if restored else None,
                tensorboard=config.logging.tensorboard,
                wandb=config.logging.wandb,
            ) as log,
            Progress(config.total_steps, first, every_seconds=config.logging.console_every_seconds) as progress,
            Watchdog(config.training.hang_seconds, workdir) as watchdog,
        ):
            for note in _resumed(first, meta, data, folder) if restored else origin.notes if origin else ():
                progress.note(note)
            run = _Run(config, data, layout, tools, checkpoints, folder, log, progress, watchdog)
            run.set_out(first, meta, control, Guard(config.training, meta.get("guard", {})))
            run.begin(state, first, restored is not None)
            if not (workdir / "baselines.json").exists():
                folder.write("baselines.json", json.dumps(tools.evaluation.baselines(), indent=2) + "\n")
            try:
                state = run.train(state, stop)
            except Diverged as error:
                progress.note(str(error))
                folder.note(exit="diverged", spike_score=spike_scores(read_run(workdir)))
                return EXIT_DIVERGED
        done = int(state["step"])
        checkpoints.wait()
        samples = tools.evaluation.samples(state["params"]) if done == config.total_steps else []
    facts = folder.facts()
    folder.note(seconds=round(facts["seconds"] + time.monotonic() - began, 1), finished=_now())
    folder.note(spike_score=spike_scores(read_run(workdir)))  # from the record, which outlives interruptions
    if done < config.total_steps:
        folder.note(exit="preempted")
        print(f"stopped at step {done:,} as asked, and saved; run the same command again to go on", flush=True)
        return EXIT_PREEMPTED
    folder.write("samples.json", json.dumps({"step": done, "samples": samples}, indent=2) + "\n")
    folder.note(exit="complete")
    if is_first():
        print(f"report: {write_report([workdir], workdir / 'report')}", flush=True)
    return 0


@dataclass(frozen=True)
class _Tools:
    """What a run computes with; compiled before its first step, for every shape of batch on the mesh that serves it."""

    meshes: dict[BatchShape, Mesh]
    executables: dict[BatchShape, Callable]
    pass_over: Callable
    evaluation: Evaluation
    probes: ProbeRunner
    norms: Callable

    @classmethod
    def make(
        cls,
        config: Config,
        data: Data,
        layout: Layout,
        optimizer,
        control: Control,
        benchmarks: Benchmarks,
        workdir: Path,
    ) -> "_Tools":
        parts = config.training.accumulation_steps
        meshes = lengths.meshes_for(layout.mesh, config.mesh, control.shapes(), parts)
        step = make_train_step(config, optimizer, layout)
        return cls(
            meshes,
            {shape: compile_train_step(step, layout.on(mesh), *shape) for shape, mesh in meshes.items()},
            compile_pass_over(layout),
            Evaluation(config, data, layout, benchmarks),
            open_probes(config, data, layout, workdir),
            compile_weight_norms(layout),
        )


class _Run:
    """The steps of a run, and what is done between them."""

    def __init__(
        self,
        config: Config,
        data: Data,
        layout: Layout,
        tools: _Tools,
        checkpoints: Checkpoints,
        folder: RunFolder,
        log: MetricsLog,
        progress: Progress,
        watchdog: Watchdog,
    ):
        self._config, self._data, self._layout, self._tools = config, data, layout, tools
        self._checkpoints, self._folder, self._log, self._progress = checkpoints, folder, log, progress
        self._watchdog, self._tell = watchdog, progress.note

    def set_out(self, first: int, meta: dict, control: Control, guard: Guard) -> None:
        """From step `first`. meta: of the checkpoint of that step; of a run without one, {"read": what its weights have read}."""
        self._control, self._guard = control, guard
        self._recorder = Recorder(self._config, self._data, self._log, self._progress, first, guard)
        self._history = History(self._data.stream, first, meta["read"])

    def begin(self, state: State, step: int, restored: bool) -> None:
        """What comes before the first step of this process."""
        self._watchdog.watch(f"what comes before step {step:,}", BETWEEN)
        if restored and not self._control.due(step):
            return
        due = (False, []) if restored else self._tools.evaluation.due(step, starting=True)
        scores, probed = self._look(state["params"], step, due, starting=not restored)
        if scores and not restored:  # of a restored one that was to end here, the record is written
            self._recorder.begin(scores)
        self._decide(step, probed)
        if self._guard.may_roll_back and not restored:
            self._checkpoints.save(step, state, self._meta(step))

    def train(self, state: State, stop: StopSignal) -> State:
        """Steps from the state's step to the end, or until asked to stop; the state returned is saved."""
        while True:
            try:
                return self._steps(state, stop)
            except RollBack as error:
                fault = error.with_traceback(None)  # which would hold on to the state
            del state  # makes room for the one that is read
            state = self._go_back(fault)

    def _go_back(self, fault: RollBack) -> State:
        """To the last checkpoint, and past the batch at fault: all as if the run had been started again."""
        self._watchdog.watch("going back to the last checkpoint", BETWEEN)
        self._checkpoints.wait()
        restored = self._checkpoints.restore(self._layout.abstract)
        assert restored is not None  # a run that may roll back saves where it begins
        state, meta = restored
        first = int(state["step"])
        self._log.cut_back(first)
        guard = self._guard.after(fault, first, meta.get("guard", {}))
        self.set_out(first, meta, _control(self._config, self._data, meta, self._folder.path), guard)
        self._folder.note(roll_backs=guard.roll_backs)
        gone, count = guard.roll_backs[-1], len(guard.roll_backs)
        self._tell(
            f"{fault}; back to step {first:,}, and past the batches of steps {gone['first_step']:,} to "
            f"{gone['last_step']:,} (roll back {count} of {self._config.training.max_roll_backs})"
        )
        return state

    def _steps(self, state: State, stop: StopSignal) -> State:
        config, control, tools, total = self._config, self._control, self._tools, self._config.total_steps
        self._recorder.resume_clock()
        first = int(state["step"])
        self._watchdog.watch(f"the batch of step {first:,}")
        for step, local in control.batches(first, tools.meshes):
            self._watchdog.watch(f"step {step:,}")
            stage, shape = control.stream.stage(step), control.stream.shape(step)
            if self._guard.passes(step):
                state, metrics = tools.pass_over(state), None
            else:
                batch = global_batch(tools.meshes[shape], local, shape.rows)
                state, metrics = tools.executables[shape](state, batch)
            self._recorder.add(step + 1, stage, metrics)  # waits for the step before this one, not for this one
            done = step + 1
            stopping = stop.requested(done)
            saving = done == total or stopping or _due(done, config.checkpoint.every_steps)
            due = self._tools.evaluation.due(done)
            if any(due) or saving or self._tools.probes.due(done) or control.due(done):
                self._recorder.stop_clock()
                self._watchdog.watch(f"evaluation, probes and saving at step {done:,}", BETWEEN)
                scores, probed = self._look(state["params"], done, due)
                self._recorder.flush(scores)  # on disk before the checkpoint, so that a resumed run lacks no record
                self._decide(done, probed)
                if saving:
                    self._checkpoints.save(done, state, self._meta(done))
                self._recorder.resume_clock()
            if stopping:
                break
            self._watchdog.watch(f"the batch of step {done:,}")
        return state

    def _look(
        self, params, step: int, due: tuple[bool, list[str]], starting: bool = False
    ) -> tuple[dict[str, float], Probed]:
        """Everything measured between two steps, and what the probes have found of it.   due: of the evaluation."""
        scores: dict[str, float] = {}
        held_out, tasks = due
        if held_out or tasks:
            scores, items = self._tools.evaluation.scores(params, step, held_out, tasks)
            if is_first():
                write_items(self._folder.path, step, items)
        if held_out:
            norms = jax.device_get(self._tools.norms(params))
            scores |= {name: float(value) for name, value in norms.items()}
        probed = self._tools.probes.run(params, step, self._control.stream, starting, self._control.due(step))
        for failure in probed.failures:
            self._tell("step {:,}: probe {probe} of experiment {experiment} failed: {error}".format(step, **failure))
        if probed.failures:
            earlier = [one for one in self._folder.facts().get("probe_failures", []) if one["step"] < step]
            self._folder.note(probe_failures=earlier + [{"step": step} | failure for failure in probed.failures])
        return scores | probed.metrics, probed

    def _decide(self, step: int, probed: Probed) -> None:
        found = {name: self._tools.probes.control(name, probed) for name in self._control.due(step)}
        for entry in self._control.decide(step, found):
            if "failed" in entry:
                self._tell(
                    f"step {step:,}: experiment {entry['experiment']} could not decide ({entry['failed']}); what it "
                    "decided last holds on"
                )

    def _meta(self, done: int) -> dict:
        """What a checkpoint remembers besides the arrays."""
        return {
            "tokens": self._recorder.tokens,
            "stream": self._data.stream.fingerprint(),
            "read": self._history.until(done),
            "tokenizer": {"name": self._data.tokenizer.name, "hash": self._data.tokenizer.hash},
            "config_sha256": hashlib.sha256(to_json(self._config).encode()).hexdigest(),
            "control_log": self._control.log.meta(),
            "guard": self._guard.meta(),
        }


def _control(config: Config, data: Data, meta: dict, workdir: Path) -> Control:
    """As decided up to a checkpoint of this meta; nothing is, before a run's first."""
    decided = read_log(workdir / "control.jsonl", meta["control_log"]) if "control_log" in meta else ControlLog()
    return Control(config, data, decided, workdir)


def _due(step: int, every: int) -> bool:
    return every > 0 and step % every == 0


def _check_stream(meta: dict, data: Data, allow_change: tuple[str, ...]) -> None:
    if meta and meta["stream"] != data.stream.fingerprint() and not allow_change:
        raise UserError(
            "checkpoints: the newest one was trained on another stream than this config and corpus give; name another "
            "--workdir, or the change that is meant with --allow-change"
        )


def _resumed(first: int, meta: dict, data: Data, folder: RunFolder) -> list[str]:
    """What to tell of a run that goes on from step `first`."""
    notes = [f"going on from step {first:,}"]
    apart = first_difference(meta["read"], History(data.stream).until(first))
    if apart is not None and apart != (folder.facts().get("origin") or {}).get("data_differ_from_step"):
        notes.append(
            f"note: steps {apart:,} to {first - 1:,} were read by other stages than the configuration now has; these hold "
            f"from step {first:,} on"
        )
    return notes


def _keep_compiled() -> None:
    """Compiled programs are kept on disk, also quick ones, so that a second start does not compile."""
    jax.config.update("jax_compilation_cache_dir", str(cache_folder() / "compiled"))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)
    jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)


def _now() -> str:
    return datetime.now().astimezone().isoformat(timespec="seconds")
