"""Adapters pushed to the real SGLang, measured against transformers on merged weights. One engine serves all tests."""

from __future__ import annotations

import asyncio
import json

import numpy as np
import pytest
from small_model import MARKS, Reference, engine_config, random_adapters, write_merged, write_model

from rollout.engine.base import EngineError
from rollout.engine.hf_tensors import adapter_manifest
from rollout.engine.sglang import SglangEngine
from rollout.engine.sglang_lora import Adapters
from rollout.types import SamplingParams
from sqlrl_jax.config_lora import LoraConfig
from sqlrl_jax.model.hf_files import CheckpointError
from sqlrl_jax.model.peft_config import CONFIG, WEIGHTS, adapter_config
from tests import engine_contract as contract

pytestmark = MARKS
GREEDY = SamplingParams(temperature=0.0, max_tokens=24, stop=())
LORA = LoraConfig(rank=4, alpha=6, target_modules=("q_proj", "o_proj", "up_proj", "down_proj"))


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    folder = tmp_path_factory.mktemp("lora") / "base"
    write_model(folder, 0)
    return folder


@pytest.fixture(scope="module")
def pushed(base):
    """Two sets of adapters, each with the model that transformers makes of them."""
    out = []
    for seed in (1, 2):
        adapters = random_adapters(adapter_manifest(base, LORA, "float32"), seed)
        folder = base.with_name(f"merged{seed}")
        write_merged(base, folder, adapters, LORA.alpha / LORA.rank)
        out.append((adapters, Reference(folder)))
    return out


@pytest.fixture(scope="module")
def plain(base):
    return Reference(base)


@pytest.fixture(scope="module")
def engine(base, plain, pushed):  # the references first: SGLang changes how transformers loads models after it
    modules = json.dumps(LORA.target_modules)
    settings = [f"rank={LORA.rank}", f"alpha={LORA.alpha}", f"target_modules={modules}"]
    engine = SglangEngine(engine_config(base, *(f"trainer.policy.model.lora.{setting}" for setting in settings)))
    yield engine
    engine.close()


def check(engine, reference, version):
    for number in range(3):
        ids = contract.prompt(engine, number)
        generation = contract.generate(engine, ids, GREEDY)
        reference.check(ids, generation)
        assert generation.spans == [(version, 0, len(generation.output_ids))]


def adapters_left(engine) -> float:
    """After what SGLang was told has been done."""
    engine._runtime.call(engine._runtime.manager.get_internal_state(), "wait", 30)
    assert len(engine._runtime.manager.lora_registry.get_all_adapters()) == engine.stats()["adapters"]
    return engine.stats()["adapters"]


def test_each_version_is_transformers_with_its_adapters(engine, plain, pushed):
    check(engine, plain, 0)
    for version, (adapters, reference) in enumerate(pushed, 3):
        assert engine.apply_weights(adapters, version) == 0.0  # nothing stands still
        assert engine.version == version
        check(engine, reference, version)
        assert adapters_left(engine) == 1
    contract.scores_given_tokens_as_it_sampled_them(engine)


def test_a_version_pushed_again_by_a_learner_that_started_again_is_taken(engine, pushed):
    for adapters, reference in pushed:
        engine.apply_weights(adapters, 4)
        check(engine, reference, 4)


def test_turns_end_on_the_adapters_they_began_with(engine, pushed):
    (old, first), (new, second) = pushed
    engine.apply_weights(old, 5)
    long = SamplingParams(temperature=0.0, max_tokens=250, stop=())
    ids = next(
        ids
        for ids in (contract.prompt(engine, number) for number in range(20))
        if len(contract.generate(engine, ids, long).output_ids) == 250
    )

    async def main():
        async with engine.session(0) as session:
            started = engine.stats()["generated_tokens"]
            turn = asyncio.ensure_future(session.generate(ids, long, 0))
            while engine.stats()["generated_tokens"] < started + 8:
                await asyncio.sleep(0.001)
            await asyncio.to_thread(engine.apply_weights, new, 6)
            assert not turn.done()
            assert engine.stats()["adapters"] == 2
            before = await turn
            after = await session.generate([*ids, *before.output_ids, 41], GREEDY, 0)
            return before, after

    before, after = asyncio.run(main())
    first.check(ids, before)
    assert before.spans == [(5, 0, 250)]
    second.check([*ids, *before.output_ids, 41], after)
    assert after.spans == [(6, 0, len(after.output_ids))]
    assert adapters_left(engine) == 1


def test_cancelled_turns_hold_no_adapters(engine, pushed):
    long = SamplingParams(temperature=1.0, max_tokens=250, stop=())

    async def cancelled():
        async with engine.session(0) as session:
            started = engine.stats()["generated_tokens"]
            turn = asyncio.ensure_future(session.generate(contract.prompt(engine, 0), long, 0))
            while engine.stats()["generated_tokens"] < started + 4:
                await asyncio.sleep(0.001)
            turn.cancel()
            await asyncio.gather(turn, return_exceptions=True)

    for version, (adapters, reference) in enumerate(pushed, 7):
        asyncio.run(cancelled())
        engine.apply_weights(adapters, version)
        check(engine, reference, version)
    assert adapters_left(engine) == 1


def test_adapters_that_do_not_fit_are_refused_by_name(engine, pushed):
    contract.keeps_its_weights_when_others_do_not_fit(engine, pushed[0][0], "0.mlp.up_proj.lora_A.weight")


def test_an_adapter_folder_is_version_0(engine, base, pushed, tmp_path):
    """As an engine starts with lora.path."""
    from safetensors.numpy import save_file

    adapters, reference = pushed[1]
    (tmp_path / CONFIG).write_text(json.dumps(adapter_config(LORA, base)))
    save_file(adapters, tmp_path / WEIGHTS, metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match=r"holds adapters of rank 4.*asks for adapters of rank 8"):
        Adapters(engine._runtime, LORA.model_copy(update={"rank": 8, "path": str(tmp_path)}), str(base), "float32", 1)
    engine._adapters = Adapters(
        engine._runtime, LORA.model_copy(update={"path": str(tmp_path)}), str(base), "float32", 1
    )
    ids = contract.prompt(engine, 1)
    generation = contract.generate(engine, ids, GREEDY)
    reference.check(ids, generation)
    assert [span[0] for span in generation.spans] == [0]


def test_a_load_that_fails_leaves_the_old_adapters_in_use(engine, pushed, monkeypatch):
    manager = engine._runtime.manager
    engine.apply_weights(pushed[0][0], 9)

    async def fails(request):
        return type("Answer", (), {"success": False, "error_message": "out of memory"})

    monkeypatch.setattr(manager, "load_lora_adapter_from_tensors", fails)
    with pytest.raises(EngineError, match="version 10: out of memory"):
        engine.apply_weights(pushed[1][0], 10)
    monkeypatch.undo()
    assert engine.version == 9
    check(engine, pushed[0][1], 9)
    assert np.isfinite(engine.score([contract.prompt(engine, 0)])[0]).all()
