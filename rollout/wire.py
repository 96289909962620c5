"""Records to protobuf and back.

Only translation: what the fields mean is in types.py. Logprobs are float32 on the wire, which is what engines compute;
a sampled token's number would have to pass 2^32 to be lost.
"""

from __future__ import annotations

import json
from typing import Any

import numpy as np

from rollout import bridge_pb2 as pb
from rollout.probe import Probe
from rollout.text import whole
from rollout.types import SamplingParams, Task, TensorSpec, Trajectory, Turn


class WireError(ValueError):
    """A message that protobuf accepts but that means nothing."""


def task_to_proto(task: Task) -> pb.Task:
    """Raises WireError when `fields` holds something that JSON has no form for."""
    try:
        fields = json.dumps(task.fields, allow_nan=False)  # ASCII: JSON may hold half a surrogate pair
    except (TypeError, ValueError) as error:
        raise WireError(f"task {task.id!r}: its fields cannot be sent as JSON: {error}") from None
    return pb.Task(id=task.id, source=task.source, fields_json=fields, samples=task.samples)


def task_from_proto(message: pb.Task) -> Task:
    try:
        fields: Any = json.loads(message.fields_json)
    except ValueError as error:
        raise WireError(f"task {message.id!r}: fields_json is not JSON: {error}") from None
    if not isinstance(fields, dict):
        raise WireError(f"task {message.id!r}: fields_json must be an object, not {type(fields).__name__}")
    return Task(id=message.id, source=message.source, fields=fields, samples=tuple(message.samples))


def sampling_to_proto(params: SamplingParams) -> pb.SamplingParams:
    return pb.SamplingParams(
        temperature=params.temperature, top_p=params.top_p, max_tokens=params.max_tokens, stop=params.stop
    )


def sampling_from_proto(message: pb.SamplingParams) -> SamplingParams:
    if not (message.temperature >= 0 and 0 < message.top_p <= 1 and message.max_tokens >= 1):
        raise WireError(
            f"sampling: temperature {message.temperature} must be at least 0, top_p {message.top_p} in (0, 1] and "
            f"max_tokens {message.max_tokens} at least 1"
        )
    return SamplingParams(message.temperature, message.top_p, message.max_tokens, tuple(message.stop))


def trajectory_to_proto(t: Trajectory) -> pb.Trajectory:
    message = pb.Trajectory(
        task_id=t.task_id,
        source=t.source,
        sample=t.sample,
        prompt_ids=t.prompt_ids,
        response_ids=t.response_ids,
        loss_mask=[bool(m) for m in t.loss_mask],
        logprobs=t.logprobs,
        spans=[pb.Span(version=version, start=start, end=end) for version, start, end in t.spans],
        reward=t.reward,
        outcome=t.outcome,
        stop_reason=t.stop_reason,
        metrics=t.metrics,
        error=whole(t.error),
        contexts=[pb.Ids(ids=ids) for ids in t.contexts],
    )
    for turn in t.turns:
        message.turns.add(
            action=whole(turn.action),
            sql=whole(turn.sql),
            status=whole(turn.status),
            observation=whole(turn.observation),
            tokens=turn.tokens,
            seconds=turn.seconds,
            reward=turn.reward,
            answer=turn.answer,
        )
    return message


def trajectory_from_proto(message: pb.Trajectory) -> Trajectory:
    """Raises WireError when ids, mask and logprobs differ in length."""
    lengths = (len(message.response_ids), len(message.loss_mask), len(message.logprobs))
    if len(set(lengths)) != 1:
        raise WireError(
            f"trajectory of task {message.task_id!r}: {lengths[0]} response ids, {lengths[1]} mask values and "
            f"{lengths[2]} logprobs; they must be equally many"
        )
    return Trajectory(
        task_id=message.task_id,
        source=message.source,
        sample=message.sample,
        prompt_ids=list(message.prompt_ids),
        response_ids=list(message.response_ids),
        loss_mask=[int(m) for m in message.loss_mask],
        logprobs=list(message.logprobs),
        spans=[(span.version, span.start, span.end) for span in message.spans],
        reward=message.reward,
        outcome=message.outcome,
        stop_reason=message.stop_reason,
        turns=[_turn(t) for t in message.turns],
        metrics=dict(message.metrics),
        error=message.error,
        contexts=[list(context.ids) for context in message.contexts],
    )


def _turn(t: pb.Turn) -> Turn:
    return Turn(t.action, t.sql, t.status, t.observation, t.tokens, t.seconds, t.reward, t.answer)


def probe_to_proto(probe: Probe) -> pb.Probe:
    pairs = zip(probe.sequences, probe.logprobs, strict=True)
    sequences = [pb.ProbeSequence(ids=ids, logprobs=logprobs) for ids, logprobs in pairs]
    return pb.Probe(sequences=sequences, tolerance=probe.tolerance)


def probe_from_proto(message: pb.Probe) -> Probe:
    """Raises WireError when a sequence has another number of log-probabilities than it has ids after the first."""
    for number, s in enumerate(message.sequences):
        if len(s.ids) < 2 or len(s.logprobs) != len(s.ids) - 1:
            raise WireError(f"probe: sequence {number} has {len(s.ids)} ids and {len(s.logprobs)} log-probabilities")
    return Probe(
        [list(s.ids) for s in message.sequences], [list(s.logprobs) for s in message.sequences], message.tolerance
    )


def spec_from_proto(message: pb.TensorSpec) -> TensorSpec:
    return TensorSpec(message.name, tuple(message.shape), message.dtype)


def numpy_dtype(name: str) -> np.dtype[Any]:
    """The numpy type of a TensorSpec's dtype name. Raises WireError for one that numpy does not know."""
    if name == "bfloat16":
        import ml_dtypes  # registers bfloat16 with numpy; only those who use it need it installed

        return np.dtype(ml_dtypes.bfloat16)
    try:
        return np.dtype(name)
    except TypeError:
        raise WireError(f"dtype {name!r} is not known to numpy") from None
