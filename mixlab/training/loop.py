"""The training loop: the only place where stream, step, state, evaluation and checkpoints meet."""

import hashlib
import json
import time
from datetime import datetime
from pathlib import Path

import jax
from jax.sharding import Mesh

from mixlab import loader
from mixlab.config import Config, to_json
from mixlab.corpus.cache import cache_folder
from mixlab.data import Data
from mixlab.errors import EXIT_DIVERGED, EXIT_PREEMPTED, UserError
from mixlab.evals.evaluation import Evaluation
from mixlab.model.size import flops_per_token
from mixlab.parallel.mesh import global_batch, make_mesh
from mixlab.plan import as_text, make_plan
from mixlab.report.page import write_report
from mixlab.report.runs import read_run
from mixlab.report.spikes import spike_scores
from mixlab.run_folder import RunFolder
from mixlab.training.checkpoint import Checkpoints
from mixlab.training.history import History
from mixlab.training.metrics import MetricsLog, mfu
from mixlab.training.optimizer import make_optimizer
from mixlab.training.progress import Progress
from mixlab.training.signals import StopSignal
from mixlab.training.start import load_origin
from mixlab.training.state import State, create_state, plan_state
from mixlab.training.step import compile_train_step, make_train_step


class Diverged(Exception):
    """Loss or gradient is not finite and the policy says stop."""


def train(config: Config, data: Data, workdir: Path, allow_change: tuple[str, ...] = ()) -> int:
    """Trains to the end of the plan, from the newest good checkpoint in `workdir` if there is one, else from where
    `config.start` says, and writes the report.

    Returns 0 when the run is complete, EXIT_PREEMPTED when it was asked to stop and has saved, EXIT_DIVERGED when the loss
    is not finite and the policy says stop. Raises UserError before the first step for whatever can be known by then."""
    began = time.monotonic()
    plan = make_plan(config, data)
    mesh = make_mesh(config.mesh)
    _check_rows(config, data, mesh)
    optimizer = make_optimizer(config.optimizer)
    layout = plan_state(config.model, optimizer, mesh)
    _keep_compiled()
    origin = load_origin(config, data, layout, optimizer, workdir)
    folder = RunFolder(workdir, config, plan, allow_change)
    if origin:
        folder.note(origin=origin.record)
    print(as_text(plan), flush=True)
    settings = config.checkpoint
    with (
        jax.set_mesh(mesh),
        Checkpoints(
            workdir / "checkpoints", keep_last=settings.keep_last, keep_every_steps=settings.keep_every_steps
        ) as checkpoints,
        StopSignal(checkpoints.reached_preemption) as stop,
    ):
        restored = checkpoints.restore(layout.abstract)
        if restored:
            state, meta = restored
            _check_stream(meta, data, allow_change)
            read = meta["read"]
        elif origin:
            state, read = origin.state, origin.read
        else:
            state, read = create_state(config.model, optimizer, layout, config.seed), []
        first = int(state["step"])
        history = History(data.stream, first, read)
        evaluation = Evaluation(config, data, layout)
        train_step = make_train_step(config, optimizer, layout)
        executables = {shape: compile_train_step(train_step, layout, *shape) for shape in data.stream.shapes()}
        with (
            MetricsLog(
                workdir,
                resume_step=first if restored else None,
                tensorboard=config.logging.tensorboard,
                wandb=config.logging.wandb,
            ) as log,
            Progress(config.total_steps, first, every_seconds=config.logging.console_every_seconds) as progress,
        ):
            recorder = _Recorder(config, data, log, progress, first)
            for note in (f"going on from step {first:,}",) if restored else origin.notes if origin else ():
                progress.note(note)
            if not restored and config.evaluation.every_steps:
                recorder.begin(evaluation.scores(state["params"]))
            if not (workdir / "baselines.json").exists():
                folder.write("baselines.json", json.dumps(evaluation.baselines(), indent=2) + "\n")
            try:
                state = _run(config, data, layout, state, executables, evaluation, checkpoints, stop, recorder, history)
            except Diverged as error:
                progress.note(str(error))
                folder.note(exit="diverged", spike_score=spike_scores(read_run(workdir)))
                return EXIT_DIVERGED
        done = int(state["step"])
        checkpoints.wait()
        samples = evaluation.samples(state["params"]) if done == config.total_steps else []
    facts = folder.facts()
    folder.note(seconds=round(facts["seconds"] + time.monotonic() - began, 1), finished=_now())
    folder.note(spike_score=spike_scores(read_run(workdir)))  # from the record, which outlives interruptions
    if done < config.total_steps:
        folder.note(exit="preempted")
        print(f"stopped at step {done:,} as asked, and saved; run the same command again to go on", flush=True)
        return EXIT_PREEMPTED
    folder.write("samples.json", json.dumps({"step": done, "samples": samples}, indent=2) + "\n")
    folder.note(exit="complete")
    print(f"report: {write_report([workdir], workdir / 'report')}", flush=True)
    return 0


def _run(config, data, layout, state, executables, evaluation, checkpoints, stop, recorder, history) -> State:
    """Steps from the state's step to the end, or until asked to stop; the state returned is saved."""
    stream, total, first = data.stream, config.total_steps, int(state["step"])
    recorder.resume_clock()
    for step, local in loader.batches(stream, first, config.loader, jax.process_index(), jax.process_count()):
        stage, shape = stream.stage(step), stream.shape(step)
        batch = global_batch(layout.mesh, local, shape.rows)
        state, metrics = executables[shape](state, batch)
        recorder.add(step + 1, stage, metrics)  # waits for the step before this one, not for this one
        done = step + 1
        stopping = stop.requested(done)
        scoring = done == total or _due(done, config.evaluation.every_steps)
        saving = done == total or stopping or _due(done, config.checkpoint.every_steps)
        if scoring or saving:
            recorder.stop_clock()
            scores = evaluation.scores(state["params"]) if scoring else {}
            recorder.flush(scores)  # on disk before the checkpoint, so that a resumed run lacks no record
            if saving:
                checkpoints.save(done, state, _meta(config, data, recorder.tokens, history.until(done)))
            recorder.resume_clock()
        if stopping:
            break
    return state


class _Recorder:
    """Writes the metrics of a step when the next one has been dispatched, so that reading them holds nothing up."""

    def __init__(self, config: Config, data: Data, log: MetricsLog, progress: Progress, first: int):
        self._config, self._log, self._progress, self._first = config, log, progress, first
        self._stages = data.stream.stages
        self.tokens = sum(s.tokens_per_step * min(max(first - s.first_step, 0), s.steps) for s in self._stages)
        self._waiting: tuple | None = None
        self._skipped_in_a_row = 0
        self._last = time.perf_counter()
        self._ended: float | None = None  # when the waiting step did, if that is known

    def begin(self, scores: dict[str, float]) -> None:
        """The record of the step the run begins at (0, or a branch's): held-out scores before any training."""
        self._log.add(self._first, {"tokens": self.tokens} | scores)
        self._log.flush()
        self._tell(self._first, scores)

    def add(self, step: int, stage, metrics) -> None:
        self.flush({})
        self.tokens += stage.tokens_per_step
        self._waiting = (step, stage, metrics)

    def flush(self, scores: dict[str, float]) -> None:
        """Writes the step that is waiting, together with the held-out scores made after it, if any."""
        if self._waiting is None:
            return
        step, stage, metrics = self._waiting
        values = {f"train/{name}": float(value) for name, value in jax.device_get(metrics).items()}
        now = time.perf_counter() if self._ended is None else self._ended
        self._waiting = self._ended = None
        seconds, self._last = now - self._last, now
        speed = stage.tokens_per_step / seconds
        length = stage.shape(step - 1)[1]
        utilisation = mfu(flops_per_token(self._config.model, length), speed, jax.devices())
        perf = {"perf/step_seconds": seconds, "perf/tokens_per_second": speed}
        perf |= {} if utilisation is None else {"perf/mfu": utilisation}
        buckets = {}
        if stage.curriculum is not None:  # the loss of short rows is higher, and their steps are quicker
            buckets = {
                "train/sequence_length": length,
                f"train/bucket_{length}/loss": values["train/loss"],
                f"perf/bucket_{length}/step_seconds": seconds,
            }
        self._log.add(step, {"tokens": self.tokens} | values | perf | buckets | scores)
        self._log.flush()
        self._progress.update(step, values["train/loss"], speed, utilisation)
        self._tell(step, scores)
        self._react(step, values)

    def stop_clock(self) -> None:
        """Before work between two steps that is not a step's own (evaluation, saving): the waiting step ends here."""
        if self._waiting is not None:
            jax.block_until_ready(self._waiting[2])
            self._ended = time.perf_counter()

    def resume_clock(self) -> None:
        """After such work."""
        self._last = time.perf_counter()

    def _tell(self, step: int, scores: dict[str, float]) -> None:
        if scores:
            value, error = scores["eval/macro/bits_per_byte"], scores["eval/macro/bits_per_byte_se"]
            self._progress.note(
                f"step {step:,}  held-out bits per byte {value:.3f} ± {error:.3f} (mean of the domains)"
            )

    def _react(self, step: int, values: dict[str, float]) -> None:
        if not values["train/skipped"]:
            self._skipped_in_a_row = 0
            return
        self._skipped_in_a_row += 1
        settings = self._config.training
        what = f"step {step:,}: the loss or its gradient is not finite"
        if settings.on_non_finite == "stop":
            raise Diverged(f"{what}; stopping, as training.on_non_finite says. The last checkpoint is from before it")
        self._progress.note(f"{what}; the update is skipped ({self._skipped_in_a_row} in a row)")
        if self._skipped_in_a_row >= settings.max_skipped_steps:
            raise Diverged(f"stopping after {self._skipped_in_a_row} skipped updates in a row")


def _check_rows(config: Config, data: Data, mesh: Mesh) -> None:
    """UserError unless the rows of every step split evenly over the accumulation's parts and the devices. Those of all
    shapes do when the fewest do: shorter rows come in multiples of their number."""
    parts, shards = config.training.accumulation_steps, mesh.shape["data"] * mesh.shape["fsdp"]
    problems = []
    for number, stage in enumerate(data.stream.stages):
        fewest = stage.shapes()[-1]
        if fewest[0] % (parts * shards):
            unit = parts * shards * fewest[1]
            below = stage.tokens_per_step // unit * unit
            problems.append(
                f"stages.{number}: {fewest[0]} rows of {fewest[1]} tokens a step cannot be split over data x fsdp = "
                f"{shards} devices in {parts} accumulation steps; use "
                f"{f'tokens_per_step={below} or ' if below else ''}tokens_per_step={below + unit}, or fewer devices"
            )
    if problems:
        raise UserError("\n".join(problems))


def _due(step: int, every: int) -> bool:
    return every > 0 and step % every == 0


def _meta(config: Config, data: Data, tokens: int, read: list[dict]) -> dict:
    """What a checkpoint remembers besides the arrays. The control log is empty until something decides during a run."""
    return {
        "tokens": tokens,
        "stream": data.stream.fingerprint(),
        "read": read,
        "tokenizer": {"name": data.tokenizer.name, "hash": data.tokenizer.hash},
        "config_sha256": hashlib.sha256(to_json(config).encode()).hexdigest(),
        "control_log": {"entries": 0, "sha256": hashlib.sha256(b"").hexdigest()},
    }


def _check_stream(meta: dict, data: Data, allow_change: tuple[str, ...]) -> None:
    if meta and meta["stream"] != data.stream.fingerprint() and not allow_change:
        raise UserError(
            "checkpoints: the newest one was trained on another stream than this config and corpus give; name another "
            "--workdir, or the change that is meant with --allow-change"
        )


def _keep_compiled() -> None:
    """Compiled programs are kept on disk, also quick ones, so that a second start does not compile."""
    jax.config.update("jax_compilation_cache_dir", str(cache_folder() / "compiled"))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)
    jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)


def _now() -> str:
    return datetime.now().astimezone().isoformat(timespec="seconds")
