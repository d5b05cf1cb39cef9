"""From a configuration to what is read: stores, tokenizer, the stream, and the documents held out from it."""

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np

from mixlab.config import Config, SourceConfig
from mixlab.corpus import embedded
from mixlab.corpus.cache import cache_folder, is_url
from mixlab.corpus.filters import in_part, matches
from mixlab.corpus.store import TokenStore
from mixlab.corpus.tokenizer import Tokenizer, load
from mixlab.errors import UserError
from mixlab.inject.control_log import ControlLog
from mixlab.schedule.fixed import FixedCut
from mixlab.schedule.stages import BucketTokens, Stage, StageConfig, place_stages
from mixlab.seeds import seed_of
from mixlab.sequences.documents import Documents
from mixlab.sequences.format import FormatConfig
from mixlab.sequences.metadata import Metadata, MetadataConfig, make_metadata
from mixlab.stream import Stream
from mixlab.treatment import Experiments, follow, open_experiments, treat

VERIFIED_BYTES = 2**30  # of tokens: about a second's reading

Chosen = dict[str, dict[str, np.ndarray]]  # source -> split -> ids of the documents to read


@dataclass(frozen=True)
class Data:
    """What a run reads. `held_out`: evaluation set -> (store, its validation documents, int64 ascending).
    `experiments`: all that are configured, by name; the stream has the insertions of those that are enabled."""

    stores: dict[str, TokenStore]
    tokenizer: Tokenizer
    stream: Stream
    held_out: dict[str, tuple[TokenStore, np.ndarray]]
    experiments: Experiments = field(default_factory=dict)


@dataclass(frozen=True)
class Sizes:
    """What a run can be planned from while some or all of its text is elsewhere.

    stores: those at hand.   declared: tokens of the other sources, as the configuration has them.
    epoch_tokens: (source, format) -> tokens of one pass over it, by its store or as declared."""

    stages: tuple[Stage, ...]
    stores: dict[str, TokenStore]
    declared: dict[str, int]
    epoch_tokens: Callable[[str, FormatConfig], int]


def declared_sizes(config: Config) -> dict[str, int]:
    """Source -> declared tokens, of the sources without a store at hand: enough to plan with, not to train on."""
    return {
        name: source.declared_tokens
        for name, source in config.sources.items()
        if source.declared_tokens is not None and not _at_hand(source.store)
    }


def _at_hand(location: str) -> bool:
    return location == "embedded" or is_url(location) or Path(location).exists()


def open_sizes(config: Config, verify: bool = False) -> Sizes:
    """As `open_data`, but a source whose store is not there has the size that it declares."""
    declared = declared_sizes(config)
    stores = _open_stores(config, set(config.sources) - set(declared), verify)
    documents = _documents(config, stores, _tokenizer(config, stores))[0] if stores else None

    def epoch_tokens(name: str, format: FormatConfig) -> int:
        if documents is None or name in declared:
            return declared[name]
        return int(documents(name, format).lengths.sum())

    buckets = _bucket_tokens(config, documents, declared)
    stages = place_stages(config.stages, epoch_tokens, config.seed, config.total_tokens, buckets)
    return Sizes(stages, stores, declared, epoch_tokens)


def open_data(config: Config, verify: bool = False) -> Data:
    """Opens, and where needed builds, everything the configuration reads. Stores of up to VERIFIED_BYTES are read
    through and compared with their checksums, all stores with `verify`.

    Raises UserError, before anything is trained: a store that is missing or damaged, stores of different tokenizers, a
    tokenizer that is not the stores', a vocabulary larger than the model's, a source with too little text."""
    if declared := declared_sizes(config):
        listed = "\n".join(f"  - sources.{name}.store: there is no {config.sources[name].store}" for name in declared)
        raise UserError(
            f"the text is not at hand, and declared_tokens serve the plan alone (tools/plan.py):\n{listed}\n"
            "Make each with tools/prepare_corpus.py --output=DIR, or give its folder: --config.sources.NAME.store=DIR"
        )
    stores = _open_stores(config, set(config.sources), verify)
    tokenizer = _tokenizer(config, stores)
    documents, chosen = _documents(config, stores, tokenizer)
    stages = place_stages(
        config.stages,
        lambda name, format: int(documents(name, format).lengths.sum()),
        config.seed,
        config.total_tokens,
        _bucket_tokens(config, documents, {}),
    )
    stream = Stream(stages, documents, config.seed, _indices(), tokenizer.pad_id or 0)
    held_out = _held_out(stores, {name: splits["validation"] for name, splits in chosen.items()})
    experiments = open_experiments(config, stream, documents, tokenizer)
    return Data(stores, tokenizer, treat(config, stream, experiments, tokenizer), held_out, experiments)


def with_decisions(config: Config, data: Data, log: ControlLog) -> Data:
    """The data with what dynamic experiments have decided during the run. UserError where that does not fit the data."""
    return replace(data, stream=follow(config, data.stream, data.experiments, data.tokenizer, log.entries))


def open_tokenizer(config: Config) -> Tokenizer:
    """The tokenizer that a run of this configuration reads with; its text need not be there if it names a tokenizer.json or
    "bytes". UserError when it cannot be found."""
    if config.tokenizer is not None and not config.tokenizer.startswith("bpe:"):
        return load(config.tokenizer)
    name, source = next(iter(config.sources.items()))
    return _open_store(name, source.store, config.tokenizer, verify=False).tokenizer()


def _documents(
    config: Config, stores: dict[str, TokenStore], tokenizer: Tokenizer
) -> tuple[Callable[[str, FormatConfig], Documents], Chosen]:
    """(source, format) -> the documents to train on with what surrounds them; and what was chosen of each store."""
    chosen = {name: _chosen(name, config.sources[name], store) for name, store in stores.items()}
    metadata = _metadata(config, stores, chosen, tokenizer)

    def documents(name: str, format: FormatConfig) -> Documents:
        if format.bos and tokenizer.bos_id is None:
            raise UserError(f"the format puts BOS first, but tokenizer {tokenizer.name} has none; set bos=False")
        prefix = (tokenizer.bos_id,) if format.bos else ()
        suffix = (tokenizer.eos_id,) if format.eos else ()
        written = metadata[name, format.metadata] if format.metadata else None
        every_piece = written is not None and format.kind == "decompose" and format.metadata.every_piece
        return Documents(stores[name], chosen[name]["train"], prefix, suffix, written, every_piece)

    return documents, chosen


def _metadata(
    config: Config, stores: dict[str, TokenStore], chosen: Chosen, tokenizer: Tokenizer
) -> dict[tuple[str, MetadataConfig], Metadata]:
    """(source, what is asked for) -> metadata, of all stages that have some.

    Raises UserError, all problems at once: a source without the column, metadata that leave no room for text in a row."""
    found: dict[tuple[str, MetadataConfig], Metadata] = {}
    problems: dict[tuple[str, MetadataConfig | None], str] = {}
    for i, stage in enumerate(config.stages):
        asked = stage.format.metadata
        for name in stage.mixture:
            if asked is None or name not in stores or (name, asked) in problems:
                continue
            where, ids = f"sources.{name} with stages.{i}.format.metadata", chosen[name]["train"]
            try:
                if (name, asked) not in found:
                    seed = seed_of(config.seed, "metadata", name)
                    found[name, asked] = make_metadata(stores[name], asked, ids, tokenizer, seed, where)
                _check_length(found[name, asked], stores[name], ids, asked, stage, where)
            except UserError as error:
                problems[name, asked] = str(error)
    if problems:
        raise UserError("\n".join(problems.values()))
    return found


def _check_length(
    metadata: Metadata, store: TokenStore, ids: np.ndarray, asked: MetadataConfig, stage: StageConfig, where: str
) -> None:
    lengths = metadata.lengths(ids)
    longest = int(lengths.max(initial=0)) + stage.format.bos
    if longest >= stage.sequence_length:
        number = int(ids[lengths.argmax()])
        document, alike = store.metadata(number), int(np.count_nonzero(metadata.codes[ids] == metadata.codes[number]))
        remedies = ["reduce='domain'"] if asked.reduce in (None, "url") else []
        remedies += [] if asked.hashed else ["hashed=True"]
        remedies.append(f"min_documents={max(alike, asked.min_documents) + 1} to write 'unknown' for rarer values")
        value = ", ".join(str(document[column]) for column in asked.columns)
        shown = value if len(value) <= 80 else f"{value[:80]}…"
        raise UserError(
            f"{where}: the metadata of document {document['id']!r} ({shown}) are {longest:,} tokens, and a row of "
            f"sequence_length = {stage.sequence_length} has no room for text behind them; set {', or '.join(remedies)}; "
            "else shorten prefix and suffix, or lengthen the rows"
        )


def _bucket_tokens(
    config: Config, documents: Callable[[str, FormatConfig], Documents] | None, declared: dict[str, int]
) -> BucketTokens:
    """(source, format, longest row) -> tokens in rows of each length."""

    def bucket_tokens(name: str, format: FormatConfig, longest: int) -> dict[int, int]:
        if documents is None or name in declared:
            raise UserError(
                f"sources.{name}.declared_tokens: into which lengths its documents decompose is known from the text "
                "alone; give its store, or plan with another format.kind"
            )
        return FixedCut(name, documents(name, format), format, longest, config.seed, _indices()).tokens()

    return bucket_tokens


def _indices() -> Path:
    return cache_folder() / "indices"


def _chosen(name: str, source: SourceConfig, store: TokenStore) -> dict[str, np.ndarray]:
    """The documents of a source by split: those of the store for which its `where` holds."""
    ids = {split: store.documents(split) for split in ("train", "validation")}
    if source.where:
        keep = matches(store, source.where, f"sources.{name}.where")
        ids = {split: found[keep[found]] for split, found in ids.items()}
    if source.part != (0.0, 1.0):  # of the training documents alone: all parts are evaluated on the same ones
        ids["train"] = ids["train"][in_part(store, source.part)[ids["train"]]]
    if not len(ids["train"]):
        what = f"no training document for which {source.where} holds" if source.where else "no training documents"
        what += f" in part {source.part}" if source.part != (0.0, 1.0) else ""
        raise UserError(f"sources.{name}: {store.path} has {what}; prepare it with more text, or change the condition")
    return ids


def _open_stores(config: Config, names: set[str], verify: bool) -> dict[str, TokenStore]:
    """The stores of the sources in `names`, in the configuration's order."""
    return {
        name: _open_store(name, source.store, config.tokenizer, verify)
        for name, source in config.sources.items()
        if name in names
    }


def _open_store(name: str, location: str, tokenizer: str | None, verify: bool) -> TokenStore:
    if location == "embedded":
        return embedded.store(tokenizer)
    try:
        store = TokenStore.open(location)
        quick = not is_url(location) and store.n_tokens * store.dtype.itemsize <= VERIFIED_BYTES
        return TokenStore.open(location, verify=True) if verify or quick else store
    except UserError as error:
        raise UserError(f"sources.{name}.store: {error}") from None


def _tokenizer(config: Config, stores: dict[str, TokenStore]) -> Tokenizer:
    (first, store), *others = stores.items()
    for name, other in others:
        if other.tokenizer_hash != store.tokenizer_hash:
            again, like = (first, other) if config.sources[name].store == "embedded" else (name, store)
            raise UserError(
                f"sources.{first} and sources.{name} were prepared with different tokenizers "
                f"({store.tokenizer().name}, {store.tokenizer_hash[:12]}…, and {other.tokenizer().name}, "
                f"{other.tokenizer_hash[:12]}…; bpe is trained on each text by itself); prepare {again} again with "
                f"--tokenizer={like.path}/tokenizer.json"
            )
    tokenizer = store.tokenizer()
    prepared = [name for name in stores if config.sources[name].store != "embedded"]
    if config.tokenizer and prepared and not config.tokenizer.startswith("bpe:"):
        asked = load(config.tokenizer)
        if asked.hash != tokenizer.hash:
            raise UserError(
                f"tokenizer = {config.tokenizer!r} is not the one that sources.{prepared[0]} was prepared with "
                f"({tokenizer.name}, {tokenizer.hash[:12]}…); set tokenizer=None to use the store's, or prepare it "
                "again"
            )
    if config.model.vocab_size != tokenizer.vocab_size:
        raise UserError(
            f"model.vocab_size = {config.model.vocab_size}, but tokenizer {tokenizer.name} has "
            f"{tokenizer.vocab_size} tokens; set model.vocab_size={tokenizer.vocab_size}"
        )
    return tokenizer


def _held_out(stores: dict[str, TokenStore], ids: dict[str, np.ndarray]) -> dict[str, tuple[TokenStore, np.ndarray]]:
    """One set a domain (the source's name where its store has no domains). A name that several sources share is told
    apart as source.domain, unless they hold out the very same documents."""
    sets: dict[str, list[tuple[str, TokenStore, np.ndarray]]] = {}
    for source, store in stores.items():
        if "domain" not in store.column_names:
            sets.setdefault(source, []).append((source, store, ids[source]))
            continue
        domains = store.column("domain").take(ids[source]).to_numpy(zero_copy_only=False).astype(str)
        for domain in np.unique(domains).tolist():
            sets.setdefault(domain, []).append((source, store, ids[source][domains == domain]))
    found = {}
    held_by = set()  # two parts of one store hold out the same documents
    for name, parts in sets.items():
        alike = len({(store.fingerprint, held.tobytes()) for _, store, held in parts}) == 1
        for source, store, held in parts[:1] if alike else parts:
            if len(held) and (store.fingerprint, held.tobytes()) not in held_by:
                held_by.add((store.fingerprint, held.tobytes()))
                found[name if alike else f"{source}.{name}"] = (store, held)
    return dict(sorted(found.items()))
