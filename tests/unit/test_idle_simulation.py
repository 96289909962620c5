"""The simulation behind the table of idle shares, where the answer is known."""

import pytest

from benchmarks.idle_simulation import Cluster, simulate


def test_episodes_of_one_length_take_turns_with_the_update_or_go_on_beside_it():
    turns = simulate(Cluster(4, slots=8, samples=4), [100.0], staleness=0)
    assert (turns.seconds, turns.learner_idle, turns.rollout_idle) == pytest.approx((200.0, 0.5, 0.5))
    beside = simulate(Cluster(4, slots=8, samples=4), [100.0], staleness=1)
    assert (beside.seconds, beside.learner_idle) == pytest.approx((100.0, 0.0), abs=1e-6)
    assert beside.rollout_idle == pytest.approx(0.0, abs=1e-6)
    assert turns.dropped == beside.dropped == 0.0


def test_long_episodes_make_synchronous_runs_wait_and_short_bounds_drop():
    lengths = [50.0] * 19 + [1000.0]
    waits = simulate(Cluster(8), lengths, staleness=0)
    assert waits.seconds == pytest.approx(1000.0 + sum(lengths) / 20)  # every batch of 256 episodes has a long one
    bounds = [simulate(Cluster(8), lengths, staleness) for staleness in (1, 4, 16)]
    assert [b.seconds for b in bounds] == sorted((b.seconds for b in bounds), reverse=True)
    assert bounds[0].dropped > 0
    assert bounds[2].dropped < bounds[1].dropped
