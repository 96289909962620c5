"""Where the services that a run starts get their GPUs, interpreter and logs from."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from rollout.errors import UserError
from sqlrl_jax.config import Config
from sqlrl_jax.local_services import interpreter, log_of, visible_gpus


def config_with(backend: str = "sglang", **engine: object) -> Config:
    return Config.model_validate({"generator": {"backend": backend, "inference_engine": engine}})


def test_each_engine_sees_its_own_gpus():
    config = config_with(num_engines=2, tensor_parallel_size=2)
    seen = [visible_gpus(config, engine, {}) for engine in range(2)]
    assert seen == [{"CUDA_VISIBLE_DEVICES": "0,1"}, {"CUDA_VISIBLE_DEVICES": "2,3"}]


def test_gpus_are_those_that_the_run_may_see():
    config = config_with(num_engines=2)
    chosen = {"CUDA_VISIBLE_DEVICES": "GPU-a,5,7"}
    assert visible_gpus(config, 1, chosen) == {"CUDA_VISIBLE_DEVICES": "5"}
    with pytest.raises(UserError, match=r"num_engines 2 x tensor_parallel_size 2 need 4 GPUs, .*=GPU-a,5,7 names 3"):
        visible_gpus(config_with(num_engines=2, tensor_parallel_size=2), 0, chosen)


@pytest.mark.parametrize(
    "config",
    [
        config_with(tensor_parallel_size=2),
        config_with("embedded", num_engines=2),
        config_with(num_engines=2, engine_init_kwargs={"device": "cpu"}),
        config_with(num_engines=2, engine_init_kwargs={"base_gpu_id": 3}),
    ],
    ids=["one engine", "embedded", "on a CPU", "placed by hand"],
)
def test_otherwise_an_engine_sees_what_the_run_sees(config):
    assert visible_gpus(config, 0, {"CUDA_VISIBLE_DEVICES": "1,2"}) == {}


def test_logs_have_names_of_their_own():
    names = [log_of(Path("run/service.process1.log"), engine) for engine in range(3)]
    assert names == [Path(f"run/service.process1{number}.log") for number in ("", ".1", ".2")]


def test_the_interpreter_is_the_learners_unless_one_is_named(tmp_path):
    assert interpreter(config_with()) == sys.executable
    assert interpreter(config_with(python=sys.executable)) == sys.executable
    with pytest.raises(UserError, match=r"inference_engine\.python = .*/no/python: there is no such program"):
        interpreter(config_with(python=str(tmp_path / "no/python")))
