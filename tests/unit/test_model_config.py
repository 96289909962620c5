"""config.json in and out: nothing is overridden, nothing unsupported is taken silently."""

import dataclasses
import json
import re
from importlib.util import find_spec
from pathlib import Path

import pytest
from transformers import AutoConfig, LlamaConfig, Qwen2Config, Qwen3Config

from sqlrl_jax.model.config import CARRIED, NEUTRAL, READ, WINDOWS, Llama3Scaling, ModelConfig, ModelConfigError

SIZES = {
    "vocab_size": 96,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "rms_norm_eps": 1e-5,
    "max_position_embeddings": 128,
}
LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}


def raw(model_type: str = "qwen2", **change: object) -> dict:
    return {"model_type": model_type, **SIZES, **({"head_dim": 8} if model_type == "qwen3" else {}), **change}


def test_reads_what_the_checkpoint_says() -> None:
    config = ModelConfig.from_hf(
        raw(rope_theta=1e6, tie_word_embeddings=True, eos_token_id=[7, 8], bos_token_id=3, initializer_range=0.5)
    )
    assert (config.rope_theta, config.rms_norm_eps, config.tie_word_embeddings) == (1e6, 1e-5, True)
    assert (config.attention_bias, config.qk_norm, config.head_dim, config.query_groups) == (True, False, 8, 2)
    assert (config.eos_token_ids, config.bos_token_id, config.pad_token_id) == ((7, 8), 3, None)
    assert config.extra == {"initializer_range": 0.5}
    hash(config)


@pytest.mark.parametrize("source", [Qwen2Config, Qwen3Config, LlamaConfig])
def test_our_config_json_means_the_same_to_transformers(source: type, tmp_path) -> None:
    theirs = source(
        **SIZES, head_dim=8, rope_parameters={"rope_type": "default", "rope_theta": 5e5}, eos_token_id=5, pad_token_id=6
    )
    config = ModelConfig.from_hf(json.loads(theirs.to_json_string()))
    (tmp_path / "config.json").write_text(json.dumps(config.to_hf("bfloat16")))
    back = AutoConfig.from_pretrained(tmp_path)
    assert type(back) is source
    ignored = {"architectures", "dtype", "_name_or_path", "transformers_version"}
    differing = {k for k, v in theirs.to_dict().items() if back.to_dict().get(k) != v} - ignored
    assert not differing
    assert ModelConfig.from_dir(tmp_path) == config


def test_llama3_scaling_in_both_spellings(tmp_path) -> None:
    old = ModelConfig.from_hf(raw("llama", rope_theta=5e5, rope_scaling=LLAMA3))
    new = ModelConfig.from_hf(raw("llama", rope_parameters={**LLAMA3, "rope_theta": 5e5}))
    assert old == new
    assert old.rope_scaling == Llama3Scaling(8.0, 1.0, 4.0, 16)
    (tmp_path / "config.json").write_text(json.dumps(old.to_hf()))
    assert AutoConfig.from_pretrained(tmp_path).rope_parameters == {**LLAMA3, "rope_theta": 5e5}
    assert ModelConfig.from_dir(tmp_path) == old


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"model_type": "mixtral"}, "mixtral"),
        ({"architectures": ["Qwen2ForSequenceClassification"]}, "Qwen2ForSequenceClassification"),
        ({"hidden_act": "gelu"}, "gelu"),
        ({"use_sliding_window": True, "sliding_window": 64, "max_window_layers": 1}, "use_sliding_window"),
        ({"use_sliding_window": True, "num_hidden_layers": 30}, "sliding_window 4096"),
        ({"model_type": "llama", "sliding_window": 64}, "sliding_window 64"),
        ({"layer_types": ["full_attention", "sliding_attention"]}, "layer_types"),
        ({"layer_types": ["full_attention"]}, "layer_types holds 1 layers"),
        ({"rope_theta": 1e4, "rope_scaling": {"type": "yarn", "factor": 4.0}}, "yarn"),
        ({"rope_parameters": {"rope_type": "llama3", "factor": 4.0}}, "low_freq_factor"),
        ({"rope_scaling": {**LLAMA3, "original_max_position_embeddings": None}}, "original_max_position_embeddings"),
        ({"rope_parameters": {"full_attention": {"rope_theta": 3.0}}}, r"rope_parameters\.full_attention"),
        ({"rope_scaling": {"type": "default", "mrope_section": [2]}}, r"rope_scaling\.mrope_section"),
        ({"per_layer_config": {"0": {"head_dim": 4}}}, "per_layer_config"),
        ({"model_type": "llama", "num_attention_heads": 6, "head_dim": 8}, "hidden_size 32"),
        ({"num_experts": 8}, "num_experts"),
        ({"quantization_config": {"bits": 4}}, "quantization_config"),
        ({"attention_dropout": 0.1}, "attention_dropout"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor"),
        ({"hidden_size": None}, "hidden_size"),
        ({"vocab_size": "many"}, "vocab_size"),
        ({"num_key_value_heads": 3}, "num_key_value_heads"),
        ({"head_dim": 7}, "head_dim"),
    ],
)
def test_refuses_by_name(change: dict, named: str) -> None:
    with pytest.raises(ModelConfigError, match=named):
        ModelConfig.from_hf(raw(**change))


def test_refuses_a_bias_on_the_output_projection() -> None:
    with pytest.raises(ModelConfigError, match="attention_bias"):
        ModelConfig.from_hf(raw("llama", attention_bias=True))


def test_sliding_window_that_no_layer_uses_is_fine() -> None:
    ModelConfig.from_hf(raw(use_sliding_window=True, sliding_window=64, max_window_layers=2))
    ModelConfig.from_hf(raw(use_sliding_window=False, sliding_window=64, max_window_layers=0))


def test_defaults_are_those_of_transformers() -> None:
    config = raw("llama")
    del config["num_key_value_heads"]
    assert ModelConfig.from_hf(config).num_key_value_heads == 4
    assert ModelConfig.from_hf(config).rope_theta == 10_000.0
    with pytest.raises(ModelConfigError, match="head_dim"):
        ModelConfig.from_hf({**raw("qwen3"), "head_dim": None})


SOURCES = {"qwen2": Qwen2Config, "qwen3": Qwen3Config, "llama": LlamaConfig}


@pytest.mark.parametrize("model_type", SOURCES)
def test_every_field_of_transformers_is_accounted_for(model_type: str) -> None:
    """A release that gives a family another field fails here, until it is read, refused or known to change nothing."""
    source = SOURCES[model_type]
    fields = {f.name for f in dataclasses.fields(source)} | set(source().to_dict())
    assert fields <= READ | WINDOWS | set(NEUTRAL) | CARRIED
    file = Path(find_spec("transformers").origin).parent / "models" / model_type / f"modeling_{model_type}.py"
    used = set(re.findall(r"config\.(\w+)", file.read_text())) | set(
        re.findall(r'getattr\((?:self\.)?config, "(\w+)"', file.read_text())
    )
    methods = {"standardize_rope_params", "per_layer_config", "default_theta", "_attn_implementation"}
    assert used - methods <= READ | WINDOWS | set(NEUTRAL)
    assert {"vocab_size", "rope_parameters", "attention_dropout"} <= used  # the expression finds what it should


@pytest.mark.parametrize("model_type", SOURCES)
def test_what_is_absent_means_what_it_means_to_transformers(model_type: str) -> None:
    given = raw(model_type)
    theirs = SOURCES[model_type](**{k: v for k, v in given.items() if k != "model_type"})
    ours = ModelConfig.from_hf(given)
    back = SOURCES[model_type](**{k: v for k, v in ours.to_hf().items() if k != "model_type"})
    ignored = {"architectures", "dtype", "head_dim", "attention_bias"}
    assert {k for k, v in theirs.to_dict().items() if back.to_dict()[k] != v} <= ignored
    assert ours.rope_theta == theirs.rope_parameters["rope_theta"]


def test_names_the_file(tmp_path) -> None:
    with pytest.raises(ModelConfigError, match="does not exist"):
        ModelConfig.from_dir(tmp_path)
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(ModelConfigError, match=r"config\.json is not JSON"):
        ModelConfig.from_dir(tmp_path)
