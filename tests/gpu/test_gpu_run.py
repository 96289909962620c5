"""A whole run on one GPU: the learner and its rollout service share the card."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = [pytest.mark.gpu, pytest.mark.timeout(600)]

ROOT = Path(__file__).resolve().parents[2]


def test_the_quickstart_trains_on_a_gpu(tmp_path: Path) -> None:
    data = tmp_path / "demo"
    settings = {
        "trainer.run_dir": tmp_path / "run",
        "trainer.max_steps": 2,
        "trainer.eval_interval": 0,
        "trainer.eval_before_train": "false",
        "trainer.train_batch_size": 8,
        "trainer.policy_mini_batch_size": 8,
        "trainer.compile_cache": "",
        "data.demo.directory": data,
        "data.demo.train_databases": 8,
        "data.demo.heldout_databases": 4,
        "data.train_data": f"[{data}/train.jsonl]",
        "data.val_data": f"[{data}/heldout.jsonl]",
        "environment.text2sql.database_root": data / "databases",
    }
    command = [sys.executable, str(ROOT / "launch.py"), "--config", str(ROOT / "configs/quickstart.yaml")]
    command += [f"{key}={value}" for key, value in settings.items()]
    environment = {k: v for k, v in os.environ.items() if k != "JAX_PLATFORMS"} | {"PYTHONUNBUFFERED": "1"}
    done = subprocess.run(command, cwd=ROOT, env=environment, text=True, capture_output=True, timeout=500)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    steps = [line for line in lines if line["kind"] == "train"]
    assert [line["step"] for line in steps] == [1, 2]
    assert "cuda" in done.stdout or "gpu" in done.stdout
    for line in steps:  # both ends are on the card, in float32 by its matrix units: TF32
        assert line["policy/logprob_diff"] < 1e-2
