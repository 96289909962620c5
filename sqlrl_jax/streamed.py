"""Batches from a stream that never stops: episodes run while the learner steps, and weights change under them.

A batch is made of the first groups that have ended, the oldest first, and are no more than trainer.max_staleness versions
behind: the learner's version less that of the group's oldest token. Older ones are dropped, counted, and their questions
asked again. At most max_staleness + 1 batches of groups are out at one time (running, waiting, or being trained on), so that
a group that is trained on in its turn is in time.

With several processes each plays its share and all hear everything at the same points, so all keep the same books and make
the same batches. Left out: keeping finished groups in checkpoints; a resumed run asks for them again, with newer weights.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from rollout.stream import Finished
from sqlrl_jax.answer import Answer
from sqlrl_jax.batches import Batch, Group, Sieve, Watch, groups_of
from sqlrl_jax.config import Config
from sqlrl_jax.data.order import Supply
from sqlrl_jax.fleet import Fleet
from sqlrl_jax.stop import Stopped

LISTEN_SECONDS = 0.25
"""How long a process listens before it tells the others what it heard."""


class StreamedBatches:
    """See the module. Every method but `close` must be called by all processes at one point."""

    def __init__(self, config: Config, supply: Supply, fleet: Fleet, watch: Watch) -> None:
        self._config, self._supply, self._fleet, self._watch = config, supply, fleet, watch
        self._size = config.trainer.train_batch_size
        self._samples = config.generator.n_samples_per_prompt
        self._stream = fleet.stream()
        self._playing: dict[str, int] = {}  # question → position
        self._ready: list[Group] = []
        self._version = self._asked = 0
        self._kept: list[int] = []

    def take(self, step: int) -> Batch | None:
        self._version = step
        self._fleet.begin_batch()
        sieve, dropped = Sieve(self._config), 0
        with self._watch.bar("rollout", self._size * self._samples) as bar:
            while True:
                dropped += self._fill(sieve)
                bar(self._samples * len(sieve.kept))
                if sieve.done:
                    break
                self._ask()
                if not self._playing:  # the rest are questions that the batch has already, if there are any
                    self._ask(repeat=True)
                if not self._playing:
                    self._supply.used(group.position for group in sieve.kept)
                    return None
                self._listen()
        self._kept = [group.position for group in sieve.kept]
        batch = sieve.batch()
        groups = sorted(batch.groups, key=lambda group: group.position)  # those with short episodes came first
        return Batch(groups, batch.metrics | self._metrics(groups, dropped))

    def trained(self, batch: Batch) -> None:
        self._supply.used(self._kept)
        self._version += 1
        self._ask()

    def close(self) -> None:
        self._stream.close()

    def _fill(self, sieve: Sieve) -> int:
        """Moves finished groups into the batch, as long as it needs any; returns how many were too old."""
        dropped = 0
        self._ready.sort(key=oldest)  # those that will be too old next go first; otherwise as they ended
        while self._ready and not sieve.done:
            group = self._ready.pop(0)
            if staleness(group, self._version) > self._config.trainer.max_staleness:
                self._supply.again([group.position])
                dropped += 1
            elif not sieve.offer(group):
                self._supply.used([group.position])
        return dropped

    def _ask(self, repeat: bool = False) -> None:
        """Asks for as many groups as may be out."""
        trainer = self._config.trainer
        asked = self._supply.take((trainer.max_staleness + 1) * self._size - self._supply.out, repeat)
        if asked:
            self._playing |= {task.id: position for position, task in asked}
            mine = self._fleet.share([task for _, task in asked], self._asked)
            seed = trainer.seed * 1_000_003 + self._version + (self._asked << 40)
            self._stream.submit(mine, version=self._version, seed=seed)
            self._asked += 1

    def _listen(self) -> None:
        """Waits for news, tells the others, and enters all of it into the books. Raises Stopped in all processes if one was
        asked to stop."""
        answers = self._fleet.agree(self._hear())
        stop = next((answer.stop for answer in answers if answer.stop), "")
        if stop:
            raise Stopped(stop)
        for answer in answers:
            for episodes in groups_of(answer.episodes):
                self._ready.append(Group(self._playing.pop(episodes[0].task_id), episodes))
            self._supply.again(self._playing.pop(name) for name in answer.unplayed)
        self._fleet.recover([lost for answer in answers for lost in answer.lost])

    def _hear(self) -> Answer:
        answer = Answer()
        news = self._stream.take(LISTEN_SECONDS)
        while news is not None:
            if isinstance(news, Finished):
                answer.episodes += news.episodes
            else:
                answer.unplayed += [task.id for task in news.tasks]
                if news.error is not None:
                    answer.lost.append((news.error.address, str(news.error), news.error.stopping))
            news = self._stream.take(0.0)
        try:
            self._watch.heed()
        except Stopped as stopped:
            answer.stop = str(stopped)
        return answer

    def _metrics(self, groups: Sequence[Group], dropped: int) -> dict[str, float]:
        behind = [staleness(group, self._version) for group in groups]
        spans = [len(episode.spans) for group in groups for episode in group.episodes]
        return {
            "async/staleness_mean": float(np.mean(behind)),
            "async/staleness_max": float(max(behind)),
            "async/staleness_min": float(min(behind)),
            "async/staleness_dropped": float(dropped),
            "async/mixed_episodes": float(np.mean([count > 1 for count in spans])),
            "async/queue": float(len(self._ready)),
            "async/in_flight": float(len(self._playing)),
        }


def oldest(group: Group) -> int:
    """The version that sampled a group's oldest token; -1 for one without tokens."""
    return min((span[0] for episode in group.episodes for span in episode.spans), default=-1)


def staleness(group: Group, version: int) -> int:
    """How many versions before `version` a group's oldest token was sampled; 0 for one without tokens."""
    first = oldest(group)
    return version - first if first >= 0 else 0
