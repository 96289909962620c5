"""What several samples of one question are worth together, and how sure an accuracy is: pure functions of counts.

* pass@k: would k samples have held a right one? The unbiased estimator of Chen et al. (arXiv:2107.03374).
* Majority voting: self-consistency (Wang et al., arXiv:2203.11171) with the results of executed queries as votes, as
  Shi et al. (arXiv:2204.11454) choose among programs. Equal results are one candidate however the SQL was written.
* Wilson's interval (1927) for the accuracy, with the samples of one question counted as the cluster they are.

Left out: votes weighted by the model's own probabilities, and significance tests between two models.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence

import numpy as np

Z95 = 1.959963984540054
"""Standard normal quantile of a two-sided 95% interval."""


def pass_at_k(correct: int, n: int, k: int) -> float:
    """Chance that at least one of k of the n samples is correct, without bias."""
    if n - correct < k:
        return 1.0
    return float(1.0 - np.prod(1.0 - k / np.arange(n - correct + 1, n + 1)))


def ks(n: int) -> list[int]:
    """The k for which pass@k is shown: powers of two below n, and n."""
    powers = [1 << i for i in range(n.bit_length()) if 1 << i < n]
    return [*powers, n]


def majority(answers: Sequence[str]) -> int | None:
    """The sample that represents the most frequent answer: its earliest. An empty answer is no vote.

    Of equally frequent answers the one that was given first wins. None if nobody votes.
    """
    votes = Counter(answer for answer in answers if answer)
    if not votes:
        return None
    most = max(votes.values())
    return next(place for place, answer in enumerate(answers) if votes[answer] == most)


def wilson(p: float, n: float) -> tuple[float, float]:
    """95% interval of a share p that was seen in n independent trials; n need not be whole. (0, 1) for n = 0."""
    if n <= 0:
        return 0.0, 1.0
    z2 = Z95 * Z95
    centre = (p + z2 / (2 * n)) / (1 + z2 / n)
    half = Z95 / (1 + z2 / n) * math.sqrt(p * (1 - p) / n + z2 / (4 * n * n))
    return max(0.0, min(p, centre - half)), min(1.0, max(p, centre + half))


def mean_interval(scores: Sequence[float], intervals: Sequence[tuple[float, float]]) -> tuple[float, float]:
    """95% interval of the plain mean of independent scores from each one's own interval.

    The method of variance estimates recovery (Zou and Donner 2008): distances to the bounds add up as errors do, so a set
    without a single right answer still counts as uncertain.
    """
    count, mean = len(scores), sum(scores) / len(scores)
    below = math.sqrt(sum((p - low) ** 2 for p, (low, _) in zip(scores, intervals, strict=True))) / count
    above = math.sqrt(sum((high - p) ** 2 for p, (_, high) in zip(scores, intervals, strict=True))) / count
    return max(0.0, mean - below), min(1.0, mean + above)


def independent_trials(shares: Sequence[float], samples: int) -> float:
    """How many independent trials an accuracy is worth that is the mean of each question's share of right samples.

    Kish's effective sample size: p (1 - p) over the variance of the mean. One sample a question gives the number of
    questions; more give at most samples times as many, fewer the more the samples of a question agree.
    """
    count = len(shares)
    p = sum(shares) / count if count else 0.0
    variance = sum((share - p) ** 2 for share in shares) / count if count else 0.0
    if samples <= 1 or not 0 < p < 1:
        return float(count)
    largest = float(count * samples)
    return largest if variance == 0 else min(largest, count * p * (1 - p) / variance)
