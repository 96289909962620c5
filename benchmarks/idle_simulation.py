"""How much of their time learner and rollout services wait for each other: a discrete-event simulation.

Services decode up to `slots` episodes at one time, each token taking one unit of time whatever else runs (a batch that is
limited by memory bandwidth); more episodes wait in a queue. A batch has as many groups as the services can play at once, and
its update takes as long as those episodes would if all slots were always full. Groups go to the service with least to do,
batches are made and groups are dropped as sqlrl_jax/streamed.py does it. Left out: pushes, environments, prefill.
"""

from __future__ import annotations

import heapq
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np


@dataclass(frozen=True)
class Cluster:
    services: int
    slots: int = 32
    samples: int = 8

    @property
    def batch(self) -> int:
        """Groups of a step."""
        return self.services * self.slots // self.samples


@dataclass(frozen=True)
class Result:
    """`seconds` a step, in units of a token's time; shares of idle time; groups dropped of all that ended."""

    seconds: float
    learner_idle: float
    rollout_idle: float
    dropped: float


@dataclass
class _Group:
    missing: int
    oldest: int


@dataclass
class _World:
    cluster: Cluster
    tokens: Sequence[float]
    rng: np.random.Generator
    now: float = 0.0
    version: int = 0
    busy: float = 0.0
    active: int = 0
    events: list[tuple[float, int, int, _Group]] = field(default_factory=list)
    ready: list[tuple[int, int, _Group]] = field(default_factory=list)  # by the version of the oldest token
    out: int = 0

    def __post_init__(self) -> None:
        self.free = [self.cluster.slots] * self.cluster.services
        self.waiting: list[deque[_Group]] = [deque() for _ in self.free]
        self.load = [0] * self.cluster.services
        self.count = 0

    def submit(self, groups: int) -> None:
        """Asks for groups, each of the service that has least to do."""
        order = [(load, service) for service, load in enumerate(self.load)]
        heapq.heapify(order)
        for _ in range(groups):
            load, service = heapq.heappop(order)
            group = _Group(self.cluster.samples, 1 << 60)
            self.waiting[service].extend([group] * self.cluster.samples)
            self.load[service] = load + self.cluster.samples
            heapq.heappush(order, (self.load[service], service))
            self.start(service)
        self.out += groups

    def start(self, service: int) -> None:
        while self.free[service] and self.waiting[service]:
            group = self.waiting[service].popleft()
            self.free[service] -= 1
            group.oldest = min(group.oldest, self.version)
            length = float(self.tokens[int(self.rng.integers(len(self.tokens)))])
            self.active += 1
            self.count += 1
            heapq.heappush(self.events, (self.now + length, self.count, service, group))

    def advance(self, until: float) -> None:
        """Lets episodes end up to a time."""
        while self.events and self.events[0][0] <= until:
            at, _, service, group = heapq.heappop(self.events)
            self.busy += self.active * (at - self.now)
            self.now, self.active = at, self.active - 1
            self.free[service] += 1
            self.load[service] -= 1
            self.start(service)
            group.missing -= 1
            if not group.missing:
                self.count += 1
                heapq.heappush(self.ready, (group.oldest, self.count, group))
        self.busy += self.active * (until - self.now)
        self.now = until


def simulate(cluster: Cluster, tokens: Sequence[float], staleness: int, steps: int = 40, warm: int = 8) -> Result:
    """Trains for `steps` steps with episodes of lengths drawn from `tokens`; the first `warm` are not counted."""
    world = _World(cluster, tokens, np.random.default_rng(0))
    update = float(np.mean(tokens))
    began = waited = busy = 0.0
    dropped = ended = 0
    for step in range(steps + warm):
        if step == warm:
            began, waited, busy, dropped, ended = world.now, 0.0, world.busy, 0, 0
        world.submit((staleness + 1) * cluster.batch - world.out)
        asked, batch = world.now, 0
        while batch < cluster.batch:
            if not world.ready:
                world.advance(world.events[0][0])
                continue
            oldest, _, _ = heapq.heappop(world.ready)
            ended += 1
            if world.version - oldest > staleness:
                dropped += 1
                world.out -= 1
                world.submit(1)
            else:
                batch += 1
        waited += world.now - asked
        world.advance(world.now + update)
        world.version += 1
        world.out -= cluster.batch
    span = world.now - began
    playing = world.busy - busy
    capacity = span * cluster.services * cluster.slots
    return Result(span / steps, waited / span, 1 - playing / capacity, dropped / max(1, ended))
