"""A rollout service on SGLang as a process: episodes of the demo task, a push over the bridge, and SGLang's death."""

from __future__ import annotations

import os
import signal
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from small_model import MARKS, START_TIMEOUT, Reference, settings, weights, write_model

from rollout import bridge_pb2 as pb
from rollout import frames
from rollout.client import RolloutClient
from rollout.engine.hf_tensors import full_manifest
from rollout.stub import BridgeError
from rollout.supervisor import ServiceProcess
from rollout.types import SamplingParams
from sqlrl_jax.config import DemoConfig
from sqlrl_jax.data.demo.generate import ensure
from sqlrl_jax.data.tasks import read_tasks

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


def push(stub, folder, key) -> str:
    """The whole of `folder` as `key`; the state of the service after it."""
    specs, values = full_manifest(folder, "float32"), weights(folder)
    manifest = [pb.TensorSpec(name=s.name, shape=s.shape, dtype=s.dtype) for s in specs]
    state = stub.begin(pb.BeginRequest(weights=key, manifest=manifest, lease_seconds=SECONDS), timeout=SECONDS)
    stream = [
        frame
        for gap in state.missing
        for frame in frames.slice_frames(
            state.push_id,
            gap.tensor,
            gap.slice,
            memoryview(values[specs[gap.tensor].name].tobytes()),
            [(gap.offset, gap.length)],
        )
    ]
    stub.push(iter(stream), timeout=SECONDS)
    for phase in ("PREPARE", "APPLY"):
        state = stub.commit(pb.CommitRequest(weights=key, phase=phase), timeout=SECONDS)
    return pb.State.Name(state.state)


def test_episodes_are_played_and_follow_the_pushed_weights(client, folders, demo):
    check(play(client, demo, 0), 0, Reference(folders[0]))
    key = pb.WeightsKey(run="run", epoch=1, version=4)
    assert push(client.stubs[0], folders[1], key) == "LIVE"
    client.identify("run", 1)
    check(play(client, demo, 4), 4, Reference(folders[1]))


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
