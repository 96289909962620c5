"""What a run's numbers say that a person should act on: a sentence each, with what to do.

Pure functions of the training metrics so far, the lines of metrics.jsonl, so a resumed run says what one that was never
stopped would have said, and the report page finds the same. A signal is said when it begins, and again only after it was
away for QUIET steps.

Left out: stopping a run. What is wrong may be meant.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from itertools import islice
from typing import Any

Entry = Mapping[str, Any]
"""The metrics of a training step."""
History = Sequence[Entry]
"""Those of all steps up to one, which is the last."""

QUIET = 5
FLAT_STEPS = 40  # over which a reward that does not rise is flat
FLAT_RISE = 0.01
SOLVED = 0.9  # mean reward above which a flat reward or low entropy is success
WINDOW = 5  # steps that are averaged where single steps are noisy
ENTROPY_LEFT = 0.2  # of the entropy at the beginning
MISMATCH, MISMATCH_MAX = 0.02, 1.0  # |log-probability of the learner - of the rollout|, mean and largest
DRIFT, DRIFT_FLOOR = 5.0, 1e-3  # growth of the mean mismatch, from where it is more than rounding
PROBE_FLOOR = 1e-4
TIMEOUTS, TIMEOUTS_RISE = 0.02, 3.0  # share of queries, and how many times more than at the beginning


def malformed(history: History) -> str:
    share = _of(history[-1], "outcome/malformed")
    if not share > 0.5:
        return ""
    return (
        f"{share:.0%} of the episodes gave no usable answer; read some in trajectories/ "
        f"(is the format in the prompt, is max_generate_length too short?)"
    )


def no_spread(history: History) -> str:
    if _of(history[-1], "reward/groups_with_spread") != 0:
        return ""
    solved = _of(history[-1], "outcome/correct")
    what = "every group got one and the same reward, so there was nothing to learn from"
    if solved > 0.5:
        return f"{what}: the questions are too easy by now; give harder ones, or stop here"
    return (
        f"{what}; raise generator.n_samples_per_prompt or the temperature, begin with easier questions, or let answers that "
        f"find rows earn something (environment.text2sql.partial_reward=0.1)"
    )


def missing_groups(history: History) -> str:
    missing, batches = (_of(history[-1], f"generate/{name}") for name in ("groups_missing", "sample_batches"))
    if not missing > 0:
        return ""
    return (
        f"{missing:.0f} groups with spread were missing after {batches:.0f} batches of questions "
        f"(dynamic_sampling.max_sample_batches); the questions have become too easy, or are too hard"
    )


def flat_reward(history: History) -> str:
    rewards = [_of(entry, "reward/avg_raw_reward") for entry in history[-FLAT_STEPS:]]
    half = FLAT_STEPS // 2
    if len(rewards) < FLAT_STEPS or not all(map(math.isfinite, rewards)):
        return ""
    before, now = _mean(rewards[:half]), _mean(rewards[half:])
    if now - before >= FLAT_RISE or now > SOLVED:
        return ""
    return (
        f"the reward has not risen in {FLAT_STEPS} steps (mean {before:.3f}, then {now:.3f}); look at held-out accuracy, and "
        f"try a higher trainer.policy.optimizer_config.lr, more samples a question, or larger batches"
    )


def entropy_collapse(history: History) -> str:
    first, now = _ends(history, lambda entry: _of(entry, "policy/entropy"))
    reward = _mean([_of(entry, "reward/avg_raw_reward") for entry in history[-WINDOW:]])
    if not (first > 0 and now < ENTROPY_LEFT * first and reward <= SOLVED):
        return ""
    return (
        f"entropy has fallen to {now:.3g}, {now / first:.0%} of what it was at the beginning, and the reward is not there: "
        f"samples hardly differ any more; raise trainer.algorithm.eps_clip_high (0.28), lower the learning rate, or use "
        f"use_entropy_loss or policy_loss_type=clip_cov"
    )


def mismatch(history: History) -> str:
    mean, largest = (_of(history[-1], f"policy/{name}") for name in ("logprob_diff", "logprob_diff_max"))
    if _behind(history) or not (mean > MISMATCH or largest > MISMATCH_MAX):
        return ""
    return (
        f"learner and rollout disagree on log-probabilities by {mean:.2g} a token, at most {largest:.2g}; are both on the "
        f"same weights, temperature and precision? docs/algorithms.md has corrections (algorithm.off_policy_correction)"
    )


def mismatch_drift(history: History) -> str:
    first, now = _ends(history, lambda entry: _of(entry, "policy/logprob_diff"))
    if _behind(history) or not now > max(DRIFT * first, DRIFT_FLOOR):
        return ""
    return (
        f"log-probabilities of learner and rollout drift apart: {now:.2g} a token, {first:.2g} at the beginning; a push that "
        f"loses something adds up, so look at bridge/*, start the rollout services again, and compare"
    )


def _behind(history: History) -> bool:
    """Whether episodes were sampled with other weights than those they trained, which alone makes a difference."""
    return _of(history[-1], "async/staleness_max") > 0


def probe_drift(history: History) -> str:
    first, now = _ends(history, lambda entry: _of(entry, "bridge/probe_logprob_diff"))
    if not now > max(DRIFT * first, PROBE_FLOOR):
        return ""
    return (
        f"after a push the engines' log-probabilities of the same tokens lie {now:.2g} from the learner's, {first:.2g} at "
        f"the beginning: something made from the weights may be stale; start the rollout services again to see if it falls"
    )


def stale(history: History) -> str:
    dropped = _of(history[-1], "async/staleness_dropped")
    if not dropped > 0:
        return ""
    return (
        f"{dropped:.0f} group(s) were older than trainer.max_staleness allows, played for nothing: "
        f"episodes take longer than the updates beside them; raise max_staleness, add rollout services, or shorten episodes"
    )


def timeouts(history: History) -> str:
    first, now = _ends(history, lambda entry: _share(entry, "sql/timeouts", "sql/queries"))
    if not (now > TIMEOUTS and now > TIMEOUTS_RISE * first):
        return ""
    return (
        f"{now:.0%} of the queries are too slow, {first:.0%} at the beginning: the model learns to ask too much; read some "
        f'in trajectories/ ("status": "timeout"), or raise environment.text2sql.max_vm_steps and timeout if they are fair'
    )


def skipped(history: History) -> str:
    count = _of(history[-1], "policy/skipped_steps")
    return f"gradients were not finite in {count:.0f} update(s), which were skipped" if count > 0 else ""


SIGNALS: tuple[Callable[[History], str], ...] = (
    malformed,
    no_spread,
    missing_groups,
    flat_reward,
    entropy_collapse,
    mismatch,
    mismatch_drift,
    probe_drift,
    stale,
    timeouts,
    skipped,
)
KEYS = (
    *("outcome/malformed", "outcome/correct", "reward/groups_with_spread", "reward/avg_raw_reward", "policy/entropy"),
    *("policy/logprob_diff", "policy/logprob_diff_max", "policy/skipped_steps", "sql/timeouts", "sql/queries"),
    *("generate/groups_missing", "generate/sample_batches", "async/staleness_dropped", "async/staleness_max"),
    "bridge/probe_logprob_diff",
)
"""All metrics that the signals read."""


def new_signals(history: History) -> list[str]:
    """What begins to hold with the last step of `history`."""
    out = []
    for signal in SIGNALS:
        text = signal(history)
        earlier = range(max(1, len(history) - QUIET), len(history))
        if text and not any(signal(history[:count]) for count in earlier):
            out.append(text)
    return out


def all_signals(history: History) -> list[tuple[int, str]]:
    """(step, sentence) of everything that was said over a run."""
    return [(int(e["step"]), text) for n, e in enumerate(history, 1) for text in new_signals(history[:n])]


def kept(entry: Entry) -> dict[str, Any]:
    """What the signals need of a step's metrics."""
    return {key: entry[key] for key in KEYS if key in entry}


def _of(entry: Entry, key: str) -> float:
    """A metric; NaN where there is none, with which every comparison is false."""
    value = entry.get(key)
    return float(value) if isinstance(value, (int, float)) else math.nan


def _share(entry: Entry, part: str, whole: str) -> float:
    total = _of(entry, whole)
    return _of(entry, part) / total if total > 0 else math.nan


def _ends(history: History, figure: Callable[[Entry], float]) -> tuple[float, float]:
    """Means over the first and the last WINDOW steps that have the figure; NaN for a run too short to tell them apart."""
    if len(history) < 2 * WINDOW:
        return math.nan, math.nan
    there = (value for entry in history if math.isfinite(value := figure(entry)))
    back = (value for entry in reversed(history) if math.isfinite(value := figure(entry)))
    return _mean(list(islice(there, WINDOW))), _mean(list(islice(back, WINDOW)))


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values) if values else math.nan
