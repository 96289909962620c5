"""The SGLang engine: the production backend, on GPUs, behind the interface of rollout.engine.base.

What an episode's turns have in common is found again in SGLang's radix cache, so a session only knows which turn is under
way. Log-probabilities come as the learner compares them: of the temperature-scaled distribution, not renormalised for
top-p (of the plain one where temperature is 0). New weights are loaded between two decoding steps: running turns are
retracted, every cached prefix is dropped, and the turns go on from their tokens on the new weights; their spans come from
SGLang's own record. New adapters stop nothing (sglang_lora.py): a turn ends on those that it began with.

Stop strings need the tokenizer inside SGLang, so it is loaded there too. SGLang looks for a stop string only in as many last
tokens as its usual spelling takes; one that the model spelled in more is found here, and what follows it is cut off.

What differs from the embedded engine: noise follows from a turn's seed only with `enable_deterministic_inference` in
generator.inference_engine.engine_init_kwargs, and `order` is ignored, because SGLang schedules by cached prefixes.
"""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import aclosing
from typing import TYPE_CHECKING, Any

from rollout.chat import Chat, load_tokenizer
from rollout.engine.base import Engine, EngineError, Session
from rollout.engine.hf_tensors import adapter_manifest, full_manifest
from rollout.engine.sglang_arguments import MARGIN, engine_arguments
from rollout.engine.sglang_lora import Adapters
from rollout.engine.sglang_runtime import Runtime
from rollout.engine.sglang_turn import Turn, generate_request, read_generation, read_scores, score_request
from rollout.engine.sglang_weights import load
from rollout.manifest import Refused, check_manifest
from rollout.types import Generation, SamplingParams, TensorSpec
from sqlrl_jax.model.config import ModelConfig

if TYPE_CHECKING:
    from sqlrl_jax.config import Config

_CONTROL_SECONDS = 120.0
_ABORT_SECONDS = 1.0


class _SglangSession(Session):
    """The fields are guarded by the engine's lock."""

    def __init__(self, engine: SglangEngine) -> None:
        self.engine = engine
        self.turn: Turn | None = None
        self.closed = False

    async def generate(self, input_ids: Sequence[int], params: SamplingParams, seed: int) -> Generation:
        return await self.engine._generate(self, Turn(list(input_ids), params, seed))

    def close(self) -> None:
        self.engine._close_session(self)


class SglangEngine(Engine):
    """See the module. The weights of `trainer.policy.model.path` are version 0. To be made in the main thread.

    `on_failure` is told, from another thread, when SGLang has died; every later call raises EngineError.
    """

    def __init__(self, config: Config, on_failure: Callable[[str], None] = lambda why: None) -> None:
        generator = config.generator
        self.tokenizer_dir = config.trainer.policy.model.path
        lora, dtype = config.trainer.policy.model.lora, generator.inference_engine.dtype
        self.model_config = ModelConfig.from_dir(self.tokenizer_dir)
        self.chat = Chat(load_tokenizer(self.tokenizer_dir))
        self._ends = sorted(self.chat.end_ids | set(self.model_config.eos_token_ids))
        if lora.rank:
            self._manifest = adapter_manifest(self.tokenizer_dir, lora, dtype)
        else:
            self._manifest = full_manifest(self.tokenizer_dir, dtype)
        new_tokens = max(generator.sampling_params.max_generate_length, generator.eval_sampling().max_generate_length)
        longest = self.model_config.max_position_embeddings - MARGIN
        self.max_context = min(longest, generator.max_input_length + new_tokens)
        arguments = engine_arguments(config, self.max_context)
        self._seeded = bool(arguments.get("enable_deterministic_inference"))
        self._ranks = generator.inference_engine.tensor_parallel_size
        self._max_running = generator.inference_engine.max_sequences
        self._version, self._paused, self._doubt = 0, False, ""
        self._lock = threading.Lock()  # guards what follows, and sessions and turns
        self._updating = threading.Lock()  # held while weights change or generation is stopped or started
        self._turns: dict[str, Turn] = {}
        self._sessions = 0
        self._counters = dict.fromkeys(("generated_tokens", "prefill_tokens", "prefix_hit_tokens", "retractions"), 0)
        self._busy, self._busy_since = 0.0, 0.0
        self._runtime = Runtime(arguments, config.bridge.start_timeout, on_failure)
        try:
            self._require_room()
            self._adapters = (
                Adapters(self._runtime, lora, self.tokenizer_dir, dtype, self._ranks) if lora.rank else None
            )
        except BaseException:
            self._runtime.close()
            raise

    def _require_room(self) -> None:
        limit = self._runtime.input_limit
        if limit < self.max_context:
            raise EngineError(
                f"SGLang's KV cache has room for prompts of {limit - 1} tokens, but episodes may grow to {self.max_context}:"
                " raise generator.inference_engine.gpu_memory_utilization or tensor_parallel_size, or lower"
                " generator.max_input_length"
            )

    # What others call, from any thread.

    @property
    def version(self) -> int:
        return self._version

    @property
    def failure(self) -> str:
        return self._runtime.failure

    @property
    def pids(self) -> list[int]:
        """SGLang's processes: the schedulers, then the detokenizer."""
        return self._runtime.pids

    def session(self, order: int) -> Session:
        self._require_alive()
        with self._lock:
            self._sessions += 1
        return _SglangSession(self)

    def manifest(self) -> list[TensorSpec]:
        return list(self._manifest)

    def apply_weights(self, tensors: Mapping[str, Any], version: int) -> float:
        given = [TensorSpec(name, tuple(value.shape), value.dtype.name) for name, value in tensors.items()]
        try:
            check_manifest(given, self._manifest)
        except Refused as error:
            raise EngineError(f"weights of version {version} were refused: {error}") from error
        if self._adapters is not None:
            with self._updating:
                self._adapters.load(tensors, version)
                self._version = version
                return 0.0
        with self._updating:
            paused, stopped = self._paused, time.monotonic()
            if not paused:
                self._stop_generation()
            try:
                load(self._runtime, tensors, version, self._ranks)
            except Exception as error:
                with self._lock:
                    self._doubt = f"weights of version {version} could not be applied ({error}); push again"
                    self._end_turns(self._doubt)
                raise EngineError(self._doubt) from error
            finally:
                if not paused and not self._runtime.failure:
                    self._start_generation()
            with self._lock:
                self._version, self._doubt = version, ""
            return time.monotonic() - stopped

    def score(self, sequences: Sequence[Sequence[int]]) -> list[list[float]]:
        self._require_alive()
        for ids in sequences:
            self._check_ids(ids)
        with self._updating:  # so that no other weights come in between
            scores = [self._runtime.submit(self._score(list(ids))) for ids in sequences]
            return [self._runtime.result(score, "score a sequence", _CONTROL_SECONDS) for score in scores]

    def pause(self) -> None:
        with self._updating:
            if not self._paused:
                self._stop_generation()
            self._paused = True

    def resume(self) -> None:
        with self._updating:
            if self._paused and not self._runtime.failure:
                self._start_generation()
            self._paused = False

    def abort(self) -> int:
        with self._lock:
            turns = [turn for turn in self._turns.values() if not turn.end]
            self._end_turns("abort")
        deadline = time.monotonic() + 5 * _ABORT_SECONDS
        while any(turn.rid in self._turns for turn in turns) and time.monotonic() < deadline:
            time.sleep(0.005)
        return len(turns)

    def stats(self) -> dict[str, float]:
        states = self._runtime.manager.rid_to_state
        with self._lock:
            under_way = [states.get(rid) for rid in self._turns]
            busy = self._busy + (time.monotonic() - self._busy_since if self._turns else 0.0)
            counters = dict(self._counters)
            sessions, turns = self._sessions, len(self._turns)
        counters["generated_tokens"] += sum(len(state.output_ids) for state in under_way if state is not None)
        active = min(turns, self._max_running)
        sizes = {"sessions": sessions, "active": active, "waiting": turns - active}
        sizes["adapters"] = self._adapters.count if self._adapters else 0
        return {name: float(value) for name, value in (counters | sizes).items()} | {"busy_seconds": busy}

    def close(self) -> None:
        with self._lock:
            self._end_turns("abort")
        deadline = time.monotonic() + 5 * _ABORT_SECONDS
        while self._turns and not self._runtime.failure and time.monotonic() < deadline:
            time.sleep(0.005)
        self._runtime.close()

    # What sessions call, in the event loop of the service.

    async def _generate(self, session: _SglangSession, turn: Turn) -> Generation:
        self._check(turn)
        with self._lock:
            self._require_alive()
            if session.closed or session.turn is not None:
                raise EngineError("a session generates one turn at a time, and none after it is closed")
            session.turn = turn
            turn.adapter = self._adapters.take() if self._adapters else None
            if not self._turns:
                self._busy_since = time.monotonic()
            self._turns[turn.rid] = turn
        try:
            return await asyncio.wrap_future(self._runtime.submit(self._run(turn)))
        except asyncio.CancelledError:
            task = asyncio.current_task()
            if self._runtime.failure and task is not None and not task.cancelling():  # it was SGLang's end, not ours
                raise EngineError(f"the engine has stopped: {self._runtime.failure}") from None
            raise
        finally:
            with self._lock:
                session.turn = None
                del self._turns[turn.rid]
                if not self._turns:
                    self._busy += time.monotonic() - self._busy_since
            if self._adapters and turn.adapter:
                self._adapters.give_back(turn.adapter)

    def _close_session(self, session: _SglangSession) -> None:
        with self._lock:
            if session.closed:
                return
            session.closed = True
            self._sessions -= 1
            if session.turn is not None:
                self._end_turn(session.turn, "abort")

    def _check(self, turn: Turn) -> None:
        self._check_ids(turn.ids)
        if turn.params.max_tokens < 1:
            raise EngineError(f"max_tokens = {turn.params.max_tokens}: at least 1 is needed")

    def _check_ids(self, ids: Sequence[int]) -> None:
        vocabulary = self.model_config.vocab_size
        if not 0 < len(ids) < self.max_context:
            raise EngineError(
                f"{len(ids)} input tokens: the engine takes 1 to {self.max_context - 1}"
                " (generator.max_input_length and the model's max_position_embeddings)"
            )
        if not 0 <= min(ids) <= max(ids) < vocabulary:
            raise EngineError(f"a token id lies outside the model's vocabulary of {vocabulary}")

    def _require_alive(self) -> None:
        if self._runtime.failure:
            raise EngineError(f"the engine has stopped: {self._runtime.failure}")
        if self._doubt:
            raise EngineError(self._doubt)

    # Ending turns early. The lock is held.

    def _end_turns(self, why: str) -> None:
        for turn in self._turns.values():
            self._end_turn(turn, why)

    def _end_turn(self, turn: Turn, why: str) -> None:
        turn.end = turn.end or why
        if not self._runtime.failure:
            self._runtime.loop.call_soon_threadsafe(self._cut_short, turn)

    # Everything below runs in SGLang's loop.

    def _cut_short(self, turn: Turn) -> None:
        """Asks SGLang for what there is of an aborted turn; one that it does not have yet, or an error, just ends."""
        if turn.task is None:
            return
        if turn.end != "abort":
            turn.task.cancel()
            return
        self._runtime.manager.abort_request(turn.rid)
        self._runtime.loop.call_later(_ABORT_SECONDS, turn.task.cancel)

    async def _run(self, turn: Turn) -> Generation:
        from fastapi import HTTPException

        turn.task = asyncio.current_task()
        try:
            if turn.end:
                raise asyncio.CancelledError
            async with aclosing(self._runtime.manager.generate_request(self._request(turn), None)) as answers:
                whole = [answer async for answer in answers]  # one answer: nothing is streamed
            return self._generation(turn, whole[-1])
        except asyncio.CancelledError:
            if turn.end == "abort":
                return Generation([], [], "abort", [])
            if turn.end or self._runtime.failure:
                raise EngineError(turn.end or f"the engine has stopped: {self._runtime.failure}") from None
            raise
        except (ValueError, HTTPException) as error:
            raise EngineError(f"SGLang refused a turn: {error}") from error

    async def _score(self, ids: list[int]) -> list[float]:
        from fastapi import HTTPException

        adapter = self._adapters.take() if self._adapters else None
        try:
            async with aclosing(self._runtime.manager.generate_request(score_request(ids, adapter), None)) as answers:
                whole = [answer async for answer in answers]
        except (ValueError, HTTPException) as error:
            raise EngineError(f"SGLang refused to score a sequence: {error}") from error
        finally:
            if self._adapters and adapter:
                self._adapters.give_back(adapter)
        return read_scores(ids, whole[-1])

    def _request(self, turn: Turn) -> Any:
        return generate_request(turn, self._ends, self.max_context, self._seeded)

    def _generation(self, turn: Turn, answer: dict[str, Any]) -> Generation:
        meta = answer["meta_info"]
        with self._lock:
            self._counters["generated_tokens"] += len(answer["output_ids"])
            self._counters["prefix_hit_tokens"] += meta.get("cached_tokens", 0)
            self._counters["prefill_tokens"] += len(turn.ids) - meta.get("cached_tokens", 0)
            self._counters["retractions"] += meta.get("num_retractions", 0)
        return read_generation(turn, answer, self.chat.decode)

    # Stopping and starting; `_updating` is held.

    def _stop_generation(self) -> None:
        from sglang.srt.managers.io_struct import PauseGenerationReqInput

        manager = self._runtime.manager
        request = PauseGenerationReqInput(mode="retract")
        self._runtime.call(manager.pause_generation(request), "pause", _CONTROL_SECONDS)
        # The scheduler takes messages in order: when it answers this one it has stopped.
        self._runtime.call(manager.get_internal_state(), "stop decoding", _CONTROL_SECONDS)

    def _start_generation(self) -> None:
        from sglang.srt.managers.io_struct import ContinueGenerationReqInput

        request = ContinueGenerationReqInput()
        self._runtime.call(self._runtime.manager.continue_generation(request), "resume", _CONTROL_SECONDS)
