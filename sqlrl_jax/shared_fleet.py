"""The rollout services of a run with several learner processes: each asks its own for its share of the questions.

Who asks does not matter to an episode (its seed follows from question and sample), and afterwards every process holds all
episodes in the same order, so all do the same arithmetic. A process owns the services that it started, or every so many-th of
`generator.services`. When one is lost, its process keeps what has come; as soon as all have played what they could, its
owner starts it again, all push the weights once more, and the missing episodes are asked for.

Left out: giving a slow process's questions to another. Shares are equal and fixed.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from rollout.client import RolloutClient
from rollout.errors import UserError
from rollout.stub import BridgeError
from rollout.types import SamplingParams, Task, Trajectory
from sqlrl_jax.answer import Answer
from sqlrl_jax.config import Config
from sqlrl_jax.distributed import World
from sqlrl_jax.fleet import Fleet
from sqlrl_jax.meeting import is_loopback
from sqlrl_jax.stop import Stopped


class SharedFleet(Fleet):
    """All services of all processes. Every method but `close` and `share` must be called by all processes at one point."""

    def __init__(
        self, world: World, config: Config, config_file: Path, log_file: Path, say: Callable[[str], None]
    ) -> None:
        self._world = world
        super().__init__(config, config_file, log_file, say)
        world.barrier("services are up")

    def _start(self) -> list[str]:
        host = self._world.address
        together = all(is_loopback(peer.address) for peer in self._world.peers)
        if not together and not self._config.bridge.trusted_network:
            raise UserError(
                "each host would start a rollout service that the others must reach, and the bridge is neither encrypted nor "
                "authenticated: set bridge.trusted_network=true where only the run's own hosts reach its ports, or name "
                "services in generator.services, at the local ends of tunnels for example"
            )
        listen = "127.0.0.1:0" if together else f"[{host}]:0" if ":" in host else f"{host}:0"
        return self._local.start(f"bridge.listen={listen}")

    def _connect(self, addresses: Sequence[str]) -> RolloutClient:
        index, count = self._world.index, self._world.count
        if self._local.owns(addresses[0]):
            by_process = self._world.gather("services", list(addresses))
            first = sum(len(theirs) for theirs in by_process[:index])
            players = list(range(first, first + len(addresses)))
            addresses = [address for theirs in by_process for address in theirs]
        else:
            players = list(range(index, len(addresses), count)) or [index % len(addresses)]
        return RolloutClient(addresses, stall_timeout=self._config.bridge.stall_timeout, players=players)

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
        got: dict[tuple[str, int], Trajectory] = {}

        def play(asked: Sequence[Task]) -> Answer:
            answer = Answer()

            def take(episode: Trajectory) -> None:
                answer.episodes.append(episode)
                on_trajectory(episode)

            try:
                self.client.rollout(
                    asked, samples, sampling, version=version, seed=seed, max_turns=max_turns, on_trajectory=take
                )
            except Stopped as stopped:
                answer.stop = str(stopped)
            except BridgeError as error:
                if not error.transient:
                    raise
                answer.lost.append((error.address, str(error)))
            return answer

        todo = tasks
        while todo:
            answers = [Answer.unpack(data) for data in self._world.exchange("episodes", play(self.share(todo)).pack())]
            stop = next((answer.stop for answer in answers if answer.stop), "")
            if stop:
                raise Stopped(stop)
            got |= {(episode.task_id, episode.sample): episode for answer in answers for episode in answer.episodes}
            todo = [task for task in tasks if any((task.id, sample) not in got for sample in range(samples))]
            lost = {address: why for answer in answers for address, why in answer.lost}
            if lost:
                self._mend(lost)
        self._restarts = 0
        return [got[task.id, sample] for task in tasks for sample in range(samples)]

    def bring_back(self, address: str, error: Exception) -> None:
        """As Fleet.bring_back, in all processes."""
        self._mend({address: str(error)})

    def recover(self, lost: Mapping[str, str]) -> None:
        """As Fleet.recover, in all processes."""
        present = {address: why for address, why in lost.items() if address in self.client.addresses}
        if present:
            self._mend(present)

    def _mend(self, lost: dict[str, str]) -> None:
        moved: dict[str, str] = {}
        for address, why in lost.items():
            self._count_loss(address, why)
            doing = "waiting for it to come back" if self._config.generator.services else "starting it again"
            self._say(f"rollout service {address} is lost ({why}); {doing}")
            if self._local.owns(address):
                moved[address] = self._local.restart(address)
        for part in self._world.gather("moved services", moved):
            for address, now in part.items():
                self.client.replace(now, address)
        self.client.wait_ready(self._config.bridge.start_timeout)
        self.republish()
        self._say("all rollout services have the present weights again; asking for the missing episodes")


def open_fleet(world: World, config: Config, folder: Path, say: Callable[[str], None]) -> Fleet:
    """The services of the run in `folder`."""
    config_file = folder / "config.yaml"
    if world.count == 1:
        return Fleet(config, config_file, folder / "service.log", say)
    return SharedFleet(world, config, config_file, folder / f"service.process{world.index}.log", say)
