"""The rollout services as the learner sees them: started or joined, given weights, asked for episodes, brought back.

A service that this run started is restarted when it dies, gets the present weights again, and is asked only for what is
still missing; the bridge's client counts every (question, sample) exactly once. Services started elsewhere
(`generator.services`) are waited for instead. With several learner processes: shared_fleet.py.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from rollout import bridge_pb2 as pb
from rollout.client import RolloutClient
from rollout.errors import InfrastructureError
from rollout.stream import GroupStream
from rollout.stub import BridgeError
from rollout.types import SamplingParams, Task, Trajectory
from sqlrl_jax.answer import Answer
from sqlrl_jax.config import Config, SamplingConfig
from sqlrl_jax.local_services import LocalServices


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
        self._restarts = 0
        self._local = LocalServices(config, config_file, log_file)
        self._idle = IdleMeter()
        self.republish: Callable[[], Any] = lambda: None
        """Pushes the present weights to every service; the trainer sets it."""
        addresses = list(config.generator.services) or self._start()
        self.client = self._connect(addresses)
        self.client.wait_ready(config.bridge.start_timeout)

    def _start(self) -> list[str]:
        """Starts the services of our own and returns their addresses."""
        return self._local.start()

    def _connect(self, addresses: Sequence[str]) -> RolloutClient:
        return RolloutClient(addresses, stall_timeout=self._config.bridge.stall_timeout)

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
        episodes = self.client.rollout(
            tasks,
            samples,
            sampling,
            version=version,
            seed=seed,
            max_turns=max_turns,
            on_trajectory=on_trajectory,
            on_lost=self.bring_back,
        )
        self._restarts = 0
        return episodes

    def bring_back(self, address: str, error: Exception) -> None:
        """Restarts a lost service, or waits for one started elsewhere, and gives it the present weights.

        Raises InfrastructureError after bridge.max_restarts losses without a finished batch in between.
        """
        self._count_loss(address, str(error))
        if self._local.owns(address):
            self._say(f"rollout service {address} is lost ({error}); starting it again")
            lost, address = address, self._local.restart(address)
            self.client.replace(address, lost)
        else:
            self._say(f"rollout service {address} is lost ({error}); waiting for it to come back")
        self.client.wait_ready(self._config.bridge.start_timeout)
        self.republish()
        self._say(f"rollout service {address} is back with the present weights; asking again for the missing episodes")

    def idle_metrics(self) -> dict[str, float]:
        """The share of the time since the last call in which a service's engine computed nothing, mean over the services that
        tell; empty when none does."""
        try:
            idle = self._idle.shares(time.monotonic(), self.client.status())
        except BridgeError:  # whoever asks it for something will see to it
            return {}
        return {"async/rollout_idle": sum(idle) / len(idle)} if idle else {}

    def recover(self, lost: Mapping[str, str]) -> None:
        """Brings back the services that a stream has lost (address → why), unless somebody has done so already."""
        for address, why in lost.items():
            if address in self.client.addresses:
                self.bring_back(address, BridgeError(address, why))

    def _count_loss(self, address: str, why: str) -> None:
        self._restarts += 1
        limit = self._config.bridge.max_restarts
        if self._restarts > limit:
            raise InfrastructureError(
                f"rollout service {address} was lost {self._restarts} times in a row (bridge.max_restarts = {limit}): {why}"
            )

    def close(self) -> None:
        self.client.close()
        self._local.close()
