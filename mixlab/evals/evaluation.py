"""The evaluation that belongs to a run: its held-out sets and the one compiled function that scores them."""

from collections.abc import Collection

import numpy as np

from mixlab.config import Config
from mixlab.data import Data
from mixlab.errors import UserError
from mixlab.evals.baselines import baselines
from mixlab.evals.benchmarks import Benchmarks, Scored
from mixlab.evals.breakdown import breakdown
from mixlab.evals.conditional import ConditionalSets, metrics_of
from mixlab.evals.generate import Generator, until
from mixlab.evals.held_out import EvaluationSet, make_set
from mixlab.evals.language_model import document_sums, score, summarise
from mixlab.evals.probing import Probing
from mixlab.parallel.lengths import least_length, resolved
from mixlab.parallel.mesh import whole_rows
from mixlab.training.state import Layout
from mixlab.training.step import compile_token_losses, make_token_losses

PROMPT_TOKENS = 32  # of a held-out document, where the config names no prompts
PROMPTS = 6


class Evaluation:
    """Held-out loss, benchmarks, baselines and samples of one run. Everything is built once; held-out text has one shape of
    batch, benchmarks have a few."""

    def __init__(self, config: Config, data: Data, layout: Layout, benchmarks: Benchmarks):
        self.config, self.data, self.layout = config, data, layout
        stage = data.stream.stages[-1]
        length = config.evaluation.sequence_length or stage.sequence_length
        least = least_length(resolved(config.mesh, layout.mesh))
        if length % least:
            raise UserError(
                f"evaluation: rows of {length} held-out tokens cannot be cut over mesh.sequence = {least // 2} devices, two "
                f"pieces each; set evaluation.sequence_length to a multiple of {least}"
            )
        self.sets = [
            found
            for name, (store, ids) in data.held_out.items()
            if (found := self._set(name, store, ids, stage.format.bos, length))
        ]
        if not self.sets:
            raise UserError(
                "evaluation: no source has a validation document with anything to score; prepare the corpus with a "
                "larger --validation-per-mille"
            )
        self._conditional = self._with_metadata(stage.format.bos, length)
        self._rows = whole_rows(layout.mesh, config.evaluation.rows)
        self._token_losses = compile_token_losses(make_token_losses(config, layout), layout, self._rows, length)
        self._probing = Probing(config, layout, None)
        self._benchmarks = benchmarks

    def _set(self, name, store, ids, bos, length) -> EvaluationSet | None:
        return make_set(name, store, ids, self.data.tokenizer, bos, length, self.config.evaluation.tokens_per_domain)

    def _with_metadata(self, bos: bool, length: int) -> ConditionalSets | None:
        settings, template, data = self.config.evaluation, self.config.metadata_template, self.data
        if not settings.metadata.variants or template is None:
            return None
        return ConditionalSets(
            settings.metadata,
            template,
            self.sets,
            data.held_out,
            data.tokenizer,
            bos,
            length,
            settings.tokens_per_domain,
        )

    def due(self, step: int, starting: bool = False) -> tuple[bool, list[str]]:
        """Whether held-out text is scored when `step` updates are done, and which tasks are."""

        def due(every: int | None) -> bool:
            return self.config.evaluation.due(step, self.config.total_steps, every, starting)

        return due(None), [name for name, task in self._benchmarks.tasks.items() if due(task.config.every_steps)]

    def scores(self, params, step: int, held_out: bool = True, tasks: Collection[str] | None = None) -> Scored:
        """Of the model after `step` updates: eval/<set>/* of held-out text (eval/by_length/* and eval/by_position/*, and
        eval_metadata/*, where the config asks for them), and eval/<task>/* of these tasks, by default of all."""
        names = list(self._benchmarks.tasks) if tasks is None else tasks
        found = self._benchmarks.scores(self._probing.at(params, step), names)
        if not held_out:
            return found
        nll = self._score(self.sets, params)
        metrics = summarise(self.sets, nll) | (breakdown(self.sets, nll) if self.config.evaluation.breakdown else {})
        if self._conditional is not None:
            variants = {variant: self._score(sets, params) for variant, sets in self._conditional.sets.items() if sets}
            metrics |= metrics_of(self._conditional, variants)
        return Scored(metrics | found.metrics, self._by_document(nll) | found.items)

    def _by_document(self, nll: np.ndarray) -> dict[str, np.ndarray]:
        """ "<set>/id", "<set>/nats", "<set>/tokens" and "<set>/bytes", [documents] each.   nll: of all sets."""
        found, at = {}, 0
        for s in self.sets:
            scored = s.rows.loss_weights > 0
            sums = document_sums(s.documents[scored], nll[at : at + len(scored)][scored], s.bytes[scored])
            at += len(scored)
            ids = self.data.held_out[s.name][0].column("id").take(s.document_ids[np.unique(s.documents[scored])])
            found |= {f"{s.name}/{key}": values for key, values in zip(("nats", "tokens", "bytes"), sums, strict=True)}
            found[f"{s.name}/id"] = np.array(ids.to_pylist(), dtype=str)
        return found

    def _score(self, sets: list[EvaluationSet], params) -> np.ndarray:
        return score(sets, self._token_losses, params, self.layout, self._rows)

    def baselines(self) -> dict[str, dict[str, float]]:
        """Bits per byte of counting alone, on the same tokens."""
        return baselines(list(self.data.stores.values()), self.sets, self.data.tokenizer.vocab_size)

    def samples(self, params) -> list[dict[str, str]]:
        """Continuations of the configured prompts, or of the beginnings of held-out documents of each domain in turn."""
        settings, tokenizer = self.config.evaluation, self.data.tokenizer
        room = self.config.model.context_length - 1
        prompts = [tokenizer.encode(text) for text in settings.sample_prompts] or self._beginnings()
        if settings.sample_metadata is not None and self.config.metadata_template is not None:
            written = tokenizer.encode(self.config.metadata_template.text(settings.sample_metadata))
            prompts = [np.concatenate([written, prompt]) for prompt in prompts]
        prompts = [prompt[:room] for prompt in prompts]
        if not settings.sample_tokens or not prompts:
            return []
        if self.data.stream.stages[-1].format.bos:
            prompts = [np.concatenate([[tokenizer.bos_id], prompt])[:room] for prompt in prompts]
        longest = max(len(prompt) for prompt in prompts)
        count = min(settings.sample_tokens, self.config.model.context_length - longest)
        generate = Generator(self.config.model, self.layout, settings.rows)
        texts = generate(params, prompts, count, settings.sample_temperature, self.config.seed)[:, 0]
        return [
            {"prompt": tokenizer.decode(prompt), "text": tokenizer.decode(until(text, tokenizer.eos_id))}
            for prompt, text in zip(prompts, texts, strict=True)
        ]

    def _beginnings(self) -> list[np.ndarray]:
        prompts = []
        for turn in range(PROMPTS):
            s = self.sets[turn % len(self.sets)]
            document = turn // len(self.sets)
            if document < len(s.document_ids):
                store = self.data.held_out[s.name][0]
                prompts.append(store[int(s.document_ids[document])][:PROMPT_TOKENS])
        return prompts
