"""Each episode of a batch is counted exactly once, whatever comes and however often."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rollout.ledger import Ledger
from rollout.types import Task, Trajectory


def task(name):
    return Task(name, "test", {})


def trajectory(name, sample, outcome="correct", error=""):
    return Trajectory(name, "test", sample, [], [], [], [], [], 0.0, outcome, "solution", error=error)


arrivals = st.lists(
    st.tuples(st.sampled_from("abcx"), st.integers(-1, 3), st.sampled_from(["correct", "infrastructure"]))
)


@given(arrivals)
def test_exactly_once(arriving):
    ledger, counted, dropped = Ledger([task(n) for n in "abc"], 3), {}, 0
    for name, sample, outcome in arriving:
        new = trajectory(name, sample, outcome)
        known = (name, sample) in counted or name == "x" or not 0 <= sample < 3
        assert ledger.accept(new) == (not known and outcome == "correct")
        dropped += known
        if not known and outcome == "correct":
            counted[name, sample] = new
    assert ledger.duplicates == dropped
    missing = {(n, s) for n in "abc" for s in ledger.missing(n)}
    assert missing == {(n, s) for n in "abc" for s in range(3)} - counted.keys()
    assert [t.id for t in ledger.incomplete([task("c"), task("a")])] == [
        n for n in "ca" if any(m[0] == n for m in missing)
    ]
    for name, sample in sorted(missing, reverse=True):
        counted[name, sample] = trajectory(name, sample)
        assert ledger.accept(counted[name, sample])
    assert ledger.result() == [counted[n, s] for n in "abc" for s in range(3)]


def test_failures_are_counted_with_their_reason():
    ledger = Ledger([task("a"), task("b")], 2)
    ledger.accept(trajectory("a", 0))
    ledger.accept(trajectory("a", 1, "infrastructure", "no database"))
    assert ledger.attempt_ended([task("a")], "gone") == [(1, "task 'a' sample 1: no database")]
    assert ledger.attempt_ended([task("a"), task("b")], "gone") == [
        (2, "task 'a' sample 1: gone"),
        (1, "task 'b' sample 0: gone"),
        (1, "task 'b' sample 1: gone"),
    ]
    assert ledger.retried == 4


def test_a_task_twice_is_refused():
    with pytest.raises(ValueError, match="'b' is twice"):
        Ledger([task("a"), task("b"), task("b")], 1)
