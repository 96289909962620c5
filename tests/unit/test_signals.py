"""Warnings: each begins where it should, says what to do, is said once, and is the same after a resume."""

from __future__ import annotations

import json
import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sqlrl_jax.signals import FLAT_STEPS, KEYS, QUIET, all_signals, kept, new_signals

FINE = {
    "outcome/malformed": 0.02,
    "outcome/correct": 0.4,
    "reward/groups_with_spread": 0.6,
    "policy/entropy": 0.5,
    "policy/logprob_diff": 1e-5,
    "policy/logprob_diff_max": 1e-4,
    "policy/skipped_steps": 0.0,
    "sql/timeouts": 0.0,
    "sql/queries": 100.0,
}


def run(steps: int, **changes) -> list[dict]:
    """A healthy run whose reward rises by 0.005 a step; a change is a value or a function of the step, from 1."""
    entries = []
    for step in range(1, steps + 1):
        entry = {**FINE, "step": step, "reward/avg_raw_reward": min(0.2 + 0.005 * step, 1.0)}
        for key, value in changes.items():
            entry[key.replace("__", "/")] = value(step) if callable(value) else value
        entries.append(entry)
    return entries


def said(entries: list[dict]) -> list[tuple[int, str]]:
    """(step, first words) of each warning."""
    return [(step, " ".join(text.split()[:3])) for step, text in all_signals(entries)]


def test_a_healthy_run_is_silent():
    assert said(run(100)) == []


@pytest.mark.parametrize(
    ("changes", "step", "words"),
    [
        (
            {"bridge__probe_logprob_diff": lambda s: 1e-5 if s < 20 else 1e-3},
            20,
            "start the rollout services again to see if it falls",
        ),
        (
            {"outcome__malformed": lambda s: 0.6 if s >= 3 else 0.1},
            3,
            "gave no usable answer; read some in trajectories/",
        ),
        ({"reward__groups_with_spread": lambda s: 0.0 if s >= 4 else 1.0}, 4, "partial_reward=0.1"),
        (
            {"reward__groups_with_spread": 0.0, "outcome__correct": 1.0},
            1,
            "the questions are too easy by now; give harder ones",
        ),
        (
            {"generate__groups_missing": lambda s: 3.0 if s >= 2 else 0.0, "generate__sample_batches": 30.0},
            2,
            "3 groups with spread were missing after 30 batches",
        ),
        ({"reward__avg_raw_reward": 0.3}, FLAT_STEPS, "the reward has not risen in 40 steps (mean 0.300, then 0.300)"),
        ({"policy__entropy": lambda s: 0.5 * 0.8**s}, 13, "entropy has fallen to"),
        (
            {"policy__logprob_diff": lambda s: 0.03 if s >= 2 else 1e-5},
            2,
            "disagree on log-probabilities by 0.03 a token",
        ),
        ({"policy__logprob_diff_max": lambda s: 2.0 if s >= 2 else 1e-4}, 2, "at most 2; are both on the same weights"),
        ({"policy__logprob_diff": lambda s: 1e-4 * s}, 18, "drift apart: 0.0016 a token, 0.0003 at the beginning"),
        ({"policy__skipped_steps": lambda s: float(s == 5)}, 5, "gradients were not finite in 1 update(s)"),
        ({"sql__timeouts": lambda s: 0.5 * s}, 12, "5% of the queries are too slow, 2% at the beginning"),
        ({"async__staleness_dropped": lambda s: 2.0 if s > 7 else 0.0}, 8, "2 group(s) were older than"),
    ],
)
def test_each_signal_begins_when_it_should(changes, step, words):
    found = all_signals(run(60, **changes))
    assert [when for when, text in found if words in text] == [step], found


def test_what_goes_on_is_said_once_and_again_only_after_it_was_away():
    away = range(20, 20 + QUIET)
    bad = run(40, outcome__malformed=lambda s: 0.1 if s in away else 0.7)
    assert [step for step, _ in said(bad)] == [1, 20 + QUIET]
    flickering = run(40, outcome__malformed=lambda s: 0.1 if s % 2 else 0.7)
    assert [step for step, _ in said(flickering)] == [2]


@pytest.mark.parametrize("reward", [0.95, 1.0])
def test_success_is_no_alarm(reward):
    entries = run(80, reward__avg_raw_reward=reward, policy__entropy=lambda s: 0.5 * 0.8**s)
    assert said(entries) == []


def test_episodes_of_earlier_weights_are_no_mismatch():
    far = {"policy__logprob_diff": lambda s: 0.01 * s, "policy__logprob_diff_max": 3.0}
    assert said(run(30, **far)) != []
    assert said(run(30, **far, async__staleness_max=1.0)) == []


def test_a_few_timeouts_among_many_queries_are_none():
    assert said(run(60, sql__timeouts=lambda s: 1.0 if s > 20 else 0.0)) == []
    assert said(run(60, sql__timeouts=5.0)) == []  # as many as ever


def test_a_resumed_run_says_what_one_that_was_never_stopped_says():
    entries = run(
        60, policy__entropy=lambda s: 0.5 * 0.9**s, sql__timeouts=lambda s: 0.3 * s, reward__avg_raw_reward=0.3
    )
    whole = all_signals(entries)
    assert len(whole) == 3
    for cut in (9, 30, 45):
        history = [kept(json.loads(json.dumps(entry))) for entry in entries[:cut]]  # what metrics.jsonl gives back
        later = []
        for entry in entries[cut:]:
            history.append(kept(entry))
            later += [(entry["step"], text) for text in new_signals(history)]
        assert later == [found for found in whole if found[0] > cut]


@given(
    st.lists(
        st.dictionaries(st.sampled_from(KEYS), st.sampled_from([0.0, 1.0, 1e9, -1.0, math.nan, math.inf, None, "x"])),
        min_size=1,
        max_size=45,
    )
)
def test_missing_and_odd_figures_are_borne(entries):
    history = [{**entry, "step": number} for number, entry in enumerate(entries, 1)]
    assert all(isinstance(text, str) and text for _, text in all_signals(history))
