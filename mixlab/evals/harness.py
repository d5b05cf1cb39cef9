"""A run's checkpoint as a model of the Language Model Evaluation Harness (lm-eval), beside its own backends.

python -m mixlab.evals.harness --model_args workdir=RUN_DIR[,step=N] --tasks=NAME,NAME [lm-eval's other flags]

is `lm_eval --model mixlab`, which by itself does not know this model. Within Python, importing this module is enough for
lm_eval.simple_evaluate(model="mixlab", model_args={"workdir": ...}).

Texts become tokens as in training: after BOS where documents began with one, and text that spells a special token stays text.
Rows are padded to a few lengths, powers of two. Answers are those of the harness's Hugging Face backend on an exported
checkpoint, up to rounding.
"""

import dataclasses
import sys
from collections.abc import Sequence
from pathlib import Path

import jax
import numpy as np

from mixlab import errors
from mixlab.errors import UserError
from mixlab.evals.generate import until
from mixlab.evals.probing import Probing
from mixlab.parallel.mesh import make_mesh, row_shards
from mixlab.trained import open_trained
from mixlab.training.optimizer import make_optimizer
from mixlab.training.state import plan_state

try:
    from lm_eval import utils
    from lm_eval.api.model import TemplateLM
    from lm_eval.api.registry import register_model
    from lm_eval.models.utils import handle_stop_sequences, normalize_gen_kwargs, postprocess_generated_text
except ImportError as error:
    if __name__ != "__main__":
        raise
    print(f"error: lm-eval cannot be imported ({error}); pip install -e '.[interop]'", file=sys.stderr)
    sys.exit(errors.EXIT_USER_ERROR)

GENERATION = {"do_sample", "temperature", "until", "max_gen_toks"}  # what of a task's generation_kwargs is understood
Tokens = Sequence[int]


@register_model("mixlab")
class MixlabLM(TemplateLM):
    """workdir: folder of a run, a soup or an import.   step: of which checkpoint; None: the newest that is sound.
    batch_size: rows of the longest texts at a time, as many tokens in more rows of shorter ones; "auto": as in the run's
    own evaluation."""

    def __init__(self, workdir: str, step: int | None = None, batch_size: int | str = 1, seed: int = 0, **_unused):
        super().__init__()
        with open_trained(Path(workdir), step) as trained:
            config = trained.config
            self._mesh = make_mesh(config.mesh)
            layout = plan_state(config.model, make_optimizer(config.optimizer), self._mesh)
            with jax.set_mesh(self._mesh):
                self._params, meta = trained.checkpoints.restore_params(layout.abstract["params"], step)
            self._texts, self._bos, self._seed = trained.tokenizer, trained.begins_with_bos, seed
        self.step = meta["step"]
        rows = config.evaluation.rows
        if not str(batch_size).startswith("auto"):
            rows = int(batch_size) * row_shards(self._mesh.shape)
        config = dataclasses.replace(config, evaluation=dataclasses.replace(config.evaluation, rows=rows))
        self._probing = Probing(config, layout, None)
        self.max_length = config.model.context_length

    # --- tokens ---

    @property
    def eot_token_id(self) -> int:
        return self._texts.eos_id

    @property
    def prefix_token_id(self) -> int:
        """What a text without context is scored after."""
        return self.eot_token_id if self._texts.bos_id is None else self._texts.bos_id

    @property
    def tokenizer_name(self) -> str:
        return f"{self._texts.name}-{self._texts.hash[:12]}"

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **_unused) -> list[int]:
        bos = [self._texts.bos_id] if self._bos and add_special_tokens is not False else []
        return bos + self._texts.encode(string).tolist()

    # --- answers ---

    def _loglikelihood_tokens(self, requests, disable_tqdm: bool = False, **_unused) -> list[tuple[float, bool]]:
        found = self.score([context for _, context, _ in requests], [target for _, _, target in requests])
        for (texts, _, _), answer in zip(requests, found, strict=True):
            if texts is not None:
                self.cache_hook.add_partial("loglikelihood", texts, answer)
        return found

    def loglikelihood_rolling(self, requests, disable_tqdm: bool = False) -> list[float]:
        windows, owner = [], []
        for number, request in enumerate(requests):
            parts = utils.get_rolling_token_windows(
                token_list=self.tok_encode(request.args[0]),
                prefix_token=self.prefix_token_id,
                max_seq_len=self.max_length,
                context_len=1,
            )
            windows += [utils.make_disjoint_window(part) for part in parts]
            owner += [number] * (len(windows) - len(owner))
        scores = self.score([context for context, _ in windows], [target for _, target in windows])
        totals = np.bincount(owner, [total for total, _ in scores], len(requests)).tolist()
        for request, total in zip(requests, totals, strict=True):
            self.cache_hook.add_partial("loglikelihood_rolling", request.args, total)
        return totals

    def generate_until(self, requests, disable_tqdm: bool = False) -> list[str]:
        eos = self._texts.decode([self.eot_token_id])
        groups: dict[str, list[int]] = {}
        for number, request in enumerate(requests):
            groups.setdefault(repr(request.args[1]), []).append(number)
        texts = [""] * len(requests)
        for numbers in groups.values():
            asked = requests[numbers[0]].args[1]
            settings = normalize_gen_kwargs(asked)
            if unknown := set(settings) - GENERATION:
                raise UserError(
                    f"generation_kwargs: {', '.join(sorted(unknown))} cannot be taken into account; leave out"
                )
            tokens = settings["max_gen_toks"]
            if tokens >= self.max_length:
                raise UserError(
                    f"max_gen_toks = {tokens} must be less than the model's context of {self.max_length} tokens; lower it, "
                    "for example with --gen_kwargs max_gen_toks=64"
                )
            prompts = [np.array(self.tok_encode(requests[n].args[0]) or [self.prefix_token_id]) for n in numbers]
            temperature = settings.get("temperature", 0.0) if settings.get("do_sample") else 0.0
            with jax.set_mesh(self._mesh):
                made = self._probing.generate(self._params, prompts, tokens, temperature, self._seed)[:, 0]
            for number, new in zip(numbers, made, strict=True):
                stop = handle_stop_sequences(list(settings.get("until") or []), eos=eos)
                texts[number] = postprocess_generated_text(self._decode(until(new, self.eot_token_id)), stop, None)
                self.cache_hook.add_partial("generate_until", requests[number].args, texts[number])
        return texts

    def _decode(self, tokens: np.ndarray) -> str:
        specials = [i for i in (self._texts.bos_id, self._texts.eos_id, self._texts.pad_id) if i is not None]
        return self._texts.decode(tokens[~np.isin(tokens, specials)])

    def score(self, contexts: Sequence[Tokens], targets: Sequence[Tokens]) -> list[tuple[float, bool]]:
        """Log-probability (nats) of every target after its context, neither empty, and whether each of its tokens is the
        likeliest. Of a context that does not fit with its target, the end is read."""
        with jax.set_mesh(self._mesh):
            sums, likeliest = self._probing.at(self._params, self.step).totals(contexts, targets)
        return list(zip(sums.tolist(), likeliest.tolist(), strict=True))


def main(arguments: list[str]) -> None:
    from lm_eval.__main__ import cli_evaluate

    flags = [argument.split("=")[0] for argument in arguments]
    if not {"--model", "-M", "--help", "-h", "ls", "validate"} & set(flags):
        arguments = [*arguments, "--model", "mixlab"]
    sys.argv = ["lm_eval", *arguments]
    cli_evaluate()


if __name__ == "__main__":
    sys.exit(errors.run(main))
