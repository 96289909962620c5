"""`launch.py check --topology`: a small model compiled for a TPU slice by the real command, on a machine without one."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
SIZES = {
    "architectures": ["Qwen2ForCausalLM"],
    "model_type": "qwen2",
    "vocab_size": 1024,
    "hidden_size": 256,
    "intermediate_size": 1024,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "rms_norm_eps": 1e-6,
    "rope_theta": 10000.0,
    "max_position_embeddings": 512,
    "tie_word_embeddings": False,
}
SETTINGS = [
    "trainer.policy.row_tokens=256",
    "trainer.policy.rows_per_micro_batch=4",
    "trainer.policy.logprob_chunk=128",
    "generator.max_input_length=200",
    "generator.sampling_params.max_generate_length=56",
]


def check(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    (folder / "config.json").write_text(json.dumps(SIZES))
    config = ["--config", "configs/sql_fsdp.yaml", "--model-config", str(folder)]
    environment = {k: v for k, v in os.environ.items() if k != "JAX_PLATFORMS"}  # the command sees to that itself
    return subprocess.run(
        [sys.executable, "launch.py", "check", *config, *arguments, *SETTINGS],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        timeout=550,
        check=False,
    )


def test_a_small_step_compiles_for_a_slice(tmp_path):
    pytest.importorskip("libtpu", reason="needs the TPU compiler: pip install '.[tpu]'")
    done = check(tmp_path, "--topology", "v5e:2x2", "--json")
    assert done.returncode == 0, done.stderr[-2000:]
    found = json.loads(done.stdout)
    compiled = found["compiled"]
    assert found["fits"]
    assert found["mesh"] == {"data": 1, "fsdp": 4, "sequence": 1, "tensor": 1}
    assert [p["name"] for p in compiled["programs"]] == ["gradients", "apply"]
    # Splash attention: forward, forward again, and its backward kernels, in each of the layers.
    assert compiled["attention_kernels"] >= 3 * 3
    # Weights are gathered twice and gradients scattered, each in the compute dtype; nothing else of size is sent.
    assert set(compiled["sent_bytes_per_micro_batch"]["measured"]) == {"fsdp"}
    assert 0.9 < compiled["sent_bytes_per_micro_batch"]["ratio"] < 1.2
    matrices = found["micro_batch"]["flops"]["matrices"] / found["devices"]
    assert 0.9 < compiled["flops_per_device_per_micro_batch"] / matrices < 1.2
    assert compiled["needs_bytes_per_device"] > found["parameters"] * 16 / 4


def test_rows_that_share_beginnings_compile_for_a_slice(tmp_path):
    """With this project's own attention kernel in place of splash attention, over rows that two devices share."""
    pytest.importorskip("libtpu", reason="needs the TPU compiler: pip install '.[tpu]'")
    how = "trainer.policy.share_prefixes=true", "trainer.mesh.fsdp=2", "trainer.mesh.sequence=2"
    done = check(tmp_path, "--topology", "v5e:2x2", "--json", *how)
    assert done.returncode == 0, done.stderr[-2000:]
    assert (
        json.loads(done.stdout)["compiled"]["attention_kernels"] >= 4 * 3
    )  # forward twice, two backward, of each layer


def test_a_critic_beside_adapters_is_compiled_and_needs_the_most(tmp_path):
    """Its step trains all weights, the policy's only adapters. It holds its weights, moments and gradients, four bytes each,
    over the four devices, while the adapters' base rests."""
    pytest.importorskip("libtpu", reason="needs the TPU compiler: pip install '.[tpu]'")
    gae = ("trainer.algorithm.advantage_estimator=gae", "trainer.policy.model.lora.rank=4")
    done = check(tmp_path, "--topology", "v5e:2x2", "--json", *gae)
    assert done.returncode == 0, done.stderr[-2000:]
    found = json.loads(done.stdout)
    needs = {p["name"]: p["needs"] for p in found["compiled"]["programs"]}
    assert list(needs) == ["gradients", "apply", "critic gradients", "critic apply"]
    assert found["compiled"]["needs_bytes_per_device"] == max(needs.values()) == needs["critic gradients"]
    head = SIZES["vocab_size"] * SIZES["hidden_size"]
    assert needs["critic gradients"] > (found["parameters"] - head) * 4 * 4 / 4 + found["parameters"] * 2 / 4
