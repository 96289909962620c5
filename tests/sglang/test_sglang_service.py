"""A rollout service on SGLang as a process: episodes of the demo task, a push over the bridge, and SGLang's death."""

from __future__ import annotations

import os
import shutil
import signal
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file
from small_model import MARKS, START_TIMEOUT, Reference, settings, weights, write_model

from rollout import bridge_pb2 as pb
from rollout import delta, frames
from rollout.channel import grpc
from rollout.client import RolloutClient
from rollout.engine.hf_tensors import full_manifest
from rollout.stub import BridgeError
from rollout.supervisor import ServiceProcess
from rollout.types import SamplingParams
from sqlrl_jax.config import DemoConfig
from sqlrl_jax.data.demo.generate import ensure
from sqlrl_jax.data.tasks import read_tasks
from tests.slices import slice_frames

pytestmark = MARKS
ROOT = Path(__file__).resolve().parents[2]
SAMPLING = SamplingParams(temperature=1.0, max_tokens=48)
SECONDS = 120.0


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    made = [tmp_path_factory.mktemp("model") / name for name in ("first", "second")]
    for seed, folder in enumerate(made):
        write_model(folder, seed)
    return made


@pytest.fixture(scope="module")
def demo(tmp_path_factory):
    return ensure(DemoConfig(directory=str(tmp_path_factory.mktemp("demo") / "data"), heldout_databases=1))


@pytest.fixture(scope="module")
def service(tmp_path_factory, folders, demo):
    folder = tmp_path_factory.mktemp("service")
    (folder / "config.yaml").write_text("{}\n")
    given = [
        *settings(folders[0]),
        "generator.max_input_length=1500",
        f"environment.text2sql.database_root={demo / 'databases'}",
        "environment.text2sql.prompt_style=short",
        "environment.text2sql.workers=1",
    ]
    command = [sys.executable, str(ROOT / "launch.py"), "serve", "--config", str(folder / "config.yaml"), *given]
    process = ServiceProcess(command, folder / "service.log", start_timeout=START_TIMEOUT)
    process.start()
    yield process
    process.stop()


@pytest.fixture
def client(service):
    client = RolloutClient([service.address])
    yield client
    client.close()


def play(client, demo, version):
    tasks = read_tasks(demo / "heldout.jsonl")[:3]
    return client.rollout(tasks, 2, SAMPLING, version=version, seed=3, max_turns=3)


def check(episodes, version, reference):
    """Every sampled token has transformers' log-probability on the whole episode, and the version of its weights."""
    assert len(episodes) == 6
    for episode in episodes:
        assert episode.outcome not in ("infrastructure", "prompt_too_long")
        rows = reference.logprobs(episode.prompt_ids + episode.response_ids)[len(episode.prompt_ids) - 1 : -1]
        sampled = np.flatnonzero(episode.loss_mask)
        ours = rows[sampled, np.array(episode.response_ids)[sampled]]
        np.testing.assert_allclose(np.array(episode.logprobs)[sampled], ours, atol=1e-4)
        assert [span[0] for span in episode.spans] == [version]
    assert len({tuple(episode.response_ids) for episode in episodes}) == 6


def push(stub, folder, key, base=None, old=None, probe=None) -> pb.PushState:
    """The weights of `folder` as `key`, or what is different from those of `old`, which are `base`; the last answer."""
    specs, values = full_manifest(folder, "float32"), weights(folder)
    manifest = [pb.TensorSpec(name=s.name, shape=s.shape, dtype=s.dtype) for s in specs]
    begin = pb.BeginRequest(weights=key, manifest=manifest, lease_seconds=SECONDS, base=base)
    state = stub.begin(begin, timeout=SECONDS)
    before = weights(old) if old else values
    stream = []
    for gap in state.missing:
        new, had = (data[specs[gap.tensor].name].reshape(-1).view(np.uint8) for data in (values, before))
        if state.delta:
            payload = memoryview(delta.encode(had, new, 4)[0])
            stream.append(frames.frame(state.push_id, gap.tensor, gap.slice, 0, payload, frames.DELTA))
        ranges = [] if state.delta else [(gap.offset, gap.length)]
        stream += slice_frames(state.push_id, gap.tensor, gap.slice, new.data, ranges)
    sent = stub.push(state, iter(stream), SECONDS).bytes
    for phase in ("PREPARE", "APPLY"):
        commit = pb.CommitRequest(weights=key, phase=phase, probe=probe if phase == "APPLY" else None)
        state = stub.commit(commit, timeout=SECONDS)
    state.received_bytes = sent
    return state


def probe_of(reference):
    """What a learner with these weights would have a push tried out with."""
    ids = list(range(40, 90))
    logprobs = reference.logprobs(ids)[np.arange(49), ids[1:]]
    return pb.Probe(sequences=[pb.ProbeSequence(ids=ids, logprobs=logprobs)], tolerance=1e-4)


def write_changed(folder, out):
    """The same model with one value of fifty a little different."""
    shutil.copytree(folder, out)
    values = weights(folder)
    for value in values.values():
        value.reshape(-1)[::50] *= np.float32(1.25)
    save_file(values, out / "model.safetensors", metadata={"format": "pt"})


def test_episodes_are_played_and_follow_the_pushed_weights(client, folders, demo):
    check(play(client, demo, 0), 0, Reference(folders[0]))
    assert push(client.stubs[0], folders[1], key(4)).state == pb.LIVE
    client.identify("run", 1)
    check(play(client, demo, 4), 4, Reference(folders[1]))


def test_differences_are_tried_out_and_served_and_other_weights_are_not(client, folders, demo, tmp_path):
    """After the test above."""
    stub, changed = client.stubs[0], tmp_path / "changed"
    write_changed(folders[1], changed)
    client.identify("run", 1)
    state = push(stub, changed, key(5), key(4), folders[1], probe_of(Reference(changed)))
    assert (state.state, state.delta) == (pb.LIVE, False)  # nothing is open any more
    assert 0 < state.probe_mean < 1e-5
    assert state.received_bytes < sum(value.nbytes for value in weights(changed).values()) / 8
    check(play(client, demo, 5), 5, Reference(changed))
    with pytest.raises(grpc.RpcError, match="differ from the learner's"):
        push(stub, folders[0], key(6), probe=probe_of(Reference(changed)))
    assert stub.status().state == pb.QUARANTINED
    with pytest.raises(BridgeError, match="differ from the learner's"):
        play(client, demo, 6)
    assert push(stub, folders[0], key(6), key(5), changed, probe_of(Reference(folders[0]))).state == pb.LIVE
    check(play(client, demo, 6), 6, Reference(folders[0]))


def key(version):
    return pb.WeightsKey(run="run", epoch=1, version=version)


def scheduler_of(pid: int) -> int:
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            parent = int((folder / "stat").read_text().rpartition(")")[2].split()[1])
            if parent == pid and b"sglang::scheduler" in (folder / "cmdline").read_bytes():
                return int(folder.name)
        except OSError:
            continue  # it ended meanwhile
    raise AssertionError("the service has no scheduler")


def test_a_service_whose_sglang_has_died_ends_and_says_why(service, client, demo):
    """The last test: the service is gone after it."""
    version = client.status()[service.address].live.version
    pid = service.pid
    os.kill(scheduler_of(pid), signal.SIGKILL)
    with pytest.raises(BridgeError):
        play(client, demo, version)
    deadline = time.monotonic() + SECONDS
    while service.alive():
        assert time.monotonic() < deadline
        time.sleep(0.1)
    log = service.last_lines()
    assert "error: the engine has stopped: its process" in log
    assert "exit code -9" in log
