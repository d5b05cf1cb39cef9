"""How many batches a stage reads of each length bucket, and which sources they come from."""

from collections.abc import Mapping
from fractions import Fraction
from math import ceil, fsum

from mixlab.errors import UserError
from mixlab.schedule.curriculum import CurriculumConfig, batches_per_cycle

ROUNDS = 4000  # of raking, at most; few are needed, but where sources hardly share a bucket it goes slowly
NEAR = 1e-6  # of a share: there raking ends

Tokens = dict[str, dict[int, int]]  # source -> bucket length -> tokens in its rows


def share_out(
    config: CurriculumConfig,
    shares: Mapping[str, Fraction],
    tokens: Tokens,
    tokens_per_step: int,
    steps: int,
    where: str = "stages.0",
) -> tuple[dict[int, int], dict[int, dict[str, Fraction | float]]]:
    """Bucket length -> batches in each cycle; and of the buckets that are read, the weights of the sources in them.

    shares: source -> share of the stage's tokens.
    In the natural mixture every source is read as it is made: buckets have the tokens of all sources in these shares,
    and a source has in each bucket what it has of those. In other mixtures it has its share in every bucket.
    Raises UserError when a source that should be read in a bucket has no row there, or a bucket no whole batch.
    """
    read = {name: share for name, share in shares.items() if share}
    pool = mixed_tokens(read, tokens)
    batches = batches_per_cycle(config, pool, tokens_per_step, steps, f"{where}.curriculum")
    used = [length for length, count in batches.items() if count]
    problems = []
    for length in used:
        rows, wanted = sum(tokens[name][length] for name in read) // length, tokens_per_step // length
        if rows < wanted:
            problems.append(
                f"the bucket of length {length} has {rows} rows, fewer than the {wanted} of one batch; use more text, "
                "fewer tokens_per_step, or give it no share (curriculum.mixture='custom')"
            )
        lacking = [name for name in read if not tokens[name][length]] if config.mixture != "natural" else []
        problems += [
            f"no document of {name} gives a row to the bucket of length {length}, of which curriculum.mixture = "
            f"{config.mixture!r} has every source serve its share; use mixture='natural', leave out the bucket or the "
            "source, or choose other bucket lengths"
            for name in lacking
        ]
    if problems:
        raise UserError("\n".join(f"{where}: {problem}" for problem in problems))
    if config.mixture != "natural":
        return batches, {length: dict(read) for length in used}
    return batches, _raked(read, {name: tokens[name] for name in read}, {length: batches[length] for length in used})


def mixed_tokens(shares: Mapping[str, Fraction], tokens: Tokens) -> dict[int, int]:
    """Bucket length -> tokens of all sources in it, read in these shares (all above 0) until the first is used up."""
    whole = {name: sum(tokens[name].values()) for name in shares}
    scale = min(whole[name] / share for name, share in shares.items())
    lengths = sorted(next(iter(tokens.values())))
    return {
        length: ceil(sum(scale * share * Fraction(tokens[n][length], whole[n]) for n, share in shares.items()))
        for length in lengths
    }


def tokens_without_repeats(config: CurriculumConfig, shares: Mapping[str, Fraction], tokens: Tokens) -> dict[int, int]:
    """Bucket length -> tokens that can be read of it in these shares (all above 0) before a row comes again."""
    if config.mixture == "natural":
        return mixed_tokens(shares, tokens)
    lengths = sorted(next(iter(tokens.values())))
    return {length: int(min(tokens[name][length] / share for name, share in shares.items())) for length in lengths}


def _raked(
    shares: dict[str, Fraction], tokens: Tokens, batches: dict[int, int]
) -> dict[int, dict[str, Fraction | float]]:
    """Bucket length -> source -> weight: what each source holds, scaled until the sources have their shares of all
    batches although these are whole numbers (iterative proportional fitting). Plain floats and exact sums, so that
    every machine gets the same."""
    if len(shares) == 1:
        return {length: dict.fromkeys(shares, Fraction(1)) for length in batches}
    total = sum(batches.values())
    table = {name: {length: float(tokens[name][length]) for length in batches} for name in shares}
    for _ in range(ROUNDS):
        factors = {name: float(share) * total / fsum(table[name].values()) for name, share in shares.items()}
        if all(abs(factor - 1) < NEAR for factor in factors.values()):
            break
        for name, factor in factors.items():
            table[name] = {length: value * factor for length, value in table[name].items()}
        for length, count in batches.items():
            factor = count / fsum(row[length] for row in table.values())
            for row in table.values():
                row[length] *= factor
    return {length: {name: row[length] for name, row in table.items()} for length in batches}
