"""Nested plain values, as files hold them, to and from frozen dataclasses, which are the schema: keys, types, defaults."""

import ast
import dataclasses
import difflib
import re
import types
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from ml_collections import ConfigDict


def plain(value: Any) -> Any:
    """Nested dicts, lists and scalars of a config, a ConfigDict or any dataclass: what config.json holds."""
    if dataclasses.is_dataclass(value):
        return {f.name: plain(getattr(value, f.name)) for f in dataclasses.fields(value)}
    if isinstance(value, ConfigDict | dict):
        return {str(key): plain(entry) for key, entry in value.items()}
    if isinstance(value, list | tuple):
        return [plain(entry) for entry in value]
    return value


def differences(old: dict, new: dict) -> dict[str, tuple[Any, Any]]:
    """Every key in which two configs (as `plain` gives them) differ: {"stages.0.steps": (100, 200)}."""
    a, b = dict(_leaves(old)), dict(_leaves(new))
    missing = "(absent)"
    keys = [*a, *(key for key in b if key not in a)]
    return {k: (a.get(k, missing), b.get(k, missing)) for k in keys if a.get(k, missing) != b.get(k, missing)}


def _leaves(value: Any, key: str = ""):
    if not isinstance(value, dict | list):
        yield key, value
        return
    for name, entry in value.items() if isinstance(value, dict) else enumerate(value):
        yield from _leaves(entry, f"{key}.{name}" if key else str(name))


def override(values: dict, asked: str, problems: list[str]) -> None:
    """Sets the key of "--config.a.0.b=value" in nested `values`; unknown keys are left to the schema."""
    key, equals, text = asked.removeprefix("--config.").partition("=")
    if not equals:
        problems.append(f"{asked}: write it as {asked}=VALUE")
        return
    try:
        value = ast.literal_eval(text)
    except (ValueError, SyntaxError):
        value = {"true": True, "false": False, "none": None}.get(text.lower(), text)
    *groups, last = re.sub(r"\[(\d+)\]", r".\1", key).split(".")
    node: Any = values
    for name in [*groups, last]:
        if isinstance(node, list) and not (name.isdigit() and int(name) < len(node)):
            problems.append(f"unknown key {key!r}: the list has entries 0 to {len(node) - 1}, not {name!r}")
            return
        at = int(name) if isinstance(node, list) else name
        if name is last:
            node[at] = value
        elif isinstance(node, list) or isinstance(node.get(at, None), dict | list):
            node = node[at]
        else:  # an unknown group, or a key within a plain value: the schema says so
            node[at] = node = {}


def build(kind: Any, value: Any, key: str, problems: list[str]) -> Any:
    """`value`, which stands at `key`, as an instance of the type `kind`; what does not fit is added to `problems`."""
    origin, args = get_origin(kind), get_args(kind)
    if dataclasses.is_dataclass(kind):
        return _build_dataclass(kind, value, key, problems)
    if kind is Any:
        return value
    if origin in (Union, types.UnionType):
        if value is None and type(None) in args:
            return None
        options = [a for a in args if a is not type(None)]
        groups = [a for a in options if dataclasses.is_dataclass(a)]
        if len(groups) > 1 and isinstance(value, dict):
            return _build_kind(groups, value, key, problems)
        return build(groups[0] if groups and isinstance(value, dict) else options[0], value, key, problems)
    if origin is dict and isinstance(value, dict):
        return {name: build(args[1], entry, f"{key}.{name}", problems) for name, entry in value.items()}
    if origin is tuple and isinstance(value, list | tuple):
        return tuple(build(args[0], entry, f"{key}.{i}", problems) for i, entry in enumerate(value))
    if origin is Literal:
        if value not in args:
            problems.append(f"{key} = {value!r}: use one of {', '.join(map(repr, args))}")
        return value
    if kind is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if origin in (dict, tuple) or not isinstance(value, kind) or (isinstance(value, bool) and kind is not bool):
        expected = {dict: "names with values", tuple: "a list"}.get(origin) or kind.__name__
        problems.append(f"{key} = {value!r}: must be of type {expected}")
    return value


def _build_kind(groups: list[Any], value: dict, key: str, problems: list[str]) -> Any:
    """One of several dataclasses, by the `kind` that the value names."""
    kinds = {get_args(get_type_hints(group)["kind"])[0]: group for group in groups}
    if value.get("kind") in kinds:
        return _build_dataclass(kinds[value["kind"]], value, key, problems)
    near = difflib.get_close_matches(str(value.get("kind")), kinds, n=1)
    hint = f"did you mean {near[0]!r}?" if near else f"use one of {', '.join(map(repr, kinds))}"
    problems.append(
        f"{key}.kind = {value['kind']!r}; {hint}" if "kind" in value else f"{key}.kind: must be set; {hint}"
    )
    return None


def _build_dataclass(kind: Any, value: Any, key: str, problems: list[str]) -> Any:
    if not isinstance(value, dict):
        problems.append(f"{key} = {value!r}: is a group of keys; set one of them")
        return None
    hints = get_type_hints(kind)
    dot = f"{key}." if key else ""
    for name in value:
        if name not in hints:
            near = difflib.get_close_matches(name, hints, n=1, cutoff=0.4)
            hint = f"did you mean {dot + near[0]!r}?" if near else f"its keys are {', '.join(hints)}"
            problems.append(f"unknown key {dot + name!r}; {hint}")
    built = {n: build(hints[n], entry, dot + n, problems) for n, entry in value.items() if n in hints}
    required = [f.name for f in dataclasses.fields(kind) if f.default is f.default_factory is dataclasses.MISSING]
    missing = [name for name in required if name not in built]
    problems += [f"{dot + name}: must be set" for name in missing]
    return None if missing else kind(**built)
