"""Pushing: the learner's parameters become every rollout service's weights, all services or none.

Bucket after bucket is converted, copied to the host and sent (buckets.py, sending.py): as it is, or as a difference from the
version that all services took last, where a service still holds that and the difference is small. A broken transfer goes
on from what the service still misses. Two phases: every service has everything, checked, before any applies it; an applied
version is live once the engine's log-probabilities are the learner's (rollout/probe.py). A service that fails in that gets
everything once more. With several learner processes each sends its own shards to every service, and process 0 leads through
the phases.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import astuple, dataclass
from functools import partial
from typing import Any, TypeVar

from rollout import bridge_pb2 as pb
from rollout import wire
from rollout.channel import grpc
from rollout.client import RolloutClient
from rollout.probe import Probe
from rollout.stub import BridgeError, Stub, explain
from sqlrl_jax.buckets import Converter, Weights
from sqlrl_jax.config_lora import LoraConfig
from sqlrl_jax.distributed import World
from sqlrl_jax.model.config import ModelConfig
from sqlrl_jax.sending import Base, Encoded, Sender, Stream, estimate

T = TypeVar("T")

ATTEMPTS = 3
ROUNDS = 2  # a service that could not apply, or failed the probe, is given everything once more
RETRY_SECONDS = 5.0  # for a service to answer again after a broken transfer
PAYS_BELOW = 0.5  # bytes of differences for a byte of weights


class PushError(BridgeError):
    """The weights did not arrive at `address`. The services go on with what they had, or are quarantined."""


@dataclass(frozen=True)
class _Problem:
    """Why a service did not do what it was asked. `alive`: it answers, so another attempt may go through."""

    address: str
    text: str
    transient: bool
    alive: bool


@dataclass
class _Push:
    """One push under way. `encoded` None: everything is sent; otherwise differences, where a service takes them."""

    key: pb.WeightsKey
    weights: Weights
    encoded: Encoded | None
    refill: bool
    """The base is overwritten with what is sent."""
    sent: int = 0
    checking: float = 0.0
    """Seconds in which the services applied differences to what they held, and checked everything."""
    on_delta: int = 0
    passed: bool = False
    """Every piece has gone by, so that the base can follow."""

    def begin(self, base: pb.WeightsKey | None, lease: float) -> pb.BeginRequest:
        manifest = [cut.to_proto() for cut in self.weights.cuts]
        return pb.BeginRequest(weights=self.key, manifest=manifest, lease_seconds=lease, base=base)


class Pusher:
    """Pushes to all services of `client` as learner (run_id, epoch); `epoch` grows with each start of the run.

    `dtype` is the engine's ("float32", "bfloat16"). With the rank of `lora` above 0 what is pushed are adapters, under PEFT's
    names. With `delta` this process keeps the bytes that it pushed last on its host, and sends differences from them where
    those are less than half as much. `timeout` bounds one transfer, and the time a service keeps the bytes of one that does
    not go on.
    """

    def __init__(
        self,
        client: RolloutClient,
        model_config: ModelConfig,
        dtype: str,
        lora: LoraConfig | None = None,
        *,
        run_id: str,
        epoch: int,
        timeout: float = 300.0,
        delta: bool = True,
        world: World | None = None,
    ) -> None:
        self._world = world or World()
        self._client, self._run, self._epoch, self._timeout = client, run_id, epoch, timeout
        self._converter = Converter(model_config, dtype, lora)
        self._base = Base() if delta else None
        client.identify(run_id, epoch)

    def push(self, params: Any, version: int, probe: Probe | None = None) -> dict[str, float]:
        """Makes trained `params` the weights of every service as `version`; returns seconds and bytes as bridge/… metrics.

        `probe` is what the learner computes with them. Idempotent: a service that has this version already is left alone.
        Raises PushError naming the service, in every process the same.
        """
        return self.push_weights(self._converter.weights(params), version, probe)

    def push_weights(self, weights: Weights, version: int, probe: Probe | None = None) -> dict[str, float]:
        """The same of weights that are converted already."""
        started = time.monotonic()
        key = pb.WeightsKey(run=self._run, epoch=self._epoch, version=version)
        push = self._plan(key, weights)
        staged = applied = 0.0
        for attempt in range(1, ROUNDS + 1):
            before = time.monotonic()
            self._stage(push)
            between = time.monotonic()
            states, problems = self._commit(key, pb.APPLY, probe)
            staged, applied = staged + between - before, applied + time.monotonic() - between
            if not problems or attempt == ROUNDS or not all(problem.alive for problem in problems):
                break
        if problems:
            raise PushError(problems[0].address, f"weight version {version} was not applied: {problems[0].text}")
        self._follow(push)
        seconds = {"push": time.monotonic() - started, "wire": staged, "apply": applied} | weights.waited
        return {f"bridge/{name}_seconds": value for name, value in seconds.items()} | self._metrics(push, states)

    def _plan(self, key: pb.WeightsKey, weights: Weights) -> _Push:
        """Whether differences are worth it; the same in every process."""
        base = self._base
        if base is None or base.key == key:  # these very weights, again: for a service that is new
            return _Push(key, weights, None, refill=False)
        encoded = None
        if base.key is not None and base.cuts == weights.cuts:
            sample = weights.sample()
            if self._world.from_main("differences pay", lambda: estimate(base, sample) < PAYS_BELOW):
                encoded = Encoded()
        return _Push(key, weights, encoded, refill=encoded is None)

    def _stage(self, push: _Push) -> None:
        """Brings every service everything, checked. Raises PushError.

        Each process sends its shards; when all have, process 0 has the services check that they are whole. Another attempt
        goes on where a broken one stopped, because Begin tells what is missing.
        """
        for attempt in range(1, ATTEMPTS + 1):
            problems = self._transfer(push)
            before = time.monotonic()
            problems = problems or self._commit(push.key, pb.PREPARE)[1]
            push.checking += time.monotonic() - before
            if not problems:
                return
            worst = min(problems, key=lambda problem: (problem.transient, problem.alive))
            if attempt == ATTEMPTS or not worst.transient or not worst.alive:
                break
        self._abort(push.key)
        raise PushError(
            worst.address,
            f"pushing weight version {push.key.version} failed (attempt {attempt} of {ATTEMPTS}): {worst.text}",
            transient=worst.transient,
        )

    def _transfer(self, push: _Push) -> list[_Problem]:
        """Begin, then Push what is missing, on all services at the same time. Returns what went wrong in any process."""
        base = self._base.key if self._base is not None and push.encoded is not None else None
        request = push.begin(base, self._timeout)
        begun, problems = self._everywhere(lambda stub: (stub, stub.begin(request, timeout=self._timeout)))
        problems = self._of_all("begun", problems)
        push.on_delta = max(push.on_delta, sum(state.delta for _, state in begun))
        if problems or not any(self._world.gather("to send", any(bool(state.missing) for _, state in begun))):
            return problems
        takers = [(stub, state) for stub, state in begun if state.missing]
        if self._base is not None and push.refill:
            self._base.start(push.weights.cuts)
        sender = Sender(begun[0][1].push_id, self._base, push.encoded, refill=push.refill)
        with ThreadPoolExecutor(max(1, len(takers)), thread_name_prefix="stream") as pool:
            streams = [Stream(stub, state, self._timeout, pool) for stub, state in takers]
            try:
                sender.send(push.weights.buckets(), streams)
            finally:
                sent, problems = self._each([(stream.stub, stream.finish) for stream in streams])
        push.passed = True
        push.sent += sum(sent)
        return self._of_all("pushed", problems)

    def _follow(self, push: _Push) -> None:
        """All services have the version: the next push's differences are from it."""
        if self._base is None or self._base.key == push.key:
            return
        if push.encoded is not None and push.passed:
            self._base.advance(push.encoded)
        self._base.key = push.key if push.passed else None

    def _metrics(self, push: _Push, states: Sequence[pb.PushState]) -> dict[str, float]:
        encoded = push.encoded or Encoded()
        kept = self._base.nbytes if self._base is not None else 0
        mine = [push.sent, kept, encoded.changed, encoded.values, encoded.nbytes, encoded.covered]
        every = self._world.gather("bytes pushed", mine)
        sent, kept, changed, values, made, covered = (sum(column) for column in zip(*every, strict=True))
        metrics = {
            "sent_bytes": sent,
            "model_bytes": sum(cut.nbytes for cut in push.weights.cuts),
            "base_bytes": kept,
            "services": len(self._client.stubs),
            "delta_services": push.on_delta,
            "check_seconds": push.checking,
            "pause_seconds": max((state.pause_seconds for state in states), default=0.0),
        }
        tried = [state for state in states if state.probe_tokens]
        if tried:
            metrics["probe_logprob_diff"] = max(state.probe_mean for state in tried)
            metrics["probe_logprob_diff_max"] = max(state.probe_max for state in tried)
        if values:
            metrics |= {"delta_density": changed / values, "delta_ratio": made / covered}
            metrics["encode_seconds"] = encoded.seconds
        return {f"bridge/{name}": float(value) for name, value in metrics.items()}

    def _commit(
        self, key: pb.WeightsKey, phase: pb.Phase, probe: Probe | None = None
    ) -> tuple[list[pb.PushState], list[_Problem]]:
        """Process 0 takes all services through a phase; the others wait for what came of it."""
        message = wire.probe_to_proto(probe) if probe is not None else None
        request = pb.CommitRequest(weights=key, phase=phase, probe=message)
        states: list[pb.PushState] = []
        problems: list[_Problem] = []
        if self._world.is_main:
            states, problems = self._everywhere(lambda stub: stub.commit(request, timeout=self._timeout))
        return states, self._of_all("committed", problems)

    def _everywhere(self, function: Callable[[Stub], T]) -> tuple[list[T], list[_Problem]]:
        return self._each([(stub, partial(function, stub)) for stub in self._client.stubs])

    def _each(self, calls: Sequence[tuple[Stub, Callable[[], T]]]) -> tuple[list[T], list[_Problem]]:
        """Makes all calls at the same time; waits for all. Returns the results and what went wrong."""

        def call(pair: tuple[Stub, Callable[[], T]]) -> T | _Problem:
            stub, function = pair
            try:
                return function()
            except grpc.RpcError as error:
                problem = explain(stub.address, error)
            except BridgeError as error:
                problem = error
            alive = not problem.transient or stub.healthy(RETRY_SECONDS, wait=True)
            return _Problem(stub.address, str(problem), problem.transient, alive)

        with ThreadPoolExecutor(max(1, len(calls)), thread_name_prefix="push") as pool:
            done = list(pool.map(call, calls))
        return [d for d in done if not isinstance(d, _Problem)], [d for d in done if isinstance(d, _Problem)]

    def _of_all(self, name: str, problems: list[_Problem]) -> list[_Problem]:
        """The problems of all processes, in every process."""
        return [_Problem(*p) for part in self._world.gather(name, [astuple(p) for p in problems]) for p in part]

    def _abort(self, key: pb.WeightsKey) -> None:
        """Tells all services to forget a push that has failed somewhere; leases cover those that cannot be told."""
        for stub in self._client.stubs if self._world.is_main else ():
            call = stub.abort.future(pb.AbortRequest(weights=key), timeout=5.0)
            call.exception()
