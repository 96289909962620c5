"""Records to protobuf and back, the generated messages, addresses."""

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from rollout import bridge_pb2 as pb
from rollout import wire
from rollout.receiver import State
from rollout.types import SamplingParams, Task, Trajectory, Turn

ROOT = Path(__file__).resolve().parents[2]
texts, counts = st.text(max_size=20), st.integers(0, 2**31)
f32, f64 = st.floats(width=32, allow_nan=False), st.floats(allow_nan=False)
turns = st.builds(Turn, texts, texts, texts, texts, counts, f64, f64, texts)


@st.composite
def trajectories(draw):
    size = draw(st.integers(0, 5))

    def several(values):
        return draw(st.lists(values, min_size=size, max_size=size))

    spans = draw(st.lists(st.tuples(counts, counts, counts), max_size=2))
    return Trajectory(
        draw(texts), draw(texts), draw(counts), draw(st.lists(counts, max_size=4)), several(counts),
        several(st.integers(0, 1)), several(f32), spans, draw(f64), draw(texts), draw(texts),
        draw(st.lists(turns, max_size=2)), draw(st.dictionaries(texts, f64, max_size=2)), draw(texts),
    )  # fmt: skip


@given(trajectories())
def test_trajectory_round_trip(trajectory):
    message = pb.Trajectory.FromString(wire.trajectory_to_proto(trajectory).SerializeToString())
    assert wire.trajectory_from_proto(message) == trajectory


def test_halves_of_surrogate_pairs_cross_the_bridge():
    task = Task("t", "", {"name": "\ud800 x"})
    assert wire.task_from_proto(pb.Task.FromString(wire.task_to_proto(task).SerializeToString())) == task
    turn = Turn("a", "b", "c", "\ud800 é")
    trajectory = Trajectory("t", "", 0, [], [], [], [], [], 0.0, "wrong", "done", [turn], {}, "\udcff")
    back = wire.trajectory_from_proto(wire.trajectory_to_proto(trajectory))
    assert (back.turns[0].observation, back.error) == ("? é", "?")


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | f64.filter(np.isfinite) | texts, st.lists, max_leaves=4
)


@given(texts, texts, st.dictionaries(texts, json_values, max_size=3))
def test_task_round_trip(id_, source, fields):
    task = Task(id_, source, fields)
    assert wire.task_from_proto(wire.task_to_proto(task)) == task


def test_sampling_round_trip_and_bounds():
    params = SamplingParams(0.7, 0.9, 33, ("</sql>",))
    assert wire.sampling_from_proto(wire.sampling_to_proto(params)) == params
    for bad in (
        SamplingParams(-1.0),
        SamplingParams(float("nan")),
        SamplingParams(top_p=0.0),
        SamplingParams(max_tokens=0),
    ):
        with pytest.raises(wire.WireError, match="temperature"):
            wire.sampling_from_proto(wire.sampling_to_proto(bad))


def test_what_cannot_be_sent_is_named():
    with pytest.raises(wire.WireError, match=r"task 'q7'.*JSON"):
        wire.task_to_proto(Task("q7", "s", {"x": object()}))
    with pytest.raises(wire.WireError, match="task 'q8': fields_json must be an object, not list"):
        wire.task_from_proto(pb.Task(id="q8", fields_json="[]"))
    with pytest.raises(wire.WireError, match="task 'q9': fields_json is not JSON"):
        wire.task_from_proto(pb.Task(id="q9", fields_json="{"))
    with pytest.raises(wire.WireError, match="'q1': 2 response ids, 1 mask values and 0 logprobs"):
        wire.trajectory_from_proto(pb.Trajectory(task_id="q1", response_ids=[1, 2], loss_mask=[True]))
    with pytest.raises(wire.WireError, match="'float7'"):
        wire.numpy_dtype("float7")


def test_states_are_those_of_the_contract():
    assert {state.name: int(state) for state in State} == dict(pb.State.items())


def test_generated_messages_are_those_of_the_proto_file(tmp_path):
    """The command that bridge.proto documents gives the files that are committed."""
    pytest.importorskip("grpc_tools")
    documented = next(x for x in (ROOT / "rollout/bridge.proto").read_text().splitlines() if "grpc_tools.protoc" in x)
    arguments = documented.removeprefix("//").replace("_out=.", f"_out={tmp_path}").split()[1:]
    subprocess.run([sys.executable, *arguments], cwd=ROOT, check=True)
    for name in ("rollout/bridge_pb2.py", "rollout/bridge_pb2.pyi"):
        assert (tmp_path / name).read_text() == (ROOT / name).read_text()
