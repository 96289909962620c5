"""The bridge end to end over real processes: episodes come back whole and in order, weights go there and are used."""

import subprocess
import sys

import numpy as np
import pytest
from bridge_helpers import DEADLINE, ROOT, SAMPLING, begin, commit, key, level, push, service, tasks, weights
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc

from rollout import bridge_pb2 as pb
from rollout.channel import SERVICE, grpc
from rollout.client import RolloutClient
from rollout.stub import BridgeError, Stub
from rollout.types import Task

pytestmark = pytest.mark.timeout(180)


@pytest.fixture(scope="module")
def two(tmp_path_factory):
    """Two services that started with weights (version 0)."""
    services = [service(tmp_path_factory.mktemp(name), "--version", "0") for name in ("a", "b")]
    try:
        yield [s.start() for s in services]
    finally:
        for s in services:
            s.stop()


@pytest.fixture
def fresh(tmp_path):
    """A client and a stub of one service without weights."""
    process = service(tmp_path)
    client = RolloutClient([process.start()])
    try:
        yield client, client.stubs[0]
    finally:
        client.close()
        process.stop()


def play(client, batch, samples=3, **options):
    return client.rollout(batch, samples, SAMPLING, **{"version": 0, "seed": 11, "max_turns": 5, **options})


def test_episodes_come_in_order_and_do_not_depend_on_who_played_them(two):
    seen = []
    with_two, with_one = RolloutClient(two), RolloutClient(two[:1])
    batch = tasks(7)
    episodes = play(with_two, batch, on_trajectory=seen.append)
    assert [(e.task_id, e.sample) for e in episodes] == [(t.id, s) for t in batch for s in range(3)]
    assert sorted((e.task_id, e.sample) for e in seen) == sorted((e.task_id, e.sample) for e in episodes)
    assert [e.response_ids for e in episodes] == [e.response_ids for e in play(with_one, batch)]
    assert len({tuple(e.response_ids) for e in episodes}) == len(episodes)
    assert [e.response_ids for e in episodes] != [e.response_ids for e in play(with_two, batch, seed=12)]
    first = episodes[0]
    assert first.loss_mask == [1] * 4 + [0] * 3 + [1] * 4
    assert (first.reward, first.outcome, len(first.turns), first.spans) == (1.0, "correct", 2, [(0, 0, 11)])
    assert (with_two.duplicates, with_two.retried, with_two.lost) == (0, 0, 0)
    with_two.close()
    with_one.close()


def test_live_version_is_found_when_none_is_asked_for(two):
    client = RolloutClient(two)
    assert len(play(client, tasks(2), version=None)) == 6
    client.close()


def test_a_task_twice_in_a_batch_is_refused(two):
    client = RolloutClient(two)
    with pytest.raises(ValueError, match="'q1' is twice"):
        play(client, [*tasks(3), Task("q1", "test", {})])
    client.close()


def test_weights_that_are_not_live_are_refused(two, fresh):
    client = RolloutClient(two)
    with pytest.raises(BridgeError, match=r"version 3 is not live: this service generates with version 0"):
        play(client, tasks(1), version=3)
    client.close()
    empty, _ = fresh
    with pytest.raises(BridgeError, match="no weights"):
        play(empty, tasks(1), version=0)
    with pytest.raises(BridgeError, match="has no weights yet"):
        play(empty, tasks(1), version=None)


def test_a_bad_request_is_not_tried_again(two):
    client = RolloutClient(two)
    with pytest.raises(BridgeError, match="max_turns of 1") as caught:
        play(client, tasks(2), max_turns=0, on_lost=lambda address, error: pytest.fail("a mistake is not a loss"))
    assert not caught.value.transient
    client.close()


def test_infrastructure_failures_are_retried_then_named(two):
    client = RolloutClient(two[:1], retries=1)
    episodes = play(client, tasks(3, failures=1, round=1), samples=1)
    assert [e.outcome for e in episodes] == ["correct"] * 3
    assert client.retried == 3
    with pytest.raises(
        BridgeError, match=r"failed 2 times each.*\n.*task 'bad1' sample 0: RuntimeError: no database for bad1"
    ):
        play(client, [Task("good", "t", {}), Task("bad1", "t", {"failures": 99})], samples=1)
    client.close()


def test_pushed_weights_are_used_and_stamped(fresh):
    client, stub = fresh
    first, second = weights(1), weights(2)
    for version, arrays in ((4, first), (5, second)):
        state = push(stub, key(version), arrays)
        assert state.state == pb.LIVE
        client.identify("run", 1)
        episode = play(client, tasks(1), samples=1, version=version)[0]
        assert episode.spans == [(version, 0, 11)]
        assert episode.logprobs[:4] == [level(arrays)] * 4
    with pytest.raises(BridgeError, match="version 4 of run 'run', start 1 is not live"):
        play(client, tasks(1), version=4)
    client.identify("run", 2)
    with pytest.raises(BridgeError, match="start 2 is not live"):
        play(client, tasks(1), version=5)


def test_status_tells_where_a_push_is(fresh):
    _, stub = fresh
    assert (stub.status().state, stub.status().HasField("live")) == (pb.EMPTY, False)
    begin(stub, key(1))
    status = stub.status()
    assert (status.state, status.staging, status.received_bytes, status.total_bytes) == (
        pb.STAGING,
        key(1),
        0,
        1_200_028,
    )
    stub.abort(pb.AbortRequest(weights=key(1)), timeout=DEADLINE)
    assert stub.status().state == pb.EMPTY


def test_duplicate_commits_apply_once(fresh):
    _, stub = fresh
    arrays = weights()
    push(stub, key(1), arrays)
    for phase in (pb.PREPARE, pb.APPLY, pb.APPLY):
        assert commit(stub, key(1), phase).state == pb.LIVE
    assert not begin(stub, key(1)).missing


def test_health_and_reflection(two):
    with Stub(two[0]) as stub:
        assert stub.healthy()
        reflect = reflection_pb2_grpc.ServerReflectionStub(stub.channel)
        request = reflection_pb2.ServerReflectionRequest(list_services="")
        reply = next(iter(reflect.ServerReflectionInfo(iter([request]), timeout=DEADLINE)))
        names = {s.name for s in reply.list_services_response.service}
    assert {SERVICE, "grpc.health.v1.Health"} <= names


def test_two_services_on_one_port_are_refused(two, tmp_path):
    second = service(tmp_path, "--listen", two[0])
    with pytest.raises(Exception, match="the port is in use"):
        second.start()


def test_the_learners_side_pushes_a_model_to_all(tmp_path):
    """Pusher: convert, cut, send, apply; then again with nothing to send."""
    import jax

    from sqlrl_jax.model.config import ModelConfig
    from sqlrl_jax.model.hf import hf_manifest, to_hf_tensors
    from sqlrl_jax.model.params import init_param, nest, param_specs
    from sqlrl_jax.weights import Pusher, PushError

    sizes = {
        "vocab_size": 64,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
    }
    sizes |= {
        "num_key_value_heads": 2,
        "max_position_embeddings": 64,
        "rms_norm_eps": 1e-6,
        "tie_word_embeddings": True,
    }
    config = ModelConfig.from_hf({"model_type": "qwen2", **sizes})
    params = nest(
        {
            name: init_param(spec, jax.random.key(i), "float32")
            for i, (name, spec) in enumerate(param_specs(config).items())
        }
    )
    specs = hf_manifest(config, "bfloat16")
    processes = [service(tmp_path / str(i), specs=specs) for i in range(2)]
    try:
        client = RolloutClient([p.start() for p in processes])
        pusher = Pusher(client, config, "bfloat16", run_id="r", epoch=3)
        metrics = pusher.push(params, 7)
        tensors = to_hf_tensors(params, config, "bfloat16")
        expected = float(sum(np.asarray(t, np.float64).sum() for t in tensors.values()))
        for status in client.status().values():
            assert status.live == key(7, 3, "r")
            assert status.stats["level"] == pytest.approx(expected, rel=1e-9)
        size = sum(t.nbytes for t in tensors.values())
        assert metrics["bridge/model_bytes"] == size
        assert metrics["bridge/sent_bytes"] > 2 * size
        assert {f"bridge/{n}_seconds" for n in ("convert", "wire", "check", "apply", "pause")} <= metrics.keys()
        assert pusher.push(params, 7)["bridge/sent_bytes"] == 0
        assert len(play(client, tasks(2), version=7)) == 6
        with pytest.raises(PushError, match=r"version 6 failed \(attempt 1 of 3\).*is stale"):
            pusher.push(params, 6)
        client.close()
    finally:
        for p in processes:
            p.stop()


SHARDED = """
import itertools
import jax
jax.config.update("jax_platforms", "cpu")
jax.config.update("jax_num_cpu_devices", 4)
import jax.numpy as jnp, numpy as np
from jax.sharding import NamedSharding, PartitionSpec as P
from rollout.manifest import Slice, check_slices
from rollout.receiver import Key, Receiver
from rollout.types import TensorSpec
from sqlrl_jax.buckets import cut_of, pieces
from tests.slices import slice_frames

mesh = jax.make_mesh((2, 2), ("fsdp", "tensor"))
key, total = Key("r", 1, 1), 0
for shape, axes in itertools.product([(8, 6), (4, 2, 10)], [P(), P("fsdp"), P(None, "tensor"), P("tensor", "fsdp")]):
    array = jax.device_put(jnp.arange(np.prod(shape), dtype=jnp.bfloat16).reshape(shape), NamedSharding(mesh, axes))
    cut = cut_of("w", array)
    spec = TensorSpec("w", shape, "bfloat16")
    slices = [Slice(*s) for s in cut.slices]
    check_slices(spec, slices)
    owned = {piece.slice: piece.data for piece in pieces(0, cut, array)}
    assert sum(d.nbytes for d in owned.values()) == array.nbytes, "each byte leaves the devices once"
    receiver = Receiver([spec], lambda: 0.0)
    missing = receiver.begin(key, [spec], [slices], 10)
    for r in missing:
        for frame in slice_frames(key.push_id, 0, r.slice, owned[r.slice].data, [(r.offset, r.length)]):
            receiver.frame(frame)
    receiver.prepare(key)
    assert np.array_equal(receiver.start_apply(key)["w"], np.asarray(array))
    total += len(slices)
from sqlrl_jax.config import MeshConfig
from sqlrl_jax.mesh import make_mesh
from tests.unit.test_buckets import check
check("bfloat16", make_mesh(MeshConfig(fsdp=2, tensor=2)))
print("slices", total)
"""


def test_sharded_arrays_are_sent_once_and_put_together():
    command = [sys.executable, "-c", SHARDED]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=DEADLINE, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "slices 18"


def test_a_message_that_is_not_protobuf_is_refused(two):
    with Stub(two[0]) as stub:
        call = stub.channel.unary_unary(f"/{SERVICE}/Begin")
        with pytest.raises(grpc.RpcError):
            call(b"\xff\xff\xff", timeout=DEADLINE)
        assert stub.healthy()
