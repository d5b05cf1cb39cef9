"""Seeds come from names, never from positions in a list, so adding a source or a stage reseeds nothing else."""

import hashlib


def seed_of(*names: str | int) -> int:
    """A 64-bit seed that is a function of the names alone (BLAKE2b over their NUL-separated text)."""
    text = "\0".join(str(name) for name in names)
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little")
