"""What is asked of each source -> its share of a stage's tokens: weights, amounts, copies, and limits on repeating."""

from dataclasses import dataclass
from fractions import Fraction
from typing import Literal


@dataclass(frozen=True)
class SourceRequest:
    """What a stage asks of one source: exactly one of the first three.

    weight: of those sources that share the tokens which `tokens` and `epochs` leave over.
    tokens: so many.   epochs: all of the source so many times; 2.5 is two copies and a half.
    max_epochs: how often its text may be read in the stage; None: as often as it takes.
    over_limit: what to do when that is not enough. "refuse": say so. "renormalise": read it max_epochs times; the
        sources with a weight take over the rest, in proportion. "repeat": read on.
    """

    weight: float | None = None
    tokens: int | None = None
    epochs: float | None = None
    max_epochs: float | None = None
    over_limit: Literal["refuse", "renormalise", "repeat"] = "refuse"

    @property
    def asks(self) -> bool:
        """It asks for anything at all."""
        return bool(self.weight or self.tokens or self.epochs)


@dataclass(frozen=True)
class SourceShare:
    """share: exact fraction of the stage's tokens.   tokens: to the nearest one.   epochs: times that its text is read.
    limited: it got less than it asked for."""

    share: Fraction
    tokens: int
    epochs: float
    limited: bool = False


def exact(value: float | Fraction) -> Fraction:
    """A float as the decimal number that it prints as: 0.1 is a tenth."""
    return Fraction(value) if isinstance(value, int | Fraction) else Fraction(repr(float(value)))


def token_shares(
    requests: dict[str, SourceRequest],
    stage_tokens: int,
    epoch_tokens: dict[str, int],
    where: str = "stages.0.mixture",
    slack_tokens: int = 0,
) -> tuple[dict[str, SourceShare], list[str]]:
    """The shares of a stage of `stage_tokens`, and what is wrong with the requests (then there are no shares).

    epoch_tokens: source -> tokens of one pass over it.   where: the key that messages name.
    slack_tokens: when no source has a weight the amounts must add up to the stage, give or take this many (those of one
        step, as a stage has whole steps); they are then scaled to fit.
    The shares sum to 1 when nothing is wrong, and are ready for `Mixture`.
    """
    problems = [
        p for name, request in requests.items() for p in _malformed(f"{where}.{name}", request, epoch_tokens[name])
    ]
    if problems or not requests:
        return {}, problems or [f"{where} names no source"]

    limits = {n: exact(r.max_epochs) * epoch_tokens[n] for n, r in requests.items() if r.max_epochs is not None}
    bound = {n for n in limits if requests[n].over_limit == "renormalise"}
    given: dict[str, Fraction] = {}
    limited: set[str] = set()
    for name, request in requests.items():
        if request.weight is None:
            amount = (
                exact(request.tokens or 0) if request.epochs is None else exact(request.epochs) * epoch_tokens[name]
            )
            if name in bound and amount > limits[name]:
                amount = limits[name]
                limited.add(name)
            given[name] = amount
    weights = {name: exact(request.weight) for name, request in requests.items() if request.weight is not None}
    left = Fraction(stage_tokens) - sum(given.values())
    if left < 0 and (weights or -left > slack_tokens):
        problems.append(
            f"{where}: the amounts asked for by tokens and epochs add up to {_count(sum(given.values()))} tokens, but "
            f"the stage has {stage_tokens:,}; ask for less or lengthen the stage"
        )
    elif any(weights.values()):
        given |= _divide(left, weights, {n: limits[n] for n in bound if n in weights}, limited)
    else:
        given |= dict.fromkeys(weights, Fraction(0))

    short = stage_tokens - sum(given.values())
    if short > slack_tokens:
        amounts = ", ".join(f"{name} {_count(amount)}" for name, amount in given.items())
        problems.append(
            f"{where}: the sources supply {_count(stage_tokens - short)} of the stage's {stage_tokens:,} tokens "
            f"({amounts}); shorten the stage, raise max_epochs, or give a source without a limit a weight"
        )
    for name, limit in limits.items():
        if requests[name].over_limit == "refuse" and given[name] > limit:
            problems.append(
                f"{where}.{name}: {_count(given[name])} tokens are asked of it, "
                f"{float(given[name] / epoch_tokens[name]):.4g} epochs of its {epoch_tokens[name]:,}, but max_epochs = "
                f"{requests[name].max_epochs} allows {_count(limit)}; ask for less, raise max_epochs, or set "
                "over_limit to 'renormalise' or 'repeat'"
            )
    total = sum(given.values())
    if problems or not total:
        return {}, problems or [f"{where}: no source is asked for anything; give one a weight above 0"]
    shares = {name: given[name] / total for name in requests}
    return {
        name: SourceShare(
            share, round(share * stage_tokens), float(share * stage_tokens / epoch_tokens[name]), name in limited
        )
        for name, share in shares.items()
    }, []


def _divide(
    tokens: Fraction, weights: dict[str, Fraction], limits: dict[str, Fraction], limited: set[str]
) -> dict[str, Fraction]:
    """`tokens` in proportion to the weights, but none above its limit; those held back are added to `limited`."""
    given: dict[str, Fraction] = {}
    open_weights = dict(weights)
    while True:
        left, total = tokens - sum(given.values()), sum(open_weights.values())
        shares = {name: left * weight / total if total else Fraction(0) for name, weight in open_weights.items()}
        over = [name for name, amount in shares.items() if name in limits and amount > limits[name]]
        if not over:
            return given | shares
        for name in over:
            given[name] = limits[name]
            del open_weights[name]
        limited.update(over)


def _malformed(where: str, request: SourceRequest, epoch_tokens: int) -> list[str]:
    amounts = {
        key: getattr(request, key) for key in ("weight", "tokens", "epochs") if getattr(request, key) is not None
    }
    found = []
    if len(amounts) != 1:
        found.append(f"{where}: set exactly one of weight, tokens and epochs; {' and '.join(amounts) or 'none'} is set")
    for key, value in amounts.items():
        if not 0 <= value < float("inf"):
            found.append(f"{where}.{key} = {value}: must be a number from 0 on")
    if request.max_epochs is not None and not 0 < request.max_epochs < float("inf"):
        found.append(f"{where}.max_epochs = {request.max_epochs}: must be above 0; leave it out for no limit")
    if not found and not epoch_tokens and any(amounts.values()):
        found.append(f"{where}: the source has no tokens; drop it or prepare more text")
    if request.over_limit not in ("refuse", "renormalise", "repeat"):
        found.append(f"{where}.over_limit = {request.over_limit!r}: use one of 'refuse', 'renormalise', 'repeat'")
    return found


def _count(tokens: Fraction | int) -> str:
    return f"{round(tokens):,}"
