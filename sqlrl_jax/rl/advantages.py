"""How good each episode was, relative to the other episodes of its question.

Plain NumPy in float64 on the host: a batch has one number an episode, so nothing here is worth a device. What needs a
critic or a running statistic is left out: these estimators see one batch of rewards and nothing else.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence

import numpy as np
from jaxtyping import Float

EPSILON = 1e-6


def grpo(
    rewards: Float[np.ndarray, " episodes"], groups: Sequence[Hashable], norm_by_std: bool = True
) -> Float[np.ndarray, " episodes"]:
    """Group-relative advantages (arXiv:2402.03300): (R - mean) / (std + 1e-6), std unbiased, inside each group.

    `groups` names the group of each episode (its question). A group of one has mean 0 and std 1, so its advantage is its
    reward. `norm_by_std=False` leaves the division out (Dr. GRPO, arXiv:2503.20783). Non-finite rewards raise ValueError.
    """
    values = np.asarray(rewards, np.float64)
    if values.shape != (len(groups),):
        raise ValueError(f"rewards have shape {values.shape} for {len(groups)} groups: expected one reward an episode")
    if not np.isfinite(values).all():
        raise ValueError(f"reward of episode {int(np.flatnonzero(~np.isfinite(values))[0])} is not finite")
    members: dict[Hashable, list[int]] = {}
    for i, group in enumerate(groups):
        members.setdefault(group, []).append(i)
    out = np.empty_like(values)
    for index in members.values():
        reward = values[index]
        if len(index) > 1 and (reward == reward[0]).all():  # exactly, where the mean of equal numbers may be off a bit
            out[index] = 0.0
            continue
        mean, std = (reward.mean(), reward.std(ddof=1)) if len(index) > 1 else (0.0, 1.0)
        out[index] = (reward - mean) / (std + EPSILON if norm_by_std else 1.0)
    return out.astype(np.float32)
