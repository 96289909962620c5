"""A run of launch.py that trains adapters: they alone are pushed and saved, and what comes out is the trained model."""

import json
import math
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file
from test_train import DEADLINE, ROOT, finish, start

from sqlrl_jax.config import LoraConfig
from sqlrl_jax.model.config import ModelConfig
from sqlrl_jax.model.hf import load_hf
from sqlrl_jax.model.lora import merge, trained_specs
from sqlrl_jax.model.params import flatten
from sqlrl_jax.model.peft import load_peft

LORA = LoraConfig(rank=4, alpha=32)
SETTINGS = (
    "trainer.policy.model.lora.rank=4",
    "trainer.policy.model.lora.alpha=32",
    "trainer.policy.optimizer_config.lr=0.003",
    "trainer.max_steps=3",
    "trainer.ckpt_interval=0",
    "trainer.eval_before_train=false",
)


@pytest.mark.timeout(400)
def test_adapters_are_pushed_saved_and_exported(tmp_path: Path) -> None:
    run = tmp_path / "run"
    output = finish(start(run, tmp_path / "demo", f"data.train_data=[{tmp_path}/demo/train.jsonl]", *SETTINGS))
    assert "adapters of rank 4 and alpha 32 on q_proj, k_proj" in output
    base = ROOT / "models/quickstart"
    config = ModelConfig.from_dir(base)
    numbers = sum(math.prod(spec.shape) for spec in trained_specs(config, LORA).values())
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    steps = [line for line in lines if line["kind"] == "train"]
    assert len(steps) == 3
    assert sum(step["policy/optimizer_steps"] for step in steps) > 0
    for step in steps:
        assert step["bridge/model_bytes"] == 4 * numbers
        assert step["bridge/sent_bytes"] < 4 * numbers + 20_000  # the frames' headers
        assert step.get("policy/logprob_diff_max", 0.0) < 1e-4  # the service computes with what was pushed

    adapters = load_peft(run / "adapter", config, LORA)
    assert min(np.abs(value).max() for value in flatten(adapters).values()) > 0
    want = flatten(merge(load_hf(base, config), adapters, LORA))
    for path, value in flatten(load_hf(run / "export", config)).items():
        np.testing.assert_allclose(value, want[path], atol=1e-6, err_msg=path)
    export = [
        sys.executable,
        "launch.py",
        "export",
        "--checkpoint",
        str(run),
        "--out",
        str(tmp_path / "a"),
        "--adapter",
    ]
    done = subprocess.run(export, cwd=ROOT, capture_output=True, text=True, timeout=DEADLINE)
    assert done.returncode == 0, done.stderr
    mine, again = (load_file(folder / "adapter_model.safetensors") for folder in (run / "adapter", tmp_path / "a"))
    assert mine.keys() == again.keys()
    assert all(np.array_equal(mine[name], again[name]) for name in mine)
