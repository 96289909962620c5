"""What only GPUs show of the SGLang engine: `python -m pytest -m gpu tests/sglang` on a host with two of them.

Written against what the CPU tests establish, and not yet run on hardware.
"""

from __future__ import annotations

import numpy as np
import pytest
from small_model import MARKS, Reference, engine_config, installed, random_adapters, weights, write_model

from rollout.engine.hf_tensors import adapter_manifest
from rollout.engine.sglang import SglangEngine
from rollout.types import SamplingParams
from sqlrl_jax.config_lora import LoraConfig
from tests import engine_contract as contract


def gpus() -> int:
    if not installed("sglang"):
        return 0
    import torch

    return torch.cuda.device_count()


pytestmark = [*MARKS, pytest.mark.gpu, pytest.mark.skipif(gpus() < 2, reason="needs two GPUs")]
GREEDY = SamplingParams(temperature=0.0, max_tokens=24, stop=())
SAMPLED = SamplingParams(temperature=1.0, max_tokens=24, stop=())
LOOSE = {"bfloat16": 0.05, "fp8": 0.3}
"""How far log-probabilities may be from float32's: these models have large weights."""


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    made = [tmp_path_factory.mktemp("gpu") / name for name in ("first", "second")]
    for seed, folder in enumerate(made):
        write_model(folder, seed)
    return made


def close(engine, reference, tolerance: float) -> None:
    ids = contract.prompt(engine, 1)
    generation = contract.generate(engine, ids, GREEDY)
    rows = reference.logprobs(ids + generation.output_ids)[len(ids) - 1 : -1]
    theirs = rows[np.arange(len(generation.output_ids)), generation.output_ids]
    assert abs(np.mean(np.array(generation.logprobs) - theirs)) < tolerance


@pytest.mark.parametrize("ranks", [1, 2])
@pytest.mark.parametrize("kind", ["bfloat16", "fp8"])
def test_pushed_weights_are_computed_with(folders, kind, ranks):
    references = [Reference(folder) for folder in folders]
    settings = ["dtype=bfloat16", f"tensor_parallel_size={ranks}", *(["quantization=fp8"] if kind == "fp8" else [])]
    engine = SglangEngine(engine_config(folders[0], *(f"generator.inference_engine.{s}" for s in settings)))
    try:
        close(engine, references[0], LOOSE[kind])
        import ml_dtypes

        new = {name: value.astype(ml_dtypes.bfloat16) for name, value in weights(folders[1]).items()}
        assert engine.apply_weights(new, 1) > 0
        close(engine, references[1], LOOSE[kind])
    finally:
        engine.close()


def test_adapters_over_two_gpus(folders):
    lora = LoraConfig(rank=4, alpha=8)
    settings = ("trainer.policy.model.lora.rank=4", "generator.inference_engine.tensor_parallel_size=2")
    engine = SglangEngine(engine_config(folders[0], *settings))
    try:
        before = contract.generate(engine, contract.prompt(engine, 1), GREEDY).output_ids
        engine.apply_weights(random_adapters(adapter_manifest(folders[0], lora, "float32"), 1), 1)
        after = contract.generate(engine, contract.prompt(engine, 1), GREEDY)
        assert after.output_ids != before
        assert [span[0] for span in after.spans] == [1]
    finally:
        engine.close()


def test_noise_follows_from_the_seed_when_sglang_is_deterministic(folders):
    extra = 'generator.inference_engine.engine_init_kwargs={"enable_deterministic_inference": true}'
    engine = SglangEngine(engine_config(folders[0], extra))
    try:
        ids = contract.prompt(engine, 1)
        first, same, other = (contract.generate(engine, ids, SAMPLED, seed).output_ids for seed in (3, 3, 4))
        assert first == same != other
    finally:
        engine.close()
