"""Estimators over several samples, against slow and obvious versions."""

import math
from itertools import combinations

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from sqlrl_jax.voting import Z95, independent_trials, ks, majority, mean_interval, pass_at_k, wilson

SHARE = st.floats(0, 1)


@given(st.integers(1, 8).flatmap(lambda n: st.tuples(st.just(n), st.integers(0, n), st.integers(1, n))))
def test_pass_at_k_counts_the_subsets_with_a_success(case):
    n, correct, k = case
    subsets = list(combinations([i < correct for i in range(n)], k))
    assert math.isclose(pass_at_k(correct, n, k), sum(map(any, subsets)) / len(subsets), abs_tol=1e-12)


def test_pass_at_k_all_correct():
    assert pass_at_k(3, 3, 2) == 1.0


@given(st.integers(1, 100))
def test_ks_are_powers_of_two_and_n(n):
    assert ks(n) == sorted({k for k in (1, 2, 4, 8, 16, 32, 64) if k <= n} | {n})


def slow_majority(answers):
    """Counts for every answer in the order they were given; only a strictly larger count replaces the best."""
    best, place = 0, None
    for i, answer in enumerate(answers):
        count = sum(other == answer for other in answers)
        if answer != "" and count > best:
            best, place = count, i
    return place


@given(st.lists(st.sampled_from(["", "a", "b", "c"]), max_size=10))
def test_majority(answers):
    assert majority(answers) == slow_majority(answers)


@pytest.mark.parametrize(
    ("answers", "chosen"),
    [
        ([], None),
        (["", ""], None),
        (["", "a"], 1),
        (["a", "b", "b"], 1),
        (["a", "b", "b", "a"], 0),
        (["", "", "", "a"], 3),
    ],
)
def test_majority_of_a_few(answers, chosen):
    assert majority(answers) == chosen


@given(st.integers(0, 500), st.integers(1, 500))
def test_wilson_holds_the_shares_that_the_score_test_accepts(right, n):
    """The interval's ends are where |p - x| = z sqrt(x (1 - x) / n)."""
    assume(right <= n)
    p = right / n
    low, high = wilson(p, n)
    assert 0 <= low <= p <= high <= 1
    for end in (low, high):
        if end not in (p, 0.0, 1.0):
            assert math.isclose(abs(p - end), Z95 * math.sqrt(end * (1 - end) / n), rel_tol=1e-6, abs_tol=1e-9)


def test_wilson_known_values():
    low, high = wilson(0.5, 100)
    assert (round(low, 4), round(high, 4)) == (0.4038, 0.5962)
    low, high = wilson(0.0, 10)
    assert (low, round(high, 4)) == (0.0, 0.2775)
    assert wilson(0.3, 0) == (0.0, 1.0)


@given(st.lists(st.integers(0, 4), min_size=1, max_size=30))
def test_samples_of_one_question_are_worth_between_one_and_all_of_them(right):
    trials = independent_trials([count / 4 for count in right], 4)
    assert len(right) * (1 - 1e-12) <= trials <= 4 * len(right)


@given(st.lists(st.booleans(), min_size=1, max_size=30), st.integers(1, 8))
def test_samples_that_always_agree_are_worth_one(right, samples):
    trials = independent_trials([float(r) for r in right], samples)
    assert math.isclose(trials, len(right))


def test_samples_that_never_depend_on_the_question_are_worth_all():
    assert independent_trials([0.5] * 20, 8) == 160


@given(st.lists(st.tuples(SHARE, st.integers(1, 200)), min_size=1, max_size=5))
def test_interval_of_a_mean(sets):
    scores = [p for p, _ in sets]
    intervals = [wilson(p, n) for p, n in sets]
    low, high = mean_interval(scores, intervals)
    mean = sum(scores) / len(scores)
    widest = max(top - bottom for bottom, top in intervals)
    assert -1e-12 <= low <= mean + 1e-12
    assert mean - 1e-12 <= high <= 1 + 1e-12
    assert high - low <= 2 * widest + 1e-12
    if len(sets) == 1:
        assert low == pytest.approx(intervals[0][0], abs=1e-12)
        assert high == pytest.approx(intervals[0][1], abs=1e-12)


def test_a_set_without_a_right_answer_stays_uncertain():
    low, high = mean_interval([0.0, 0.0], [wilson(0.0, 10)] * 2)
    assert low == 0.0
    assert 0.1 < high < wilson(0.0, 10)[1]
