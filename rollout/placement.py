"""Which service plays which group, a group being one question with all its samples.

A group stays together because its samples share a prompt: the engine computes that once. Groups go to the service that has
least to do, so one that is slower gets fewer when they are asked for one after another; a group that was somewhere before
goes there again, where its prompt may still be cached, unless that service has much more to do than another. Ties go to the
service that comes first, so a batch dealt out at once is dealt out the same way every time.

Pure functions. Left out: weights for services of different speed (a batch that must repeat exactly is dealt out in equal
parts; otherwise what a service has left says how fast it is) and choices that depend on addresses (a port that changes
would change who plays what, and with it the last digits of a run).
"""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TypeVar

S = TypeVar("S", bound=Hashable)


@dataclass(frozen=True)
class Load:
    """What a service has to do: episodes it was asked for that have not come. `accepts`: it takes more, that is, it
    answers, has the weights and is not about to stop."""

    episodes: int = 0
    accepts: bool = True


def choose(loads: Mapping[S, Load], *, last: S | None = None, slack: int = 0) -> S | None:
    """The service that the next group goes to; None when none accepts any.

    `last` is where the group was before; it is kept to as long as that one has at most `slack` episodes more to do than the
    least loaded.
    """
    open_to = {service: load.episodes for service, load in loads.items() if load.accepts}
    if not open_to:
        return None
    least = min(open_to, key=lambda service: open_to[service])  # the first of equals
    if last is not None and last in open_to and open_to[last] <= open_to[least] + slack:
        return last
    return least


def deal(
    groups: Sequence[tuple[str, int]], loads: Mapping[S, Load], *, last: Mapping[str, S] | None = None, slack: int = 0
) -> dict[str, S]:
    """Places (group, its episodes) one after another, each load for the next; places none when no service accepts any."""
    now, placed = dict(loads), {}
    for group, episodes in groups:
        service = choose(now, last=(last or {}).get(group), slack=slack)
        if service is None:
            return {}
        placed[group] = service
        now[service] = replace(now[service], episodes=now[service].episodes + episodes)
    return placed
