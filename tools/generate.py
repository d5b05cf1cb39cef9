"""Continues prompts with a checkpoint of a run, a soup or an import.

python tools/generate.py --workdir=RUN_DIR [--step=N] ["A prompt" ...] [--prompts=FILE] [--tokens=64] [--temperature=0.7]

Prompts are arguments, or the lines of a file of {"prompt": …} objects (.jsonl), or one whole text (any other file, or standard
input as --prompts=-); all are continued together. Text goes to standard output, prompt and continuation; with --json an object
a continuation. --metadata=VALUE writes a line such as "URL: VALUE" in front, as the run's own metadata are written.
"""

import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # runs from a checkout, installed or not

from mixlab import errors
from mixlab.cli import Parser
from mixlab.errors import UserError


def main(arguments: list[str]) -> None:
    parser = Parser(__doc__.splitlines()[0], with_config=False)
    parser.add_argument("texts", nargs="*", metavar="PROMPT", help="a text to continue")
    parser.add_argument("--prompts", metavar="FILE", help="prompts of a .jsonl, or one text; - for standard input")
    parser.add_argument("--workdir", type=Path, required=True, metavar="RUN_DIR", help="a run, a soup or an import")
    parser.add_argument("--step", type=int, metavar="N", help="the checkpoint; the newest good one when left out")
    parser.add_argument("--tokens", type=int, default=64, metavar="N", help="new tokens at most; 64")
    parser.add_argument("--temperature", type=float, default=0.0, help="0, the default, takes the likeliest token")
    parser.add_argument("--top-k", type=int, default=0, metavar="K", help="draw among the K likeliest tokens alone")
    parser.add_argument("--top-p", type=float, default=1.0, metavar="P", help="and among the fewest that hold P")
    parser.add_argument("--samples", type=int, default=1, metavar="N", help="continuations of each prompt")
    parser.add_argument("--seed", type=int, default=0, help="of what is drawn")
    parser.add_argument(
        "--metadata", metavar="VALUE", help="written in front of every prompt, such as en.wikipedia.org"
    )
    parser.add_argument("--json", action="store_true", help='one object {"prompt", "text"} a continuation')
    flags, strays = parser.parse(arguments)
    if strays:
        raise UserError(f"{strays[0]}: a checkpoint has its own configuration; leave this out")
    _check(flags)
    prompts = [*flags.texts, *(_read(flags.prompts) if flags.prompts else [])]
    if not prompts:
        raise UserError("give a prompt as an argument, --prompts=FILE, or --prompts=- to read one from standard input")
    for number, (prompt, text) in enumerate(_continued(flags, prompts)):
        if flags.json:
            print(json.dumps({"prompt": prompt, "text": text}, ensure_ascii=False), flush=True)
        else:
            print("\n" * (number > 0) + prompt + text, flush=True)


def _check(flags) -> None:
    problems = [
        f"--{name}={value}: must be at least 1"
        for name, value in (("tokens", flags.tokens), ("samples", flags.samples))
        if value < 1
    ]
    if flags.temperature < 0:
        problems.append(f"--temperature={flags.temperature}: must be at least 0")
    if flags.top_k < 0:
        problems.append(f"--top-k={flags.top_k}: must be at least 1, or left out")
    if not 0 < flags.top_p <= 1:
        problems.append(f"--top-p={flags.top_p}: must be above 0 and at most 1")
    drawn = [
        f"--{name}"
        for name, asked in (("top-k", flags.top_k), ("top-p", flags.top_p < 1), ("samples", flags.samples > 1))
        if asked
    ]
    if drawn and flags.temperature == 0:
        problems.append(
            f"{', '.join(drawn)}: nothing is drawn at temperature 0; add --temperature=0.7, say, or leave out"
        )
    if problems:
        raise UserError("\n".join(problems))


def _read(name: str) -> list[str]:
    """The prompts of a file, or standard input as one; without the line break at its end."""
    try:
        text = sys.stdin.read() if name == "-" else Path(name).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"--prompts={name}: cannot be read as text ({error})") from None
    if not name.endswith(".jsonl"):
        return [text.removesuffix("\n")] if text.strip() else []
    prompts = []
    for number, line in enumerate(text.splitlines(), 1):
        try:
            prompts.append(json.loads(line)["prompt"])
        except (ValueError, TypeError, KeyError):
            prompts.append(None)
        if not isinstance(prompts[-1], str):
            raise UserError(
                f'--prompts={name}: line {number} must be an object such as {{"prompt": "Once upon a time"}}'
            )
    return prompts


def _continued(flags, prompts: list[str]):
    """(prompt, continuation) of every prompt and sample, in order."""
    import jax
    import numpy as np

    from mixlab.evals.generate import Generator, until
    from mixlab.parallel.mesh import make_mesh
    from mixlab.trained import open_trained
    from mixlab.training.optimizer import make_optimizer
    from mixlab.training.state import plan_state

    with open_trained(flags.workdir, flags.step) as trained:
        config, texts = trained.config, trained.tokenizer
        before = np.array([texts.bos_id] if trained.begins_with_bos else [], np.int32)
        if flags.metadata is not None:
            template = config.metadata_template
            if template is None:
                raise UserError(
                    f"--metadata: no stage of {flags.workdir} has metadata, so the model knows none; leave it out"
                )
            before = np.concatenate([before, texts.encode(template.text(flags.metadata))])
        encoded = [np.concatenate([before, texts.encode(prompt)]).astype(np.int32) for prompt in prompts]
        encoded = [tokens if len(tokens) else np.array([texts.eos_id], np.int32) for tokens in encoded]
        room = config.model.context_length - flags.tokens
        longest = max(map(len, encoded))
        if longest > room:
            raise UserError(
                f"--tokens={flags.tokens}: with the longest prompt of {longest} tokens they are more than the model's context "
                f"of {config.model.context_length}; "
                + (
                    f"use --tokens={config.model.context_length - longest}"
                    if longest < config.model.context_length
                    else "shorten the prompt"
                )
            )
        layout = plan_state(config.model, make_optimizer(config.optimizer), make_mesh(config.mesh))
        with jax.set_mesh(layout.mesh):
            params, _ = trained.checkpoints.restore_params(layout.abstract["params"], flags.step)
            generate = Generator(config.model, layout, config.evaluation.rows)
            made = generate(
                params, encoded, flags.tokens, flags.temperature, flags.seed, flags.samples, flags.top_k, flags.top_p
            )
    for prompt, samples in zip(prompts, made, strict=True):
        for tokens in samples:
            yield prompt, texts.decode(until(tokens, texts.eos_id))


if __name__ == "__main__":
    sys.exit(errors.run(main))
