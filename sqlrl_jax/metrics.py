"""What a batch of episodes says, as flat metrics. Names follow the reference (`reward/*`, `generate/*`, `eval/*`)."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable, Sequence

import numpy as np

from rollout.types import OUTCOMES, Trajectory
from sqlrl_jax.rl.rewards import context_tokens
from sqlrl_jax.voting import independent_trials, ks, majority, mean_interval, pass_at_k, wilson

OWN = "environment/"
"""Prefix of the metrics of environments of one's own."""
GRADE = "grade/"
"""Prefix of an episode's metrics that are gradings besides the one that makes the reward: 1.0 passed, 0.0 did not."""


def looked_first(episode: Trajectory) -> bool:
    """True when a query ran without error before the episode's last action."""
    return any(turn.status == "ok" and turn.sql for turn in episode.turns[:-1])


def by_task(episodes: Iterable[Trajectory]) -> dict[str, list[Trajectory]]:
    groups: dict[str, list[Trajectory]] = defaultdict(list)
    for episode in episodes:
        groups[episode.task_id].append(episode)
    return dict(groups)


def rollout_metrics(episodes: Sequence[Trajectory]) -> dict[str, float]:
    """Means over the episodes of one training step; empty for no episodes."""
    if not episodes:
        return {}
    asked = by_task(episodes).values()
    groups = [[e.reward for e in group] for group in asked]
    queries = [turn for e in episodes for turn in e.turns if turn.sql and turn.status != "solution"]
    lengths = np.array([sum(e.loss_mask) for e in episodes])
    sampled, rewarded = int(lengths.sum()), np.array([e.reward > 0 for e in episodes])
    out = {
        "reward/avg_raw_reward": _mean(e.reward for e in episodes),
        "reward/avg_pass_at_n": _mean(any(e.outcome == "correct" for e in group) for group in asked),
        "reward/groups_with_spread": _mean(max(rewards) > min(rewards) for rewards in groups),
        "generate/episodes": float(len(episodes)),
        "generate/tokens": float(sampled),
        "generate/avg_num_tokens": sampled / len(episodes),
        "generate/min_num_tokens": float(lengths.min()),
        "generate/max_num_tokens": float(lengths.max()),
        "generate/std_num_tokens": float(lengths.std()),
        "generate/avg_tokens_non_zero_rewards": _mean(lengths[rewarded]),
        "generate/avg_tokens_zero_rewards": _mean(lengths[~rewarded]),
        "generate/context_tokens": _mean(context_tokens(e) for e in episodes),
        "generate/turns": _mean(len(e.turns) for e in episodes),
        "generate/looked_first": _mean(looked_first(e) for e in episodes),
        "sql/queries": float(len(queries)),
        "sql/error_rate": _mean(turn.status in ("error", "denied") for turn in queries),
        "sql/timeouts": float(sum(turn.status == "timeout" for turn in queries)),
    }
    return out | {f"outcome/{o}": _mean(e.outcome == o for e in episodes) for o in OUTCOMES} | _own(episodes)


def eval_metrics(episodes: Sequence[Trajectory]) -> dict[str, float]:
    """Accuracy in all and by source (a source is a set of questions), what several samples are worth, outcomes, habits.

    `eval/all/*` is over all questions, `eval/mean_over_sets` the plain mean of the sets' accuracies, as in published
    tables. Failures of infrastructure say nothing about the model and are left out.
    """
    episodes = [episode for episode in episodes if episode.outcome != "infrastructure"]
    if not episodes:
        return {"eval/questions": 0.0}
    groups = by_task(episodes)
    samples = min(len(group) for group in groups.values())
    sources: dict[str, list[list[Trajectory]]] = defaultdict(list)
    for group in groups.values():
        sources[set_name(group[0].source)].append(sorted(group, key=lambda episode: episode.sample))
    queries = [turn for e in episodes for turn in e.turns if turn.sql and turn.status not in ("solution", "unused")]
    out = {
        "eval/questions": float(len(groups)),
        "eval/samples": float(samples),
        "eval/turns": _mean(len(e.turns) for e in episodes),
        "eval/looked_first": _mean(looked_first(e) for e in episodes),
        "eval/avg_reward": _mean(e.reward for e in episodes),
        "eval/sql_queries": float(len(queries)),
        "eval/sql_errors": _mean(turn.status in ("error", "denied") for turn in queries),
        "eval/sql_timeouts": _mean(turn.status == "timeout" for turn in queries),
    }
    everything = [group for members in sources.values() for group in members]
    names = _gradings(episodes)
    for source, members in [("all", everything), *sources.items()]:
        out |= {f"eval/{source}/{key}": value for key, value in _set_metrics(members, samples, names).items()}
    scores = [out[f"eval/{source}/avg_score"] for source in sources]
    bounds = [(out[f"eval/{source}/ci_low"], out[f"eval/{source}/ci_high"]) for source in sources]
    out["eval/mean_over_sets"] = _mean(scores)
    out["eval/mean_over_sets_ci_low"], out["eval/mean_over_sets_ci_high"] = mean_interval(scores, bounds)
    out |= {f"eval/outcome/{o}": _mean(e.outcome == o for e in episodes) for o in OUTCOMES}
    return out | {f"eval/{name}": value for name, value in _own(episodes).items()}


def set_name(source: str) -> str:
    """What a set is called in keys and tables: `all` means all questions there."""
    return "all (set)" if source == "all" else source


def _own(episodes: Sequence[Trajectory]) -> dict[str, float]:
    """What an environment of one's own measured: means over the episodes that have the figure."""
    names = sorted({name for e in episodes for name in e.metrics if name.startswith(OWN)})
    return {name: _mean(e.metrics[name] for e in episodes if name in e.metrics) for name in names}


def _set_metrics(groups: Sequence[Sequence[Trajectory]], samples: int, gradings: Sequence[str]) -> dict[str, float]:
    """One set's figures; each of `groups` holds a question's episodes in the order of their samples."""
    right = [sum(e.outcome == "correct" for e in group) for group in groups]
    shares = [count / len(group) for count, group in zip(right, groups, strict=True)]
    score = _mean(shares)
    trials = independent_trials(shares, samples)
    low, high = wilson(score, trials)
    out = {
        "avg_score": score,
        "pass_at_n": _mean(count > 0 for count in right),
        "questions": float(len(groups)),
        "stderr": math.sqrt(score * (1 - score) / trials),
        "ci_low": low,
        "ci_high": high,
        "turns": _mean(len(e.turns) for group in groups for e in group),
    }
    if samples > 1:
        for k in ks(samples):
            out[f"pass_at_{k}"] = _mean(pass_at_k(c, len(g), k) for c, g in zip(right, groups, strict=True))
        if _has_answers(groups):
            out["maj_at_n"] = _mean(_voted_right(group) for group in groups)
    for name in gradings:
        graded = [verdicts for group in groups if (verdicts := _verdicts(group, name))]
        out[name] = _mean(_mean(verdicts) for verdicts in graded)
        out[f"graded/{name.removeprefix(GRADE)}"] = float(len(graded))
    return out


def _verdicts(group: Sequence[Trajectory], name: str) -> list[float]:
    """What a grading says of a question's episodes, answered or not. Those of which the environment says other things
    alone can't be graded (a test suite without this database); where it says nothing (a prompt too long), none passed."""
    return [e.metrics.get(name, 0.0) for e in group if name in e.metrics or "sql/queries" not in e.metrics]


def _gradings(episodes: Iterable[Trajectory]) -> list[str]:
    """Names of the gradings that an environment reported beside its reward."""
    return sorted({name for e in episodes for name in e.metrics if name.startswith(GRADE)})


def _answer(episode: Trajectory) -> str:
    return episode.turns[-1].answer if episode.turns else ""


def _has_answers(groups: Sequence[Sequence[Trajectory]]) -> bool:
    """False for an environment that does not tell what its answers were: there is nothing to vote with."""
    episodes = [e for group in groups for e in group]
    return any(_answer(e) for e in episodes) or not any(e.outcome == "correct" for e in episodes)


def _voted_right(group: Sequence[Trajectory]) -> bool:
    chosen = majority([_answer(e) for e in group])
    return chosen is not None and group[chosen].outcome == "correct"


def _mean(values: Iterable[float]) -> float:
    items = list(values)
    return float(np.mean(items)) if items else 0.0
