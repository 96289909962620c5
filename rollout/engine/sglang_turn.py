"""One turn as SGLang is asked for it, and what came back as the episode takes it. SGLang is imported only to ask."""

from __future__ import annotations

import asyncio
import bisect
import uuid
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from rollout.engine.base import EngineError
from rollout.engine.sglang_lora import Adapter
from rollout.types import Generation, SamplingParams

Decode = Callable[[list[int]], str]


@dataclass
class Turn:
    """One turn being generated. `end` says why it ends early: "" not at all, "abort", or else an error. `adapter` is None
    where whole weights are served."""

    ids: list[int]
    params: SamplingParams
    seed: int
    rid: str = field(default_factory=lambda: uuid.uuid4().hex)
    task: asyncio.Task[Any] | None = None
    end: str = ""
    adapter: Adapter | None = None


def generate_request(turn: Turn, ends: Sequence[int], max_context: int, seeded: bool) -> Any:
    """What is asked of SGLang; `ends` are tokens that end a turn besides its stop strings."""
    from sglang.srt.managers.io_struct import GenerateReqInput

    params = turn.params
    sampling: dict[str, Any] = {
        "temperature": params.temperature,
        "top_p": params.top_p,
        "max_new_tokens": min(params.max_tokens, max_context - len(turn.ids)),
        "stop": list(params.stop),
        "stop_token_ids": ends,
        "no_stop_trim": True,
    }
    if seeded:
        sampling["sampling_seed"] = turn.seed
    return GenerateReqInput(
        rid=turn.rid,
        input_ids=turn.ids,
        sampling_params=sampling,
        return_logprob=True,
        logprob_start_len=-1,
        lora_path=_name(turn.adapter),
    )


def score_request(ids: list[int], adapter: Adapter | None) -> Any:
    """Asks for the log-probability of every token given those before it."""
    from sglang.srt.managers.io_struct import GenerateReqInput

    sampling = {"temperature": 1.0, "max_new_tokens": 0}
    return GenerateReqInput(
        input_ids=ids,
        sampling_params=sampling,
        return_logprob=True,
        logprob_start_len=0,
        lora_path=_name(adapter),
    )


def read_scores(ids: list[int], answer: dict[str, Any]) -> list[float]:
    """The log-probabilities of all tokens but the first. Raises EngineError."""
    logprobs = answer["meta_info"]["input_token_logprobs"]
    if len(logprobs) != len(ids):
        raise EngineError(f"SGLang scored {len(logprobs)} of {len(ids)} tokens")
    return [float(entry[0]) for entry in logprobs[1:]]  # the first has nothing before it


def read_generation(turn: Turn, answer: dict[str, Any], decode: Decode) -> Generation:
    """The turn, cut after the token that completes its first stop string. Raises EngineError."""
    meta = answer["meta_info"]
    ids = list(answer["output_ids"])
    logprobs = [float(entry[0]) for entry in meta.get("output_token_logprobs", [])]
    kind = meta["finish_reason"]["type"]
    if len(logprobs) != len(ids):
        if kind != "abort":
            raise EngineError(f"SGLang gave {len(ids)} tokens and {len(logprobs)} log-probabilities")
        ids, logprobs = ids[: len(logprobs)], logprobs[: len(ids)]
    keep = _first_stop(ids, turn.params.stop, decode)
    reason = "stop" if keep < len(ids) else kind
    if turn.adapter is None:
        spans = [(int(s["version"]), s["start"], min(s["end"], keep)) for s in meta.get("weight_versions", [])]
    else:
        spans = [(turn.adapter.version, 0, keep)]
    spans = [span for span in spans if span[1] < span[2]]
    return Generation(ids[:keep], logprobs[:keep], reason, spans)


def _name(adapter: Adapter | None) -> str | None:
    return adapter.name or None if adapter else None


def _first_stop(ids: list[int], stop: tuple[str, ...], decode: Decode) -> int:
    """How many ids there are up to the one that completes the first stop string; all, without one."""

    def found(count: int) -> bool:
        text = decode(ids[:count])
        return any(string in text for string in stop)

    return bisect.bisect_left(range(1, len(ids)), True, key=found) + 1 if found(len(ids)) else len(ids)
