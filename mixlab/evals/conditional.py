"""Held-out loss with metadata in front of documents: their own, others, one for all, and none (Gao et al. 2025, section 4).

All variants score the same tokens, each with the same text before it, so that their differences are those of the metadata
alone. For that, every piece of a document has the metadata in front, and the text is cut so that the longest fit.
"""

from collections.abc import Mapping
from dataclasses import replace

import numpy as np

from mixlab.config import MetadataEvaluationConfig
from mixlab.corpus.store import TokenStore
from mixlab.corpus.tokenizer import Tokenizer
from mixlab.errors import UserError
from mixlab.evals.held_out import ISOLATED, EvaluationSet, as_set, pack
from mixlab.evals.language_model import ratio, summarise
from mixlab.schedule.shuffle import permute
from mixlab.seeds import seed_of
from mixlab.sequences.documents import Documents
from mixlab.sequences.metadata import Metadata, MetadataConfig, values_of
from mixlab.stream import Kind, render

WHERE = "evaluation.metadata"
APART = replace(ISOLATED, targets_past_row=False)


class ConditionalSets:
    """The held-out sets of each variant.

    sets: variant -> sets.   seen: per set, int64 [documents], how many training documents have the document's value.
    Documents without metadata are left out, and sets that have no others.
    Raises UserError: no column, metadata that leave less than half of a row for text, a set of documents that all have one
    value where another is asked for."""

    def __init__(
        self,
        settings: MetadataEvaluationConfig,
        template: MetadataConfig,
        sets: list[EvaluationSet],
        held_out: Mapping[str, tuple[TokenStore, np.ndarray]],
        tokenizer: Tokenizer,
        bos: bool,
        length: int,
        tokens: int,
    ):
        self.sets: dict[str, list[EvaluationSet]] = {variant: [] for variant in settings.variants}
        self.seen: list[np.ndarray] = []
        stores = {held_out[s.name][0].fingerprint: held_out[s.name][0] for s in sets}
        for fingerprint, store in stores.items():
            here = [s for s in sets if held_out[s.name][0].fingerprint == fingerprint]
            train = store.documents("train")
            codes, names = values_of(store, replace(template, share=1.0), train, WHERE)
            counts = np.bincount(codes[train], minlength=len(names) + 1)
            named = {s.name: s.document_ids[codes[s.document_ids] > 0] for s in here}
            named = {name: ids for name, ids in named.items() if len(ids)}
            if not named:
                continue
            strings = tokenizer.encode_batch([template.text(name) for name in [*names, settings.text or ""]])
            given = {variant: _codes(variant, codes, named, len(names) + 1) for variant in settings.variants}
            used = np.unique(np.concatenate([c[ids] for c in given.values() for ids in named.values()]))
            longest = max((len(strings[c - 1]) for c in used.tolist() if c), default=0) + bos
            if 2 * longest > length:
                raise UserError(
                    f"{WHERE}: the metadata of a held-out document are {longest} tokens, more than half of a row of "
                    f"{length}; reduce them further, or evaluate a run with longer rows"
                )
            prefix = (tokenizer.bos_id,) if bos else ()
            written = {variant: Metadata.of(chosen, strings) for variant, chosen in given.items()}
            for name, ids in named.items():
                made = {}
                for variant, metadata in written.items():
                    documents = Documents(store, ids, prefix, (tokenizer.eos_id,), metadata, every_piece=True)
                    made[variant] = _set(name, documents, tokenizer, length, length - longest, tokens)
                if all(made.values()):
                    self.seen.append(counts[codes[ids]])
                    for variant, found in made.items():
                        self.sets[variant].append(found)


def _codes(variant: str, codes: np.ndarray, named: dict[str, np.ndarray], free: int) -> np.ndarray:
    """int64 [documents of the store]: whose metadata stand before the documents of the sets (name -> ids); 0 for none.
    free: the code of the free text."""
    given = np.zeros_like(codes)
    every = np.concatenate(list(named.values()))
    if variant == "true":
        given[every] = codes[every]
    elif variant == "text":
        given[every] = free
    elif variant == "shuffled":
        for name, ids in named.items():
            given[ids] = codes[ids[permute(np.arange(len(ids)), len(ids), seed_of("shuffled metadata", name))]]
    elif variant == "wrong":
        every = every[permute(np.arange(len(every)), len(every), seed_of("wrong metadata"))]
        twice = np.tile(codes[every], 2)
        changes = np.flatnonzero(twice[1:] != twice[:-1]) + 1
        if not len(changes):
            raise UserError(
                f"{WHERE}.variants: 'wrong' needs held-out documents of two values, and all have one; leave it out, or "
                "hold out more"
            )
        given[every] = twice[changes[np.searchsorted(changes, np.arange(len(every)), side="right")]]
    return given


def _set(
    name: str, documents: Documents, tokenizer: Tokenizer, length: int, text_tokens: int, tokens: int
) -> EvaluationSet | None:
    """Rows in which every piece has text_tokens of a document, the first of them that another piece has predicted already."""
    ids = documents.ids
    heads = documents.heads(ids)
    before = np.where(heads > 0, heads, len(documents.prefix))
    counted = np.minimum(documents.virtual_lengths(ids) - before, max(text_tokens, tokens // 8))
    stride = max(text_tokens - 1, 1)
    counts = np.maximum(-(-(counted - 1) // stride), 1)
    which = np.repeat(np.arange(len(ids)), counts)
    begins = (np.arange(len(which)) - np.repeat(np.cumsum(counts) - counts, counts)) * stride
    sizes = np.minimum(counted[which] - begins, text_tokens)
    starts = np.where(begins > 0, before[which] + begins, 0)
    lengths = sizes + np.where(begins > 0, heads[which], before[which])
    pieces, rows = pack(ids[which], starts, lengths, length)
    batch = render(pieces, documents, APART, rows, length, pad=tokenizer.pad_id or 0)
    text = batch.spans[(batch.spans["kind"] == Kind.TEXT) & (batch.spans["offset"] > 0)]
    text = text[(text["start"] > 0) | (not documents.prefix)]  # the others begin a document, after a BOS
    batch.loss_weights[text["row"], text["offset"] - 1] = 0
    return as_set(name, batch, ids, documents, tokenizer)


def metrics_of(conditional: ConditionalSets, nll: Mapping[str, np.ndarray]) -> dict[str, float]:
    """eval_metadata/<variant>/<set>/* like eval/<set>/*, and, where both were scored, eval_metadata/true_minus_none/<set>/{loss,
    loss_se, tokens, documents}: what its metadata change in a document's loss (negative: they help), paired by document;
    also for "micro", and by how many training documents share the value: seen_0, seen_1 (1 to 9), seen_10 (10 to 99), …

    nll: variant -> per-token losses [rows of all sets, L] (nats)."""
    metrics: dict[str, float] = {}
    for variant, losses in nll.items():
        found = summarise(conditional.sets[variant], losses)
        metrics |= {f"eval_metadata/{variant}/{key.removeprefix('eval/')}": value for key, value in found.items()}
    if "true" in nll and "none" in nll:
        true, none = (_nats_and_tokens(conditional.sets[v], nll[v]) for v in ("true", "none"))
        parts: dict[str, list[tuple[np.ndarray, np.ndarray]]] = {}
        for s, (there, tokens), (without, _), seen in zip(
            conditional.sets["true"], true, none, conditional.seen, strict=True
        ):
            some = tokens > 0
            groups = {s.name: some, "micro": some}
            decades = np.where(seen > 0, 10 ** np.floor(np.log10(np.maximum(seen, 1)) + 1e-9), 0).astype(int)
            groups |= {f"seen_{decade}": some & (decades == decade) for decade in np.unique(decades[some]).tolist()}
            for name, here in groups.items():
                parts.setdefault(name, []).append(((there - without)[here], tokens[here]))
        bins = sorted((name for name in parts if name.startswith("seen_")), key=lambda name: int(name[5:]))
        sets = [s.name for s in conditional.sets["true"]]
        for name in (*sets, "micro", *bins):
            pairs = parts[name]
            difference, tokens = (np.concatenate(column) for column in zip(*pairs, strict=True))
            loss, loss_se = ratio(difference, tokens)
            values = {"loss": loss, "loss_se": loss_se, "tokens": int(tokens.sum()), "documents": len(tokens)}
            metrics |= {f"eval_metadata/true_minus_none/{name}/{key}": value for key, value in values.items()}
    return metrics


def _nats_and_tokens(sets: list[EvaluationSet], nll: np.ndarray) -> list[tuple[np.ndarray, np.ndarray]]:
    """Per set, of its documents: nats and scored tokens."""
    found, at = [], 0
    for s in sets:
        scored = s.rows.loss_weights > 0
        owner, count = s.documents[scored], len(s.document_ids)
        nats = np.bincount(owner, nll[at : at + len(scored)][scored].astype(np.float64), count)
        found.append((nats, np.bincount(owner, minlength=count)))
        at += len(scored)
    return found
