"""The rollout services as the learner sees them: started or joined, given weights, asked for episodes, brought back.

Services come and go. What one held that is lost or told to stop is played by the others at once; one that this run started is
started again meanwhile. Whichever is there when the next episodes are asked for, new or back, gets the present weights first.
Only when none is left does the run wait for one. The bridge's client counts every (question, sample) exactly once. With
several learner processes: shared_fleet.py.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

from rollout import bridge_pb2 as pb
from rollout.client import RolloutClient
from rollout.errors import InfrastructureError
from rollout.security import Security, is_loopback
from rollout.stream import GroupStream
from rollout.stub import BridgeError
from rollout.supervisor import ServiceError
from rollout.types import SamplingParams, Task, Trajectory
from sqlrl_jax.answer import Answer
from sqlrl_jax.config import Config, SamplingConfig
from sqlrl_jax.local_services import LocalServices

AGAIN_SECONDS = 0.5


def sampling_params(config: SamplingConfig) -> SamplingParams:
    return SamplingParams(
        temperature=config.temperature,
        top_p=config.top_p,
        max_tokens=config.max_generate_length,
        stop=config.stop,
    )


class IdleMeter:
    """How long engines computed nothing, from their own counters of busy seconds."""

    def __init__(self) -> None:
        self._last: dict[tuple[str, int], tuple[float, float]] = {}

    def shares(self, now: float, replies: Mapping[str, pb.StatusReply]) -> list[float]:
        """Share of the time since the last call, of each service that tells and was there then."""
        seen = {
            (address, reply.pid): (now, reply.stats["busy_seconds"])
            for address, reply in replies.items()
            if "busy_seconds" in reply.stats
        }
        both = [(self._last[key], seen[key]) for key in seen if key in self._last]
        self._last = seen
        return [min(1.0, max(0.0, 1 - (busy - was) / (at - then))) for (then, was), (at, busy) in both if at > then]


class Fleet:
    """All rollout services of a run. Close it to stop those that it started."""

    def __init__(self, config: Config, config_file: Path, log_file: Path, say: Callable[[str], None]) -> None:
        self._config = config
        self._say = say
        self._losses = 0
        self._security = Security.load(config.bridge)
        self._local = LocalServices(config, config_file, log_file)
        self._idle = IdleMeter()
        self._mender = ThreadPoolExecutor(thread_name_prefix="mend")
        self._mending: dict[str, Future[str]] = {}  # address of a lost service → where it will be
        self.republish: Callable[[], Any] = lambda: None
        """Pushes the present weights to every service; the trainer sets it."""
        addresses = list(config.generator.services) or self._start()
        self.client = self._connect(addresses)
        for address in self.client.wait_ready(config.bridge.start_timeout):
            self._say(f"rollout service {address} does not answer; it joins when it does")

    def _start(self) -> list[str]:
        """Starts the services of our own and returns their addresses."""
        return self._start_at(self._config.bridge.listen)

    def _start_at(self, listen: str) -> list[str]:
        settings = [f"bridge.listen={listen}"]
        if is_loopback(listen):  # a certificate is for a name that others know
            self._security = self._security.on_loopback()
            settings += ["bridge.tls_cert=", "bridge.tls_key=", "bridge.tls_ca=", "bridge.data_port=0"]
        return self._local.start(*settings, security=self._security)

    def _connect(self, addresses: Sequence[str]) -> RolloutClient:
        return RolloutClient(addresses, security=self._security, stall_timeout=self._config.bridge.stall_timeout)

    def share(self, tasks: Sequence[Task], turn: int = 0) -> Sequence[Task]:
        """Those of `tasks` that this process has its services play: all, whichever `turn` it is."""
        return tasks

    def agree(self, answer: Answer) -> list[Answer]:
        """What each process heard: this is the only one."""
        return [answer]

    def stream(self) -> GroupStream:
        """A stream of groups for training; it takes whatever version is live, from the one asked for on."""
        generator = self._config.generator
        return GroupStream(
            self.client,
            sampling_params(generator.sampling_params),
            n_samples=generator.n_samples_per_prompt,
            max_turns=generator.max_turns,
        )

    def rollout(
        self,
        tasks: Sequence[Task],
        *,
        samples: int,
        sampling: SamplingParams,
        version: int | None,
        seed: int,
        max_turns: int,
        on_trajectory: Callable[[Trajectory], None],
    ) -> list[Trajectory]:
        """Episodes of every task in (task, sample) order. Raises InfrastructureError when services stay away."""
        self.begin_batch()
        episodes = self.client.rollout(
            tasks,
            samples,
            sampling,
            version=version,
            seed=seed,
            max_turns=max_turns,
            on_trajectory=on_trajectory,
            on_lost=self.lose,
            revive=self.revive,
        )
        return episodes

    def begin_batch(self) -> None:
        """Before a batch of episodes: forgets what was lost before it, and takes in those that have come."""
        self._losses = 0
        self.look()
        if not self._there():
            self.revive(BridgeError("", "all rollout services have stopped"))

    def look(self) -> None:
        """Takes in services that have appeared or come back: they get the present weights, and episodes from then on."""
        self._leave_stopping()
        self._place_restarted()
        joined = self.client.members.look()
        if joined:
            self._say(f"rollout service {', '.join(joined)} joins")
            self.republish()

    def lose(self, address: str, error: BridgeError) -> None:
        """Goes on without a service; one that this run started is started again meanwhile.

        Raises InfrastructureError after bridge.max_restarts losses a service without a finished batch in between.
        """
        self.client.members.leave(address)
        if not error.stopping:
            self._count_loss(address, str(error))
        doing = "starting it again" if self._mend(address) else "it joins again when it answers"
        self._say(f"rollout service {address} {'stops' if error.stopping else 'is lost'} ({error}); {doing}")

    def revive(self, error: BridgeError) -> None:
        """With no service left: waits for one, and gives it the present weights. Raises InfrastructureError."""
        self._wait_for_one(error)
        self.republish()
        there = ", ".join(self.client.addresses)
        self._say(f"rollout service {there} is back with the present weights; asking for the missing episodes")

    def bring_back(self, address: str, error: BridgeError) -> None:
        """After a push that failed at one service: goes on with the others, or brings one back."""
        self.lose(address, error)
        if not self._there():
            self.revive(error)

    def recover(self, lost: Sequence[tuple[str, str, bool]]) -> None:
        """Goes on without the services that a stream has lost (address, why, it was told to stop), or brings one back."""
        for address, why, stopping in lost:
            if address in self._there():  # or it is known already
                self.bring_back(address, BridgeError(address, why, stopping=stopping))

    def idle_metrics(self) -> dict[str, float]:
        """The share of the time since the last call in which a service's engine computed nothing, mean over the services that
        tell; empty when none does."""
        try:
            idle = self._idle.shares(time.monotonic(), self.client.status())
        except BridgeError:  # whoever asks it for something will see to it
            return {}
        return {"async/rollout_idle": sum(idle) / len(idle)} if idle else {}

    def close(self) -> None:
        self.client.close()
        self._local.close()
        self._mender.shutdown(cancel_futures=True)

    def _there(self) -> list[str]:
        """The services that can be asked."""
        return self.client.addresses

    def _mend(self, address: str) -> bool:
        """Has a service of our own started again; False for any other."""
        if self._local.owns(address) and address not in self._mending:
            self._mending[address] = self._mender.submit(self._local.restart, address)
        return address in self._mending

    def _restarted(self) -> dict[str, str]:
        """Has every service of our own that is away started again; returns those that have been since the last call: old →
        new address.

        Raises ServiceError for one that does not start, if there is no other.
        """
        done = {address: self._mending.pop(address) for address in list(self._mending) if self._mending[address].done()}
        moved: dict[str, str] = {}
        for address, future in done.items():
            try:
                moved[address] = future.result()
            except ServiceError as error:
                if not self.client.stubs and not self._mending:
                    raise
                self._count_loss(address, str(error))
                self._say(f"rollout service {address} did not start and is tried again: {error}")
        for address in self.client.members.away:
            if address not in moved:
                self._mend(address)
        return moved

    def _leave_stopping(self) -> None:
        for address in self.client.stopping:
            self.client.members.leave(address)
        self.client.stopping.clear()

    def _place_restarted(self) -> None:
        for old, new in self._restarted().items():
            self.client.members.replace(new, old)

    def _wait_for_one(self, error: BridgeError) -> None:
        limit = self._config.bridge.start_timeout
        deadline = time.monotonic() + limit
        self._leave_stopping()
        while not self.client.stubs:
            self._place_restarted()
            if self._mending:
                deadline = time.monotonic() + limit  # which has its own deadline
            elif time.monotonic() > deadline:
                raise self._nobody_came(error)
            if not self.client.members.look(eager=True):
                time.sleep(AGAIN_SECONDS)

    def _nobody_came(self, error: BridgeError) -> InfrastructureError:
        limit = self._config.bridge.start_timeout
        return InfrastructureError(
            f"no rollout service came back within {limit:.0f} s (bridge.start_timeout); the last was lost: {error}"
        )

    def _count_loss(self, address: str, why: str) -> None:
        self._losses += 1
        limit, known = self._config.bridge.max_restarts, len(self.client.stubs) + len(self.client.members.away)
        if self._losses > limit * known:
            raise InfrastructureError(
                f"rollout services were lost {self._losses} times without a finished batch in between "
                f"(bridge.max_restarts = {limit}, services: {known}), the last at {address}: {why}"
            )
