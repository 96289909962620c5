from google.protobuf.internal import containers as _containers
from google.protobuf.internal import enum_type_wrapper as _enum_type_wrapper
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable, Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class State(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    EMPTY: _ClassVar[State]
    STAGING: _ClassVar[State]
    COMPLETE: _ClassVar[State]
    APPLYING: _ClassVar[State]
    LIVE: _ClassVar[State]
    QUARANTINED: _ClassVar[State]

class Phase(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    PHASE_UNSPECIFIED: _ClassVar[Phase]
    PREPARE: _ClassVar[Phase]
    APPLY: _ClassVar[Phase]
EMPTY: State
STAGING: State
COMPLETE: State
APPLYING: State
LIVE: State
QUARANTINED: State
PHASE_UNSPECIFIED: Phase
PREPARE: Phase
APPLY: Phase

class WeightsKey(_message.Message):
    __slots__ = ("run", "epoch", "version")
    RUN_FIELD_NUMBER: _ClassVar[int]
    EPOCH_FIELD_NUMBER: _ClassVar[int]
    VERSION_FIELD_NUMBER: _ClassVar[int]
    run: str
    epoch: int
    version: int
    def __init__(self, run: _Optional[str] = ..., epoch: _Optional[int] = ..., version: _Optional[int] = ...) -> None: ...

class Task(_message.Message):
    __slots__ = ("id", "source", "fields_json", "samples")
    ID_FIELD_NUMBER: _ClassVar[int]
    SOURCE_FIELD_NUMBER: _ClassVar[int]
    FIELDS_JSON_FIELD_NUMBER: _ClassVar[int]
    SAMPLES_FIELD_NUMBER: _ClassVar[int]
    id: str
    source: str
    fields_json: str
    samples: _containers.RepeatedScalarFieldContainer[int]
    def __init__(self, id: _Optional[str] = ..., source: _Optional[str] = ..., fields_json: _Optional[str] = ..., samples: _Optional[_Iterable[int]] = ...) -> None: ...

class SamplingParams(_message.Message):
    __slots__ = ("temperature", "top_p", "max_tokens", "stop")
    TEMPERATURE_FIELD_NUMBER: _ClassVar[int]
    TOP_P_FIELD_NUMBER: _ClassVar[int]
    MAX_TOKENS_FIELD_NUMBER: _ClassVar[int]
    STOP_FIELD_NUMBER: _ClassVar[int]
    temperature: float
    top_p: float
    max_tokens: int
    stop: _containers.RepeatedScalarFieldContainer[str]
    def __init__(self, temperature: _Optional[float] = ..., top_p: _Optional[float] = ..., max_tokens: _Optional[int] = ..., stop: _Optional[_Iterable[str]] = ...) -> None: ...

class RolloutRequest(_message.Message):
    __slots__ = ("request_id", "weights", "tasks", "n_samples", "sampling", "seed", "max_turns", "or_later")
    REQUEST_ID_FIELD_NUMBER: _ClassVar[int]
    WEIGHTS_FIELD_NUMBER: _ClassVar[int]
    TASKS_FIELD_NUMBER: _ClassVar[int]
    N_SAMPLES_FIELD_NUMBER: _ClassVar[int]
    SAMPLING_FIELD_NUMBER: _ClassVar[int]
    SEED_FIELD_NUMBER: _ClassVar[int]
    MAX_TURNS_FIELD_NUMBER: _ClassVar[int]
    OR_LATER_FIELD_NUMBER: _ClassVar[int]
    request_id: str
    weights: WeightsKey
    tasks: _containers.RepeatedCompositeFieldContainer[Task]
    n_samples: int
    sampling: SamplingParams
    seed: int
    max_turns: int
    or_later: bool
    def __init__(self, request_id: _Optional[str] = ..., weights: _Optional[_Union[WeightsKey, _Mapping]] = ..., tasks: _Optional[_Iterable[_Union[Task, _Mapping]]] = ..., n_samples: _Optional[int] = ..., sampling: _Optional[_Union[SamplingParams, _Mapping]] = ..., seed: _Optional[int] = ..., max_turns: _Optional[int] = ..., or_later: _Optional[bool] = ...) -> None: ...

class RolloutEvent(_message.Message):
    __slots__ = ("trajectory", "progress", "finished")
    TRAJECTORY_FIELD_NUMBER: _ClassVar[int]
    PROGRESS_FIELD_NUMBER: _ClassVar[int]
    FINISHED_FIELD_NUMBER: _ClassVar[int]
    trajectory: Trajectory
    progress: Progress
    finished: Finished
    def __init__(self, trajectory: _Optional[_Union[Trajectory, _Mapping]] = ..., progress: _Optional[_Union[Progress, _Mapping]] = ..., finished: _Optional[_Union[Finished, _Mapping]] = ...) -> None: ...

class Progress(_message.Message):
    __slots__ = ("active", "finished", "tokens", "stopping")
    ACTIVE_FIELD_NUMBER: _ClassVar[int]
    FINISHED_FIELD_NUMBER: _ClassVar[int]
    TOKENS_FIELD_NUMBER: _ClassVar[int]
    STOPPING_FIELD_NUMBER: _ClassVar[int]
    active: int
    finished: int
    tokens: int
    stopping: bool
    def __init__(self, active: _Optional[int] = ..., finished: _Optional[int] = ..., tokens: _Optional[int] = ..., stopping: _Optional[bool] = ...) -> None: ...

class Finished(_message.Message):
    __slots__ = ("trajectories", "stats")
    class StatsEntry(_message.Message):
        __slots__ = ("key", "value")
        KEY_FIELD_NUMBER: _ClassVar[int]
        VALUE_FIELD_NUMBER: _ClassVar[int]
        key: str
        value: float
        def __init__(self, key: _Optional[str] = ..., value: _Optional[float] = ...) -> None: ...
    TRAJECTORIES_FIELD_NUMBER: _ClassVar[int]
    STATS_FIELD_NUMBER: _ClassVar[int]
    trajectories: int
    stats: _containers.ScalarMap[str, float]
    def __init__(self, trajectories: _Optional[int] = ..., stats: _Optional[_Mapping[str, float]] = ...) -> None: ...

class Span(_message.Message):
    __slots__ = ("version", "start", "end")
    VERSION_FIELD_NUMBER: _ClassVar[int]
    START_FIELD_NUMBER: _ClassVar[int]
    END_FIELD_NUMBER: _ClassVar[int]
    version: int
    start: int
    end: int
    def __init__(self, version: _Optional[int] = ..., start: _Optional[int] = ..., end: _Optional[int] = ...) -> None: ...

class Turn(_message.Message):
    __slots__ = ("action", "sql", "status", "observation", "tokens", "seconds", "reward", "answer")
    ACTION_FIELD_NUMBER: _ClassVar[int]
    SQL_FIELD_NUMBER: _ClassVar[int]
    STATUS_FIELD_NUMBER: _ClassVar[int]
    OBSERVATION_FIELD_NUMBER: _ClassVar[int]
    TOKENS_FIELD_NUMBER: _ClassVar[int]
    SECONDS_FIELD_NUMBER: _ClassVar[int]
    REWARD_FIELD_NUMBER: _ClassVar[int]
    ANSWER_FIELD_NUMBER: _ClassVar[int]
    action: str
    sql: str
    status: str
    observation: str
    tokens: int
    seconds: float
    reward: float
    answer: str
    def __init__(self, action: _Optional[str] = ..., sql: _Optional[str] = ..., status: _Optional[str] = ..., observation: _Optional[str] = ..., tokens: _Optional[int] = ..., seconds: _Optional[float] = ..., reward: _Optional[float] = ..., answer: _Optional[str] = ...) -> None: ...

class Trajectory(_message.Message):
    __slots__ = ("task_id", "source", "sample", "prompt_ids", "response_ids", "loss_mask", "logprobs", "spans", "reward", "outcome", "stop_reason", "turns", "metrics", "error", "contexts")
    class MetricsEntry(_message.Message):
        __slots__ = ("key", "value")
        KEY_FIELD_NUMBER: _ClassVar[int]
        VALUE_FIELD_NUMBER: _ClassVar[int]
        key: str
        value: float
        def __init__(self, key: _Optional[str] = ..., value: _Optional[float] = ...) -> None: ...
    TASK_ID_FIELD_NUMBER: _ClassVar[int]
    SOURCE_FIELD_NUMBER: _ClassVar[int]
    SAMPLE_FIELD_NUMBER: _ClassVar[int]
    PROMPT_IDS_FIELD_NUMBER: _ClassVar[int]
    RESPONSE_IDS_FIELD_NUMBER: _ClassVar[int]
    LOSS_MASK_FIELD_NUMBER: _ClassVar[int]
    LOGPROBS_FIELD_NUMBER: _ClassVar[int]
    SPANS_FIELD_NUMBER: _ClassVar[int]
    REWARD_FIELD_NUMBER: _ClassVar[int]
    OUTCOME_FIELD_NUMBER: _ClassVar[int]
    STOP_REASON_FIELD_NUMBER: _ClassVar[int]
    TURNS_FIELD_NUMBER: _ClassVar[int]
    METRICS_FIELD_NUMBER: _ClassVar[int]
    ERROR_FIELD_NUMBER: _ClassVar[int]
    CONTEXTS_FIELD_NUMBER: _ClassVar[int]
    task_id: str
    source: str
    sample: int
    prompt_ids: _containers.RepeatedScalarFieldContainer[int]
    response_ids: _containers.RepeatedScalarFieldContainer[int]
    loss_mask: _containers.RepeatedScalarFieldContainer[bool]
    logprobs: _containers.RepeatedScalarFieldContainer[float]
    spans: _containers.RepeatedCompositeFieldContainer[Span]
    reward: float
    outcome: str
    stop_reason: str
    turns: _containers.RepeatedCompositeFieldContainer[Turn]
    metrics: _containers.ScalarMap[str, float]
    error: str
    contexts: _containers.RepeatedCompositeFieldContainer[Ids]
    def __init__(self, task_id: _Optional[str] = ..., source: _Optional[str] = ..., sample: _Optional[int] = ..., prompt_ids: _Optional[_Iterable[int]] = ..., response_ids: _Optional[_Iterable[int]] = ..., loss_mask: _Optional[_Iterable[bool]] = ..., logprobs: _Optional[_Iterable[float]] = ..., spans: _Optional[_Iterable[_Union[Span, _Mapping]]] = ..., reward: _Optional[float] = ..., outcome: _Optional[str] = ..., stop_reason: _Optional[str] = ..., turns: _Optional[_Iterable[_Union[Turn, _Mapping]]] = ..., metrics: _Optional[_Mapping[str, float]] = ..., error: _Optional[str] = ..., contexts: _Optional[_Iterable[_Union[Ids, _Mapping]]] = ...) -> None: ...

class Ids(_message.Message):
    __slots__ = ("ids",)
    IDS_FIELD_NUMBER: _ClassVar[int]
    ids: _containers.RepeatedScalarFieldContainer[int]
    def __init__(self, ids: _Optional[_Iterable[int]] = ...) -> None: ...

class TensorSpec(_message.Message):
    __slots__ = ("name", "shape", "dtype", "slices")
    NAME_FIELD_NUMBER: _ClassVar[int]
    SHAPE_FIELD_NUMBER: _ClassVar[int]
    DTYPE_FIELD_NUMBER: _ClassVar[int]
    SLICES_FIELD_NUMBER: _ClassVar[int]
    name: str
    shape: _containers.RepeatedScalarFieldContainer[int]
    dtype: str
    slices: _containers.RepeatedCompositeFieldContainer[Slice]
    def __init__(self, name: _Optional[str] = ..., shape: _Optional[_Iterable[int]] = ..., dtype: _Optional[str] = ..., slices: _Optional[_Iterable[_Union[Slice, _Mapping]]] = ...) -> None: ...

class Slice(_message.Message):
    __slots__ = ("start", "size")
    START_FIELD_NUMBER: _ClassVar[int]
    SIZE_FIELD_NUMBER: _ClassVar[int]
    start: _containers.RepeatedScalarFieldContainer[int]
    size: _containers.RepeatedScalarFieldContainer[int]
    def __init__(self, start: _Optional[_Iterable[int]] = ..., size: _Optional[_Iterable[int]] = ...) -> None: ...

class BeginRequest(_message.Message):
    __slots__ = ("weights", "manifest", "lease_seconds", "base")
    WEIGHTS_FIELD_NUMBER: _ClassVar[int]
    MANIFEST_FIELD_NUMBER: _ClassVar[int]
    LEASE_SECONDS_FIELD_NUMBER: _ClassVar[int]
    BASE_FIELD_NUMBER: _ClassVar[int]
    weights: WeightsKey
    manifest: _containers.RepeatedCompositeFieldContainer[TensorSpec]
    lease_seconds: float
    base: WeightsKey
    def __init__(self, weights: _Optional[_Union[WeightsKey, _Mapping]] = ..., manifest: _Optional[_Iterable[_Union[TensorSpec, _Mapping]]] = ..., lease_seconds: _Optional[float] = ..., base: _Optional[_Union[WeightsKey, _Mapping]] = ...) -> None: ...

class RawFrame(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class ByteRange(_message.Message):
    __slots__ = ("tensor", "slice", "offset", "length")
    TENSOR_FIELD_NUMBER: _ClassVar[int]
    SLICE_FIELD_NUMBER: _ClassVar[int]
    OFFSET_FIELD_NUMBER: _ClassVar[int]
    LENGTH_FIELD_NUMBER: _ClassVar[int]
    tensor: int
    slice: int
    offset: int
    length: int
    def __init__(self, tensor: _Optional[int] = ..., slice: _Optional[int] = ..., offset: _Optional[int] = ..., length: _Optional[int] = ...) -> None: ...

class PushState(_message.Message):
    __slots__ = ("state", "push_id", "missing", "received_bytes", "pause_seconds", "delta", "held", "probe_mean", "probe_max", "probe_tokens", "data_port", "ticket")
    STATE_FIELD_NUMBER: _ClassVar[int]
    PUSH_ID_FIELD_NUMBER: _ClassVar[int]
    MISSING_FIELD_NUMBER: _ClassVar[int]
    RECEIVED_BYTES_FIELD_NUMBER: _ClassVar[int]
    PAUSE_SECONDS_FIELD_NUMBER: _ClassVar[int]
    DELTA_FIELD_NUMBER: _ClassVar[int]
    HELD_FIELD_NUMBER: _ClassVar[int]
    PROBE_MEAN_FIELD_NUMBER: _ClassVar[int]
    PROBE_MAX_FIELD_NUMBER: _ClassVar[int]
    PROBE_TOKENS_FIELD_NUMBER: _ClassVar[int]
    DATA_PORT_FIELD_NUMBER: _ClassVar[int]
    TICKET_FIELD_NUMBER: _ClassVar[int]
    state: State
    push_id: int
    missing: _containers.RepeatedCompositeFieldContainer[ByteRange]
    received_bytes: int
    pause_seconds: float
    delta: bool
    held: WeightsKey
    probe_mean: float
    probe_max: float
    probe_tokens: int
    data_port: int
    ticket: bytes
    def __init__(self, state: _Optional[_Union[State, str]] = ..., push_id: _Optional[int] = ..., missing: _Optional[_Iterable[_Union[ByteRange, _Mapping]]] = ..., received_bytes: _Optional[int] = ..., pause_seconds: _Optional[float] = ..., delta: _Optional[bool] = ..., held: _Optional[_Union[WeightsKey, _Mapping]] = ..., probe_mean: _Optional[float] = ..., probe_max: _Optional[float] = ..., probe_tokens: _Optional[int] = ..., data_port: _Optional[int] = ..., ticket: _Optional[bytes] = ...) -> None: ...

class PushReply(_message.Message):
    __slots__ = ("frames", "bytes", "duplicates")
    FRAMES_FIELD_NUMBER: _ClassVar[int]
    BYTES_FIELD_NUMBER: _ClassVar[int]
    DUPLICATES_FIELD_NUMBER: _ClassVar[int]
    frames: int
    bytes: int
    duplicates: int
    def __init__(self, frames: _Optional[int] = ..., bytes: _Optional[int] = ..., duplicates: _Optional[int] = ...) -> None: ...

class DataEnd(_message.Message):
    __slots__ = ("reply", "code", "message")
    REPLY_FIELD_NUMBER: _ClassVar[int]
    CODE_FIELD_NUMBER: _ClassVar[int]
    MESSAGE_FIELD_NUMBER: _ClassVar[int]
    reply: PushReply
    code: str
    message: str
    def __init__(self, reply: _Optional[_Union[PushReply, _Mapping]] = ..., code: _Optional[str] = ..., message: _Optional[str] = ...) -> None: ...

class CommitRequest(_message.Message):
    __slots__ = ("weights", "phase", "probe")
    WEIGHTS_FIELD_NUMBER: _ClassVar[int]
    PHASE_FIELD_NUMBER: _ClassVar[int]
    PROBE_FIELD_NUMBER: _ClassVar[int]
    weights: WeightsKey
    phase: Phase
    probe: Probe
    def __init__(self, weights: _Optional[_Union[WeightsKey, _Mapping]] = ..., phase: _Optional[_Union[Phase, str]] = ..., probe: _Optional[_Union[Probe, _Mapping]] = ...) -> None: ...

class Probe(_message.Message):
    __slots__ = ("sequences", "tolerance")
    SEQUENCES_FIELD_NUMBER: _ClassVar[int]
    TOLERANCE_FIELD_NUMBER: _ClassVar[int]
    sequences: _containers.RepeatedCompositeFieldContainer[ProbeSequence]
    tolerance: float
    def __init__(self, sequences: _Optional[_Iterable[_Union[ProbeSequence, _Mapping]]] = ..., tolerance: _Optional[float] = ...) -> None: ...

class ProbeSequence(_message.Message):
    __slots__ = ("ids", "logprobs")
    IDS_FIELD_NUMBER: _ClassVar[int]
    LOGPROBS_FIELD_NUMBER: _ClassVar[int]
    ids: _containers.RepeatedScalarFieldContainer[int]
    logprobs: _containers.RepeatedScalarFieldContainer[float]
    def __init__(self, ids: _Optional[_Iterable[int]] = ..., logprobs: _Optional[_Iterable[float]] = ...) -> None: ...

class AbortRequest(_message.Message):
    __slots__ = ("weights",)
    WEIGHTS_FIELD_NUMBER: _ClassVar[int]
    weights: WeightsKey
    def __init__(self, weights: _Optional[_Union[WeightsKey, _Mapping]] = ...) -> None: ...

class StatusRequest(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class StatusReply(_message.Message):
    __slots__ = ("state", "live", "staging", "received_bytes", "total_bytes", "quarantine_reason", "active_requests", "stats", "pid", "stopping")
    class StatsEntry(_message.Message):
        __slots__ = ("key", "value")
        KEY_FIELD_NUMBER: _ClassVar[int]
        VALUE_FIELD_NUMBER: _ClassVar[int]
        key: str
        value: float
        def __init__(self, key: _Optional[str] = ..., value: _Optional[float] = ...) -> None: ...
    STATE_FIELD_NUMBER: _ClassVar[int]
    LIVE_FIELD_NUMBER: _ClassVar[int]
    STAGING_FIELD_NUMBER: _ClassVar[int]
    RECEIVED_BYTES_FIELD_NUMBER: _ClassVar[int]
    TOTAL_BYTES_FIELD_NUMBER: _ClassVar[int]
    QUARANTINE_REASON_FIELD_NUMBER: _ClassVar[int]
    ACTIVE_REQUESTS_FIELD_NUMBER: _ClassVar[int]
    STATS_FIELD_NUMBER: _ClassVar[int]
    PID_FIELD_NUMBER: _ClassVar[int]
    STOPPING_FIELD_NUMBER: _ClassVar[int]
    state: State
    live: WeightsKey
    staging: WeightsKey
    received_bytes: int
    total_bytes: int
    quarantine_reason: str
    active_requests: int
    stats: _containers.ScalarMap[str, float]
    pid: int
    stopping: bool
    def __init__(self, state: _Optional[_Union[State, str]] = ..., live: _Optional[_Union[WeightsKey, _Mapping]] = ..., staging: _Optional[_Union[WeightsKey, _Mapping]] = ..., received_bytes: _Optional[int] = ..., total_bytes: _Optional[int] = ..., quarantine_reason: _Optional[str] = ..., active_requests: _Optional[int] = ..., stats: _Optional[_Mapping[str, float]] = ..., pid: _Optional[int] = ..., stopping: _Optional[bool] = ...) -> None: ...
