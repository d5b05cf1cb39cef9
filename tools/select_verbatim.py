"""Finds texts that a run has memorised: beginnings of documents it has read whose prefix it greedily completes.

python tools/select_verbatim.py --workdir=RUN_DIR --output=FILE [--step=N] [--count=1000] [--prefix-tokens=25] [--target-tokens=25]

The file is what the experiment `verbatim` takes as its strings. Documents are those that the run had read by the checkpoint,
batch after batch in an order of the run's seed; the run's folder is not touched.
"""

import sys
from pathlib import Path

import numpy as np

from mixlab import config as configs
from mixlab import errors
from mixlab.cli import Parser
from mixlab.errors import UserError
from mixlab.inject.experiments.verbatim import memorised, write_strings
from mixlab.schedule.shuffle import permute
from mixlab.seeds import seed_of


def main(arguments: list[str]) -> None:
    parser = Parser(__doc__.splitlines()[0], with_config=False)
    parser.add_argument("--workdir", type=Path, required=True, metavar="RUN_DIR", help="the run's folder")
    parser.add_argument("--output", type=Path, required=True, metavar="FILE", help="the file to write")
    parser.add_argument("--step", type=int, metavar="N", help="the checkpoint; the newest good one when left out")
    parser.add_argument("--count", type=int, default=1000, metavar="N", help="texts wanted")
    parser.add_argument("--prefix-tokens", type=int, default=25, metavar="N", help="tokens given")
    parser.add_argument("--target-tokens", type=int, default=25, metavar="N", help="tokens to be completed")
    flags, overrides = parser.parse(arguments)
    for name in ("count", "prefix_tokens", "target_tokens"):
        if getattr(flags, name) < 1:
            raise UserError(f"--{name.replace('_', '-')}={getattr(flags, name)}: must be at least 1")
    if flags.output.exists():
        raise UserError(f"--output={flags.output}: is there already; name another file or delete it")
    path = flags.workdir / "config.json"
    if not path.is_file():
        raise UserError(f"--workdir={flags.workdir}: has no config.json; name the folder of a run")
    step, strings, tokenizer = find(configs.load_json(path, overrides), flags)
    if not len(strings):
        raise UserError(f"{flags.workdir}: no text that the run had read by step {step} is completed; train longer")
    write_strings(flags.output, strings, flags.prefix_tokens, tokenizer.hash)
    print(f"{len(strings)} of {flags.count} texts, completed by step {step}, in {flags.output}. The first:")
    for string in strings[:3]:
        parts = string[: flags.prefix_tokens], string[flags.prefix_tokens :]
        print("  " + " | ".join(repr(tokenizer.decode(part)) for part in parts))


def find(config: configs.Config, flags):
    """(step of the checkpoint, int32 [K, prefix + target], tokenizer)."""
    import jax

    from mixlab.data import open_data
    from mixlab.evals.probing import Probing
    from mixlab.parallel.mesh import make_mesh
    from mixlab.training.checkpoint import Checkpoints
    from mixlab.training.optimizer import make_optimizer
    from mixlab.training.places import checkpoints_of
    from mixlab.training.state import plan_state

    data = open_data(config)
    mesh = make_mesh(config.mesh)
    layout = plan_state(config.model, make_optimizer(config.optimizer), mesh)
    with jax.set_mesh(mesh), Checkpoints(checkpoints_of(flags.workdir), read_only=True) as checkpoints:
        restored = checkpoints.restore_params(layout.abstract["params"], flags.step)
        if restored is None:
            raise UserError(f"{flags.workdir}: has no checkpoint yet; train first")
        params, meta = restored
        step = meta["step"]
        order = permute(np.arange(step), step, seed_of(config.seed, "verbatim")) if step else []
        model = Probing(config, layout, None).at(params, step)
        batches = (data.stream[int(one)] for one in order)
        return step, memorised(model, batches, flags.count, flags.prefix_tokens, flags.target_tokens), data.tokenizer


if __name__ == "__main__":
    sys.exit(errors.run(main))
