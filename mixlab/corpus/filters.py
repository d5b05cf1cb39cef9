"""Choosing documents by their metadata."""

import hashlib
from collections.abc import Mapping
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from mixlab.corpus.store import TokenStore
from mixlab.draws import draws
from mixlab.errors import UserError
from mixlab.seeds import seed_of

BOUNDS = {"min": pc.greater_equal, "max": pc.less_equal}


def matches(store: TokenStore, where: Mapping[str, Any], key: str) -> np.ndarray:
    """bool [documents]: for which documents of the store every condition of `where` holds.

    where: column -> a value, a list of values, or {"min": number, "max": number} (either or both; text that is a number
        counts as one). A document without a value in the column does not match.
    key: that messages name, such as "sources.web.where". Raises UserError: no such column, an empty list, another bound
        than min and max, text that is no number where one is asked for.
    """
    keep = np.ones(len(store), bool)
    for name, condition in where.items():
        try:
            column = store.column(name)
        except UserError as error:
            raise UserError(f"{key}.{name}: {error}") from None
        keep &= _holds(column, condition, f"{key}.{name}")
    return keep


def in_part(store: TokenStore, part: tuple[float, ...]) -> np.ndarray:
    """bool [documents]: which lie in the part [from, to) of the store, where a hash of the id gives each document a place
    in [0, 1). Parts that do not overlap have no document in common, whatever is added to the store later."""
    places = draws(seed_of("part"), id_hashes(store)) >> np.uint64(11)  # 53 bits: exact as a float
    return (places >= part[0] * 2**53) & (places < part[1] * 2**53)


def id_hashes(store: TokenStore) -> np.ndarray:
    """uint64 [documents]: a hash of every document's id."""
    ids = store.column("id").to_pylist()
    digests = b"".join(hashlib.blake2b(str(i).encode(), digest_size=8).digest() for i in ids)
    return np.frombuffer(digests, "<u8")


def _holds(column: pa.ChunkedArray, condition: Any, key: str) -> np.ndarray:
    if isinstance(condition, Mapping):
        if not condition or set(condition) - set(BOUNDS):
            raise UserError(f"{key} = {dict(condition)}: give min, max or both")
        try:
            numbers = pc.cast(column, pa.float64())
        except pa.ArrowInvalid as error:
            raise UserError(f"{key}: min and max need numbers, and the column holds others ({error})") from None
        parts = [BOUNDS[bound](numbers, float(value)) for bound, value in condition.items()]
    else:
        values = list(condition) if isinstance(condition, list | tuple) else [condition]
        if not values:
            raise UserError(f"{key} = []: name at least one value")
        try:
            parts = [pc.is_in(column, value_set=pa.array(values).cast(column.type))]
        except (pa.ArrowInvalid, pa.ArrowNotImplementedError) as error:
            raise UserError(f"{key} = {condition!r}: is not of the column's type {column.type} ({error})") from None
    both = parts[0] if len(parts) == 1 else pc.and_(*parts)
    return np.asarray(pc.fill_null(both, False)).astype(bool)
