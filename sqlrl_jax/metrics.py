"""What a batch of episodes says, as flat metrics. Names follow the reference (`reward/*`, `generate/*`, `eval/*`)."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Sequence

import numpy as np

from rollout.types import OUTCOMES, Trajectory


def looked_first(episode: Trajectory) -> bool:
    """True when a query ran without error before the episode's last action."""
    return any(turn.status == "ok" for turn in episode.turns[:-1])


def by_task(episodes: Iterable[Trajectory]) -> dict[str, list[Trajectory]]:
    groups: dict[str, list[Trajectory]] = defaultdict(list)
    for episode in episodes:
        groups[episode.task_id].append(episode)
    return dict(groups)


def pass_at_k(correct: int, n: int, k: int) -> float:
    """Chance that at least one of k of the n samples is correct, without bias (Chen et al., arXiv:2107.03374)."""
    if n - correct < k:
        return 1.0
    return float(1.0 - np.prod(1.0 - k / np.arange(n - correct + 1, n + 1)))


def rollout_metrics(episodes: Sequence[Trajectory]) -> dict[str, float]:
    """Means over the episodes of one training step; empty for no episodes."""
    if not episodes:
        return {}
    groups = [[e.reward for e in group] for group in by_task(episodes).values()]
    queries = [turn for e in episodes for turn in e.turns if turn.sql and turn.status != "solution"]
    sampled = sum(sum(e.loss_mask) for e in episodes)
    out = {
        "reward/avg_raw_reward": _mean(e.reward for e in episodes),
        "reward/avg_pass_at_n": _mean(max(rewards) > 0 for rewards in groups),
        "reward/groups_with_spread": _mean(max(rewards) > min(rewards) for rewards in groups),
        "generate/episodes": float(len(episodes)),
        "generate/tokens": float(sampled),
        "generate/avg_num_tokens": sampled / len(episodes),
        "generate/context_tokens": _mean(len(e.prompt_ids) + len(e.response_ids) for e in episodes),
        "generate/turns": _mean(len(e.turns) for e in episodes),
        "generate/looked_first": _mean(looked_first(e) for e in episodes),
        "sql/queries": float(len(queries)),
        "sql/error_rate": _mean(turn.status in ("error", "denied") for turn in queries),
        "sql/timeouts": float(sum(turn.status == "timeout" for turn in queries)),
    }
    return out | {f"outcome/{o}": _mean(e.outcome == o for e in episodes) for o in OUTCOMES}


def eval_metrics(episodes: Sequence[Trajectory]) -> dict[str, float]:
    """Accuracy in all and by source, pass@k for every power of two up to the samples taken, outcomes, habits."""
    if not episodes:
        return {"eval/questions": 0.0}
    groups = by_task(episodes)
    samples = min(len(group) for group in groups.values())
    out = {
        "eval/questions": float(len(groups)),
        "eval/samples": float(samples),
        "eval/turns": _mean(len(e.turns) for e in episodes),
        "eval/looked_first": _mean(looked_first(e) for e in episodes),
    }
    sources: dict[str, list[list[Trajectory]]] = defaultdict(list)
    for group in groups.values():
        sources["all"].append(group)
        sources[group[0].source].append(group)
    for source, members in sorted(sources.items()):
        right = [sum(e.outcome == "correct" for e in group) for group in members]
        out[f"eval/{source}/avg_score"] = _mean(c / len(g) for c, g in zip(right, members, strict=True))
        out[f"eval/{source}/pass_at_n"] = _mean(c > 0 for c in right)
        k = 2
        while source == "all" and k <= samples:
            out[f"eval/all/pass_at_{k}"] = _mean(pass_at_k(c, len(g), k) for c, g in zip(right, members, strict=True))
            k *= 2
    return out | {f"eval/outcome/{o}": _mean(e.outcome == o for e in episodes) for o in OUTCOMES}


def _mean(values: Iterable[float]) -> float:
    items = list(values)
    return float(np.mean(items)) if items else 0.0
