"""What a rollout service asks of an inference engine.

An episode opens a session, generates turn after turn in it and closes it. The session tells the engine what belongs
together: the embedded engine keeps a session's KV cache between turns, an engine with a prefix cache of its own may take it
as a hint only. Token ids go in and come out; text, chat templates and environments are the episode's business.

Left out on purpose: streaming of single tokens (nobody in training reads them) and any notion of groups (identical
prompts are recognised by their ids).
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from types import TracebackType
from typing import Any

from rollout.errors import InfrastructureError
from rollout.types import Generation, SamplingParams, TensorSpec


class EngineError(InfrastructureError):
    """The engine cannot serve this request, or any more; the message says which and what to do."""


class Session(ABC):
    """One episode's place in the engine. Use it as `async with`; leaving it gives the place back, in mid-turn too."""

    @abstractmethod
    async def generate(self, input_ids: Sequence[int], params: SamplingParams, seed: int) -> Generation:
        """Samples one turn after `input_ids`, which hold the whole episode so far.

        What earlier turns of this session already computed is reused where `input_ids` agrees with it. A token's noise
        depends on `seed` and its position in the sequence alone. The stop string stays in the output, which ends with the
        token that completes it; a sampled end-of-sequence token stays too. Raises EngineError when the ids do not fit
        the context or the engine is closed.
        """

    @abstractmethod
    def close(self) -> None:
        """Gives the place back; a turn being generated ends with finish_reason "abort". Closing twice does nothing."""

    async def __aenter__(self) -> Session:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


class Engine(ABC):
    """A model being served. All methods but `session` and `generate` may block and are safe to call from any thread."""

    tokenizer_dir: str
    """Folder of the tokenizer that the model was made with."""

    max_context: int
    """Longest sequence, prompt and output together."""

    @property
    @abstractmethod
    def version(self) -> int:
        """Version of the weights in use; -1 before any were given."""

    @property
    def failure(self) -> str:
        """Why the engine has stopped for good; "" while it works. An engine in this process stops with it and has none."""
        return ""

    @abstractmethod
    def session(self, order: int) -> Session:
        """Opens a session. When places are short, lower `order` of a batch goes first, and an earlier batch before a later.

        Open all sessions of a batch in order before awaiting anything: an engine that promises reproducible results waits
        for every open session before it decides what to run next.
        """

    @abstractmethod
    def manifest(self) -> list[TensorSpec]:
        """The tensors that make up a full set of weights: Hugging Face names, shapes, dtypes."""

    @abstractmethod
    def apply_weights(self, tensors: Mapping[str, Any], version: int) -> float:
        """Replaces all weights by `tensors` (numpy arrays by Hugging Face name) as `version`.

        Stops generation for as long as it must, and returns those seconds. Running turns continue on the new weights; their
        `spans` say from which token on. Raises EngineError and keeps the old weights when a tensor is missing, unknown or of
        another shape.
        """

    @abstractmethod
    def score(self, sequences: Sequence[Sequence[int]]) -> list[list[float]]:
        """Of each sequence: the natural log-probability of every token but the first, given those before it, at temperature
        1 under the weights in use. Not between `pause` and `resume`. Raises EngineError when ids do not fit the model.
        """

    @abstractmethod
    def pause(self) -> None:
        """Stops between two decoding steps; running turns keep their place. Returns once nothing is being computed."""

    @abstractmethod
    def resume(self) -> None:
        """Goes on after `pause`."""

    @abstractmethod
    def abort(self) -> int:
        """Ends every running and waiting turn with finish_reason "abort"; returns how many there were."""

    @abstractmethod
    def stats(self) -> dict[str, float]:
        """Counters since the start: generated_tokens, prefill_tokens, prefix_hit_tokens, busy_seconds, active, waiting…"""

    @abstractmethod
    def close(self) -> None:
        """Ends all turns with finish_reason "abort" and frees what the engine holds."""
