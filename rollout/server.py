"""The rollout service: one engine behind the bridge's gRPC methods, in a process of its own.

One event loop runs the episodes, the calls and the receiver of weights; whatever blocks (the engine's weights, the
environments) runs in threads. A client that goes away takes its episodes with it. Left out: who may call, and how much
(listener.py), and several engines in one process.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import signal
import threading
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rollout import bridge_pb2 as pb
from rollout import wire
from rollout.channel import STOPPING, grpc, split_address
from rollout.data_port import DataPort
from rollout.engine.base import Engine, EngineError
from rollout.listener import Limits, listen_at
from rollout.manifest import Refused, check_size
from rollout.security import PLAIN, Security
from rollout.types import SamplingParams, Task, Trajectory
from rollout.weight_calls import WeightCalls, key_of, key_to_proto
from sqlrl_jax.allocator import keep_freed_frames

if TYPE_CHECKING:
    from sqlrl_jax.config import Config

_log = logging.getLogger(__name__)
HEARTBEAT_SECONDS = 1.0
LIMITS = Limits()
STOP_SECONDS = 10.0

# (tasks, n_samples, sampling, seed, max_turns, on_trajectory) → plays the batch; cancelling it frees the engine.
Player = Callable[[list[Task], int, SamplingParams, int, int, Callable[[Trajectory], None]], Awaitable[object]]


class Stopping(Refused):
    """The service was told to stop. Another one can play."""

    code = "UNAVAILABLE"


class RolloutService:
    """The bridge's methods around `engine`; `play` runs a batch of episodes on it."""

    def __init__(
        self,
        engine: Engine,
        play: Player,
        data_port: DataPort,
        limits: Limits = LIMITS,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._engine, self._play, self._limits = engine, play, limits
        self._weights = WeightCalls(engine, data_port, clock, self._end_jobs)
        self._jobs: dict[asyncio.Task[object], str] = {}  # running batches → the run that asked
        self._tensors = len(engine.manifest())
        self._stopping = False

    def methods(self) -> dict[str, Callable[..., Any]]:
        """The bridge's methods by name."""
        return {
            "Rollout": self.rollout,
            "Begin": self.begin,
            "Push": self.push,
            "Commit": self.commit,
            "Abort": self.abort,
            "Status": self.status,
        }

    async def rollout(self, request: pb.RolloutRequest, context: Any) -> AsyncIterator[pb.RolloutEvent]:
        arrived: asyncio.Queue[Trajectory | None] = asyncio.Queue()
        job = await self._start(request, context, arrived.put_nowait)
        job.add_done_callback(lambda _: arrived.put_nowait(None))
        finished, beat, wanted = 0, 0.0, sum(len(task.samples) or request.n_samples for task in request.tasks)
        coming = asyncio.ensure_future(self._next(arrived))
        try:
            while True:
                now = time.monotonic()
                if now - beat >= HEARTBEAT_SECONDS:
                    yield self._progress(wanted - finished, finished)
                    beat = now
                await asyncio.wait({coming}, timeout=HEARTBEAT_SECONDS)
                if not coming.done():
                    continue
                trajectory = coming.result()
                self._require_sound()
                if trajectory is None:
                    break
                coming = asyncio.ensure_future(self._next(arrived))
                finished += 1
                yield pb.RolloutEvent(trajectory=wire.trajectory_to_proto(trajectory))
            if self._stopping:
                yield self._progress(wanted - finished, finished)  # which says so
            await self._settle(job, context, wanted - finished)
            yield pb.RolloutEvent(finished=pb.Finished(trajectories=finished, stats=self._engine.stats()))
        finally:  # also when the client has gone
            coming.cancel()
            job.cancel()
            await asyncio.gather(job, return_exceptions=True)

    async def begin(self, request: pb.BeginRequest, context: Any) -> pb.PushState:
        key = key_of(request.weights)
        others = {run for run in self._jobs.values() if run and run != key.run}
        if others:
            raise Refused(f"{key} is refused: run {others.pop()!r} is using this service")
        check_size(len(request.manifest), sum(len(spec.slices) for spec in request.manifest), self._tensors)
        return await self._weights.begin(request)

    async def push(self, requests: AsyncIterator[bytes], context: Any) -> pb.PushReply:
        return await self._weights.push(requests)

    async def commit(self, request: pb.CommitRequest, context: Any) -> pb.PushState:
        return await self._weights.commit(request)

    async def abort(self, request: pb.AbortRequest, context: Any) -> pb.PushState:
        return await self._weights.abort(request)

    async def status(self, request: pb.StatusRequest, context: Any) -> pb.StatusReply:
        receiver = self._weights.receiver
        return pb.StatusReply(
            state=receiver.state.name,
            live=key_to_proto(receiver.live),
            staging=key_to_proto(receiver.staging),
            received_bytes=receiver.received_bytes,
            total_bytes=receiver.total_bytes,
            quarantine_reason=receiver.quarantine,
            active_requests=len(self._jobs),
            stats=self._engine.stats(),
            pid=os.getpid(),
            stopping=self._stopping,
        )

    async def drain(self, seconds: float) -> None:
        """Takes no more requests for episodes, plays on for at most `seconds`, and hands back what is not finished then."""
        self._stopping = True
        if self._jobs:
            await asyncio.wait(list(self._jobs), timeout=seconds)
        self._end_jobs()

    def _end_jobs(self) -> None:
        for job in list(self._jobs):
            job.cancel()

    async def _next(self, arrived: asyncio.Queue[Trajectory | None]) -> Trajectory | None:
        """The next episode, once the weights that it may have been played with are known to be right."""
        trajectory = await arrived.get()
        await self._weights.sure.wait()
        return trajectory

    def _require_sound(self) -> None:
        if self._weights.receiver.quarantine:
            raise Refused(self._weights.receiver.quarantine)

    async def _start(
        self, request: pb.RolloutRequest, context: Any, on_trajectory: Callable[[Trajectory], None]
    ) -> asyncio.Task[object]:
        tasks = [wire.task_from_proto(task) for task in request.tasks]
        sampling = wire.sampling_from_proto(request.sampling)
        if not tasks or request.n_samples < 1 or request.max_turns < 1:
            raise wire.WireError("rollout: at least one task, n_samples of 1 and max_turns of 1 are needed")
        for task in tasks:
            if len(set(task.samples)) < len(task.samples) or max(task.samples, default=0) >= request.n_samples:
                raise wire.WireError(f"task {task.id!r}: samples must be different numbers below {request.n_samples}")
        episodes = sum(len(task.samples) or request.n_samples for task in tasks)
        if episodes > self._limits.episodes:
            raise wire.WireError(f"rollout: {episodes} episodes in one request, {self._limits.episodes} are allowed")
        if self._stopping:
            raise Stopping(STOPPING)
        weights = key_of(request.weights)
        async with self._weights.lock:
            self._weights.receiver.require_live(weights.run, weights.epoch, weights.version, request.or_later)
            batch = self._play(tasks, request.n_samples, sampling, request.seed, request.max_turns, on_trajectory)
            job: asyncio.Task[object] = asyncio.ensure_future(batch)
            self._jobs[job] = weights.run
            job.add_done_callback(lambda done: self._jobs.pop(done, None))
        return job

    async def _settle(self, job: asyncio.Task[object], context: Any, missing: int) -> None:
        """After the last episode: passes on what ended the batch, if it was not its own end."""
        if job.cancelled():
            if self._weights.receiver.quarantine:
                raise Refused(self._weights.receiver.quarantine)
            raise Stopping(f"{STOPPING}: it hands back {missing} episodes")
        error = job.exception()
        if error is not None:
            _log.error("a batch of episodes failed", exc_info=error)
            await context.abort(grpc.StatusCode.INTERNAL, f"the batch failed: {type(error).__name__}: {error}")

    def _progress(self, active: int, finished: int) -> pb.RolloutEvent:
        tokens = int(self._engine.stats().get("generated_tokens", 0))
        progress = pb.Progress(active=active, finished=finished, tokens=tokens, stopping=self._stopping)
        return pb.RolloutEvent(progress=progress)


async def serve(
    engine: Engine,
    play: Player,
    listen: str,
    *,
    port_file: str | None = None,
    supervised: bool = False,
    security: Security = PLAIN,
    limits: Limits = LIMITS,
    drain_timeout: float = 20.0,
    data_port: int = 0,
) -> None:
    """Serves until SIGTERM, Ctrl-C or, when supervised, until whoever holds the other end of standard input is gone.

    After a signal it plays what it has begun for `drain_timeout` seconds more; after a second one it ends at once. Prints
    one line with the address, and writes the address to `port_file`, once calls are taken.
    """
    keep_freed_frames()
    stopping = asyncio.Event()
    loop = asyncio.get_running_loop()
    signalled = False

    def stop(number: int) -> None:
        nonlocal signalled
        if stopping.is_set():  # asked twice: now
            os._exit(128 + number)
        signalled = True
        stopping.set()

    for number in (signal.SIGINT, signal.SIGTERM):
        loop.add_signal_handler(number, stop, number)
    security.require_allowed(listen)
    data = DataPort(split_address(listen)[0], data_port, security, limits)
    service = RolloutService(engine, play, data, limits)
    listening = await listen_at(service.methods(), listen, security, limits)
    if supervised:
        threading.Thread(target=_watch_parent, args=(loop, stopping), name="parent", daemon=True).start()
    if port_file:
        partial = Path(port_file + ".partial")
        partial.write_text(listening.address)
        partial.replace(port_file)
    print(f"rollout service listening on {listening.address}", flush=True)
    await stopping.wait()
    await listening.stop_serving()
    await service.drain(drain_timeout if signalled and not engine.failure else 0.0)
    data.close()
    await listening.server.stop(grace=5.0)  # until the last have heard


def _watch_parent(loop: asyncio.AbstractEventLoop, stopping: asyncio.Event) -> None:
    """Stops the service when its standard input closes: the process that started it has died."""
    while os.read(0, 4096):
        continue
    loop.call_soon_threadsafe(stopping.set)
    time.sleep(STOP_SECONDS)  # a daemon thread: an orderly stop ends it here
    if os.getpgrp() == os.getpid():
        os.killpg(os.getpid(), signal.SIGKILL)  # workers too
    os._exit(1)


def main(config: Config, port_file: str | None = None) -> int:
    """`launch.py serve`. A service given a port file belongs to the process that gave it, and stops when that one dies."""
    bridge, security = config.bridge, Security.load(config.bridge)
    security.require_allowed(bridge.listen)  # before a model is loaded for nothing
    logging.basicConfig(format="%(asctime)s %(name)s: %(message)s")
    with contextlib.ExitStack() as stack:
        engine, play = _build(config, stack)
        supervised = port_file is not None
        asyncio.run(
            serve(
                engine,
                play,
                bridge.listen,
                port_file=port_file,
                supervised=supervised,
                security=security,
                drain_timeout=bridge.drain_timeout,
                data_port=bridge.data_port,
            )
        )
        failure = engine.failure
    if failure:
        raise EngineError(f"the engine has stopped: {failure}")
    return 0


def _build(config: Config, stack: contextlib.ExitStack) -> tuple[Engine, Player]:
    """The engine and the episodes that `config` describes; `stack` closes them."""
    from rollout.chat import Chat, load_tokenizer
    from rollout.environment import make_environment_factory
    from rollout.episode import EpisodeSettings, run_batch

    generator = config.generator
    chat = Chat(
        load_tokenizer(config.trainer.policy.model.path),
        conversation=generator.use_conversation_multi_turn,
        append_eos=generator.append_eos_token_after_stop_str_in_multi_turn,
        step_wise=generator.step_wise_trajectories,
    )
    pool = stack.enter_context(ThreadPoolExecutor(64, thread_name_prefix="environment"))
    environments = stack.enter_context(make_environment_factory(config))  # closed before the threads that wait for it
    engine = _engine(config)
    stack.callback(engine.close)

    def play(
        tasks: list[Task],
        n_samples: int,
        sampling: SamplingParams,
        seed: int,
        max_turns: int,
        on_trajectory: Callable[[Trajectory], None],
    ) -> Awaitable[object]:
        settings = EpisodeSettings(max_turns, generator.max_input_length, config.trainer.max_prompt_length)
        return run_batch(
            tasks, n_samples, engine, environments.create, chat, settings, sampling, seed, on_trajectory, pool
        )

    return engine, play


def _engine(config: Config) -> Engine:
    """The engine of `generator.backend`; the other one is not even imported."""
    if config.generator.backend == "embedded":
        from rollout.engine.embedded import EmbeddedEngine

        return EmbeddedEngine(config)
    from rollout.engine.sglang import SglangEngine

    # An engine that has died does not come back: the service ends, and whoever watches it starts another.
    return SglangEngine(config, on_failure=lambda why: os.kill(os.getpid(), signal.SIGTERM))
