"""The service's calls about weights: Begin, Push, Commit, Abort around the receiver and the engine.

What takes long (checking, applying, the probe) runs in threads, one such call at a time, while the event loop
takes frames and plays episodes. From the moment new weights enter the engine until its probe has passed nothing that was
generated may leave the service: see `sure`.
"""

from __future__ import annotations

import asyncio
import logging
import os
from collections.abc import AsyncIterator, Callable
from concurrent.futures import ThreadPoolExecutor

from rollout import bridge_pb2 as pb
from rollout import frames, wire
from rollout.data_port import DataPort
from rollout.engine.base import Engine, EngineError
from rollout.manifest import Refused, Slice
from rollout.probe import Gap, Probe, gap
from rollout.receiver import Corrupt, Key, Range, Receiver

_log = logging.getLogger(__name__)
_CHECKING_THREADS = 4


class WeightCalls:
    """`on_doubt` is called when the engine holds nobody knows what: its episodes must end."""

    def __init__(
        self, engine: Engine, data_port: DataPort, clock: Callable[[], float], on_doubt: Callable[[], None]
    ) -> None:
        self._engine, self._data_port, self._on_doubt = engine, data_port, on_doubt
        live = Key("", 0, engine.version) if engine.version >= 0 else None  # weights that it was started with
        self.receiver = Receiver(engine.manifest(), clock, live)
        self.lock = asyncio.Lock()
        """Held while the receiver's state may change; who starts episodes holds it too."""
        self.sure = asyncio.Event()
        """Set but while weights are applied and tried out."""
        self.sure.set()
        self._pool = ThreadPoolExecutor(min(_CHECKING_THREADS, os.cpu_count() or 1), thread_name_prefix="check")
        self._pause, self._gap = 0.0, Gap()
        data_port.open(self.receiver.frame)

    async def begin(self, request: pb.BeginRequest) -> pb.PushState:
        weights, base = key_of(request.weights), key_of(request.base) if request.HasField("base") else None
        manifest = [wire.spec_from_proto(spec) for spec in request.manifest]
        slices = [[Slice(tuple(s.start), tuple(s.size)) for s in spec.slices] for spec in request.manifest]
        receiver, lease = self.receiver, request.lease_seconds
        async with self.lock:
            missing = receiver.begin(weights, manifest, slices, lease, base)
        state = self._state(weights, missing)
        state.data_port, state.ticket = self._data_port.port, self._data_port.ticket(state.push_id)
        return state

    async def push(self, requests: AsyncIterator[bytes]) -> pb.PushReply:
        reply = pb.PushReply()
        async for data in requests:
            try:
                frame = frames.decode(data)
            except frames.FrameError as error:
                raise Corrupt(str(error)) from None
            reply.duplicates += not self.receiver.frame(frame)
            reply.frames += 1
            reply.bytes += len(data)
        return reply

    async def commit(self, request: pb.CommitRequest) -> pb.PushState:
        weights = key_of(request.weights)
        if request.phase not in (pb.PREPARE, pb.APPLY):
            raise Refused("commit: phase must be PREPARE or APPLY")
        async with self.lock:  # a repeated call waits for the first and finds its result
            if request.phase == pb.PREPARE:
                await asyncio.to_thread(self.receiver.prepare, weights, self._pool.map)
            else:
                await self._apply(weights, wire.probe_from_proto(request.probe))
        return self._state(weights, [])

    async def abort(self, request: pb.AbortRequest) -> pb.PushState:
        weights = key_of(request.weights)
        async with self.lock:
            self.receiver.abort(weights)
        return self._state(weights, [])

    async def _apply(self, weights: Key, probe: Probe) -> None:
        tensors = self.receiver.start_apply(weights)
        if tensors is None:
            return
        self.sure.clear()
        try:
            self._pause = await asyncio.to_thread(self._engine.apply_weights, tensors, weights.version)
            self._gap = await asyncio.to_thread(self._try_out, probe)
        except Exception as error:
            _log.exception("weights could not be applied")
            self.receiver.finish_apply(f"{type(error).__name__}: {error}")
            self._on_doubt()
            raise Refused(self.receiver.quarantine) from error
        else:
            self.receiver.finish_apply()
        finally:
            self.sure.set()

    def _try_out(self, probe: Probe) -> Gap:
        """Raises ProbeFailed. An engine that works but has no time for it proves nothing: it goes on unproven."""
        if not probe.sequences:
            return Gap()
        try:
            scores = self._engine.score(probe.sequences)
        except EngineError as error:
            if self._engine.failure:
                raise
            _log.warning("new weights are live although they could not be tried out: %s", error)
            return Gap()
        found = gap(probe.logprobs, scores)
        if not found.mean <= probe.tolerance:  # not a number is no pass
            raise ProbeFailed(
                f"the engine's log-probabilities differ from the learner's by {found.mean:.2g} nats a token in the mean "
                f"(largest {found.largest:.2g}), more than {probe.tolerance:.2g} (bridge.probe_tolerance): it does not "
                f"compute with the weights that were pushed, or otherwise (quantization, adapters' alpha, another model)"
            )
        return found

    def _state(self, weights: Key, missing: list[Range]) -> pb.PushState:
        receiver = self.receiver
        return pb.PushState(
            state=receiver.state.name,
            push_id=weights.push_id,
            missing=[pb.ByteRange(tensor=r.tensor, slice=r.slice, offset=r.offset, length=r.length) for r in missing],
            received_bytes=receiver.received_bytes,
            pause_seconds=self._pause,
            delta=receiver.takes_delta,
            held=key_to_proto(receiver.held),
            probe_mean=self._gap.mean,
            probe_max=self._gap.largest,
            probe_tokens=self._gap.tokens,
        )


class ProbeFailed(Exception):
    """The engine computes something else than the learner."""


def key_of(message: pb.WeightsKey) -> Key:
    return Key(message.run, message.epoch, message.version)


def key_to_proto(key: Key | None) -> pb.WeightsKey | None:
    return None if key is None else pb.WeightsKey(run=key.run, epoch=key.epoch, version=key.version)
