"""Which process this is, what a World of one does, and how the processes other than 0 see the run's folder."""

import pytest

from rollout.errors import UserError
from rollout.types import Trajectory, Turn
from sqlrl_jax import config_file
from sqlrl_jax import run as run_module
from sqlrl_jax.distributed import Place, World, place_of, run
from sqlrl_jax.link import LinkError
from sqlrl_jax.run import FollowedRun, Run, RunError, open_run
from sqlrl_jax.shared_fleet import Answer


@pytest.fixture(autouse=True)
def no_cluster(monkeypatch):
    for name in ("JAX_COORDINATOR_ADDRESS", "JAX_PROCESS_ID", "JAX_NUM_PROCESSES"):
        monkeypatch.delenv(name, raising=False)


def call(work):
    return work()


def test_without_flags_there_is_one_process_and_no_jax_distributed():
    assert place_of(None, None, None, 1) is None
    worlds = []
    assert run(None, config_file.load(None, []).trainer.distributed, lambda world: worlds.append(world) or 3, call) == 3
    [world] = worlds
    assert (world.index, world.count, world.is_main) == (0, 1, True)


def test_flags_and_variables_name_the_place(monkeypatch):
    assert place_of("host:81", 1, 4, 1) == Place("host", 81, 1, 4)
    assert place_of("[::1]:81", 0, 2, 1) == Place("::1", 81, 0, 2)
    assert place_of("host:81", 0, 1, 1) is None
    monkeypatch.setenv("JAX_COORDINATOR_ADDRESS", "other:9")
    monkeypatch.setenv("JAX_PROCESS_ID", "2")
    monkeypatch.setenv("JAX_NUM_PROCESSES", "3")
    assert place_of(None, None, None, 1) == Place("other", 9, 2, 3)
    assert place_of("host:81", 0, None, 1) == Place("host", 81, 0, 3)
    monkeypatch.setenv("JAX_PROCESS_ID", "two")
    with pytest.raises(UserError, match="JAX_PROCESS_ID='two': expected a whole number"):
        place_of(None, None, None, 1)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ((None, 1, 2), "need --coordinator HOST:PORT"),
        (("host:81", None, 2), "needs --process-id"),
        (("host:81", 2, 2), "must be 0 to 1"),
        (("host", 0, 2), "expected host:port"),
    ],
)
def test_flags_that_do_not_go_together_are_refused(flags, message):
    with pytest.raises(UserError, match=message):
        place_of(*flags, 1)


def test_slurm_is_detected_when_asked(monkeypatch):
    variables = {"JOB_ID": "4242", "STEP_NODELIST": "node[07-09],other", "NTASKS": "4", "PROCID": "3", "LOCALID": "0"}
    for name, value in {**variables, "STEP_NUM_NODES": "4"}.items():
        monkeypatch.setenv(f"SLURM_{name}", value)
    assert place_of(None, None, None, 1) is None, "only when asked"
    place = place_of("auto", None, None, 1)
    assert place is not None
    assert (place.host, place.index, place.count, place.local_devices) == ("node07", 3, 4, [0])
    monkeypatch.setenv("SLURM_STEP_TASKS_PER_NODE", "1(x4)")
    alone = place_of("auto", None, None, 1)
    assert alone is not None
    assert alone.local_devices is None, "the only process of its node has all its devices"


def test_auto_without_a_cluster_says_what_to_do(monkeypatch):
    monkeypatch.delenv("SLURM_JOB_ID", raising=False)
    with pytest.raises(UserError, match="found neither a TPU pod, nor SLURM"):
        place_of("auto", None, None, 1)


def test_a_world_of_one_answers_itself():
    world = World()
    assert world.exchange("x", b"a") == [b"a"]
    assert world.gather("x", {"a": [1]}) == [{"a": [1]}]
    assert world.from_main("x", lambda: [1, "b"]) == [1, "b"]
    assert world.in_turn("x", lambda: 5) == 5
    world.require_same("x", "text")
    with world.ending_together():
        world.barrier("x")


class Two(World):
    """Process 1 of two, where process 0 gives `other`."""

    index, count = 1, 2

    def __init__(self, other: bytes) -> None:
        self.other = other

    def exchange(self, name: str, data: bytes) -> list[bytes]:
        return [self.other, data]


def test_processes_that_differ_are_told_where():
    message = r"process 1 and process 0 differ in configuration: 'seed: 2' and 'seed: 1'; start every process"
    with pytest.raises(LinkError, match=message):
        Two(b'"a: 1\\n  seed: 1"').require_same("configuration", "a: 1\n  seed: 2")


def test_an_answer_survives_the_way():
    turn = Turn("act", "SELECT 1", "ok", "seen", 3, 0.5, 0.25, "1")
    episode = Trajectory(
        "q", "s", 1, [1, 2], [3, 4], [1, 0], [-0.5, 0.0], [(2, 0, 2)], 0.1, "correct", "done", [turn], {"m": 1.5}
    )
    answer = Answer([episode, episode], ["q2"], [("127.0.0.1:1", "gone\n!", True)], "SIGTERM")
    assert Answer.unpack(answer.pack()) == answer
    assert Answer.unpack(Answer().pack()) == Answer()


@pytest.fixture
def config(tmp_path):
    return config_file.load(None, [f"trainer.run_dir={tmp_path / 'run'}"])


def test_the_others_log_and_leave_the_rest_to_process_0(config):
    main = open_run(config, World())
    follower = FollowedRun(config, 2, main.id, main.epoch)
    follower.log_metrics("train", 1, {"a": 1.0})
    follower.log_episodes("train", 1, [], {}, str)
    follower.forget_after(-1)
    follower.log("here")
    follower.close()
    main.close()
    assert not main.metrics_file.exists()
    assert (main.dir / "log.process2.txt").read_text() == "here\n"


def test_a_folder_that_is_not_shared_is_found_out(config, monkeypatch):
    monkeypatch.setattr(run_module, "SHARED_SECONDS", 0.2)
    message = "process 1 does not see in .*/run what process 0 has written there: put trainer.run_dir on a file system"
    with pytest.raises(RunError, match=message):
        FollowedRun(config, 1, "other", 1)
    Run(config).close()  # a folder of the same name, of another run
    with pytest.raises(RunError, match=message):
        FollowedRun(config, 1, "other", 1)
