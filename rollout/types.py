"""The records that cross the bridge: what is asked, what is sampled, what comes back.

Plain dataclasses without behaviour, so that the learner and the rollout service can share them without sharing anything
else. Token ids are the truth: text in these records is for people to read and is never encoded again.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, TypedDict

# How an episode ended. The last three say nothing about the answer: `overflow` is scored 0, `infrastructure` is retried
# and never trained on, `prompt_too_long` is dropped.
OUTCOMES = ("correct", "wrong", "malformed", "sql_error", "timeout", "overflow", "infrastructure", "prompt_too_long")


class Message(TypedDict):
    """One chat message, as chat templates take it."""

    role: str
    content: str


@dataclass(frozen=True)
class Task:
    """One question. `fields` is what the environment reads: any JSON (text2sql: db_id, question, gold_sql, …).

    `samples`: which episodes of a request's n_samples are wanted; empty means all.
    """

    id: str
    source: str
    fields: dict[str, Any]
    samples: tuple[int, ...] = ()


@dataclass(frozen=True)
class SamplingParams:
    """How tokens are drawn. `temperature` 0 is greedy; `max_tokens` bounds one turn."""

    temperature: float = 1.0
    top_p: float = 1.0
    max_tokens: int = 256
    stop: tuple[str, ...] = ("</sql>", "</solution>")


@dataclass(frozen=True)
class Generation:
    """One turn of sampled tokens.

    `logprobs` are natural logs under the temperature-scaled distribution, before top-p cuts it; one per output id.
    `finish_reason` is "stop" (stop string or end of sequence), "length" or "abort".
    `spans` are (weight version, start, end) over `output_ids`.
    """

    output_ids: list[int]
    logprobs: list[float]
    finish_reason: str
    spans: list[tuple[int, int, int]]


@dataclass
class Turn:
    """One action of the model and what came back, for people and metrics.

    `status` is ok, denied, error or timeout for a query that ran, solution for an answer, unused for a query in the last
    turn (it is not run), invalid when nothing usable was found. Other environments: ok, solution for the step that ended
    the episode, timeout, or any word of their own. `observation` is what came back, without tags where the environment
    says so. `reward` is this turn's part of the episode's; `answer` is equal for solutions with equal results (voting),
    empty where there is none.
    """

    action: str
    sql: str = ""
    status: str = ""
    observation: str = ""
    tokens: int = 0
    seconds: float = 0.0
    reward: float = 0.0
    answer: str = ""


@dataclass
class Trajectory:
    """One finished episode, ready to be trained on.

    `response_ids`, `loss_mask` and `logprobs` have one length R: everything after the prompt. The mask is 1 on sampled
    tokens only; `logprobs` is 0.0 where the mask is 0. `spans` are (weight version, start, end) over the response.
    `contexts` are, for each turn, the ids that it was generated from, where a chat template rewrites what came before
    (it drops thoughts); empty where each turn was generated from the prompt and all of the response before it.
    """

    task_id: str
    source: str
    sample: int
    prompt_ids: list[int]
    response_ids: list[int]
    loss_mask: list[int]
    logprobs: list[float]
    spans: list[tuple[int, int, int]]
    reward: float
    outcome: str
    stop_reason: str  # solution | done (ended without one) | max_turns | length | timeout | overflow | error
    turns: list[Turn] = field(default_factory=list)
    metrics: dict[str, float] = field(default_factory=dict)
    error: str = ""
    contexts: list[list[int]] = field(default_factory=list)


@dataclass(frozen=True)
class TensorSpec:
    """A weight tensor as both ends must agree on it: Hugging Face name, shape, dtype name ("float32", "bfloat16")."""

    name: str
    shape: tuple[int, ...]
    dtype: str
