"""The embedded engine: turns, stop strings, determinism, scarce slots, changing weights, and giving up."""

import asyncio
import random
import threading

import numpy as np
import pytest
from tiny_model import engine_config, model_config, sharp_params, write_model

from rollout.engine.base import EngineError
from rollout.engine.embedded import EmbeddedEngine
from rollout.types import SamplingParams
from sqlrl_jax.model.config import ModelConfig
from sqlrl_jax.model.hf import to_hf_tensors

PARAMS = SamplingParams(temperature=1.0, max_tokens=18, stop=("</sql>", "</solution>"))
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


def prompt(engine, number: int) -> list[int]:
    return engine.chat.prompt_ids([{"role": "user", "content": f"city {number}"}])


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
    endless = SamplingParams(temperature=1.0, max_tokens=18, stop=())

    async def generate(params, seed):
        async with engine.session(0) as session:
            return await session.generate(prompt(engine, 2), params, seed)

    seeds = ((seed, asyncio.run(generate(endless, seed))) for seed in range(50))
    seed, free = next((s, g) for s, g in seeds if g.finish_reason == "length")  # the others sampled an end of turn
    assert len(free.output_ids) == len(free.logprobs) == 18
    for start, length in ((1, 2), (3, 2), (6, 4), (9, 1)):  # inside a chunk of 4, across two, one token
        text = engine.chat.decode(free.output_ids[start : start + length])
        stopped = asyncio.run(generate(SamplingParams(temperature=1.0, max_tokens=18, stop=("never", text)), seed))
        ends = [n for n in range(1, 19) if text in engine.chat.decode(free.output_ids[:n])]
        assert stopped.finish_reason == "stop"
        assert stopped.output_ids == free.output_ids[: ends[0]]
        assert stopped.logprobs == free.logprobs[: ends[0]]
        assert stopped.spans == [(0, 0, ends[0])]


def aligned(value) -> np.ndarray:
    """A copy at an address that JAX would use in place instead of copying."""
    value = np.asarray(value)
    room = np.zeros(value.size + 16, value.dtype)
    start = -room.ctypes.data % 64 // value.itemsize
    out = room[start : start + value.size].reshape(value.shape)
    out[...] = value
    return out


def test_new_weights_count_from_the_next_token_on(folder, engine):
    own = EmbeddedEngine(engine_config(folder, "generator.sampling_params.max_generate_length=200"))
    config = ModelConfig.from_dir(folder)
    new = {k: aligned(v) for k, v in to_hf_tensors(sharp_params(config, 9), config, "float32").items()}
    params = SamplingParams(temperature=1.0, max_tokens=200, stop=())
    swapped = threading.Event()

    def swap():
        while own.stats()["generated_tokens"] < 8 and not swapped.wait(0.001):
            continue
        own.pause()
        own.apply_weights(new, 5)
        for array in new.values():
            array[:] = 0  # the caller's memory is reused; the engine must have copied
        own.resume()
        swapped.set()

    async def main():
        thread = threading.Thread(target=swap)
        thread.start()
        async with own.session(0) as session:
            ids = prompt(own, 3)
            generation = await session.generate(ids, params, 1)
            return ids, generation, await asyncio.to_thread(thread.join, 60)

    ids, generation, _ = asyncio.run(main())
    assert [span[0] for span in generation.spans] == [0, 5]
    assert own.version == 5
    start = generation.spans[1][1]
    assert generation.spans == [(0, 0, start), (5, start, len(generation.output_ids))]

    async def rest():  # the same continuation, with the new weights from the start
        async with own.session(0) as session:
            left = SamplingParams(temperature=1.0, max_tokens=len(generation.output_ids) - start, stop=())
            return await session.generate(ids + generation.output_ids[:start], left, 1)

    rest_of_it = asyncio.run(rest())
    assert rest_of_it.output_ids == generation.output_ids[start:]
    np.testing.assert_allclose(rest_of_it.logprobs, generation.logprobs[start:], atol=1e-4)
    own.close()


def test_weights_that_do_not_fit_are_refused_and_the_old_ones_stay(engine):
    config = model_config(engine.model_config.vocab_size, intermediate_size=80)
    wrong = {k: np.array(v) for k, v in to_hf_tensors(sharp_params(config, 9), config, "float32").items()}
    before = asyncio.run(play(engine, 2, turns=2))
    with pytest.raises(EngineError, match="mlp"):
        engine.apply_weights(wrong, 3)
    assert engine.version == 0
    assert asyncio.run(play(engine, 2, turns=2)) == before
    names = {spec.name for spec in engine.manifest()}
    assert names == set(wrong)


def test_requests_that_cannot_be_served_are_refused(engine):
    async def ask(ids, params=PARAMS):
        async with engine.session(0) as session:
            await session.generate(ids, params, 0)

    for ids, message in (([], "0 input tokens"), ([1] * engine.max_context, "input tokens"), ([10**6], "vocabulary")):
        with pytest.raises(EngineError, match=message):
            asyncio.run(ask(ids))
    with pytest.raises(EngineError, match="max_tokens"):
        asyncio.run(ask([1], SamplingParams(max_tokens=0)))


def test_the_context_bounds_a_turn(engine):
    async def main():
        async with engine.session(0) as session:
            return await session.generate([7] * (engine.max_context - 5), SamplingParams(max_tokens=64, stop=()), 0)

    generation = asyncio.run(main())
    assert len(generation.output_ids) == 5
    assert generation.finish_reason == "length"


def test_cancelled_and_aborted_turns_free_their_places(engine):
    long = SamplingParams(temperature=1.0, max_tokens=60, stop=())

    async def main():
        async def turn(order):
            async with engine.session(order) as session:
                return await session.generate(prompt(engine, order), long, 0)

        engine.pause()
        jobs = [asyncio.ensure_future(turn(i)) for i in range(3)]
        await asyncio.sleep(0.05)
        jobs[0].cancel()
        with pytest.raises(asyncio.CancelledError):
            await jobs[0]
        aborted = await asyncio.to_thread(engine.abort)
        engine.resume()
        return aborted, [(await job).finish_reason for job in jobs[1:]]

    assert asyncio.run(main()) == (2, ["abort", "abort"])
    assert engine.stats()["sessions"] == 0
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
