"""A stream of groups: questions are asked at any time, and each comes back with all its episodes when the last has ended.

What client.py does for a whole batch at a barrier, this does group by group while weights change: a group's episodes may span
several versions, which their spans tell. Each question that was submitted comes back exactly once, as `Finished` or, when its
service is gone or an episode failed for reasons of infrastructure, as `Unplayed`: whoever keeps the books asks again.
Blocking calls for one thread; the reading threads inside only move events into a queue.

Left out: asking for single missing episodes of a group. Another try has other weights, and a group is cheap beside a batch.
"""

from __future__ import annotations

import queue
import threading
import time
import uuid
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from rollout import bridge_pb2 as pb
from rollout import wire
from rollout.channel import grpc
from rollout.client import RolloutClient
from rollout.placement import Load, deal
from rollout.pulse import Pulse
from rollout.stub import BridgeError, Stub, explain
from rollout.types import SamplingParams, Task, Trajectory


@dataclass(frozen=True)
class Finished:
    """One group: the episodes of a question, by sample."""

    episodes: list[Trajectory]


@dataclass(frozen=True)
class Unplayed:
    """Questions that nobody is playing any more. `error`: their service is lost, or stops (it may then still play others, and
    there may be no tasks yet); otherwise an episode failed."""

    tasks: list[Task]
    error: BridgeError | None = None


@dataclass(eq=False)
class _Call:
    """One running Rollout call; `tasks` are those whose group is not complete."""

    stub: Stub
    tasks: dict[str, Task]
    call: Any
    got: dict[str, dict[int, Trajectory]] = field(default_factory=dict)
    pulse: Pulse = field(default_factory=Pulse)
    stopping: bool = False


class GroupStream:
    """Groups of `n_samples` episodes from the services of `client`."""

    def __init__(self, client: RolloutClient, sampling: SamplingParams, *, n_samples: int, max_turns: int) -> None:
        self._client, self._samples = client, n_samples
        self._common = pb.RolloutRequest(
            n_samples=n_samples, sampling=wire.sampling_to_proto(sampling), max_turns=max_turns, or_later=True
        )
        self._calls: list[_Call] = []
        self._events: queue.SimpleQueue[tuple[_Call, pb.RolloutEvent | BridgeError | None]] = queue.SimpleQueue()
        self._failures: Counter[str] = Counter()

    @property
    def in_flight(self) -> int:
        """Groups that were submitted and have not come back."""
        return sum(len(call.tasks) for call in self._calls)

    def submit(self, tasks: Sequence[Task], *, version: int, seed: int) -> None:
        """Asks for a group of each task, at weight version `version` or later, of the services with least to do. Raises
        BridgeError when there is none."""
        stubs = self._client.playing
        if not stubs:
            raise BridgeError("", "no rollout service is there to be asked for episodes")
        loads = {stub: Load(self._samples * self._held(stub)) for stub in stubs}
        placed = deal([(task.id, self._samples) for task in tasks], loads)
        for stub in stubs:
            self._ask(stub, [task for task in tasks if placed[task.id] is stub], version, seed)

    def take(self, timeout: float) -> Finished | Unplayed | None:
        """The next group to come back, or None after `timeout` seconds without any. Raises BridgeError when a question's
        episodes have failed more often than the client retries, or for a fault that trying again does not mend."""
        deadline = time.monotonic() + timeout
        while True:
            lost = self._overdue()  # also when busy services keep the queue full
            if lost:
                return lost
            try:
                call, event = self._events.get(timeout=max(0.0, min(0.25, deadline - time.monotonic())))
            except queue.Empty:
                if time.monotonic() >= deadline:
                    return None
                continue
            back = self._note(call, event) if call in self._calls else None
            if back:
                return back

    def close(self) -> None:
        """Ends all episodes that still run."""
        for call in self._calls:
            call.call.cancel()
        self._calls.clear()

    def _held(self, stub: Stub) -> int:
        return sum(len(call.tasks) for call in self._calls if call.stub is stub)

    def _ask(self, stub: Stub, tasks: list[Task], version: int, seed: int) -> None:
        if not tasks:
            return
        request = pb.RolloutRequest(
            request_id=uuid.uuid4().hex,
            weights=self._client.weights(version),
            tasks=[wire.task_to_proto(task) for task in tasks],
            seed=seed,
        )
        request.MergeFrom(self._common)
        call = _Call(stub, {task.id: task for task in tasks}, stub.rollout(request))
        self._calls.append(call)
        threading.Thread(target=self._read, args=(call,), name=f"groups {stub.address}", daemon=True).start()

    def _read(self, call: _Call) -> None:
        """Runs in a thread of its own: moves one call's events into the queue."""
        try:
            for event in call.call:
                call.pulse.note(event)
                if event.WhichOneof("event") == "trajectory" or event.progress.stopping:
                    self._events.put((call, event))
        except grpc.RpcError as error:
            self._events.put((call, explain(call.stub.address, error)))
        else:
            self._events.put((call, None))

    def _note(self, call: _Call, event: pb.RolloutEvent | BridgeError | None) -> Finished | Unplayed | None:
        if isinstance(event, BridgeError):
            return self._lose(call, event)
        if event is None:
            return self._end(call)
        if event.WhichOneof("event") == "progress":  # it was told to stop: it plays on for a while and takes no more
            told, call.stopping = call.stopping, True
            return None if told else Unplayed([], self._stops(call))
        try:
            episode = wire.trajectory_from_proto(event.trajectory)
        except wire.WireError as error:
            raise BridgeError(call.stub.address, f"service {call.stub.address}: {error}", transient=False) from None
        if episode.task_id not in call.tasks:
            return None
        group = call.got.setdefault(episode.task_id, {})
        group[episode.sample] = episode
        if len(group) < self._samples:
            return None
        task = call.tasks.pop(episode.task_id)
        episodes = [group[sample] for sample in sorted(call.got.pop(task.id))]
        faults = [e.error or "no reason given" for e in episodes if e.outcome == "infrastructure"]
        if faults:
            return self._failed([task], faults[0])
        self._failures.pop(task.id, None)
        return Finished(episodes)

    def _end(self, call: _Call) -> Unplayed | None:
        """After a call that ended well: what it did not bring."""
        self._calls.remove(call)
        left = list(call.tasks.values())
        if not left:
            return None
        if call.stopping:
            return Unplayed(left, self._stops(call))
        return self._failed(left, f"service {call.stub.address} ended without it")

    def _stops(self, call: _Call) -> BridgeError:
        return BridgeError(call.stub.address, f"rollout service {call.stub.address} is stopping", stopping=True)

    def _failed(self, tasks: list[Task], why: str) -> Unplayed:
        self._failures.update(task.id for task in tasks)
        for task in tasks:
            if self._failures[task.id] > self._client.retries:
                raise BridgeError(
                    "",
                    f"the episodes of task {task.id!r} failed {self._failures[task.id]} times for reasons other than the "
                    f"model: {why}",
                    transient=False,
                )
        return Unplayed(tasks)

    def _lose(self, call: _Call, error: BridgeError) -> Unplayed:
        self._calls.remove(call)
        call.call.cancel()
        if not error.transient:
            raise error
        return Unplayed(list(call.tasks.values()), error)

    def _overdue(self) -> Unplayed | None:
        for call in self._calls:
            why = call.pulse.overdue(self._client.silence_timeout, self._client.stall_timeout)
            if why:
                address = call.stub.address
                return self._lose(call, BridgeError(address, f"rollout service {address} {why}"))
        return None
