"""The real SGLang behind the engine's interface, measured against transformers on the same weights.

One engine serves all tests, because a start takes half a minute and more; the last test ends it.
"""

from __future__ import annotations

import asyncio
import os
import signal
import time

import numpy as np
import pytest
from small_model import MARKS, Reference, engine_config, weights, write_model

from rollout.engine import sglang_weights
from rollout.engine.base import EngineError
from rollout.engine.sglang import SglangEngine
from rollout.types import SamplingParams
from tests import engine_contract as contract

pytestmark = MARKS
GREEDY = SamplingParams(temperature=0.0, max_tokens=24, stop=())


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Two checkpoints of one model: that of the start, and one to push."""
    made = [tmp_path_factory.mktemp("model") / name for name in ("first", "second")]
    for seed, folder in enumerate(made):
        write_model(folder, seed)
    return made


@pytest.fixture(scope="module")
def started(folders, first, second):  # SGLang changes how transformers loads models that come after it in this process
    failures: list[str] = []
    engine = SglangEngine(engine_config(folders[0]), failures.append)
    yield engine, failures
    engine.close()


@pytest.fixture
def engine(started, folders):
    """The engine with the first checkpoint's weights, as version 0."""
    engine, _ = started
    if engine.version:
        engine.apply_weights(weights(folders[0]), 0)
    return engine


@pytest.fixture(scope="module")
def first(folders):
    return Reference(folders[0])


@pytest.fixture(scope="module")
def second(folders):
    return Reference(folders[1])


def long_greedy(engine, reference) -> tuple[list[int], SamplingParams]:
    """A prompt whose greedy continuation is long: most random models repeat themselves, few end at once."""
    for number in range(20):
        ids = contract.prompt(engine, number)
        params = SamplingParams(temperature=0.0, max_tokens=250, stop=())
        if len(contract.generate(engine, ids, params).output_ids) == 250:
            return ids, params
    raise AssertionError("no prompt has a long continuation: change the models' seeds")


def test_the_manifest_is_what_the_checkpoint_holds(engine, folders):
    assert {s.name: (s.shape, s.dtype) for s in engine.manifest()} == {
        name: (value.shape, "float32") for name, value in weights(folders[0]).items()
    }


def test_turns_are_those_of_transformers(engine, first):
    async def episode(number):
        ids = contract.prompt(engine, number)
        async with engine.session(number) as session:
            for turn in range(3):
                params = SamplingParams(temperature=(0.0, 1.0, 0.6)[turn], top_p=0.9, max_tokens=24, stop=())
                generation = await session.generate(ids, params, seed=number)
                first.check(ids, generation, params.temperature)
                assert generation.spans == [(0, 0, len(generation.output_ids))]
                assert generation.finish_reason in ("stop", "length")
                ids = ids + generation.output_ids + [41, 42, 43]

    async def main():
        await asyncio.gather(*(episode(number) for number in range(6)))

    before = engine.stats()
    asyncio.run(main())
    after = engine.stats()
    assert (after["active"], after["sessions"]) == (0, 0)
    gained = {name: after[name] - before[name] for name in after}
    assert gained["generated_tokens"] >= 6 * 3
    assert gained["prefix_hit_tokens"] > gained["prefill_tokens"]  # each later turn has the earlier ones' before it


def test_new_weights_are_used_and_old_prefixes_forgotten(engine, folders, first, second, monkeypatch):
    monkeypatch.setattr(sglang_weights, "BUCKET_BYTES", 40_000)
    ids = contract.prompt(engine, 3)
    first.check(ids, contract.generate(engine, ids, GREEDY))
    new = weights(folders[1])
    assert 3 < len(sglang_weights.plan(new, 40_000)) < len(new)
    engine.apply_weights(new, 4)
    generation = contract.generate(engine, ids, GREEDY)
    second.check(ids, generation)
    assert generation.spans == [(4, 0, len(generation.output_ids))]


def test_running_turns_go_on_with_new_weights(engine, folders, first):
    ids, params = long_greedy(engine, first)
    contract.goes_on_with_new_weights(engine, weights(folders[1]), 9, ids, params)


def test_a_pause_changes_nothing(engine, first):
    ids, params = long_greedy(engine, first)
    whole = contract.generate(engine, ids, params)

    async def paused():
        async with engine.session(0) as session:
            started = engine.stats()["generated_tokens"]
            turn = asyncio.ensure_future(session.generate(ids, params, 0))
            while engine.stats()["generated_tokens"] < started + 8:
                await asyncio.sleep(0.001)
            await asyncio.to_thread(engine.pause)
            held = engine.stats()["generated_tokens"]
            assert held < started + 250
            await asyncio.sleep(0.3)
            assert engine.stats()["generated_tokens"] - held < 4  # at most what had been sent and not read
            await asyncio.to_thread(engine.resume)
            return await turn

    generation = asyncio.run(paused())
    assert (generation.output_ids, generation.spans) == (whole.output_ids, whole.spans)
    np.testing.assert_allclose(generation.logprobs, whole.logprobs, atol=1e-4)


def test_stop_strings(engine, first, monkeypatch):
    ids, _ = long_greedy(engine, first)

    def again(*stop):
        return contract.generate(engine, ids, SamplingParams(temperature=0.0, max_tokens=24, stop=stop))

    free = again()
    contract.stops_at_the_token_that_completes_a_stop_string(engine, free, lambda stop: again(*stop))
    text = engine.chat.decode(free.output_ids[4:7])
    known, ask = again(text), engine._request

    def without_stop(turn):  # SGLang does not see a string that is spelled in more tokens than usual
        request = ask(turn)
        request.sampling_params["stop"] = []
        return request

    monkeypatch.setattr(engine, "_request", without_stop)
    cut = again(text)
    assert (cut.output_ids, cut.finish_reason, cut.spans) == (known.output_ids, "stop", known.spans)
    assert len(cut.logprobs) == len(cut.output_ids) < 24


def test_the_end_of_sequence_stays(engine, first):
    end = engine.chat.tokenizer.eos_token_id

    params = SamplingParams(temperature=1.0, max_tokens=250, stop=())

    async def turn(number):
        async with engine.session(number) as session:
            return await session.generate(contract.prompt(engine, number), params, number)

    async def main():
        return await asyncio.gather(*(turn(number) for number in range(16)))

    ended = [g for g in asyncio.run(main()) if g.finish_reason == "stop"]
    assert ended
    for generation in ended:
        assert generation.output_ids.index(end) == len(generation.output_ids) - 1
        assert len(generation.logprobs) == len(generation.output_ids)


def test_given_tokens_are_scored_as_they_were_sampled(engine):
    contract.scores_given_tokens_as_it_sampled_them(engine)


def test_requests_that_cannot_be_served_are_refused(engine):
    contract.refuses_what_it_cannot_serve(engine)


def test_the_context_bounds_a_turn(engine):
    contract.bounds_a_turn_by_the_context(engine)


def test_cancelled_and_aborted_turns_free_their_places(engine):
    contract.frees_the_places_of_cancelled_and_aborted_turns(engine)


def test_a_session_closed_in_mid_turn_aborts_it(engine, first):
    ids, params = long_greedy(engine, first)

    async def main():
        session = engine.session(0)
        started = engine.stats()["generated_tokens"]
        turn = asyncio.ensure_future(session.generate(ids, params, 0))
        while engine.stats()["generated_tokens"] < started + 8:
            await asyncio.sleep(0.001)
        session.close()
        session.close()
        return await asyncio.wait_for(turn, 30)

    generation = asyncio.run(main())
    assert generation.finish_reason == "abort"
    assert len(generation.output_ids) == len(generation.logprobs) < 250
    first.check(ids, generation)  # what there was of it


def test_weights_that_do_not_fit_are_refused_before_any_is_loaded(engine, folders, first):
    new = weights(folders[1])
    contract.keeps_its_weights_when_others_do_not_fit(engine, new)
    with pytest.raises(EngineError, match=r"embed_tokens.*float64"):
        engine.apply_weights({**new, "model.embed_tokens.weight": new["model.embed_tokens.weight"].astype(float)}, 1)
    ids = contract.prompt(engine, 1)
    first.check(ids, contract.generate(engine, ids, GREEDY))


def test_after_a_failure_in_mid_update_nothing_is_served_until_all_weights_are_whole(
    engine, folders, first, second, monkeypatch
):
    ids, params = long_greedy(engine, first)
    manager, calls = engine._runtime.manager, []
    real = manager.update_weights_from_tensor

    async def fails_at_the_second(request):
        calls.append(request)
        return (False, "out of memory") if len(calls) == 2 else await real(request)

    monkeypatch.setattr(sglang_weights, "BUCKET_BYTES", 40_000)
    monkeypatch.setattr(manager, "update_weights_from_tensor", fails_at_the_second)

    async def running():
        async with engine.session(0) as session:
            turn = asyncio.ensure_future(session.generate(ids, params, 0))
            await asyncio.sleep(0.05)
            with pytest.raises(EngineError, match=r"version 5 could not be applied.*out of memory"):
                await asyncio.to_thread(engine.apply_weights, weights(folders[1]), 5)
            with pytest.raises(EngineError, match="could not be applied"):
                await asyncio.wait_for(turn, 30)

    asyncio.run(running())
    with pytest.raises(EngineError, match="push again"):
        contract.generate(engine, ids, GREEDY)
    monkeypatch.undo()
    engine.apply_weights(weights(folders[1]), 6)
    second.check(ids, contract.generate(engine, ids, GREEDY))


def test_the_death_of_sglang_ends_turns_and_is_told(engine, started, first):
    """The last test: the engine is gone after it."""
    ids, params = long_greedy(engine, first)

    async def main():
        async with engine.session(0) as session:
            turn = asyncio.ensure_future(session.generate(ids, params, 0))
            await asyncio.sleep(0.1)
            os.kill(engine.pids[0], signal.SIGKILL)
            with pytest.raises(EngineError, match="exit code -9"):
                await asyncio.wait_for(turn, 30)

    asyncio.run(main())
    with pytest.raises(EngineError, match="has stopped"):
        contract.generate(engine, ids, GREEDY)
    with pytest.raises(EngineError, match="has stopped"):
        engine.apply_weights({spec.name: np.zeros(spec.shape, "float32") for spec in engine.manifest()}, 7)
    deadline = time.monotonic() + 30
    while not started[1] and time.monotonic() < deadline:
        time.sleep(0.01)
    assert len(started[1]) == 1
    assert "exit code -9" in started[1][0]
    engine.close()
    for pid in engine.pids:
        assert not os.path.exists(f"/proc/{pid}")
