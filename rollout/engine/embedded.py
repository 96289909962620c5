"""The embedded engine: JAX decoding inside the rollout service, on whatever device JAX sees.

The only file of the rollout side that imports JAX. A session owns a slot of the KV cache from its first turn to its end, so
a later turn computes only what is new; when slots are short, sessions wait in their order. One thread does all computing,
in ticks: admit, fill the cache, decode a chunk of tokens, look for stop strings.

Results repeat bit for bit: a tick begins only when every open session either waits for tokens or is closed. So what is
computed together follows from the requests alone, however long environments take. The price is that all wait for the
slowest environment; after `barrier_timeout` seconds of silence the engine goes on without it and counts that in its stats.
With trainer.max_staleness, where weights change at any time and nothing repeats anyway, a tick waits for the environments
only a fraction of the time that the last one took: long enough to compute most episodes together, too short to stall.
"""

from __future__ import annotations

import asyncio
import heapq
import itertools
import logging
import threading
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from rollout.chat import Chat, load_tokenizer
from rollout.engine.base import Engine, EngineError, Session
from rollout.types import Generation, SamplingParams, TensorSpec
from sqlrl_jax import compile_cache, slots
from sqlrl_jax.config import Config
from sqlrl_jax.model.config import ModelConfig
from sqlrl_jax.model.hf_files import CheckpointError
from sqlrl_jax.model.served import Served

_log = logging.getLogger(__name__)
LINGER = 0.1  # of the last tick's time


@dataclass
class _Request:
    """One turn being generated. `future` is resolved by the engine's thread."""

    ids: list[int]
    params: SamplingParams
    seed: int
    future: Future[Generation] = field(default_factory=Future)
    output: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    spans: list[tuple[int, int, int]] = field(default_factory=list)

    def generation(self, reason: str) -> Generation:
        return Generation(self.output, self.logprobs, reason, self.spans)


class _EmbeddedSession(Session):
    """All fields are guarded by the engine's lock, but for `sequence`, which belongs to the engine's thread."""

    def __init__(self, engine: EmbeddedEngine, rank: int) -> None:
        self.engine, self.rank = engine, rank
        self.request: _Request | None = None
        self.sequence: slots.Sequence | None = None
        self.closed = False
        self.late = False  # not waited for any longer

    async def generate(self, input_ids: Sequence[int], params: SamplingParams, seed: int) -> Generation:
        return await asyncio.wrap_future(self.engine._submit(self, list(input_ids), params, seed))

    def close(self) -> None:
        self.engine._close_session(self)


class EmbeddedEngine(Engine):
    """See the module. Weights are loaded from `trainer.policy.model.path` as version 0."""

    def __init__(self, config: Config, barrier_timeout: float = 120.0) -> None:
        compile_cache.enable(config.trainer.compile_cache)
        generator = config.generator
        self.tokenizer_dir = config.trainer.policy.model.path
        self.model_config = ModelConfig.from_dir(self.tokenizer_dir)
        self.chat = Chat(load_tokenizer(self.tokenizer_dir))
        new_tokens = max(generator.sampling_params.max_generate_length, generator.eval_sampling().max_generate_length)
        self.max_context = min(self.model_config.max_position_embeddings, generator.max_input_length + new_tokens)
        self._end_ids = self.chat.end_ids | set(self.model_config.eos_token_ids)
        self._dtype = generator.inference_engine.dtype
        self._max_sequences = generator.inference_engine.max_sequences
        self._barrier_timeout = barrier_timeout
        self._repeatable = config.trainer.max_staleness == 0
        self._linger_until = 0.0
        self._slots = slots.Slots(self.model_config, self._dtype, generator.inference_engine.decode_chunk)
        self._served = Served(config.trainer.policy.model, self.model_config, self._dtype)
        self._slots.load(self._slots.prepare(self._served.start()))
        self._version = 0
        self._stop_ids: dict[tuple[str, ...], frozenset[int]] = {}

        self._computing = threading.Lock()  # held during a tick; taken before _changed where both are needed
        self._changed = threading.Condition()
        self._sessions: set[_EmbeddedSession] = set()
        self._serial = itertools.count()
        self._closed: list[_EmbeddedSession] = []  # whose slots the engine's thread takes back
        self._idle = 0  # open sessions without a request that are waited for
        self._last_event = time.monotonic()
        self._free = list(range(self._max_sequences))
        self._paused = False
        self._failure = ""
        self._prefix_hits = self._barrier_timeouts = 0
        self._thread = threading.Thread(target=self._loop, name="embedded-engine", daemon=True)
        self._thread.start()

    # What others call, from any thread.

    @property
    def version(self) -> int:
        return self._version

    def session(self, order: int) -> Session:
        with self._changed:
            self._require_alive()
            session = _EmbeddedSession(self, next(self._serial))
            self._sessions.add(session)
            self._idle += 1
            self._event()
            return session

    def manifest(self) -> list[TensorSpec]:
        return self._served.manifest()

    def apply_weights(self, tensors: Mapping[str, Any], version: int) -> float:
        copies = {name: np.array(value) for name, value in tensors.items()}  # the caller may overwrite its memory
        try:
            params = self._slots.prepare(self._served.params(copies))
        except CheckpointError as error:
            raise EngineError(f"weights of version {version} were refused: {error}") from error
        with self._computing:
            stopped = time.monotonic()
            self._slots.load(params)
            self._version = version
            for session in self._sessions_now():
                if session.sequence is not None:
                    session.sequence.cached = 0  # computed with the old weights
            return time.monotonic() - stopped

    def score(self, sequences: Sequence[Sequence[int]]) -> list[list[float]]:
        for ids in sequences:
            self._check(ids)
        with self._computing:
            return [self._slots.score(ids) for ids in sequences]

    def pause(self) -> None:
        with self._changed:
            self._paused = True
        with self._computing:  # a tick that was under way has ended
            return

    def resume(self) -> None:
        with self._changed:
            self._paused = False
            self._event()

    def abort(self) -> int:
        with self._computing:
            return self._abort("abort")

    def stats(self) -> dict[str, float]:
        counters = self._slots.counters
        with self._changed:
            running = sum(s.request is not None for s in self._sessions)
            placed = sum(s.request is not None and s.sequence is not None for s in self._sessions)
            return {
                "generated_tokens": counters.generated_tokens,
                "prefill_tokens": counters.prefill_tokens,
                "prefix_hit_tokens": self._prefix_hits + counters.shared_tokens,
                "prefill_seconds": counters.prefill_seconds,
                "decode_seconds": counters.decode_seconds,
                "busy_seconds": counters.prefill_seconds + counters.decode_seconds,
                "compiled_shapes": len(counters.shapes),
                "barrier_timeouts": self._barrier_timeouts,
                "sessions": len(self._sessions),
                "active": placed,
                "waiting": running - placed,
            }

    def close(self) -> None:
        with self._changed:
            if self._failure == "closed":
                return
            self._failure = "closed"
            self._changed.notify_all()
        self._thread.join()
        self._abort("abort")
        self._slots.close()

    # What sessions call, in the event loop.

    def _submit(
        self, session: _EmbeddedSession, ids: list[int], params: SamplingParams, seed: int
    ) -> Future[Generation]:
        self._check(ids)
        if params.max_tokens < 1:
            raise EngineError(f"max_tokens = {params.max_tokens}: at least 1 is needed")
        request = _Request(ids, params, seed)
        request.future.set_running_or_notify_cancel()  # the engine alone resolves it
        with self._changed:
            self._require_alive()
            if session.closed or session.request is not None:
                raise EngineError("a session generates one turn at a time, and none after it is closed")
            session.request = request
            self._no_longer_idle(session)
            self._event()
        return request.future

    def _check(self, ids: Sequence[int]) -> None:
        if not 0 < len(ids) < self.max_context:
            raise EngineError(
                f"{len(ids)} input tokens: the engine takes 1 to {self.max_context - 1}"
                " (generator.max_input_length and the model's max_position_embeddings)"
            )
        if not 0 <= min(ids) <= max(ids) < self.model_config.vocab_size:
            raise EngineError(f"a token id lies outside the model's vocabulary of {self.model_config.vocab_size}")

    def _close_session(self, session: _EmbeddedSession) -> None:
        with self._changed:
            if session.closed:
                return
            session.closed = True
            request, session.request = session.request, None
            if request is None:
                self._no_longer_idle(session)
            self._sessions.remove(session)
            self._closed.append(session)
            self._event()
        if request is not None:
            request.future.set_result(Generation([], [], "abort", []))

    def _no_longer_idle(self, session: _EmbeddedSession) -> None:
        if not session.late:
            self._idle -= 1
        session.late = False

    def _event(self) -> None:
        self._last_event = time.monotonic()
        self._changed.notify_all()

    def _require_alive(self) -> None:
        if self._failure:
            raise EngineError(f"the engine has stopped: {self._failure}")

    # The engine's thread.

    def _loop(self) -> None:
        try:
            while self._wait():
                with self._computing:
                    running = self._admit()
                    if running:
                        began = time.monotonic()
                        self._tick(running)
                        ended = time.monotonic()
                        self._linger_until = ended + LINGER * (ended - began)
        except Exception as error:  # nobody may wait for a thread that has died
            _log.exception("the embedded engine failed")
            with self._changed:
                self._failure = f"{type(error).__name__}: {error}"
            self._abort("error")

    def _wait(self) -> bool:
        """Waits for the barrier; False when the engine is closed."""
        with self._changed:
            while not self._failure:
                self._reap()
                left = self._patience()
                if self._paused or len(self._sessions) == self._idle:
                    self._changed.wait()
                elif not self._idle and any(s.request is not None for s in self._sessions):
                    return True
                elif not self._idle:  # all that are open are late
                    self._changed.wait()
                elif left > 0:
                    self._changed.wait(left)
                elif self._repeatable:
                    self._give_up_waiting()
                else:
                    return True
            return False

    def _patience(self) -> float:
        """Seconds that sessions without a request may still hold up the others."""
        until = self._last_event + self._barrier_timeout if self._repeatable else self._linger_until
        return until - time.monotonic()

    def _give_up_waiting(self) -> None:
        self._barrier_timeouts += 1
        _log.warning("%d episodes are not waited for any longer: results of this batch may not repeat", self._idle)
        for session in self._sessions:
            session.late = session.late or session.request is None
        self._idle = 0

    def _reap(self) -> None:
        for session in self._closed:
            if session.sequence is not None:
                heapq.heappush(self._free, session.sequence.slot)
                session.sequence = None
        self._closed.clear()

    def _admit(self) -> list[tuple[_EmbeddedSession, _Request]]:
        """Every session that is to run in this tick, in order; new ones get slots as long as there are any."""
        with self._changed:
            if self._paused:
                return []
            asking = sorted((s for s in self._sessions if s.request is not None), key=lambda s: s.rank)
            for session in asking:
                if session.sequence is None and self._free:
                    session.sequence = slots.Sequence(slot=heapq.heappop(self._free), ids=[])
            pairs = [(s, s.request) for s in asking if s.request is not None and s.sequence is not None]
        for session, request in pairs:
            if not request.output:
                self._begin(session, request)
        return pairs

    def _begin(self, session: _EmbeddedSession, request: _Request) -> None:
        """Finds how much of an earlier turn's cache the new turn can use."""
        sequence = session.sequence
        assert sequence is not None
        same = min(sequence.cached, len(request.ids) - 1)
        if request.ids[:same] != sequence.ids[:same]:
            same = next(i for i in range(same) if request.ids[i] != sequence.ids[i])
        self._prefix_hits += same
        sequence.cached, sequence.ids = same, list(request.ids)
        sequence.seed = (request.seed >> 32 & 0xFFFFFFFF, request.seed & 0xFFFFFFFF)
        sequence.temperature, sequence.top_p = request.params.temperature, request.params.top_p
        sequence.limit = min(request.params.max_tokens, self.max_context - len(request.ids))

    def _tick(self, running: list[tuple[_EmbeddedSession, _Request]]) -> None:
        ends = set(self._end_ids).union(*(self._single_token_stops(r.params.stop) for _, r in running))
        sequences = [s.sequence for s, _ in running if s.sequence is not None]
        sampled = self._slots.run(sequences, sorted(ends))
        done = []
        for (session, request), sequence, (ids, logprobs) in zip(running, sequences, sampled, strict=True):
            keep, reason = self._cut(request, ids, sequence.limit)
            sequence.ids += ids[:keep]
            sequence.limit -= keep
            sequence.cached = min(sequence.cached, len(sequence.ids) - 1)
            _add_span(request, self._version, keep)
            request.output += ids[:keep]
            request.logprobs += logprobs[:keep]
            if reason:
                done.append((session, request, reason))
        self._resolve(done)

    def _resolve(self, done: list[tuple[_EmbeddedSession, _Request, str]]) -> None:
        with self._changed:  # all at once, so that nobody sees half a tick
            done = [d for d in done if d[0].request is d[1]]  # the others were closed meanwhile
            for session, _, _ in done:
                session.request = None
            self._idle += len(done)
            self._event()
        for _, request, reason in done:
            request.future.set_result(request.generation(reason))

    def _cut(self, request: _Request, fresh: list[int], limit: int) -> tuple[int, str]:
        """How many of the fresh tokens belong to the turn, and why it ends with them ("" if it goes on)."""
        found = self._stop_string_end(request, fresh)
        for count, token in enumerate(fresh[:found], 1):
            if token in self._end_ids:
                return count, "stop"
        if found is not None:
            return found, "stop"
        return len(fresh), "length" if len(fresh) >= limit else ""

    def _stop_string_end(self, request: _Request, fresh: list[int]) -> int | None:
        """How many fresh tokens there are up to the one that completes a stop string."""
        if not request.params.stop or not fresh:
            return None
        window = max(len(stop.encode()) for stop in request.params.stop)  # a token is at least a byte
        before = request.output[-window:]

        def stops(count: int) -> bool:
            text = self.chat.decode(before + fresh[:count])
            return any(stop in text for stop in request.params.stop)

        return next((n for n in range(1, len(fresh) + 1) if stops(n)), None) if stops(len(fresh)) else None

    def _single_token_stops(self, stop: tuple[str, ...]) -> frozenset[int]:
        """Stop strings that are one token: the decoding loop itself can stop at them."""
        if stop not in self._stop_ids:
            encoded = [self.chat.tokenizer.encode(text, add_special_tokens=False) for text in stop]
            self._stop_ids[stop] = frozenset(ids[0] for ids in encoded if len(ids) == 1)
        return self._stop_ids[stop]

    def _sessions_now(self) -> list[_EmbeddedSession]:
        with self._changed:
            return list(self._sessions)

    def _abort(self, reason: str) -> int:
        """Ends all turns: as aborted, or (reason "error") with the engine's failure."""
        with self._changed:
            asking = [(s, s.request) for s in self._sessions if s.request is not None]
            for session, _ in asking:
                session.request = None
            self._idle += len(asking)
            self._event()
        for _, request in asking:
            if reason == "error":
                request.future.set_exception(EngineError(f"the engine has stopped: {self._failure}"))
            else:
                request.future.set_result(request.generation("abort"))
        return len(asking)


def _add_span(request: _Request, version: int, count: int) -> None:
    start = len(request.output)
    if request.spans and request.spans[-1][0] == version:
        request.spans[-1] = (version, request.spans[-1][1], start + count)
    elif count:
        request.spans.append((version, start, start + count))
