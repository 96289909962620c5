"""Two services started on this machine with another interpreter: both answer, one is killed and comes back, both end."""

from __future__ import annotations

import os
import signal
import sys
from pathlib import Path

import pytest
from bridge_helpers import wait_until

from rollout.client import RolloutClient
from rollout.supervisor import ServiceError
from sqlrl_jax import config_file
from sqlrl_jax.local_services import LocalServices

ROOT = Path(__file__).resolve().parents[2]
WRAPPER = '#!/bin/sh\nexport STARTED_BY=wrapper\nexec {python} "$@"\n'


def services(folder: Path, *settings: str) -> LocalServices:
    config = config_file.load(
        str(ROOT / "configs/quickstart.yaml"),
        [f"trainer.policy.model.path={ROOT}/models/quickstart", "generator.inference_engine.num_engines=2", *settings],
    )
    config_file.save(config, folder / "config.yaml")
    return LocalServices(config, folder / "config.yaml", folder / "service.log")


def test_several_services_start_and_come_back(tmp_path):
    python = tmp_path / "python"
    python.write_text(WRAPPER.format(python=sys.executable))
    python.chmod(0o755)
    databases = f"environment.text2sql.database_root={tmp_path}"
    local = services(tmp_path, f"generator.inference_engine.python={python}", databases)
    try:
        addresses = local.start()
        assert len(set(addresses)) == 2
        client = RolloutClient(addresses)
        pids = [reply.pid for reply in client.status().values()]
        for pid in pids:
            assert b"STARTED_BY=wrapper" in Path(f"/proc/{pid}/environ").read_bytes()
        os.kill(pids[1], signal.SIGKILL)
        wait_until(lambda: not client.stubs[1].healthy(), "a killed service to be gone")
        now = local.restart(addresses[1])
        assert local.owns(now)
        assert local.owns(addresses[0])
        client.members.replace(now, addresses[1])
        assert client.members.look() == [now]
        status = client.status()
        assert status[addresses[0]].pid == pids[0]  # the other one was left alone
        assert status[now].pid not in pids
        client.close()
    finally:
        local.close()
    for pid in (pids[0], status[now].pid):
        assert not os.path.exists(f"/proc/{pid}")
    logs = [(tmp_path / name).read_text() for name in ("service.log", "service.1.log")]
    assert [log.count("rollout service listening on") for log in logs] == [1, 2]


def test_when_one_does_not_start_none_is_left(tmp_path):
    python = tmp_path / "python"
    python.write_text("#!/bin/sh\necho no SGLang in this environment\nexit 3\n")
    python.chmod(0o755)
    local = services(tmp_path, f"generator.inference_engine.python={python}")
    with pytest.raises(ServiceError, match=r"exit status 3 while starting(.|\n)*no SGLang in this environment"):
        local.start()
