"""What probes ask of the model (inject/probe.py), answered on the mesh that trains it.

Parameters are only read. Rows are padded to a few fixed shapes, so that every function is compiled a few times in a run, holds
no more tokens at a time than an evaluation batch, and every host makes the same calls.
"""

import hashlib
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np

from mixlab.config import Config
from mixlab.evals.generate import Generator
from mixlab.evals.padding import Shapes
from mixlab.model.noise import standard_noise
from mixlab.parallel.mesh import global_batch, host_rows, replicated, whole_rows
from mixlab.stream import Stream
from mixlab.training.loss import LOGITS_BYTES
from mixlab.training.state import Layout
from mixlab.training.step import make_input_gradients, make_token_losses

REMEMBERED_BYTES = 2**29  # of answers of one step, in host memory


class Probing:
    """The functions that answer probes, compiled on first use and kept for the whole run.

    bos_id: of the token that documents begin with in training, None if they begin with none."""

    def __init__(self, config: Config, layout: Layout, bos_id: int | None):
        self.bos_id, self.config, self.mesh = bos_id, config.model, layout.mesh
        self.rows = whole_rows(layout.mesh, config.evaluation.rows)
        self.shapes = Shapes(self.rows, self.config.context_length)
        whole = replicated(layout.mesh)
        self.losses = jax.jit(make_token_losses(config, layout), out_shardings=whole)
        self.scores = jax.jit(make_scores(config, layout), out_shardings=whole)
        self.gradients = jax.jit(make_input_gradients(config, layout), out_shardings=whole)
        self.noise = jax.jit(standard_noise, static_argnums=(1, 2), out_shardings=whole)
        self.generate = Generator(self.config, layout, self.rows)

    def at(self, params, step: int, stream: Stream | None = None) -> "ProbedModel":
        """The model of these parameters, after `step` updates. stream: what its run reads, for probes that ask for it."""
        return ProbedModel(self, params, step, stream)

    def by_token(
        self, function: Callable, contexts: Sequence[np.ndarray], targets: Sequence[np.ndarray]
    ) -> list[np.ndarray]:
        """Of every target [n], what function(batch of rows of one text each) -> [B, L, …] says of its tokens, float32
        [n, …]; NaN for a first token that nothing precedes. The end is read of what does not fit into the context."""
        texts = [
            np.concatenate([np.asarray(context, np.int32), np.asarray(target, np.int32)])[-self.shapes.longest - 1 :]
            for context, target in zip(contexts, targets, strict=True)
        ]
        found: list[np.ndarray] = [np.full(len(target), np.nan, np.float32) for target in targets]
        lengths = np.array([max(len(text) - 1, 0) for text in texts], np.int64)
        for numbers, rows, length in self.shapes.batches(lengths):
            tokens, following = np.zeros((2, len(numbers), length), np.int32)
            for row, number in enumerate(numbers):
                tokens[row, : lengths[number]] = texts[number][:-1]
                following[row, : lengths[number]] = texts[number][1:]
            answers = self.batched(function, rows, _whole_rows(tokens, following))
            for row, number in enumerate(numbers):
                count, end = len(targets[number]), int(lengths[number])
                answer = answers[row, max(end - count, 0) : end].astype(np.float32)
                missing = np.full((count - len(answer), *answer.shape[1:]), np.nan, np.float32)
                found[number] = np.concatenate([missing, answer])
        return found

    def batched(self, function: Callable, rows: int, arrays: dict[str, np.ndarray]) -> np.ndarray:
        """function(batch) for each `rows` rows of the arrays [N, …], the last filled up with zeros; its answers [N, …]."""
        (total,) = {len(array) for array in arrays.values()}
        mine, answers = host_rows(self.mesh, rows), []
        for first in range(0, total, rows):
            count = min(rows, total - first)
            local = {
                name: np.pad(a[first : first + count], ((0, rows - count), *((0, 0),) * (a.ndim - 1)))[mine]
                for name, a in arrays.items()
            }
            answers.append(np.asarray(jax.device_get(function(global_batch(self.mesh, local, rows))))[:count])
        return np.concatenate(answers)


class ProbedModel:
    """`inject.probe.Model` of one step. The same question asked again is not computed again, up to REMEMBERED_BYTES of answers:
    a probe's numbers and its details are often of the same answers."""

    def __init__(self, probing: Probing, params, step: int, stream: Stream | None):
        self._on, self._params, self.step, self._stream = probing, params, step, stream
        self.width = probing.config.d_model
        self._answers: dict[str, list[np.ndarray]] = {}
        self._remembered_bytes = 0

    def read(self, step: int) -> np.ndarray:
        """As the protocol has it. ValueError for a model that was made without its stream."""
        if self._stream is None:
            raise ValueError("what the model's run reads is not known here")
        return self._stream[step].tokens

    def log_probabilities(self, contexts: Sequence[np.ndarray], targets: Sequence[np.ndarray]) -> list[np.ndarray]:
        """As the protocol has it. Of a context that does not fit into the model's with its target, the end is read.
        ValueError for a target that is longer than the model's context."""
        longest = self._on.config.context_length
        if any(len(target) > longest for target in targets):
            raise ValueError(f"a target is longer than the model's context of {longest} tokens")
        return self._once(self._log_probabilities, contexts, targets)

    def _log_probabilities(self, contexts, targets) -> list[np.ndarray]:
        on, bos = self._on, np.array([] if self._on.bos_id is None else [self._on.bos_id], np.int32)
        filled = [context if len(context) else bos for context in contexts]
        return [-losses for losses in on.by_token(lambda batch: on.losses(self._params, batch), filled, targets)]

    def totals(self, contexts: Sequence[np.ndarray], targets: Sequence[np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
        """(float64 [N]: log-probability of every target after its context, nats; bool [N]: whether each of its tokens is the
        likeliest). Neither is empty; of what does not fit into the model's context, the end is read.
        ValueError for a target that is empty or longer than the context."""
        longest = self._on.config.context_length
        if any(not 0 < len(target) <= longest for target in targets):
            raise ValueError(f"a target is empty or longer than the model's context of {longest} tokens")
        on = self._on
        found = on.by_token(lambda batch: on.scores(self._params, batch), contexts, targets)
        sums = [scores[:, 0].sum(dtype=np.float64) for scores in found]
        return np.array(sums, np.float64), np.array([scores[:, 1].all() for scores in found], bool)

    def greedy(self, prompts: Sequence[np.ndarray], tokens: int) -> np.ndarray:
        """As the protocol has it; of a prompt that does not fit into the context with the new tokens, the end is read.
        An empty prompt is BOS."""
        return self.sample(prompts, tokens, 0.0, 0)[:, 0]

    def sample(
        self, prompts: Sequence[np.ndarray], tokens: int, temperature: float, seed: int, samples: int = 1
    ) -> np.ndarray:
        """As the protocol has it; at temperature 0 as `greedy`."""
        (texts,) = self._once(self._sample, prompts, tokens, temperature, seed, samples)
        return texts

    def _sample(self, prompts, tokens, temperature, seed, samples) -> list[np.ndarray]:
        bos = [] if self._on.bos_id is None else [self._on.bos_id]
        filled = [np.asarray(prompt if len(prompt) else bos, np.int32) for prompt in prompts]
        return [self._on.generate(self._params, filled, tokens, temperature, seed, samples)]

    def input_gradients(self, rows: np.ndarray) -> np.ndarray:
        """As the protocol has it. [N, L, D] is held in host memory: ask for some rows at a time."""
        (gradients,) = self._once(self._input_gradients, rows)
        return gradients

    def _input_gradients(self, rows) -> list[np.ndarray]:
        tokens = np.asarray(rows, np.int32)
        length = tokens.shape[1]
        batch = _whole_rows(tokens, np.pad(tokens[:, 1:], ((0, 0), (0, 1))))
        batch["loss_weights"][:] = np.where(np.arange(length) < length - 1, 1 / (length - 1), 0)
        return [self._on.batched(lambda batch: self._on.gradients(self._params, batch), self._on.rows, batch)]

    def noise(self, keys: np.ndarray, length: int) -> np.ndarray:
        """uint32 [N, 2] -> float32 [N, length, D]: the noise of these keys before scaling, as training adds it to rows of
        that length."""
        on = self._on
        return on.batched(lambda batch: on.noise(batch["keys"], length, self.width), on.rows, {"keys": keys})

    def _once(self, function: Callable[..., list[np.ndarray]], *question) -> list[np.ndarray]:
        name = hashlib.sha256(function.__name__.encode())
        for part in question:
            for array in map(np.asarray, part if isinstance(part, Sequence) else [part]):
                name.update(f"{array.dtype}{array.shape}".encode() + array.tobytes())
            name.update(b";")
        key = name.hexdigest()
        if key in self._answers:
            return [array.copy() for array in self._answers[key]]
        answer = function(*question)
        self._remembered_bytes += sum(array.nbytes for array in answer)
        if self._remembered_bytes <= REMEMBERED_BYTES:
            self._answers[key] = [array.copy() for array in answer]
        return answer


def _whole_rows(tokens_NxL: np.ndarray, targets_NxL: np.ndarray) -> dict[str, np.ndarray]:
    """A batch of rows that are one document each; causality hides what fills them up."""
    positions = np.broadcast_to(np.arange(tokens_NxL.shape[1], dtype=np.int32), tokens_NxL.shape)
    weights = np.ones(tokens_NxL.shape, np.float32)
    return {"tokens": tokens_NxL, "targets": targets_NxL, "positions": positions, "loss_weights": weights}


def make_scores(config: Config, layout: Layout) -> Callable:
    """(params, {"tokens", "targets", "positions"} int32 [B, L]) -> float32 [B, L, 2]: log p(target), and 1 where it is the likeliest."""
    limit = max(1, LOGITS_BYTES // (4 * config.model.vocab_size))

    def scores(params, batch):
        model = layout.model(params)
        tokens_BxL, targets_BxL = batch["tokens"], batch["targets"]
        hidden_TxD = model(tokens_BxL, None, batch["positions"]).reshape(-1, config.model.d_model)

        def one(inputs):
            hidden_D, target = inputs
            logits_V = model.logits(hidden_D)
            chosen = jax.nn.log_softmax(logits_V)[target]
            return jnp.stack([chosen, (logits_V.argmax() == target).astype(chosen.dtype)])

        found_Tx2 = jax.lax.map(one, (hidden_TxD, targets_BxL.reshape(-1)), batch_size=limit)
        return found_Tx2.reshape(*tokens_BxL.shape, 2)

    return scores
