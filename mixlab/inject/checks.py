"""Checks of settings that several experiments share."""

from typing import Any


def at_least(settings: Any, where: str, **least: float) -> list[str]:
    """A problem for each of the keys whose value is below the number given for it."""
    values = {key: getattr(settings, key) for key in least}
    return [
        f"{where}.{key} = {value}: must be at least {least[key]}" for key, value in values.items() if value < least[key]
    ]
