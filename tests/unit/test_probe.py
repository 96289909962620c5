"""What a push is tried out with: the gap between two sides, which sequences are chosen, and how large it may be."""

import math
from types import SimpleNamespace

import pytest
from tiny_model import engine_config, write_model

from rollout import bridge_pb2 as pb
from rollout import wire
from rollout.probe import Gap, Probe, gap
from rollout.types import Task, Trajectory
from sqlrl_jax.probing import Prober, tolerance


def test_the_gap_is_over_all_tokens():
    found = gap([[-1.0, -2.0], [-3.0]], [[-1.5, -2.0], [-2.0]])
    assert (found.mean, found.largest) == (pytest.approx(0.5), pytest.approx(1.0))
    assert gap([], []) == Gap(0.0, 0.0)
    assert math.isnan(gap([[-1.0]], [[math.nan]]).mean)
    assert gap([[-1.0]], [[-math.inf]]).mean == math.inf
    with pytest.raises(ValueError, match="1 log-probabilities against 2"):
        gap([[-1.0]], [[-1.0, -1.0]])


def test_a_probe_keeps_its_numbers_on_the_wire():
    probe = Probe([[1, 2, 3], [7, 8]], [[-0.5, -1.25], [-2.0]], 0.25)
    assert wire.probe_from_proto(wire.probe_to_proto(probe)) == probe
    for ids, logprobs in (([1], []), ([1, 2], [-1.0, -1.0])):
        with pytest.raises(wire.WireError, match="sequence 0 has"):
            wire.probe_from_proto(pb.Probe(sequences=[pb.ProbeSequence(ids=ids, logprobs=logprobs)]))


def episode(task, start, length=30):
    ids = list(range(start, start + length))
    return Trajectory(task, "", 0, ids[:10], ids[10:], [1] * 20, [0.0] * 20, [], 0.0, "wrong", "done")


def test_questions_first_then_one_episode_of_each_task(tmp_path):
    config = write_model(tmp_path / "model")
    settings = engine_config(
        tmp_path / "model", "bridge.probe_sequences=2", "generator.max_input_length=25", "trainer.policy.row_tokens=512"
    )
    asked = []
    learner = SimpleNamespace(
        model_config=config, score=lambda ids: asked.append(ids) or [[-1.0] * (len(i) - 1) for i in ids]
    )
    tasks = [Task(f"q{i}", "", {"question": f"the largest city in the country {i}"}) for i in range(3)]
    prober = Prober(settings, learner, tasks)
    probe = prober.probe()
    assert len(probe.sequences) == 2
    assert probe.sequences[0] != probe.sequences[1]
    assert all(2 <= len(ids) <= 25 for ids in probe.sequences)
    prober.see([episode("a", 100), episode("a", 200), episode("b", 300), episode("c", 400)])
    probe = prober.probe()
    assert probe.sequences == asked[-1] == [list(range(100, 125)), list(range(300, 325))]
    assert [len(logprobs) for logprobs in probe.logprobs] == [24, 24]
    prober.see([])
    assert prober.probe().sequences == probe.sequences
    off = Prober(engine_config(tmp_path / "model", "bridge.probe_sequences=0"), learner, tasks)
    assert off.probe() is None


@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        ((), 1e-3),
        (("generator.inference_engine.dtype=bfloat16",), 0.5),
        (("trainer.policy.compute_dtype=bfloat16",), 0.5),
        (("generator.inference_engine.dtype=bfloat16", "bridge.probe_tolerance=0.2"), 0.2),
    ],
)
def test_the_tolerance_is_the_coarser_sides(tmp_path, overrides, expected):
    assert tolerance(engine_config(tmp_path, "trainer.policy.compute_dtype=float32", *overrides)) == expected
