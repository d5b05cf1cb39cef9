"""Writes a checkpoint as a folder that Hugging Face's transformers loads, or makes a checkpoint from such a folder.

python tools/export_hf.py --workdir=RUN_DIR [--step=N] --output=DIR
python tools/export_hf.py --import=DIR --output=RUN_DIR

Llama, OLMo 2 and GPT-2. What is imported is a folder to start from (--config.start.init_from=RUN_DIR), to score
(python -m mixlab.evaluate --workdir=RUN_DIR) and to export again.
"""

import sys
from pathlib import Path

from mixlab import errors
from mixlab.cli import Parser
from mixlab.errors import UserError


def main(arguments: list[str]) -> None:
    parser = Parser(__doc__.splitlines()[0], with_config=False)
    parser.add_argument(
        "--workdir", type=Path, metavar="RUN_DIR", help="export: the folder of a run, a soup or an import"
    )
    parser.add_argument("--step", type=int, metavar="N", help="export: the checkpoint; the newest when left out")
    parser.add_argument("--import", dest="folder", type=Path, metavar="DIR", help="import: the folder of transformers")
    parser.add_argument("--output", type=Path, required=True, metavar="DIR", help="the folder to write")
    flags, strays = parser.parse(arguments)
    if strays:
        raise UserError(f"{strays[0]}: a checkpoint has its own configuration; leave this out")
    if (flags.workdir is None) == (flags.folder is None):
        raise UserError("give either --workdir=RUN_DIR, to export, or --import=DIR, to import")
    if flags.folder is not None:
        if flags.step is not None:
            raise UserError("--step: belongs to --workdir; leave it out")
        from mixlab.interop.importing import import_folder

        config = import_folder(flags.folder, flags.output)
        print(
            f"imported {flags.folder} as {flags.output}; its model, for a run that starts from it:\n{as_code(config.model)}"
        )
        return
    from mixlab.interop.export import export
    from mixlab.trained import open_trained

    with open_trained(flags.workdir, flags.step) as trained:
        record = export(trained, flags.output)
    print(f"exported step {record['step']:,} of {flags.workdir} as {flags.output} ({record['architecture']})")


def as_code(model) -> str:
    """The preset with the settings that make this model, as a configuration has it."""
    from mixlab.interop.hf import architecture_of

    preset = architecture_of(model).preset
    shape = {name: getattr(model, name) for name in ("layers", "d_model", "heads")}
    usual = preset(**shape)
    other = {name: value for name, value in vars(model).items() if getattr(usual, name) != value}
    return f"    {preset.__name__}({', '.join(f'{name}={value!r}' for name, value in (shape | other).items())})"


if __name__ == "__main__":
    sys.exit(errors.run(main))
