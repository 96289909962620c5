"""The rollout services as the learner sees them: started or joined, given weights, asked for episodes, brought back.

A service that this run started is restarted when it dies, gets the present weights again, and is asked only for what is
still missing; the bridge's client counts every (question, sample) exactly once. Services started elsewhere
(`generator.services`) are waited for instead. With several learner processes: shared_fleet.py.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from rollout.client import RolloutClient
from rollout.errors import InfrastructureError
from rollout.types import SamplingParams, Task, Trajectory
from sqlrl_jax.config import Config, SamplingConfig
from sqlrl_jax.local_services import LocalServices


def sampling_params(config: SamplingConfig) -> SamplingParams:
    return SamplingParams(
        temperature=config.temperature,
        top_p=config.top_p,
        max_tokens=config.max_generate_length,
        stop=config.stop,
    )


class Fleet:
    """All rollout services of a run. Close it to stop those that it started."""

    def __init__(self, config: Config, config_file: Path, log_file: Path, say: Callable[[str], None]) -> None:
        self._config = config
        self._say = say
        self._restarts = 0
        self._local = LocalServices(config, config_file, log_file)
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

    def share(self, tasks: Sequence[Task]) -> Sequence[Task]:
        """Those of `tasks` that this process has its services play: all."""
        return tasks

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
