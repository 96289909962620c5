"""The rollout services of a run with several learner processes: each asks its own for its share of the questions.

Who asks does not matter to an episode (its seed follows from question and sample), and afterwards every process holds all
episodes in the same order, so all do the same arithmetic. A process asks the services that it started, or every so many-th of
those that are there; when it has lost its own, any. Which are there is process 0's to say, before each batch: only then does
one that has joined, or was started again, get the weights, which all processes push together.

Left out: giving a slow process's questions to another. Shares are equal and fixed.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from rollout.client import RolloutClient
from rollout.errors import UserError
from rollout.stub import BridgeError
from rollout.types import SamplingParams, Task, Trajectory
from sqlrl_jax.answer import Answer
from sqlrl_jax.config import Config
from sqlrl_jax.distributed import World
from sqlrl_jax.fleet import AGAIN_SECONDS, Fleet
from sqlrl_jax.meeting import is_loopback
from sqlrl_jax.stop import Stopped


class SharedFleet(Fleet):
    """All services of all processes. Every method but `close` and `share` must be called by all processes at one point."""

    def __init__(
        self, world: World, config: Config, config_file: Path, log_file: Path, say: Callable[[str], None]
    ) -> None:
        self._world = world
        self._own: list[str] = []  # where the services are that this process started
        self._agreed: list[str] = []  # the services that all processes hold for present
        super().__init__(config, config_file, log_file, say)
        self._agree()

    def _start(self) -> list[str]:
        host = self._world.address
        together = all(is_loopback(peer.address) for peer in self._world.peers)
        listen = "127.0.0.1:0" if together else f"[{host}]:0" if ":" in host else f"{host}:0"
        try:
            self._security.require_allowed(listen)
        except UserError as error:
            raise UserError(
                f"each host would start a rollout service that the others must reach. {error}. Or name services in "
                f"generator.services that run already, at the local ends of tunnels for example"
            ) from None
        return self._start_at(listen)

    def _connect(self, addresses: Sequence[str]) -> RolloutClient:
        if self._local.owns(addresses[0]):
            self._own = list(addresses)
            addresses = [address for theirs in self._world.gather("services", self._own) for address in theirs]
        return super()._connect(addresses)

    def share(self, tasks: Sequence[Task], turn: int = 0) -> Sequence[Task]:
        """Those of `tasks` that this process has its services play; each `turn` begins with another process."""
        return tasks[(self._world.index + turn) % self._world.count :: self._world.count]

    def agree(self, answer: Answer) -> list[Answer]:
        """What each process heard, in every process the same."""
        return [Answer.unpack(data) for data in self._world.exchange("groups", answer.pack())]

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
        """As Fleet.rollout; `on_trajectory` sees this process's episodes alone. Raises Stopped in all processes if it does
        in one."""
        asking: dict[str, Any] = {"version": version, "seed": seed, "max_turns": max_turns}
        got: dict[tuple[str, int], Trajectory] = {}
        self.begin_batch()
        todo = tasks
        while todo:
            heard = _heard(partial(self.client.rollout, self.share(todo), samples, sampling, **asking), on_trajectory)
            answers = [Answer.unpack(data) for data in self._world.exchange("episodes", heard.pack())]
            stop = next((answer.stop for answer in answers if answer.stop), "")
            if stop:
                raise Stopped(stop)
            got |= {(episode.task_id, episode.sample): episode for answer in answers for episode in answer.episodes}
            todo = [task for task in tasks if any((task.id, sample) not in got for sample in range(samples))]
            lost = {address: (why, stopping) for answer in answers for address, why, stopping in answer.lost}
            error = BridgeError("", "none can be asked")
            for address, (why, stopping) in lost.items():
                error = BridgeError(address, why, stopping=stopping)
                self.lose(address, error)
            if todo:
                self.look()
                if not self._agreed:
                    self.revive(error)
        return [got[task.id, sample] for task in tasks for sample in range(samples)]

    def look(self) -> None:
        """As Fleet.look, in all processes."""
        joined = self._agree()
        if joined:
            self._say(f"rollout service {', '.join(joined)} joins")
            self.republish()

    def _agree(self) -> list[str]:
        """All processes know the same services as process 0; returns those that joined."""
        told = self._world.gather("services that stop", sorted(self.client.stopping))
        self.client.stopping = {address for part in told for address in part}
        self._agreed = [address for address in self._agreed if address not in self.client.stopping]
        self._leave_stopping()
        for moved in self._world.gather("services started again", self._restarted()):
            for old, new in moved.items():
                self.client.members.replace(new, old)
                self._own = [new if own == old else own for own in self._own]

        def there() -> list[tuple[str, str]]:
            self.client.members.look()
            return self.client.members.there()

        self.client.members.agree(self._world.from_main("services", there))
        before, now = self._agreed, self.client.addresses
        self._agreed = now
        index, count = self._world.index, self._world.count
        turns = now[index::count] or now[index % max(1, len(now)) :][:1]
        self.client.players = self._own or turns
        return [address for address in now if address not in before]

    def lose(self, address: str, error: BridgeError) -> None:
        """As Fleet.lose, in all processes."""
        self._agreed = [other for other in self._agreed if other != address]
        super().lose(address, error)

    def _there(self) -> list[str]:
        return self._agreed

    def _wait_for_one(self, error: BridgeError) -> None:
        deadline = time.monotonic() + self._config.bridge.start_timeout
        while not self._agree():
            mending = any(self._world.gather("services being started", bool(self._mending)))
            late = self._world.from_main("deadline", lambda: time.monotonic() > deadline)
            if late and not mending:
                raise self._nobody_came(error)
            time.sleep(AGAIN_SECONDS)


def _heard(ask: Callable[..., object], on_trajectory: Callable[[Trajectory], None]) -> Answer:
    """What came of asking one's own services, whatever that was but a mistake of ours."""
    answer = Answer()

    def take(episode: Trajectory) -> None:
        answer.episodes.append(episode)
        on_trajectory(episode)

    def lose(address: str, error: BridgeError) -> None:
        answer.lost.append((address, str(error), error.stopping))

    try:
        ask(on_trajectory=take, on_lost=lose)
    except Stopped as stopped:
        answer.stop = str(stopped)
    except BridgeError as error:
        if not error.transient:
            raise
    return answer


def open_fleet(world: World, config: Config, folder: Path, say: Callable[[str], None]) -> Fleet:
    """The services of the run in `folder`."""
    config_file = folder / "config.yaml"
    if world.count == 1:
        return Fleet(config, config_file, folder / "service.log", say)
    return SharedFleet(world, config, config_file, folder / f"service.process{world.index}.log", say)
