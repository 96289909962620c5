"""Every recipe of the reference runs: two steps on a CPU with another model, other data and smaller sizes, nothing else.

Two runs at a time, one program cache for all. The one for several hosts runs as two processes.
"""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from sqlrl_jax import config_file
from sqlrl_jax.check import Request, check

ROOT = Path(__file__).resolve().parents[2]
DEADLINE = 900.0
STEPS = 2
# A recipe and the devices and processes its mesh needs at least.
RECIPES = {
    "sql_fsdp": (1, 1),
    "skyrl_sql": (1, 1),
    "skyrl_sql_conversation": (1, 1),
    "skyrl_sql_tp_lora": (4, 1),
    "sql_fsdp_2node": (1, 2),
    "skyrl_sql_fp8": (1, 1),
    "skyrl_sql_stepwise": (1, 1),
}
# What each must show in its steps' metrics, besides an optimizer step.
SHOWS = {
    "skyrl_sql_tp_lora": "policy/tis_token_clip_high_ratio",
    "sql_fsdp_2node": "policy/policy_kl",
    "skyrl_sql_fp8": "policy/tis_seq_clip_high_ratio",
}


def overrides(folder: Path, name: str) -> list[str]:
    """Model, data and sizes; no GPU is here, so one embedded engine."""
    demo = folder / "demo"
    settings = {
        "trainer.run_dir": folder / name,
        "trainer.policy.model.path": "models/quickstart",
        "trainer.compile_cache": folder / "compiled",
        "trainer.max_steps": STEPS,
        "trainer.train_batch_size": 4,
        "trainer.policy_mini_batch_size": 4,
        "trainer.policy.row_tokens": 384,
        "trainer.policy.rows_per_micro_batch": 4,
        "trainer.policy.logprob_chunk": 256,
        "generator.backend": "embedded",
        "generator.inference_engine.num_engines": 1,
        "generator.inference_engine.max_sequences": 32,
        "generator.max_input_length": 320,
        "generator.sampling_params.max_generate_length": 64,
        "environment.text2sql.prompt_style": "short",  # what that model has learned to read
        "environment.text2sql.database_root": demo / "databases",
        "data.train_data": f"[{demo}/train.jsonl]",
        "data.val_data": f"[{demo}/heldout.jsonl]",
        "data.max_val_questions": 2,
        "data.demo.directory": demo,
        "data.demo.train_databases": 8,
        "data.demo.heldout_databases": 1,
    }
    return [f"{key}={value}" for key, value in settings.items()]


def run(folder: Path, name: str) -> list[str]:
    """The output of each process of a whole run."""
    devices, count = RECIPES[name]
    command = [sys.executable, "launch.py", "--config", f"configs/{name}.yaml", *overrides(folder, name)]
    places: list[list[str]] = [[]]
    if count > 1:
        with socket.create_server(("127.0.0.1", 0)) as free:
            coordinator = f"127.0.0.1:{free.getsockname()[1]}"
        flags = ["--coordinator", coordinator, "--process-count", str(count), "--process-id"]
        places = [[*flags, str(index)] for index in range(count)]
    environment = os.environ | {"JAX_NUM_CPU_DEVICES": str(devices), "JAX_PLATFORMS": "cpu"}
    pipes: Any = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    processes = [subprocess.Popen([*command, *place], cwd=ROOT, env=environment, **pipes) for place in places]
    try:
        outputs = [process.communicate(timeout=DEADLINE)[0] for process in processes]
    finally:
        for process in processes:
            process.kill()
    assert [process.returncode for process in processes] == [0] * count, "\n----\n".join(outputs)
    return outputs


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Path, dict[str, Future[list[str]]]]]:
    folder = tmp_path_factory.mktemp("recipes")
    demo = [sys.executable, "launch.py", "demo", "--config", "configs/skyrl_sql.yaml", *overrides(folder, "demo")]
    subprocess.run(demo, cwd=ROOT, check=True, stdout=subprocess.DEVNULL)
    with ThreadPoolExecutor(2) as pool:
        yield folder, {name: pool.submit(run, folder, name) for name in RECIPES}
        pool.shutdown(cancel_futures=True)


@pytest.mark.timeout(1800)
@pytest.mark.parametrize("name", RECIPES)
def test_runs_for_two_steps(name: str, runs: tuple[Path, dict[str, Future[list[str]]]]) -> None:
    folder, started = runs
    output = started[name].result()[0]
    assert "greedy, up to" in output, output
    lines = [json.loads(line) for line in (folder / name / "metrics.jsonl").read_text().splitlines()]
    steps = [line for line in lines if line["kind"] == "train"]
    assert [step["step"] for step in steps] == [1, 2]
    assert sum(step["policy/optimizer_steps"] for step in steps) >= 1, output
    assert all(step["policy/skipped_steps"] == 0 for step in steps)
    assert all(step["policy/episodes"] == step["generate/episodes"] == 4 * 5 for step in steps)
    if name in SHOWS:
        assert any(SHOWS[name] in step for step in steps)
    if name == "skyrl_sql_stepwise":
        trained = [step for step in steps if step["policy/trained_episodes"]]
        assert all(step["policy/trained_samples"] > step["policy/trained_episodes"] for step in trained)
    assert (folder / name / "export" / "model.safetensors").is_file()
    # The file itself, without what was given on the command line, is what a GPU host runs.
    assert config_file.load(ROOT / "configs" / f"{name}.yaml").generator.backend == "sglang"


# recipe: (epochs, lr, clip, questions a batch, turns, checkpoint, export, resume), as published; the others as skyrl_sql.
PUBLISHED = {
    "sql_fsdp": (50, 1e-6, 0.5, 256, 6, 5, 5, "none"),
    "skyrl_sql": (30, 1e-6, 0.5, 256, 6, 60, 30, "latest"),
    "skyrl_sql_conversation": (30, 1e-6, 0.5, 256, 6, 60, 30, "latest"),
    "skyrl_sql_tp_lora": (30, 3e-5, 1.0, 256, 6, 60, 0, "latest"),
    "sql_fsdp_2node": (1, 1e-6, 0.5, 64, 5, 10, 0, "none"),
    "skyrl_sql_fp8": (30, 1e-6, 0.5, 256, 6, 60, 30, "latest"),
    "skyrl_sql_stepwise": (30, 1e-6, 0.5, 256, 6, 60, 30, "latest"),
}
SPECIAL = {
    "sql_fsdp": {"trainer.algorithm.policy_loss_type": "dual_clip"},
    "skyrl_sql_conversation": {
        "generator.use_conversation_multi_turn": True,
        "generator.append_eos_token_after_stop_str_in_multi_turn": True,
    },
    "skyrl_sql_tp_lora": {
        "trainer.mesh.tensor": 4,
        "trainer.policy.model.lora.rank": 32,
        "trainer.policy.model.lora.alpha": 64,
        "trainer.policy.model.lora.init_method": "kaiming",
        "trainer.algorithm.off_policy_correction.tis_ratio_type": "token",
        "trainer.algorithm.off_policy_correction.token_tis_ratio_clip_high": 2.0,
    },
    "sql_fsdp_2node": {
        "trainer.mesh.sequence": 2,
        "trainer.algorithm.use_kl_loss": True,
        "trainer.algorithm.kl_loss_coef": 0.001,
        "trainer.algorithm.kl_estimator_type": "k3",
    },
    "skyrl_sql_fp8": {
        "generator.inference_engine.quantization": "fp8",
        "trainer.algorithm.off_policy_correction.tis_ratio_type": "sequence",
        "trainer.algorithm.off_policy_correction.sequence_tis_ratio_clip_high": 4.0,
    },
    "skyrl_sql_stepwise": {"generator.step_wise_trajectories": True, "generator.use_conversation_multi_turn": True},
}
COMMON = {
    "trainer.algorithm.advantage_estimator": "grpo",
    "trainer.policy.optimizer_config.adam_betas": (0.9, 0.999),
    "trainer.policy.optimizer_config.weight_decay": 0.01,
    "trainer.policy.optimizer_config.num_warmup_steps": 0,
    "trainer.max_prompt_length": 6000,
    "trainer.eval_before_train": True,
    "trainer.eval_interval": 5,
    "generator.n_samples_per_prompt": 5,
    "generator.max_input_length": 29000,
    "generator.sampling_params.temperature": 0.6,
    "generator.sampling_params.top_p": 0.95,
    "generator.sampling_params.max_generate_length": 3000,
    "generator.sampling_params.stop": ("</sql>", "</solution>"),
    "generator.inference_engine.tensor_parallel_size": 4,
}


@pytest.mark.parametrize("name", RECIPES)
def test_has_the_published_values(name: str) -> None:
    config = config_file.load(ROOT / "configs" / f"{name}.yaml")
    trainer = config.trainer
    values = (
        trainer.epochs,
        trainer.policy.optimizer_config.lr,
        trainer.policy.optimizer_config.max_grad_norm,
        trainer.train_batch_size,
        config.generator.max_turns,
        trainer.ckpt_interval,
        trainer.hf_save_interval,
        trainer.resume_mode,
    )
    assert values == PUBLISHED[name]
    assert trainer.policy_mini_batch_size == trainer.train_batch_size
    settings = {setting.key: setting.value for setting in config_file.settings(config)}
    wanted = COMMON | {"trainer.algorithm.policy_loss_type": "ppo", "trainer.algorithm.use_kl_loss": False}
    wanted |= SPECIAL.get(name, {})
    assert {key: settings[key] for key in wanted} == wanted
    assert check(config, Request()).fits  # on some known slice, by arithmetic
