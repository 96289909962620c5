"""A rollout service for tests: the real server, episode loop and receiver around a small deterministic engine.

Run as a process. Its tokens follow from the seed and the position alone, its logprobs from the weights, so tests see
which weights an episode was played with. Options make it slow, stuck or unable to take weights.
"""

from __future__ import annotations

import argparse
import asyncio
import hashlib
import json
import resource
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

import numpy as np

from rollout.engine.base import Engine, EngineError, Session
from rollout.environment import Environment, StepResult
from rollout.episode import EpisodeSettings, run_batch
from rollout.listener import Limits
from rollout.security import Security
from rollout.server import serve
from rollout.types import Generation, Message, SamplingParams, Task, TensorSpec, Trajectory
from sqlrl_jax.config import BridgeConfig, Config

SPECS = [TensorSpec("embed.weight", (300, 1000), "float32"), TensorSpec("norm.weight", (7,), "float32")]


def token(seed: int, position: int) -> int:
    return hashlib.blake2b(f"{seed}/{position}".encode(), digest_size=2).digest()[0]


class TableEngine(Engine):
    """Says four tokens a turn. Takes `delay` seconds for each; the sessions from number `stuck_from` on never answer."""

    tokenizer_dir, max_context = "", 10_000

    def __init__(
        self,
        specs: Sequence[TensorSpec],
        version: int,
        delay: float,
        stuck_from: int,
        fail_apply: int,
        slow_apply: int = -1,
        wrong_scores: int = 0,
        busy: bool = False,
    ) -> None:
        self.specs, self._version, self.delay, self.stuck_from, self.fail_apply = (
            list(specs),
            version,
            delay,
            stuck_from,
            fail_apply,
        )
        self.slow_apply, self.wrong_scores, self.busy = slow_apply, wrong_scores, busy
        self.weights: dict[str, np.ndarray] = {}
        self.tokens = self.open = 0

    @property
    def version(self) -> int:
        return self._version

    def session(self, order: int) -> Session:
        self.open += 1
        return TableSession(self, order)

    def manifest(self) -> list[TensorSpec]:
        return self.specs

    def apply_weights(self, tensors: Mapping[str, Any], version: int) -> float:
        self.weights = {name: np.array(value) for name, value in tensors.items()}
        if self.fail_apply == version:
            self.fail_apply = -1
            raise RuntimeError("out of memory while loading")
        if self.slow_apply == version:
            time.sleep(60)
        self._version = version
        return 0.0

    def score(self, sequences: Sequence[Sequence[int]]) -> list[list[float]]:
        if self.busy:
            raise EngineError("no time to score")
        self.wrong_scores, off = self.wrong_scores - 1, float(self.wrong_scores > 0)
        return [[float(np.float32(self.level())) + off] * (len(ids) - 1) for ids in sequences]

    def level(self) -> float:
        return float(sum(np.asarray(v, np.float64).sum() for v in self.weights.values()))

    def pause(self) -> None:
        """Its tokens take no time to stop."""

    def resume(self) -> None:
        """Nothing was stopped."""

    def abort(self) -> int:
        return 0

    def stats(self) -> dict[str, float]:
        return {"generated_tokens": float(self.tokens), "open_sessions": float(self.open), "level": self.level()}

    def close(self) -> None:
        """Nothing is held."""


class TableSession(Session):
    def __init__(self, engine: TableEngine, order: int) -> None:
        self.engine, self.order, self.is_open = engine, order, True

    async def generate(self, input_ids: Sequence[int], params: SamplingParams, seed: int) -> Generation:
        ids = []
        for position in range(len(input_ids), len(input_ids) + 4):
            await asyncio.sleep(
                3600 if self.order >= self.engine.stuck_from else self.engine.delay * (1 + self.order % 3)
            )
            ids.append(token(seed, position))
            self.engine.tokens += 1
        return Generation(ids, [float(np.float32(self.engine.level()))] * 4, "stop", [(self.engine.version, 0, 4)])

    def close(self) -> None:
        self.engine.open -= self.is_open
        self.is_open = False


class Chat:
    rewrites_history = False

    def prompt_ids(self, messages: Any) -> list[int]:
        return [ord(c) % 256 for c in messages[0]["content"]]

    def observation_ids(self, text: str, output_ids: Sequence[int]) -> list[int]:
        return [1, 2, 3]

    def action_text(self, output_ids: Sequence[int]) -> str:
        return " ".join(map(str, output_ids))


class TwoTurns(Environment):
    """Two turns. A task that says so fails `fields["failures"]` times for reasons of infrastructure."""

    failed: ClassVar[dict[str, int]] = {}

    def reset(self, task: Task) -> list[Message]:
        if self.failed.setdefault(task.id, 0) < task.fields.get("failures", 0):
            self.failed[task.id] += 1
            raise RuntimeError(f"no database for {task.id}")
        return [Message(role="user", content=task.fields.get("question", task.id))]

    def step(self, action: str, turn: int) -> StepResult:
        return StepResult(observation="seen", reward=float(turn == 2), done=turn == 2, outcome="correct")


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--port-file")
    parser.add_argument("--listen", default="127.0.0.1:0")
    parser.add_argument("--specs", help="JSON list of [name, shape, dtype]")
    parser.add_argument("--version", type=int, default=-1)
    parser.add_argument("--delay", type=float, default=0.0)
    parser.add_argument("--stuck-from", type=int, default=1 << 30)
    parser.add_argument("--fail-apply", type=int, default=-1, help="the version that fails once")
    parser.add_argument("--slow-apply", type=int, default=-1, help="the version that takes a minute")
    parser.add_argument("--wrong-scores", type=int, default=0, help="times that it computes something else")
    parser.add_argument("--busy", action="store_true", help="it has no time to score")
    parser.add_argument("--memory", type=int, help="megabytes that it may take besides what it has")
    parser.add_argument("--drain-timeout", type=float, default=20.0)
    parser.add_argument("--limits", type=json.loads, default={}, help="those of rollout.listener.Limits, as JSON")
    parser.add_argument("--bridge", type=json.loads, default={}, help="settings under `bridge`, as JSON")
    args = parser.parse_args()
    specs = [TensorSpec(n, tuple(s), d) for n, s, d in json.loads(args.specs)] if args.specs else SPECS
    engine = TableEngine(
        specs, args.version, args.delay, args.stuck_from, args.fail_apply, args.slow_apply, args.wrong_scores, args.busy
    )
    if args.memory is not None:
        taken = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (taken + (args.memory << 20),) * 2)

    async def play(
        tasks: list[Task],
        n_samples: int,
        sampling: SamplingParams,
        seed: int,
        max_turns: int,
        on_trajectory: Callable[[Trajectory], None],
    ) -> object:
        chat: Any = Chat()

        def environment() -> Environment:
            return TwoTurns(Config(), None)

        settings = EpisodeSettings(max_turns, 10_000, 10_000)
        return await run_batch(tasks, n_samples, engine, environment, chat, settings, sampling, seed, on_trajectory)

    supervised = args.port_file is not None
    asyncio.run(
        serve(
            engine,
            play,
            args.listen,
            port_file=args.port_file,
            supervised=supervised,
            drain_timeout=args.drain_timeout,
            limits=Limits(**args.limits),
            security=Security.load(BridgeConfig(**args.bridge)),
        )
    )


if __name__ == "__main__":
    main()
