"""From a configuration to what is read: stores, tokenizer, the stream, and the documents held out from it."""

from dataclasses import dataclass

import numpy as np

from mixlab.config import Config
from mixlab.corpus import embedded
from mixlab.corpus.cache import cache_folder
from mixlab.corpus.store import TokenStore
from mixlab.corpus.tokenizer import Tokenizer, load
from mixlab.errors import UserError
from mixlab.schedule.source import SourceRows
from mixlab.schedule.stages import place_stages
from mixlab.sequences.documents import Documents
from mixlab.stream import Stream

VERIFIED_BYTES = 2**30  # of tokens: about a second's reading


@dataclass(frozen=True)
class Data:
    """What a run reads. `held_out`: evaluation set -> (store, its validation documents, int64 ascending)."""

    stores: dict[str, TokenStore]
    tokenizer: Tokenizer
    stream: Stream
    held_out: dict[str, tuple[TokenStore, np.ndarray]]


def open_data(config: Config, verify: bool = False) -> Data:
    """Opens, and where needed builds, everything the configuration reads. Stores of up to VERIFIED_BYTES are read through
    and compared with their checksums, all stores with `verify`.

    Raises UserError, before anything is trained: a store that is missing or damaged, stores of different tokenizers, a
    tokenizer that is not the stores', a vocabulary larger than the model's, a source with too little text."""
    stores = {name: _open_store(name, source.store, config.tokenizer, verify) for name, source in config.sources.items()}
    tokenizer = _tokenizer(config, stores)
    sources = {}
    stages = place_stages(config.stages)
    for stage in stages:
        documents = _training_documents(stage.source, stores[stage.source], tokenizer, stage.format)
        sources[stage.source] = SourceRows(
            stage.source, documents, stage.format, stage.sequence_length, config.seed, cache_folder() / "indices"
        )
    stream = Stream(stages, sources, tokenizer.pad_id or 0)
    return Data(stores, tokenizer, stream, _held_out(stores))


def _open_store(name: str, location: str, tokenizer: str | None, verify: bool) -> TokenStore:
    if location == "embedded":
        return embedded.store(tokenizer)
    try:
        store = TokenStore.open(location)
        quick = store.n_tokens * store.dtype.itemsize <= VERIFIED_BYTES
        return TokenStore.open(location, verify=True) if verify or quick else store
    except UserError as error:
        raise UserError(f"sources.{name}.store: {error}") from None


def _tokenizer(config: Config, stores: dict[str, TokenStore]) -> Tokenizer:
    (first, store), *others = stores.items()
    for name, other in others:
        if other.tokenizer_hash != store.tokenizer_hash:
            raise UserError(
                f"sources.{first} and sources.{name} were prepared with different tokenizers "
                f"({store.tokenizer().name} and {other.tokenizer().name}); prepare one of them again"
            )
    tokenizer = store.tokenizer()
    prepared = [name for name, source in config.sources.items() if source.store != "embedded"]
    if config.tokenizer and prepared and not config.tokenizer.startswith("bpe:"):
        asked = load(config.tokenizer)
        if asked.hash != tokenizer.hash:
            raise UserError(
                f"tokenizer = {config.tokenizer!r} is not the one that sources.{prepared[0]} was prepared with "
                f"({tokenizer.name}, {tokenizer.hash[:12]}…); set tokenizer=None to use the store's, or prepare it again"
            )
    if config.model.vocab_size != tokenizer.vocab_size:
        raise UserError(
            f"model.vocab_size = {config.model.vocab_size}, but tokenizer {tokenizer.name} has "
            f"{tokenizer.vocab_size} tokens; set model.vocab_size={tokenizer.vocab_size}"
        )
    return tokenizer


def _training_documents(name, store, tokenizer, format) -> Documents:
    if format.bos and tokenizer.bos_id is None:
        raise UserError(f"sources.{name}: the format puts BOS first, but tokenizer {tokenizer.name} has none; set bos=False")
    ids = store.documents("train")
    if not len(ids):
        raise UserError(f"sources.{name}: {store.path} has no training documents; prepare it with more text")
    prefix = (tokenizer.bos_id,) if format.bos else ()
    suffix = (tokenizer.eos_id,) if format.eos else ()
    return Documents(store, ids, prefix, suffix)


def _held_out(stores: dict[str, TokenStore]) -> dict[str, tuple[TokenStore, np.ndarray]]:
    """One set a domain (the source's name where its store has no domains); a name that two sources share is told apart
    as source.domain."""
    sets = []
    for source, store in stores.items():
        ids = store.documents("validation")
        if "domain" not in store.column_names:
            sets.append((source, source, store, ids))
            continue
        domains = store.column("domain").take(ids).to_numpy()
        sets += [(source, str(domain), store, ids[domains == domain]) for domain in np.unique(domains.astype(str))]
    names = [name for _, name, *_ in sets]
    return {
        name if names.count(name) == 1 else f"{source}.{name}": (store, ids)
        for source, name, store, ids in sets
        if len(ids)
    }
