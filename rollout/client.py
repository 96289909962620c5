"""The learner's side of episodes: asks the services, collects each episode exactly once, notices who is gone.

One request a service carries the whole batch; tasks are dealt out in a fixed way. A service that vanishes, goes silent or
stops making progress is reported to `on_lost`, which brings it back; it is then asked for the tasks that lack an
episode. What had come is kept: with the same weights and seeds a repeated episode is the same one, so it is dropped and
counted. Blocking calls for a trainer's thread; the reading threads inside only move events into a queue.
"""

from __future__ import annotations

import queue
import threading
import time
import uuid
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from rollout import bridge_pb2 as pb
from rollout import wire
from rollout.channel import grpc
from rollout.ledger import Ledger
from rollout.placement import Load, deal
from rollout.stub import BridgeError, Stub, explain
from rollout.types import SamplingParams, Task, Trajectory

OnLost = Callable[[str, BridgeError], object]
OnTrajectory = Callable[[Trajectory], object]


@dataclass
class _Stream:
    """One running Rollout call."""

    place: int
    address: str
    tasks: list[Task]
    call: Any
    heard: float = field(default_factory=time.monotonic)
    progressed: float = field(default_factory=time.monotonic)
    last: tuple[int, int] = (0, 0)

    def note(self, event: pb.RolloutEvent, now: float) -> None:
        """Called as an event arrives, whenever it is looked at."""
        self.heard = now
        counts = (event.progress.finished, event.progress.tokens)
        if event.WhichOneof("event") != "progress" or counts != self.last:
            self.progressed = now
        if event.WhichOneof("event") == "progress":
            self.last = counts


class RolloutClient:
    """Several services as one.

    `stall_timeout`: seconds in which neither an episode nor a token came after which a service counts as dead.
    `silence_timeout`: the same without even the heartbeat that a service sends every second.
    `retries`: how often an episode that failed for reasons of infrastructure is asked for again.
    `players`: which of the addresses are asked for episodes (default: all); the others only get weights.
    `duplicates`, `retried`, `lost` count over the client's life.
    """

    def __init__(
        self,
        addresses: Sequence[str],
        *,
        stall_timeout: float = 300.0,
        silence_timeout: float = 60.0,
        retries: int = 2,
        players: Sequence[int] | None = None,
    ) -> None:
        if not addresses:
            raise ValueError("at least one rollout service address is needed")
        self._stubs = [Stub(address) for address in addresses]
        self.stall_timeout, self.silence_timeout = stall_timeout, min(silence_timeout, stall_timeout)
        self.retries = retries
        self.players = list(range(len(addresses)) if players is None else players)
        self._owner = ("", 0)
        self.duplicates = self.retried = self.lost = 0

    @property
    def stubs(self) -> list[Stub]:
        return list(self._stubs)

    @property
    def addresses(self) -> list[str]:
        return [stub.address for stub in self._stubs]

    @property
    def playing(self) -> list[Stub]:
        """The services that are asked for episodes."""
        return [self._stubs[place] for place in self.players]

    def identify(self, run: str, epoch: int) -> None:
        """From now on only weights that this learner pushed count as the version asked for."""
        self._owner = (run, epoch)

    def wait_ready(self, seconds: float) -> None:
        """Waits until every service answers. Raises BridgeError naming the one that does not."""
        deadline = time.monotonic() + seconds
        for stub in self._stubs:
            stub.wait_healthy(max(0.0, deadline - time.monotonic()))

    def status(self) -> dict[str, pb.StatusReply]:
        """Every service's own account of itself, by address. Raises BridgeError."""
        return {stub.address: stub.status() for stub in self._stubs}

    def replace(self, address: str, lost: str | None = None) -> None:
        """Puts the service at `address` in the place of `lost` (may be left out when there is only one)."""
        if lost is None and len(self._stubs) > 1:
            raise ValueError("replace: with several services, say which one is lost")
        place = 0 if lost is None else self.addresses.index(lost)
        self._stubs[place].close()
        self._stubs[place] = Stub(address)

    def rollout(
        self,
        tasks: Sequence[Task],
        n_samples: int,
        sampling: SamplingParams,
        *,
        version: int | None,
        seed: int,
        max_turns: int,
        on_trajectory: OnTrajectory | None = None,
        on_lost: OnLost | None = None,
    ) -> list[Trajectory]:
        """Plays every task `n_samples` times with weight version `version` (None: whatever all services have live).

        Returns the trajectories by task, then sample, whichever service played them. `on_trajectory` sees each as it comes;
        what it raises ends the call and all episodes. `on_lost(address, error)` has to bring the service back, weights
        included (`replace` if it has moved), or raise; without it a lost service raises BridgeError. Episodes whose outcome
        stays "infrastructure" after the retries raise BridgeError naming the tasks.
        """
        ledger = Ledger(tasks, n_samples)
        request = pb.RolloutRequest(
            weights=self.weights(version),
            n_samples=n_samples,
            sampling=wire.sampling_to_proto(sampling),
            seed=seed,
            max_turns=max_turns,
        )
        batch = _Batch(self, ledger, request, on_trajectory or (lambda _: None), on_lost)
        try:
            return batch.run()
        finally:
            batch.close()
            self.duplicates += ledger.duplicates
            self.retried += ledger.retried

    def close(self) -> None:
        for stub in self._stubs:
            stub.close()

    def weights(self, version: int | None) -> pb.WeightsKey:
        """What a request for episodes of this learner's version names; None: of the one that all services have live."""
        if version is not None:
            return pb.WeightsKey(run=self._owner[0], epoch=self._owner[1], version=version)
        status = self.status()
        live = {address: reply.live for address, reply in status.items() if reply.HasField("live")}
        keys = {(key.run, key.epoch, key.version) for key in live.values()}
        for address in status.keys() - live.keys():
            raise BridgeError(address, f"rollout service {address} has no weights yet; push first")
        if len(keys) != 1:
            shown = ", ".join(f"{address}: version {key.version} of {key.run!r}" for address, key in live.items())
            raise BridgeError(next(iter(live)), f"the services have different weights ({shown}); push first")
        return next(iter(live.values()))


class _Batch:
    """One `rollout` call on its way."""

    def __init__(
        self,
        client: RolloutClient,
        ledger: Ledger,
        request: pb.RolloutRequest,
        on_trajectory: OnTrajectory,
        on_lost: OnLost | None,
    ) -> None:
        self._client, self._ledger, self._request = client, ledger, request
        self._on_trajectory, self._on_lost = on_trajectory, on_lost
        self._streams: list[_Stream] = []
        self._events: queue.SimpleQueue[tuple[_Stream, pb.RolloutEvent | BridgeError | None]] = queue.SimpleQueue()

    def run(self) -> list[Trajectory]:
        tasks = list(self._ledger.tasks.values())
        placed = deal(
            [(task.id, self._ledger.n_samples) for task in tasks], dict.fromkeys(self._client.players, Load())
        )
        for place in self._client.players:
            self._ask(place, [task for task in tasks if placed[task.id] == place])
        checked = time.monotonic()
        while self._streams:
            try:
                stream, event = self._events.get(timeout=0.25)
            except queue.Empty:
                self._check_alive()
                continue
            if stream in self._streams:
                self._take(stream, event)
            if time.monotonic() - checked > 0.25:  # a busy service must not hide a silent one
                self._check_alive()
                checked = time.monotonic()
        return self._ledger.result()

    def close(self) -> None:
        for stream in self._streams:
            stream.call.cancel()

    def _ask(self, place: int, tasks: list[Task]) -> None:
        """Starts a request for those of `tasks` that lack an episode, if any do."""
        tasks = self._ledger.incomplete(tasks)
        if not tasks:
            return
        request = pb.RolloutRequest(request_id=uuid.uuid4().hex, tasks=[wire.task_to_proto(task) for task in tasks])
        request.MergeFrom(self._request)
        stub = self._client.stubs[place]
        stream = _Stream(place, stub.address, tasks, stub.rollout(request))
        self._streams.append(stream)
        threading.Thread(target=self._read, args=(stream,), name=f"rollout {stub.address}", daemon=True).start()

    def _read(self, stream: _Stream) -> None:
        """Runs in a thread of its own: moves one call's events into the queue."""
        try:
            for event in stream.call:
                stream.note(event, time.monotonic())
                self._events.put((stream, event))
        except grpc.RpcError as error:
            self._events.put((stream, explain(stream.address, error)))
        else:
            self._events.put((stream, None))

    def _take(self, stream: _Stream, event: pb.RolloutEvent | BridgeError | None) -> None:
        if isinstance(event, BridgeError):
            self._lose(stream, event)
        elif event is None:
            self._streams.remove(stream)
            self._again(stream)
        elif event.WhichOneof("event") == "trajectory":
            try:
                trajectory = wire.trajectory_from_proto(event.trajectory)
            except wire.WireError as error:
                raise BridgeError(stream.address, f"service {stream.address}: {error}", transient=False) from None
            if self._ledger.accept(trajectory):
                self._on_trajectory(trajectory)

    def _again(self, stream: _Stream) -> None:
        """After a request that ended well: asks again for what it did not bring. Raises BridgeError after the retries."""
        failed = self._ledger.attempt_ended(stream.tasks, f"service {stream.address} ended without this episode")
        given_up = [line for count, line in failed if count > self._client.retries]
        if given_up:
            more = f"\n  … and {len(given_up) - 5} more" if len(given_up) > 5 else ""
            raise BridgeError(
                stream.address,
                f"{len(given_up)} episodes failed {self._client.retries + 1} times each for reasons other than the model:\n  "
                + "\n  ".join(given_up[:5])
                + more,
                transient=False,
            )
        self._ask(stream.place, stream.tasks)

    def _lose(self, stream: _Stream, error: BridgeError) -> None:
        self._streams.remove(stream)
        stream.call.cancel()
        self._client.lost += 1
        if self._on_lost is None or not error.transient:
            raise error
        if self._ledger.incomplete(stream.tasks):
            self._on_lost(stream.address, error)
            self._ask(stream.place, stream.tasks)

    def _check_alive(self) -> None:
        now = time.monotonic()
        for stream in list(self._streams):
            silent, stalled = now - stream.heard, now - stream.progressed
            if silent > self._client.silence_timeout:
                why = f"has been silent for {silent:.0f} s, heartbeat included"
            elif stalled > self._client.stall_timeout:
                why = f"has brought neither an episode nor a token for {stalled:.0f} s (bridge.stall_timeout)"
            else:
                continue
            self._lose(stream, BridgeError(stream.address, f"rollout service {stream.address} {why}"))
