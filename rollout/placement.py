"""Which service plays which group, a group being one question with all its samples.

A group stays together because its samples share a prompt: the engine computes that once. Groups go to the service that has
least to do, so one that is slower gets fewer when they are asked for one after another. Ties go to the service that comes
first, so a batch dealt out at once is dealt out the same way every time.

Pure functions. Left out: weights for services of different speed (a batch that must repeat exactly is dealt out in equal
parts; otherwise what a service has left says how fast it is); choices that depend on addresses (a port that changes would
change who plays what, and with it the last digits of a run); memory of where a question was before (new weights have emptied
the engine's cache since).
"""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TypeVar

S = TypeVar("S", bound=Hashable)


@dataclass(frozen=True)
class Load:
    """What a service has to do: episodes it was asked for that have not come."""

    episodes: int = 0


def choose(loads: Mapping[S, Load]) -> S | None:
    """The service that the next group goes to, the first of those with least to do; None when there is none."""
    return min(loads, key=lambda service: loads[service].episodes, default=None)


def deal(groups: Sequence[tuple[str, int]], loads: Mapping[S, Load]) -> dict[str, S]:
    """Places (group, its episodes) one after another, each load for the next; places none when there is no service."""
    now, placed = dict(loads), {}
    for group, episodes in groups:
        service = choose(now)
        if service is None:
            return {}
        placed[group] = service
        now[service] = replace(now[service], episodes=now[service].episodes + episodes)
    return placed
