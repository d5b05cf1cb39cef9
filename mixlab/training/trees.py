"""Trees as nested dicts with string keys, and as flat dicts with paths for keys: what is written to disk."""

from typing import Any

import jax


def _key(entry) -> str:
    for name in ("key", "name", "idx"):
        if hasattr(entry, name):
            return str(getattr(entry, name))
    raise TypeError(f"no name for {entry!r}")


def flat(tree) -> dict[str, Any]:
    """{"blocks/up/kernel": leaf, ...}; fields of a NamedTuple go by name, members of a tuple by number."""
    return {"/".join(map(_key, path)): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(tree)}


def nested(by_path: dict[str, Any]) -> dict[str, Any]:
    """The inverse of `flat`, up to the types of the containers: all are dicts."""
    tree: dict[str, Any] = {}
    for name, leaf in by_path.items():
        *above, last = name.split("/")
        node = tree
        for key in above:
            node = node.setdefault(key, {})
        node[last] = leaf
    return tree


def pure(tree) -> dict[str, Any]:
    """Any tree -> nested dicts with string keys: fields of a NamedTuple by name, members of a tuple by
    number. Empty states and masked nodes leave no trace."""
    return nested(flat(tree))


def fill(like, arrays: dict[str, Any]):
    """`arrays` (as of `pure`) in the structure of `like`."""
    by_path = flat(arrays)
    return jax.tree_util.tree_map_with_path(lambda path, _: by_path["/".join(map(_key, path))], like)
