"""What transformers makes of our exports: every tensor under its name, in its dtype, with its bits, and nothing else."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest

torch = pytest.importorskip("torch")

from transformers import AutoModelForCausalLM  # noqa: E402 (needs torch)

from sqlrl_jax.export import import_model  # noqa: E402
from sqlrl_jax.model.config import Llama3Scaling, ModelConfig  # noqa: E402
from sqlrl_jax.model.hf import load_hf, save_hf, to_hf_tensors  # noqa: E402
from sqlrl_jax.model.params import flatten, nest, param_specs  # noqa: E402

SCALING = Llama3Scaling(8.0, 1.0, 4.0, 32)
MODELS = {
    "qwen2": ModelConfig("qwen2", 101, 64, 96, 3, 4, 2, 16, attention_bias=True, rope_theta=1e6),
    "qwen3": ModelConfig("qwen3", 101, 64, 96, 3, 4, 1, 32, qk_norm=True, rope_theta=1e6),
    "llama": ModelConfig("llama", 101, 64, 96, 3, 4, 4, 16, rope_theta=5e5, rope_scaling=SCALING, rms_norm_eps=1e-5),
}


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
@pytest.mark.parametrize("family", MODELS)
def test_an_export_loads_in_transformers_bit_for_bit(family: str, tied: bool, dtype: str, tmp_path: Path) -> None:
    config = dataclasses.replace(MODELS[family], tie_word_embeddings=tied, dtype=dtype)
    rng = np.random.default_rng(0)
    params = nest({p: jnp.asarray(rng.normal(size=s.shape), jnp.float32) for p, s in param_specs(config).items()})
    save_hf(tmp_path / "out", params, config, shard_bytes=60_000)
    assert len(list((tmp_path / "out").glob("*.safetensors"))) > 2
    model, told = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype="auto", output_loading_info=True)
    assert {name: list(found) for name, found in told.items() if found} == {}
    assert model.dtype == getattr(torch, dtype)
    assert (model.lm_head.weight is model.model.embed_tokens.weight) == tied
    theirs = dict(model.named_parameters())
    ours = to_hf_tensors(params, config, dtype)
    assert theirs.keys() == ours.keys()
    for name, value in ours.items():
        want = torch.from_numpy(np.array(value.astype(jnp.float32)))
        assert torch.equal(theirs[name].detach().float(), want), name

    model.save_pretrained(tmp_path / "theirs", max_shard_size="60KB")  # and the way back
    (tmp_path / "theirs" / "tokenizer.json").write_text("{}")
    report = import_model(tmp_path / "theirs", tmp_path / "again")
    assert report.dtype == dtype
    back, start = flatten(load_hf(tmp_path / "again", dtype=dtype)), flatten(load_hf(tmp_path / "out", dtype=dtype))
    assert all(np.array_equal(back[name], start[name]) for name in start)
    assert ModelConfig.from_dir(tmp_path / "again") == dataclasses.replace(
        config, extra=report_extra(tmp_path / "again")
    )


def report_extra(folder: Path) -> dict:
    """What transformers adds to config.json and we carry: settings that change nothing."""
    from sqlrl_jax.model.config import CARRIED, NEUTRAL, WINDOWS

    extra = dict(ModelConfig.from_dir(folder).extra)
    assert extra.keys() <= CARRIED | WINDOWS | set(NEUTRAL)
    return extra
