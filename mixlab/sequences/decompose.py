"""decompose: every document cut on its own into pieces whose lengths are powers of two, one bucket a length.

Dataset decomposition (Pouransari et al. 2024, section 2.1). A row of bucket L is one piece: L tokens of one
document to read, and the token after each of them to predict. The variants differ in the token after the
last:

exact     A document's length written in binary gives its pieces, longest first (the paper's text; OLMo-core).
          They lie end to end. For OLMo-core a row has L tokens and no more, so its last position bears no
          loss.
released  Pieces of L + 1 tokens lie end to end, and the last token is predicted but never read (the released
          code).
overlap   As released, but a piece begins with the token that the one before it predicted last: every token
          that is used, but the document's first, is predicted exactly once. In no paper.

A piece beyond the longest bucket becomes pieces of the longest; `released` can draw their lengths instead.
The end of a document that is shorter than the shortest bucket is dropped.

Documents may have a head (BOS and metadata) in front of every piece. It counts in the piece's length: a row of
L tokens behind a head of h has L - h of the document's own. A document is then cut into as many such pieces of
the longest bucket as it fills, then of the next, and so on down; buckets shorter than twice the head are left
out, as would be rows that are mostly head. Within a document the variants keep their meaning: end to end, one
token apart, or with the last token of the document never read.
"""

from typing import Literal

import numpy as np

from mixlab.draws import draws
from mixlab.sequences.index import SequenceIndex

Variant = Literal["exact", "released", "overlap"]
BLOCK = 2**16  # documents cut at a time, for the processor's cache
DRAWS = 32  # lengths drawn at a time for one document

LEFT_OVER = "shorter than the shortest bucket"
TARGET_ONLY = "predicted but not read"
MOSTLY_HEAD = "metadata longer than half of the longest bucket"


def bucket_lengths(min_length: int, max_length: int) -> list[int]:
    """The powers of two from min_length to max_length, both of them powers of two."""
    return [2**k for k in range(min_length.bit_length() - 1, max_length.bit_length())]


def length_problems(
    where: str,
    min_length: int,
    max_length: int,
    tokens_per_step: int,
    shortest: str = "min_length",
    longest: str = "max_length",
) -> list[str]:
    """What is wrong with the buckets of a stage, one line each, with the nearest values that work.

    shortest, longest: the keys within `where` that messages name."""
    found = []
    for key, value in ((shortest, min_length), (longest, max_length)):
        if value < 1:
            found.append(f"{where}.{key} = {value}: must be a power of two; use 1 or more")
        elif value & (value - 1):
            below = 2 ** (value.bit_length() - 1)
            found.append(f"{where}.{key} = {value}: must be a power of two; use {below} or {2 * below}")
    if found:
        return found
    if min_length > max_length:
        return [f"{where}.{shortest} = {min_length} is more than {longest} = {max_length}; swap them"]
    if tokens_per_step % max_length:
        below = tokens_per_step // max_length * max_length
        values = f"{below} or {below + max_length}" if below else f"{max_length}"
        found.append(
            f"{where}.{longest} = {max_length} does not divide the {tokens_per_step} tokens of a step, "
            f"which all buckets share; use tokens_per_step={values}, or a shorter {longest}"
        )
    return found


def decompose(
    documents: np.ndarray,
    lengths: np.ndarray,
    variant: Variant,
    min_length: int,
    max_length: int,
    seed: int | None = None,
    heads: np.ndarray | None = None,
) -> dict[int, SequenceIndex]:
    """The buckets, shortest first: length -> its rows, of one piece each, in reading order.

    documents: int64 [n] in reading order.   lengths: int64 [n] virtual tokens of each.
    min_length, max_length: powers of two, of the shortest and longest bucket.
    seed: of the lengths that `released` draws for documents beyond max_length, such that all buckets get
        about as many of their tokens; a function of seed and document alone. None takes max_length always.
    heads: int64 [n] tokens at the beginning of each document that are repeated in front of each of its pieces (0: of none);
        such documents are cut as if without a seed. A piece that begins after the head has it besides what `starts` says.
    Dropped tokens of all buckets together are in the shortest one's `dropped_tokens`.
    """
    sizes = bucket_lengths(min_length, max_length)
    kinds = [np.min_scalar_type(int(values.max(initial=0))) for values in (documents, lengths)]
    parts = {size: [(np.zeros(0, kinds[0]), np.zeros(0, kinds[1]))] for size in sizes}
    heads = np.zeros_like(lengths) if heads is None else heads
    mostly_head = 0  # tokens of documents that no bucket takes
    repeated = 0  # tokens of heads in front of pieces but the first
    for first in range(0, len(lengths), BLOCK):
        block = documents[first : first + BLOCK]
        virtual, behind = lengths[first : first + BLOCK], heads[first : first + BLOCK]
        plain = np.where(behind > 0, 0, virtual)
        if variant == "exact":
            pieces = _end_to_end(plain, sizes)
        elif variant == "overlap":
            pieces = _end_to_end(np.maximum(plain - 1, 0), sizes)
        else:
            pieces = _one_apart(block, plain, sizes, seed)
        if behind.any():
            pieces = _merged(pieces, _behind_heads(virtual, behind, sizes, variant))
            mostly_head += int(virtual[2 * behind > sizes[-1]].sum())
        for size, which, starts in pieces:
            parts[size].append((block[which].astype(kinds[0]), starts.astype(kinds[1])))
            repeated += int(behind[which[starts > 0]].sum())

    columns = {size: [np.concatenate([part[c] for part in parts[size]]) for c in (0, 1)] for size in sizes}
    counts = {size: len(columns[size][0]) for size in sizes}
    read = sum(size * count for size, count in counts.items()) - repeated
    target_only = {
        "exact": 0,
        "released": sum(counts.values()),
        "overlap": sum(int(np.count_nonzero(starts == 0)) for _, starts in columns.values()),
    }[variant]
    left_over = int(lengths.sum()) - read - target_only - mostly_head
    dropped = {LEFT_OVER: left_over, TARGET_ONLY: target_only, MOSTLY_HEAD: mostly_head}
    offsets = np.arange(max(counts.values()) + 1, dtype=np.int64)
    return {
        size: SequenceIndex(
            documents=columns[size][0],
            starts=columns[size][1],
            lengths=np.broadcast_to(np.uint32(size), counts[size]),
            row_offsets=offsets[: counts[size] + 1],  # row r is piece r in every bucket
            dropped_tokens={reason: n for reason, n in dropped.items() if n} if size == sizes[0] else {},
        )
        for size in sizes
    }


def _end_to_end(lengths: np.ndarray, sizes: list[int]):
    """Yields (size, [P] positions in `lengths`, [P] starts): pieces by the binary digits of the lengths."""
    longest = sizes[-1]
    long = np.flatnonzero(lengths >= longest)
    counts = lengths[long] // longest
    number = np.arange(counts.sum()) - np.repeat(np.cumsum(counts) - counts, counts)
    yield longest, np.repeat(long, counts), number * longest
    for size in sizes[:-1]:
        which = np.flatnonzero(lengths & size)
        yield size, which, lengths[which] & -(2 * size)


def _behind_heads(lengths: np.ndarray, heads: np.ndarray, sizes: list[int], variant: Variant):
    """Yields as _end_to_end, the longest size first: pieces of the documents with a head, which is in front of each."""
    with_head = np.flatnonzero(heads)
    heads, extra = heads[with_head], int(variant == "released")
    begins = heads.copy()  # of what is left of each document
    rest = lengths[with_head] - heads - (variant == "overlap")
    for size in reversed(sizes):
        taken = size - heads + extra
        counts = np.where(2 * heads <= size, np.maximum(rest, 0) // np.maximum(taken, 1), 0)
        number = np.arange(counts.sum()) - np.repeat(np.cumsum(counts) - counts, counts)
        starts = np.repeat(begins, counts) + number * np.repeat(taken, counts)
        first = starts == np.repeat(heads, counts)
        yield (
            size,
            np.repeat(with_head, counts),
            np.where(first, 0, starts),
        )  # the first piece begins with the head itself
        begins += counts * taken
        rest -= counts * taken


def _merged(pieces, others):
    """The pieces of both, size by size, in the order of the documents."""
    found = {size: (which, starts) for size, which, starts in pieces}
    for size, which, starts in others:
        if size in found:
            which, starts = np.append(found[size][0], which), np.append(found[size][1], starts)
        order = np.lexsort((starts, which))
        yield size, which[order], starts[order]


def _one_apart(documents: np.ndarray, lengths: np.ndarray, sizes: list[int], seed: int | None):
    """Yields as _end_to_end: pieces followed by one more token each, the longest that fits first."""
    long, long_starts, long_sizes, rest = _over_length(documents, lengths, sizes, seed)
    for size in reversed(sizes):
        which = np.flatnonzero(rest > size)
        starts = lengths[which] - rest[which]
        rest[which] -= size + 1
        drawn = np.flatnonzero(long_sizes == size)
        if drawn.size:
            which, starts = np.append(long[drawn], which), np.append(long_starts[drawn], starts)
            order = np.lexsort((starts, which))
            which, starts = which[order], starts[order]
        yield size, which, starts


def _over_length(documents, lengths, sizes, seed):
    """The pieces taken while more than the longest bucket could hold is left, and what is left then.

    A draw takes a bucket with a probability inverse to its length.
    Returns int64 [P] positions in `lengths`, [P] starts, [P] sizes, [n] rest.
    """
    longest = sizes[-1]
    rest = lengths.copy()
    active = np.flatnonzero(lengths > 2 * longest)
    found = [(active[:0], rest[:0], rest[:0])]
    first = 0
    while active.size:
        drawn = np.full((len(active), DRAWS), longest)
        if seed is not None:
            u = draws(draws(seed, documents[active])[:, None], np.arange(first, first + DRAWS))
            u = (u % np.uint64(2 ** len(sizes) - 1)).astype(np.int64)
            drawn >>= np.searchsorted(2 ** np.arange(len(sizes)) - 1, u, side="right") - 1
        left = rest[active, None] - np.cumsum(drawn + 1, axis=1) + drawn + 1  # before each piece
        taken = left > 2 * longest
        counts = taken.sum(axis=1)
        which = np.repeat(active, counts)
        found.append((which, lengths[which] - left[taken], drawn[taken]))
        rest[active] -= ((drawn + 1) * taken).sum(axis=1)
        active = active[counts == DRAWS]
        first += DRAWS
    return *(np.concatenate(column) for column in zip(*found, strict=True)), rest
