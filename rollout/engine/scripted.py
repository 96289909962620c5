"""An engine that says what it was told to: it plays demonstrations through the real episode.

The supervised cold start uses it to turn demonstrations into trajectories with exactly the ids, masks and observations that
reinforcement learning will see. It has no weights, so everything about weights is refused.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from rollout.engine.base import Engine, EngineError, Session
from rollout.types import Generation, SamplingParams, TensorSpec


class _ScriptedSession(Session):
    def __init__(self, turns: Sequence[Sequence[int]], engine: ScriptedEngine) -> None:
        self._turns = iter(turns)
        self._engine = engine

    async def generate(self, input_ids: Sequence[int], params: SamplingParams, seed: int) -> Generation:
        output = next(self._turns, None)
        if output is None:
            raise EngineError("a scripted session was asked for more turns than its script has")
        ids, reason = list(output), "stop"
        if len(ids) > params.max_tokens:
            ids, reason = ids[: params.max_tokens], "length"
        self._engine.generated += len(ids)
        return Generation(ids, [0.0] * len(ids), reason, [(-1, 0, len(ids))])

    def close(self) -> None:
        self._turns = iter(())


class ScriptedEngine(Engine):
    """Session number `order` says the turns `scripts[order]`, each given as token ids."""

    def __init__(self, scripts: Sequence[Sequence[Sequence[int]]], max_context: int, tokenizer_dir: str = "") -> None:
        self.scripts = scripts
        self.max_context = max_context
        self.tokenizer_dir = tokenizer_dir
        self.generated = 0

    @property
    def version(self) -> int:
        return -1

    def session(self, order: int) -> Session:
        if not 0 <= order < len(self.scripts):
            raise EngineError(f"session {order} has no script; there are {len(self.scripts)}")
        return _ScriptedSession(self.scripts[order], self)

    def manifest(self) -> list[TensorSpec]:
        return []

    def apply_weights(self, tensors: Mapping[str, Any], version: int) -> float:
        raise EngineError("the scripted engine has no weights to replace")

    def score(self, sequences: Sequence[Sequence[int]]) -> list[list[float]]:
        raise EngineError("the scripted engine has no weights to score with")

    def pause(self) -> None:
        """Nothing runs between two calls."""

    def resume(self) -> None:
        """Nothing was stopped."""

    def abort(self) -> int:
        return 0

    def stats(self) -> dict[str, float]:
        return {"generated_tokens": float(self.generated)}

    def close(self) -> None:
        """Nothing is held."""
