"""Numbers and recorded values as short text."""

import math
from collections import Counter
from dataclasses import dataclass

ABSENT = "–"


@dataclass(frozen=True)
class Measure:
    """A value with its standard error or its 95 % interval, as text ("" where there is none)."""

    value: str
    error: str = ""
    clear: bool = False  # a difference of more than two standard errors, or an interval without 0
    interval: str = ""


def count(value: float | None, unit: str = "") -> str:
    """A count at a glance: 1,234 or 12.3 M."""
    if not isinstance(value, int | float) or not math.isfinite(value):
        return ABSENT
    suffix = ""
    if 10_000 <= abs(value) < 1e15:
        value = float(f"{value:.3g}")
        scale, suffix = next(s for s in ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "k")) if abs(value) >= s[0])
        value /= scale
    whole = not suffix and (value == int(value) or abs(value) >= 1000)
    text = f"{value:,.0f}" if whole and abs(value) < 10_000 else f"{value:.3g}"
    return " ".join(filter(None, (text, suffix, unit)))


def duration(seconds: float) -> str:
    if not math.isfinite(seconds):
        return ABSENT
    seconds = round(seconds)
    for size, name, below, small in ((86400, "d", 3600, "h"), (3600, "h", 60, "min"), (60, "min", 1, "s")):
        if seconds >= size:
            return f"{seconds // size} {name} {seconds % size // below:02d} {small}"
    return f"{seconds} s"


def decimal(value: float, digits: int = 4, sign: bool = False) -> str:
    """`value` with a true minus sign; "–" when it was not recorded or is not finite."""
    return f"{value:{'+' if sign else ''}.{digits}f}".replace("-", "−") if math.isfinite(value) else ABSENT


def measure(value: float, error: float, sign: bool = False) -> Measure:
    clear = sign and abs(value) > 2 * error  # False when either is NaN
    return Measure(decimal(value, sign=sign), decimal(error) if math.isfinite(error) else "", clear)


def plain(value: object, absent: str = ABSENT) -> str:
    """A JSON value in a line: equal list members are counted ("4 × H100"), dicts are "key value, ..."."""
    if isinstance(value, dict):
        return ", ".join(f"{key} {plain(item)}" for key, item in value.items())
    if isinstance(value, list):
        counts = Counter(plain(item) for item in value)
        return ", ".join(f"{number} × {text}" if number > 1 else text for text, number in counts.items())
    return absent if value is None else str(value)


def visible(text: str) -> str:
    return text.translate({code: 0x2400 + code for code in range(32) if chr(code) not in "\n\t"})
