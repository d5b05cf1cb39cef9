import dataclasses
from fractions import Fraction

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mixlab.schedule.mixture import Mixture
from mixlab.schedule.shares import SourceRequest, token_shares

MILLION = 10**6

# OLMo 2, table 13 and the released file lists. Per mix: tokens read of the web and of peS2o, in millions; copies of
# FLAN, the Q&A, Wikipedia and mathematics; shares in per cent. Of mathematics "two students" is read once in every mix.
SIZES = {"web": 752_000, "pes2o": 58_550, "flan": 17_080, "qa": 1_260, "wiki": 3_660, "math": 7_290, "students": 3_410}
DOLMINO = {
    "50B": ((24_310, 3_010), (0.5, 1, 1, 1), [47.2, 5.85, 16.6, 2.45, 7.11, 20.8]),
    "100B": ((51_470, 9_760), (1, 2, 1, 2), [50.2, 9.52, 16.7, 2.47, 3.57, 17.5]),
    "300B": ((156_260, 58_550), (2, 4, 4, 4), [51.9, 19.4, 11.3, 1.68, 4.86, 10.8]),
}


@pytest.mark.parametrize("mix", DOLMINO)
def test_dolmino_compositions(mix):
    amounts, copies, per_cent = DOLMINO[mix]
    requests = {n: SourceRequest(tokens=t * MILLION) for n, t in zip(["web", "pes2o"], amounts, strict=True)}
    requests |= {n: SourceRequest(epochs=c) for n, c in zip(["flan", "qa", "wiki", "math"], copies, strict=True)}
    requests["students"] = SourceRequest(epochs=1)
    sizes = {name: size * MILLION for name, size in SIZES.items()}
    total = int(sum(r.tokens or r.epochs * sizes[name] for name, r in requests.items()))
    shares, problems = token_shares(requests, total, sizes)
    assert problems == [] and sum(s.share for s in shares.values()) == 1
    got = {name: 100 * float(s.share) for name, s in shares.items()}
    got["math"] += got.pop("students")
    assert list(got.values()) == pytest.approx(per_cent, abs=0.1)
    assert tuple(shares[name].epochs for name in ("flan", "qa", "wiki", "math")) == copies


def test_weights_divide_what_amounts_leave_over():
    requests = {
        "skill": SourceRequest(tokens=100),
        "books": SourceRequest(epochs=2.5),
        "web": SourceRequest(weight=3.0),
        "code": SourceRequest(weight=1.0),
    }
    shares, problems = token_shares(requests, 1000, {"skill": 50, "books": 80, "web": 10_000, "code": 100})
    assert problems == []
    assert {name: s.tokens for name, s in shares.items()} == {"skill": 100, "books": 200, "web": 525, "code": 175}
    assert (shares["skill"].epochs, shares["books"].epochs, shares["code"].epochs) == (2, 2.5, 1.75)


def test_a_microanneal_reads_its_domain_once_beside_the_web():
    """A domain of D tokens with a web share w needs a stage of D / (1 - w) tokens."""
    shares, problems = token_shares(
        {"domain": SourceRequest(epochs=1), "web": SourceRequest(weight=1)}, 2000, {"domain": 1000, "web": 10**9}
    )
    assert problems == [] and shares["domain"].share == shares["web"].share == Fraction(1, 2)


def over(rule, **others):
    requests = {
        "web": SourceRequest(weight=0.5),
        "flan": SourceRequest(weight=0.2),
        "math": SourceRequest(weight=0.3, max_epochs=2, over_limit=rule),
    }
    requests |= others
    return token_shares(
        requests, 1000, {"web": 1600, "flan": 300, "math": 100} | dict.fromkeys(others, 300), "stages.1.mixture"
    )


def test_a_limit_refuses_with_the_numbers():
    shares, (problem,) = over("refuse")
    assert shares == {} and problem.startswith("stages.1.mixture.math: 300 tokens are asked of it, 3 epochs of its 100")
    assert "max_epochs = 2 allows 200" in problem


def test_a_limit_renormalises():
    shares, problems = over("renormalise")
    assert problems == []
    assert shares["math"].share == Fraction(1, 5) and shares["math"].limited and not shares["web"].limited
    assert shares["web"].share == Fraction(4, 7) and shares["flan"].share == Fraction(8, 35)  # 800 as 5 : 2


def test_taking_over_can_reach_the_next_limit():
    shares, problems = over("renormalise", flan=SourceRequest(weight=0.2, max_epochs=0.7, over_limit="renormalise"))
    assert problems == []
    assert {name: s.tokens for name, s in shares.items()} == {"web": 590, "flan": 210, "math": 200}
    assert shares["flan"].limited


def test_a_limit_may_be_waived():
    shares, problems = over("repeat")
    assert problems == [] and shares["math"].epochs == 3 and not shares["math"].limited


def test_amounts_are_limited_too():
    request = SourceRequest(epochs=4, max_epochs=2, over_limit="renormalise")
    shares, problems = token_shares({"a": request, "b": SourceRequest(weight=1)}, 1000, {"a": 100, "b": 5000})
    assert problems == [] and shares["a"].tokens == 200 and shares["a"].limited and shares["b"].tokens == 800
    _, (problem,) = token_shares(
        {"a": dataclasses.replace(request, over_limit="refuse"), "b": SourceRequest(weight=1)},
        1000,
        {"a": 100, "b": 5000},
    )
    assert "mixture.a: 400 tokens are asked of it, 4 epochs of its 100" in problem


def test_a_published_mixture_that_cannot_be_served():
    requests = {"math": SourceRequest(weight=0.5, max_epochs=4), "web": SourceRequest(weight=0.5)}
    _, (problem,) = token_shares(requests, 1000, {"math": 100, "web": 1600})
    assert "500 tokens are asked" in problem and "allows 400" in problem


def test_a_published_mixture_dealt_in_rows():
    """13 steps of 10 rows of 8 tokens: 50, 20 and 30 per cent, to within a row."""
    requests = {
        "web": SourceRequest(weight=0.5, max_epochs=1),
        "flan": SourceRequest(weight=0.2, max_epochs=1),
        "math": SourceRequest(weight=0.3, max_epochs=4),
    }
    shares, problems = token_shares(requests, 1040, {"web": 1600, "flan": 300, "math": 100})
    assert problems == []
    mixture = Mixture({name: s.share for name, s in shares.items()}, 10, 130)
    assert dict(zip(mixture.names, mixture.counts(130).tolist(), strict=True)) == {"web": 65, "flan": 26, "math": 39}


def test_amounts_that_do_not_fit_the_stage():
    amounts = {"a": SourceRequest(tokens=600), "b": SourceRequest(epochs=2)}
    _, (problem,) = token_shares(amounts, 1000, {"a": 900, "b": 300})
    assert "add up to 1,200 tokens, but the stage has 1,000" in problem
    _, (problem,) = token_shares(amounts, 1400, {"a": 900, "b": 300})
    assert "supply 1,200 of the stage's 1,400 tokens (a 600, b 600)" in problem
    shares, problems = token_shares(amounts, 1216, {"a": 900, "b": 300}, slack_tokens=32)
    assert problems == [] and shares["a"].share == shares["b"].share == Fraction(1, 2)


def test_every_source_at_its_limit_is_not_enough():
    request = SourceRequest(weight=1, max_epochs=1, over_limit="renormalise")
    _, (problem,) = token_shares({"a": request, "b": request}, 1000, {"a": 300, "b": 400})
    assert "supply 700 of the stage's 1,000" in problem


@pytest.mark.parametrize(
    ("request_", "message"),
    [
        (SourceRequest(), "exactly one of weight, tokens and epochs; none is set"),
        (SourceRequest(weight=1, epochs=1), "weight and epochs is set"),
        (SourceRequest(weight=-1.0), "mixture.a.weight = -1.0"),
        (SourceRequest(tokens=float("inf")), "mixture.a.tokens = inf"),
        (SourceRequest(weight=1, max_epochs=0), "mixture.a.max_epochs = 0"),
        (SourceRequest(weight=1, over_limit="stop"), "mixture.a.over_limit = 'stop'"),
        (SourceRequest(weight=0), "no source is asked for anything"),
    ],
)
def test_requests_that_mean_nothing(request_, message):
    shares, problems = token_shares({"a": request_}, 1000, {"a": 100}, slack_tokens=1000)
    assert shares == {} and any(message in problem for problem in problems)


def test_an_empty_source_and_an_empty_mixture():
    assert "has no tokens" in token_shares({"a": SourceRequest(weight=1)}, 10, {"a": 0})[1][0]
    assert "names no source" in token_shares({}, 10, {})[1][0]


REQUESTS = st.builds(
    SourceRequest,
    weight=st.just(0.0) | st.floats(1e-9, 10),
    max_epochs=st.one_of(st.none(), st.floats(0.1, 5)),
    over_limit=st.sampled_from(["renormalise", "repeat"]),
)


@settings(deadline=None)
@given(st.lists(st.tuples(REQUESTS, st.integers(1, 10_000)), min_size=1, max_size=6), st.integers(1, 10_000))
def test_limits_hold_and_the_rest_keep_their_proportions(drawn, stage_tokens):
    requests = {f"s{i}": request for i, (request, _) in enumerate(drawn)}
    sizes = {f"s{i}": size for i, (_, size) in enumerate(drawn)}
    shares, problems = token_shares(requests, stage_tokens, sizes)
    if problems:
        room = [r.max_epochs * sizes[n] for n, r in requests.items() if r.weight and r.max_epochs is not None]
        unlimited = [r for r in requests.values() if r.weight and (r.max_epochs is None or r.over_limit == "repeat")]
        assert not unlimited and sum(room) < stage_tokens + 1e-6
        return
    assert sum(s.share for s in shares.values()) == 1
    free = [n for n in requests if not shares[n].limited and requests[n].weight]
    for name, request in requests.items():
        if request.over_limit == "renormalise" and request.max_epochs is not None:
            assert shares[name].epochs <= request.max_epochs * (1 + 1e-12)
        if shares[name].limited:
            assert shares[name].epochs == pytest.approx(request.max_epochs)
    rates = [float(shares[n].share) / requests[n].weight for n in free]
    assert rates == pytest.approx(rates[:1] * len(rates))
