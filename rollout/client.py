"""The learner's side of episodes: asks the services, collects each episode exactly once, notices who is gone.

One request a service carries its part of the batch; tasks are dealt out in a fixed way (placement.py). What a service held
that vanishes, goes silent, stops making progress or is told to stop goes to the others at once; only when none is left has
somebody to bring one back. What had come is kept: with the same weights and seeds a repeated episode is the same one, so
it is dropped and counted. An episode with a token of other weights than those asked for is not taken.

Blocking calls for a trainer's thread; the reading threads inside only move events into a queue. Left out: giving a running
batch's episodes to a service that joins in mid-batch. Results would depend on when it came; it gets its part of the next.
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
from rollout.members import Lookup, Members, look_up
from rollout.placement import Load, deal
from rollout.pulse import Pulse
from rollout.security import PLAIN, Security
from rollout.stub import BridgeError, Stub, explain
from rollout.types import SamplingParams, Task, Trajectory

OnLost = Callable[[str, BridgeError], object]
Revive = Callable[[BridgeError], object]
OnTrajectory = Callable[[Trajectory], object]


@dataclass
class _Stream:
    """One running Rollout call."""

    stub: Stub
    tasks: list[Task]
    call: Any
    pulse: Pulse = field(default_factory=Pulse)


class RolloutClient:
    """Several services as one. `services` as in `generator.services`.

    `stall_timeout`: seconds in which neither an episode nor a token came after which a service counts as dead.
    `silence_timeout`: the same without even the heartbeat that a service sends every second.
    `retries`: how often an episode that failed for reasons of infrastructure is asked for again.
    `players`: addresses that are asked for episodes as long as any of them is there; None: all.
    `stopping`: addresses of services that said they were told to stop; they are asked for nothing more.
    `duplicates`, `retried`, `lost`, `handed_back` count over the client's life; the last two are services.
    """

    def __init__(
        self,
        services: Sequence[str],
        *,
        security: Security = PLAIN,
        stall_timeout: float = 300.0,
        silence_timeout: float = 60.0,
        retries: int = 2,
        lookup: Lookup = look_up,
    ) -> None:
        self.members = Members(services, security, lookup)
        self.stall_timeout, self.silence_timeout = stall_timeout, min(silence_timeout, stall_timeout)
        self.retries = retries
        self.players: Sequence[str] | None = None
        self.stopping: set[str] = set()
        self._owner = ("", 0)
        self.duplicates = self.retried = self.lost = self.handed_back = 0

    @property
    def stubs(self) -> list[Stub]:
        """The services that are there: those that weights go to and episodes come from."""
        return self.members.present

    @property
    def addresses(self) -> list[str]:
        return [stub.address for stub in self.stubs]

    @property
    def playing(self) -> list[Stub]:
        """The services that are asked for episodes."""
        there = [stub for stub in self.stubs if stub.address not in self.stopping]
        return [stub for stub in there if self.players is None or stub.address in self.players] or there

    def identify(self, run: str, epoch: int) -> None:
        """From now on only weights that this learner pushed count as the version asked for."""
        self._owner = (run, epoch)

    def wait_ready(self, seconds: float) -> list[str]:
        """Waits until every service answers, but no longer; returns those that do not. Raises BridgeError when none does."""
        self.members.doubt_all()
        self.members.wait(seconds, for_all=True)
        return self.members.away

    def status(self) -> dict[str, pb.StatusReply]:
        """Every service's own account of itself, by address. Raises BridgeError."""
        return {stub.address: stub.status() for stub in self.stubs}

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
        revive: Revive | None = None,
    ) -> list[Trajectory]:
        """Plays every task `n_samples` times with weight version `version` (None: whatever all services have live).

        Returns the trajectories by task, then sample, whichever service played them. `on_trajectory` sees each as it comes;
        what it raises ends the call and all episodes. `on_lost(address, error)` is told of each service that is lost or
        stops; the others play what it held. When none is left, `revive(error)` has to bring one back, weights included, or
        raise; without it the last error is raised. Episodes whose outcome stays "infrastructure" after the retries raise
        BridgeError naming the tasks.
        """
        ledger = Ledger(tasks, n_samples)
        if not self.stubs:
            self.members.look()
        request = pb.RolloutRequest(
            weights=self.weights(version),
            n_samples=n_samples,
            sampling=wire.sampling_to_proto(sampling),
            seed=seed,
            max_turns=max_turns,
        )
        batch = _Batch(self, ledger, request, on_trajectory or (lambda _: None), on_lost, revive)
        try:
            return batch.run()
        finally:
            batch.close()
            self.duplicates += ledger.duplicates
            self.retried += ledger.retried

    def close(self) -> None:
        self.members.close()

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
        revive: Revive | None,
    ) -> None:
        self._client, self._ledger, self._request = client, ledger, request
        self._on_trajectory, self._revive = on_trajectory, revive
        self._on_lost = on_lost or (lambda address, error: None)
        self._streams: list[_Stream] = []
        self._events: queue.SimpleQueue[tuple[_Stream, pb.RolloutEvent | BridgeError | None]] = queue.SimpleQueue()

    def run(self) -> list[Trajectory]:
        nobody = BridgeError("", "no rollout service is there")
        self._place(list(self._ledger.tasks.values()), nobody)
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

    def _place(self, tasks: list[Task], error: BridgeError, shunned: Stub | None = None) -> None:
        """Deals out what lacks an episode among those that are there, `shunned` only if there is no other.

        With nobody there somebody is brought back, or `error` is raised.
        """
        tasks = self._ledger.incomplete(tasks)
        if not tasks:
            return
        asked = self._client.playing
        if not asked:
            if self._revive is None:
                raise error
            self._revive(error)
            asked = self._client.playing
        asked = [stub for stub in asked if stub is not shunned] or asked
        loads = {stub: Load(self._left(stub)) for stub in asked}
        placed = deal([(task.id, len(self._ledger.missing(task.id))) for task in tasks], loads)
        for stub in asked:
            self._ask(stub, [task for task in tasks if placed[task.id] is stub])

    def _left(self, stub: Stub) -> int:
        """Episodes that `stub` was asked for and has not brought."""
        tasks = [task for stream in self._streams if stream.stub is stub for task in stream.tasks]
        return sum(len(self._ledger.missing(task.id)) for task in tasks)

    def _ask(self, stub: Stub, tasks: list[Task]) -> None:
        """Starts a request for the episodes that `tasks` lack, if there are any tasks."""
        if not tasks:
            return
        request = pb.RolloutRequest(request_id=uuid.uuid4().hex)
        for task in tasks:
            message, missing = wire.task_to_proto(task), self._ledger.missing(task.id)
            if len(missing) < self._ledger.n_samples:
                message.samples.extend(missing)
            request.tasks.append(message)
        request.MergeFrom(self._request)
        stream = _Stream(stub, tasks, stub.rollout(request))
        self._streams.append(stream)
        threading.Thread(target=self._read, args=(stream,), name=f"rollout {stub.address}", daemon=True).start()

    def _read(self, stream: _Stream) -> None:
        """Runs in a thread of its own: moves one call's events into the queue."""
        try:
            for event in stream.call:
                stream.pulse.note(event)
                self._events.put((stream, event))
        except grpc.RpcError as error:
            self._events.put((stream, explain(stream.stub.address, error)))
        else:
            self._events.put((stream, None))

    def _take(self, stream: _Stream, event: pb.RolloutEvent | BridgeError | None) -> None:
        if isinstance(event, BridgeError):
            self._lose(stream.stub, event)
        elif event is None:
            self._streams.remove(stream)
            self._again(stream)
        elif event.WhichOneof("event") == "trajectory":
            self._accept(stream.stub.address, event.trajectory)
        elif event.progress.stopping:  # it plays on for a while, and hands back what is left
            self._client.stopping.add(stream.stub.address)

    def _accept(self, address: str, message: pb.Trajectory) -> None:
        try:
            trajectory = wire.trajectory_from_proto(message)
        except wire.WireError as error:
            raise BridgeError(address, f"service {address}: {error}", transient=False) from None
        wanted = self._request.weights.version
        others = {version for version, _, _ in trajectory.spans if version != wanted}
        if others:
            trajectory.outcome = "infrastructure"
            trajectory.error = f"service {address} sampled it with weight version {others.pop()}, not {wanted}"
        if self._ledger.accept(trajectory):
            self._on_trajectory(trajectory)

    def _again(self, stream: _Stream) -> None:
        """After a request that ended well: asks again for what it did not bring. Raises BridgeError after the retries."""
        address = stream.stub.address
        failed = self._ledger.attempt_ended(stream.tasks, f"service {address} ended without this episode")
        given_up = [line for count, line in failed if count > self._client.retries]
        if given_up:
            more = f"\n  … and {len(given_up) - 5} more" if len(given_up) > 5 else ""
            raise BridgeError(
                address,
                f"{len(given_up)} episodes failed {self._client.retries + 1} times each for reasons other than the model:\n  "
                + "\n  ".join(given_up[:5])
                + more,
                transient=False,
            )
        stopping = BridgeError(address, f"rollout service {address} is stopping, and there is no other", stopping=True)
        self._place(stream.tasks, stopping, shunned=stream.stub)

    def _lose(self, stub: Stub, error: BridgeError) -> None:
        """Takes all that the service held, and gives it to the others."""
        mine = [stream for stream in self._streams if stream.stub is stub]
        self._streams = [stream for stream in self._streams if stream.stub is not stub]
        for stream in mine:
            stream.call.cancel()
        self._client.members.leave(stub.address)
        error.stopping |= stub.address in self._client.stopping
        self._client.stopping.discard(stub.address)
        if error.stopping:
            self._client.handed_back += 1
        else:
            self._client.lost += 1
        if not error.transient:
            raise error
        self._on_lost(stub.address, error)
        self._place([task for stream in mine for task in stream.tasks], error)

    def _check_alive(self) -> None:
        for stream in list(self._streams):
            why = stream.pulse.overdue(self._client.silence_timeout, self._client.stall_timeout)
            address = stream.stub.address
            if why and stream in self._streams:  # not lost with another of the same service
                self._lose(stream.stub, BridgeError(address, f"rollout service {address} {why}"))
