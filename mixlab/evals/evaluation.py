"""The evaluation that belongs to a run: its held-out sets and the one compiled function that scores them."""

import numpy as np

from mixlab.config import Config
from mixlab.data import Data
from mixlab.errors import UserError
from mixlab.evals.baselines import baselines
from mixlab.evals.breakdown import breakdown
from mixlab.evals.conditional import ConditionalSets, metrics_of
from mixlab.evals.generate import Generator, until
from mixlab.evals.held_out import EvaluationSet, make_set
from mixlab.evals.language_model import score, summarise
from mixlab.training.state import Layout
from mixlab.training.step import compile_token_losses, make_token_losses

PROMPT_TOKENS = 32  # of a held-out document, where the config names no prompts
PROMPTS = 6


class Evaluation:
    """Held-out loss, baselines and samples of one run. Everything is built once; scoring has one shape of batch."""

    def __init__(self, config: Config, data: Data, layout: Layout):
        self.config, self.data, self.layout = config, data, layout
        stage = data.stream.stages[-1]
        self.sets = [
            found
            for name, (store, ids) in data.held_out.items()
            if (found := self._set(name, store, ids, stage.format.bos, stage.sequence_length))
        ]
        if not self.sets:
            raise UserError(
                "evaluation: no source has a validation document with anything to score; prepare the corpus with a "
                "larger --validation-per-mille"
            )
        self._conditional = self._with_metadata(stage.format.bos, stage.sequence_length)
        self._token_losses = compile_token_losses(
            make_token_losses(config, layout), layout, config.evaluation.rows, stage.sequence_length
        )

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

    def scores(self, params) -> dict[str, float]:
        """eval/<set>/* of these parameters; eval/by_length/* and eval/by_position/*, and eval_metadata/*, where the config asks
        for them."""
        settings = self.config.evaluation
        nll = self._score(self.sets, params)
        scores = summarise(self.sets, nll) | (breakdown(self.sets, nll) if settings.breakdown else {})
        if self._conditional is None:
            return scores
        variants = {variant: self._score(sets, params) for variant, sets in self._conditional.sets.items() if sets}
        return scores | metrics_of(self._conditional, variants)

    def _score(self, sets: list[EvaluationSet], params) -> np.ndarray:
        return score(sets, self._token_losses, params, self.layout, self.config.evaluation.rows)

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
