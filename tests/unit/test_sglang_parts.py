"""What the SGLang engine needs no SGLang for: its manifests, its arguments, the cutting of buckets, what is missing."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from tiny_model import engine_config, model_config, sharp_params

from rollout.engine.base import EngineError
from rollout.engine.hf_tensors import adapter_manifest, full_manifest
from rollout.engine.sglang import SglangEngine
from rollout.engine.sglang_arguments import engine_arguments
from rollout.engine.sglang_weights import plan
from sqlrl_jax.config import Config, LoraConfig
from sqlrl_jax.config_file import load
from sqlrl_jax.local_services import visible_gpus
from sqlrl_jax.model.hf import hf_manifest, save_hf
from sqlrl_jax.model.peft import peft_manifest

ROOT = Path(__file__).resolve().parents[2]
FAMILIES = {
    "qwen2": {},
    "qwen2-tied": {"tie_word_embeddings": True},
    "qwen3": {"model_type": "qwen3", "attention_bias": False, "qk_norm": True},
    "llama": {"model_type": "llama", "attention_bias": False},
}


@pytest.mark.parametrize("changes", FAMILIES.values(), ids=FAMILIES)
def test_the_manifest_read_from_a_folder_is_the_learners(tmp_path, changes):
    config = model_config(320, **changes)
    save_hf(tmp_path / "model", sharp_params(config, 0), config, shard_bytes=40_000)
    assert len(list((tmp_path / "model").glob("*.safetensors"))) > 1
    by_name = {spec.name: spec for spec in full_manifest(tmp_path / "model", "bfloat16")}
    assert by_name == {spec.name: spec for spec in hf_manifest(config, "bfloat16")}


@pytest.mark.parametrize("modules", [("all-linear",), ("q_proj", "down_proj")], ids=["all", "two"])
@pytest.mark.parametrize("changes", FAMILIES.values(), ids=FAMILIES)
def test_the_adapters_manifest_read_from_a_folder_is_the_learners(tmp_path, changes, modules):
    config, lora = model_config(320, **changes), LoraConfig(rank=3, target_modules=modules)
    save_hf(tmp_path / "model", sharp_params(config, 0), config)
    ours = {spec.name: spec for spec in adapter_manifest(tmp_path / "model", lora, "bfloat16")}
    assert ours == {spec.name: spec for spec in peft_manifest(config, lora, "bfloat16")}


def test_a_damaged_file_is_named(tmp_path):
    config = model_config(320)
    save_hf(tmp_path / "model", sharp_params(config, 0), config)
    (tmp_path / "model" / "model.safetensors").write_bytes(b"nothing of the kind")
    with pytest.raises(EngineError, match=r"model\.safetensors is damaged"):
        full_manifest(tmp_path / "model", "bfloat16")


def config_with(**engine: object) -> Config:
    return Config.model_validate({"generator": {"backend": "sglang", "inference_engine": engine}})


def test_settings_become_arguments_of_sglang():
    given = engine_arguments(
        config_with(
            tensor_parallel_size=4,
            dtype="bfloat16",
            gpu_memory_utilization=0.7,
            quantization="fp8",
            max_sequences=99,
            engine_init_kwargs={"attention_backend": "fa3", "log_level": "info"},
        ),
        1000,
    )
    assert given["context_length"] > 1000
    expected = {"tp_size": 4, "dtype": "bfloat16", "mem_fraction_static": 0.7, "quantization": "fp8"}
    expected |= {"max_running_requests": 99, "attention_backend": "fa3", "log_level": "info"}
    assert given.items() >= expected.items()
    plain = engine_arguments(config_with(), 1000)
    assert not {"quantization", "mem_fraction_static"} & plain.keys()  # SGLang chooses


def test_the_fp8_recipe_gives_two_engines_eight_bits_and_four_gpus_each():
    config = load(str(ROOT / "configs" / "skyrl_sql_fp8.yaml"))
    expected = {"quantization": "fp8", "tp_size": 4, "dtype": "bfloat16"}
    assert engine_arguments(config, 32000).items() >= expected.items()
    seen = [visible_gpus(config, engine, {})["CUDA_VISIBLE_DEVICES"] for engine in range(2)]
    assert seen == ["0,1,2,3", "4,5,6,7"]


def test_adapters_become_arguments_of_sglang():
    model = {"lora": {"rank": 8, "target_modules": ["q_proj", "o_proj"]}}
    config = Config.model_validate({"trainer": {"policy": {"model": model}}, "generator": {"backend": "sglang"}})
    expected = {
        "enable_lora": True,
        "max_lora_rank": 8,
        "lora_target_modules": ["q_proj", "k_proj", "v_proj", "o_proj"],
    }
    given = engine_arguments(config, 1000)
    assert given.items() >= expected.items()
    assert given["max_loras_per_batch"] > 1  # turns of an older version go on
    assert not [name for name in engine_arguments(config_with(), 1000) if "lora" in name]


def test_arguments_that_follow_from_settings_are_refused():
    with pytest.raises(EngineError, match="engine_init_kwargs: tp_size is not free"):
        engine_arguments(config_with(engine_init_kwargs={"tp_size": 2}), 1000)


def test_buckets_hold_every_tensor_once_in_order():
    tensors = {f"t{i}": np.zeros(size, "uint8") for i, size in enumerate([10, 100, 500, 64, 1, 0, 300])}
    buckets = plan(tensors, 200)
    assert [bucket.names for bucket in buckets] == [("t0", "t1"), ("t2",), ("t3", "t4", "t5"), ("t6",)]
    assert [bucket.size for bucket in buckets] == [64 + 128, 512, 64 + 64, 320]


def test_without_sglang_the_message_says_what_to_install(tmp_path, monkeypatch):
    import importlib.metadata

    from tiny_model import write_model

    def missing(name: str) -> str:
        raise importlib.metadata.PackageNotFoundError(name)

    write_model(tmp_path / "model")
    monkeypatch.setattr(importlib.metadata, "version", missing)
    with pytest.raises(EngineError, match=r"SGLang is not installed here.*pip install -e '\.\[rollout\]'"):
        SglangEngine(engine_config(tmp_path / "model", "generator.backend=sglang"))
