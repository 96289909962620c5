"""The embedded engine: turns, stop strings, determinism, scarce slots, changing weights, and giving up."""

import asyncio
import random

import numpy as np
import pytest
from tiny_model import engine_config, model_config, sharp_params, write_model

from rollout.engine.base import EngineError
from rollout.engine.embedded import EmbeddedEngine
from rollout.types import SamplingParams
from sqlrl_jax.model.config import ModelConfig
from sqlrl_jax.model.hf import to_hf_tensors
from tests import engine_contract as contract
from tests.engine_contract import PARAMS, prompt

OBSERVATION = [41, 42, 43, 44]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model") / "tiny"
    write_model(folder)
    return folder


@pytest.fixture(scope="module")
def engine(folder):
    with_engine = EmbeddedEngine(engine_config(folder))
    yield with_engine
    with_engine.close()


async def play(engine, count, turns=3, params=PARAMS, delays=None, group=4):
    """`count` episodes at once, each of some turns with a fixed observation; delays(i, turn) seconds in between."""
    sessions = [engine.session(i) for i in range(count)]

    async def episode(i, session):
        async with session:
            ids, out = prompt(engine, i // group), []
            for turn in range(turns - i % 2):
                out.append(await session.generate(ids, params, seed=i << 33 | 5))
                if delays:
                    await asyncio.sleep(delays(i, turn))
                ids = ids + out[-1].output_ids + OBSERVATION
            return out

    return await asyncio.gather(*(episode(i, s) for i, s in enumerate(sessions)))


def test_the_same_requests_give_the_same_bits_whatever_the_timing(engine):
    rng = random.Random(0)
    first = asyncio.run(play(engine, 12))
    second = asyncio.run(play(engine, 12, delays=lambda i, turn: rng.random() * 0.05))
    assert first == second  # ids, log-probabilities, reasons, spans
    assert len({tuple(g.output_ids) for turns in first for g in turns}) > 12
    assert engine.stats()["active"] == engine.stats()["sessions"] == 0


def test_more_episodes_than_slots(engine, folder):
    scarce = EmbeddedEngine(engine_config(folder, "generator.inference_engine.max_sequences=5"))
    few = asyncio.run(play(scarce, 12))
    again = asyncio.run(play(scarce, 12, delays=lambda i, turn: 0.01 * (i % 3)))
    scarce.close()
    assert few == again
    many = asyncio.run(play(engine, 12))
    assert [[g.output_ids for g in turns] for turns in few] == [[g.output_ids for g in turns] for turns in many]


def test_later_turns_reuse_the_cache_and_equal_a_fresh_session(engine):
    async def main():
        ids = prompt(engine, 1)
        async with engine.session(0) as session:
            first = await session.generate(ids, PARAMS, 3)
            longer = ids + first.output_ids + OBSERVATION
            before = engine.stats()
            second = await session.generate(longer, PARAMS, 3)
            after = engine.stats()
        async with engine.session(0) as session:
            fresh = await session.generate(longer, PARAMS, 3)
        computed = after["prefill_tokens"] - before["prefill_tokens"]
        assert computed <= len(OBSERVATION) + 1
        assert after["prefix_hit_tokens"] - before["prefix_hit_tokens"] >= len(longer) - len(OBSERVATION) - 2
        assert second.output_ids == fresh.output_ids
        np.testing.assert_allclose(second.logprobs, fresh.logprobs, atol=1e-4)

        async with engine.session(0) as session:  # an edited history is noticed, not trusted
            await session.generate(longer, PARAMS, 3)
            edited = [longer[0], longer[1] + 1, *longer[2:]]
            changed = await session.generate(edited, PARAMS, 3)
        async with engine.session(0) as session:
            assert (await session.generate(edited, PARAMS, 3)).output_ids == changed.output_ids

    asyncio.run(main())


def test_stop_strings_across_tokens(engine):
    def sample(stop, seed):
        return contract.generate(engine, contract.prompt(engine, 2), SamplingParams(max_tokens=18, stop=stop), seed)

    seeds = ((seed, sample((), seed)) for seed in range(50))
    seed, free = next((s, g) for s, g in seeds if g.finish_reason == "length")  # the others sampled an end of turn
    contract.stops_at_the_token_that_completes_a_stop_string(engine, free, lambda stop: sample(stop, seed))


def aligned(value) -> np.ndarray:
    """A copy at an address that JAX would use in place instead of copying."""
    value = np.asarray(value)
    room = np.zeros(value.size + 16, value.dtype)
    start = -room.ctypes.data % 64 // value.itemsize
    out = room[start : start + value.size].reshape(value.shape)
    out[...] = value
    return out


def test_new_weights_count_from_the_next_token_on(folder):
    own = EmbeddedEngine(engine_config(folder, "generator.sampling_params.max_generate_length=200"))
    config = ModelConfig.from_dir(folder)
    new = {k: aligned(v) for k, v in to_hf_tensors(sharp_params(config, 9), config, "float32").items()}
    params = SamplingParams(temperature=1.0, max_tokens=200, stop=())
    contract.goes_on_with_new_weights(own, new, 5, contract.prompt(own, 3), params, seed=1)
    own.close()


def test_weights_that_do_not_fit_are_refused_and_the_old_ones_stay(engine):
    config = model_config(engine.model_config.vocab_size)
    fitting = {k: np.array(v) for k, v in to_hf_tensors(sharp_params(config, 9), config, "float32").items()}
    contract.keeps_its_weights_when_others_do_not_fit(engine, fitting)


def test_given_tokens_are_scored_as_they_were_sampled(engine):
    contract.scores_given_tokens_as_it_sampled_them(engine)


def test_requests_that_cannot_be_served_are_refused(engine):
    contract.refuses_what_it_cannot_serve(engine)


def test_the_context_bounds_a_turn(engine):
    contract.bounds_a_turn_by_the_context(engine)


def test_cancelled_and_aborted_turns_free_their_places(engine):
    contract.frees_the_places_of_cancelled_and_aborted_turns(engine)
    assert len(asyncio.run(play(engine, 2, turns=2))) == 2


def test_a_straggler_does_not_hold_the_others_for_ever(folder):
    own = EmbeddedEngine(engine_config(folder), barrier_timeout=0.2)

    async def main():
        idle, busy = own.session(0), own.session(1)
        async with busy:
            for _ in range(2):
                await asyncio.wait_for(busy.generate(prompt(own, 0), PARAMS, 0), 60)
        late = await asyncio.wait_for(idle.generate(prompt(own, 0), PARAMS, 0), 60)
        idle.close()
        return late

    assert asyncio.run(main()).output_ids
    assert own.stats()["barrier_timeouts"] == 1  # waited for once, then no longer
    own.close()


def test_nobody_waits_where_results_need_not_repeat_and_earlier_batches_go_first(folder):
    """A stream of groups: one session's environment takes its time, and a later group finds the only place taken."""
    own = EmbeddedEngine(engine_config(folder, "trainer.max_staleness=1", "generator.inference_engine.max_sequences=2"))

    async def main():
        idle, ended = own.session(0), []
        async with idle:
            await asyncio.wait_for(idle.generate(prompt(own, 0), PARAMS, 0), 60)  # it keeps its place from now on

            async def turn(order, name):
                async with own.session(order) as session:
                    await session.generate(prompt(own, 0), PARAMS, 0)
                ended.append(name)

            async with asyncio.timeout(60), asyncio.TaskGroup() as group:  # far less than the barrier's patience
                for order, name in ((5, "first"), (6, "second"), (0, "third")):
                    group.create_task(turn(order, name))
                    await asyncio.sleep(0)
        return ended

    assert asyncio.run(main()) == ["first", "second", "third"]
    assert own.stats()["barrier_timeouts"] == 0
    own.close()


def test_a_failure_of_the_engines_thread_reaches_everybody(folder):
    own = EmbeddedEngine(engine_config(folder))

    def broken(*_):
        raise RuntimeError("out of memory")

    own._slots.run = broken  # type: ignore[method-assign]

    async def main():
        async with own.session(0) as session:
            await session.generate(prompt(own, 0), PARAMS, 0)

    with pytest.raises(EngineError, match="out of memory"):
        asyncio.run(main())
    with pytest.raises(EngineError, match="out of memory"):
        own.session(0)
    own.close()


def test_a_closed_engine_refuses(folder):
    own = EmbeddedEngine(engine_config(folder))
    own.close()
    own.close()
    with pytest.raises(EngineError, match="closed"):
        own.session(0)
