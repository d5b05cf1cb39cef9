"""Makes a token store of files of documents, or of the default corpus.

python tools/prepare_corpus.py --input='DIR/*.jsonl.gz' --tokenizer=bpe:8192 --output=STORE
python tools/prepare_corpus.py --embedded --tokenizer=bpe:4096 --output=STORE
python tools/prepare_corpus.py --embedded --freeze=FILE.jsonl.gz

After an interruption the same command goes on. The store is the same for any number of workers.
"""

import sys

from mixlab import errors
from mixlab.corpus import embedded
from mixlab.corpus.cache import is_url
from mixlab.corpus.prepare import describe_skips, prepare
from mixlab.corpus.records import Settings, metadata_fields
from mixlab.corpus.store import TokenStore
from mixlab.errors import UserError


def main(arguments: list[str]) -> None:
    from mixlab.cli import Parser  # not at the top: worker processes load this file, and have no use for it

    parser = Parser(__doc__.splitlines()[0], with_config=False)
    add = parser.add_argument
    add(
        "--input",
        action="append",
        metavar="GLOB",
        help="files or folders of documents; may be given repeatedly",
    )
    add(
        "--embedded",
        action="store_true",
        help="the corpus that this Python installation ships, instead of --input",
    )
    add(
        "--tokenizer",
        metavar="NAME_OR_JSON",
        help="bytes, bpe:SIZE (trained on this input), or a tokenizer.json",
    )
    for role in ("bos", "eos", "pad"):
        add(
            f"--{role}",
            metavar="TOKEN",
            help=f"the {role.upper()} token of a tokenizer.json with an unusual one",
        )
    add("--output", metavar="DIR", help="the store; gs://… and s3://… too, where it is copied when it is made")
    add(
        "--freeze",
        metavar="FILE.jsonl.gz",
        help="with --embedded: write the documents, to carry to another machine",
    )
    add("--text-field", default="text", help="dotted path of the text in a record (text)")
    add("--id-field", default="id", help="dotted path of the id (id); a document without one gets FILE:LINE")
    add(
        "--metadata-fields",
        default="",
        help="FIELD or COLUMN=FIELD, separated by commas, as in url,site=meta.host",
    )
    add("--split-field", help="field that says train or validation; without it the id's hash decides")
    add(
        "--validation-per-mille",
        type=int,
        default=20,
        help="validation share when the hash decides (20 of 1000)",
    )
    add(
        "--shard-megabytes",
        type=float,
        default=64,
        help="raw text of a shard, at most (64); bounds the memory",
    )
    add(
        "--drop-repetitions",
        action="store_true",
        help="leave out documents in which 1 to 13 tokens come 32 times or more in a row",
    )
    add("--workers", type=int, help="processes (one a CPU), or shards at a time on the cluster")
    add("--engine", choices=("local", "ray"), default="local", help="ray: on a running Ray cluster (extra ray)")
    flags, overrides = parser.parse(arguments)
    _check(flags, overrides)
    specials = {role: getattr(flags, role) for role in ("bos", "eos", "pad")}
    if flags.freeze:
        print(f"{flags.freeze}: {embedded.freeze(flags.freeze):,} documents")
        return
    if flags.embedded:
        store, was_there = embedded.write_store(flags.tokenizer, flags.output, **specials)
    else:
        settings = Settings(
            flags.text_field,
            flags.id_field,
            metadata_fields(flags.metadata_fields),
            flags.split_field,
            flags.validation_per_mille,
            flags.shard_megabytes,
            flags.drop_repetitions,
        )
        store, was_there = prepare(
            flags.input, flags.tokenizer, flags.output, settings, flags.workers, engine=flags.engine, **specials
        )
    if was_there:
        print(f"{flags.output}: finished already, from the same input and with the same settings; nothing to do")
    print(describe(store))


def _check(flags, overrides: list[str]) -> None:
    if overrides:
        raise UserError(f"stray argument {overrides[0]!r}: this command has no --config")
    if bool(flags.input) == flags.embedded:
        raise UserError("give either --input='GLOB' or --embedded")
    if flags.embedded and flags.engine != "local":
        raise UserError(f"--engine={flags.engine} goes with --input; the default corpus is made here")
    if flags.embedded and flags.drop_repetitions:
        raise UserError("--drop-repetitions goes with --input; the default corpus is taken as it is")
    if flags.freeze:
        if not flags.embedded or flags.output or flags.tokenizer:
            raise UserError("--freeze goes with --embedded alone, without --tokenizer and --output")
        return
    if flags.embedded and is_url(flags.output or ""):
        raise UserError(f"--output={flags.output}: the default corpus is written to a folder; copy it there afterwards")
    for name in ("tokenizer", "output"):
        if not getattr(flags, name):
            raise UserError(f"--{name} is missing; --help lists the flags")
    if flags.workers is not None and flags.workers < 1:
        raise UserError(f"--workers={flags.workers}: give 1 or more")
    if not 0 <= flags.validation_per_mille <= 1000:
        raise UserError(f"--validation-per-mille={flags.validation_per_mille}: give 0 to 1000")
    if not flags.shard_megabytes > 0:
        raise UserError(f"--shard-megabytes={flags.shard_megabytes}: give more than 0")


def describe(store: TokenStore) -> str:
    manifest, preparation = store.manifest, store.manifest["preparation"]
    lines = [
        f"{store.path}: {store.n_documents:,} documents, {manifest['bytes'] / 1e6:,.2f} MB of text, "
        f"{store.n_tokens:,} tokens, {manifest['bytes'] / store.n_tokens:.2f} bytes a token, "
        f"vocabulary {store.vocab_size:,}"
    ]
    for split, counts in manifest["splits"].items():
        lines.append(f"  {split}: {counts['documents']:,} documents, {counts['tokens']:,} tokens")
    if preparation.get("skipped"):
        lines.append(f"  skipped: {describe_skips(preparation['skipped'])}")
    if preparation.get("ids_made"):
        lines.append(f"  without an id, named FILE:LINE: {preparation['ids_made']:,} documents")
    if preparation.get("duplicate_ids"):
        lines.append(f"  with the id of an earlier document: {preparation['duplicate_ids']:,} documents")
    for column, count in preparation.get("without_value", {}).items():
        some = count < store.n_documents
        told = f"{count:,} documents" if some else "no document has one; is --metadata-fields right?"
        lines.append(f"  without a value of {column!r}: {told}")
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(errors.run(main))
