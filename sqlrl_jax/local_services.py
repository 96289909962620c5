"""The rollout services that a run starts on this machine: one process an engine, each with its GPUs and its log.

The learner's environment has no torch and no SGLang, so `generator.inference_engine.python` may name another interpreter. A
service gets the run's resolved settings and nothing else; it stops by itself when this process dies.

Left out: spreading one engine over hosts, which is SGLang's own multi-node mode, and services on other machines, which
are named in `generator.services`.
"""

from __future__ import annotations

import os
import shutil
import sys
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from rollout.errors import UserError
from rollout.security import PLAIN, Security
from rollout.supervisor import ServiceProcess
from sqlrl_jax.config import Config

LAUNCH = Path(__file__).resolve().parents[1] / "launch.py"


class LocalServices:
    """None until `start`. Addresses change when a service is started again; close it to stop them all."""

    def __init__(self, config: Config, config_file: Path, log_file: Path) -> None:
        self._config, self._config_file, self._log_file = config, config_file, log_file
        self._processes: dict[str, ServiceProcess] = {}

    def start(self, *settings: str, security: Security = PLAIN) -> list[str]:
        """Starts all of them at one time and returns their addresses. Raises UserError, ServiceError."""
        command = [interpreter(self._config), str(LAUNCH), "serve", "--config", str(self._config_file), *settings]
        processes = [
            ServiceProcess(
                command,
                log_of(self._log_file, engine),
                start_timeout=self._config.bridge.start_timeout,
                variables=visible_gpus(self._config, engine, os.environ),
                security=security,
            )
            for engine in range(self._config.generator.inference_engine.num_engines)
        ]
        pool = ThreadPoolExecutor(len(processes), thread_name_prefix="start")
        try:
            addresses = [start.result() for start in [pool.submit(process.start) for process in processes]]
        except BaseException:
            for process in processes:
                process.stop()
            raise
        finally:
            pool.shutdown(wait=False)
        self._processes = dict(zip(addresses, processes, strict=True))
        return addresses

    def owns(self, address: str) -> bool:
        return address in self._processes

    def restart(self, address: str) -> str:
        """Starts the service at `address` again; returns its new address. Raises ServiceError."""
        now = self._processes[address].restart()
        self._processes[now] = self._processes.pop(address)
        return now

    def close(self) -> None:
        for process in list(self._processes.values()):  # `restart` may be at work in another thread
            process.close()


def interpreter(config: Config) -> str:
    """The Python that runs the services. Raises UserError when there is none at the path given."""
    given = config.generator.inference_engine.python
    if not given:
        return sys.executable
    found = shutil.which(os.path.expanduser(given))
    if found is None:
        raise UserError(
            f"generator.inference_engine.python = {given}: there is no such program; name the Python of an environment with "
            f"SGLang, such as .venv-rollout/bin/python (docs/sglang.md makes one)"
        )
    return found


def log_of(log_file: Path, engine: int) -> Path:
    """service.log, service.1.log, service.2.log …"""
    return log_file.with_suffix(f".{engine}{log_file.suffix}") if engine else log_file


def visible_gpus(config: Config, engine: int, environment: Mapping[str, str]) -> dict[str, str]:
    """What shows engine number `engine` its own GPUs and no other's, in the order that CUDA_VISIBLE_DEVICES has.

    Nothing where one engine has all, or where engine_init_kwargs name the place. Raises UserError when the list is short.
    """
    settings = config.generator.inference_engine
    own_place = {"device", "base_gpu_id"} & settings.engine_init_kwargs.keys()
    if config.generator.backend != "sglang" or settings.num_engines == 1 or own_place:
        return {}
    each, needed = settings.tensor_parallel_size, settings.num_engines * settings.tensor_parallel_size
    listed = environment.get("CUDA_VISIBLE_DEVICES")
    all_gpus = listed.split(",") if listed is not None else [str(number) for number in range(needed)]
    if len(all_gpus) < needed:
        raise UserError(
            f"generator.inference_engine: num_engines {settings.num_engines} x tensor_parallel_size {each} need {needed} "
            f"GPUs, CUDA_VISIBLE_DEVICES={listed} names {len(all_gpus)}"
        )
    return {"CUDA_VISIBLE_DEVICES": ",".join(all_gpus[engine * each : (engine + 1) * each])}
