"""What every engine must do, whichever computes: called by the tests of each with a running engine.

`engine` serves a small model with a chat template, in float32, with a context of a few hundred tokens.
"""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import pytest

from rollout.engine.base import Engine, EngineError
from rollout.types import Generation, SamplingParams

PARAMS = SamplingParams(temperature=1.0, max_tokens=18, stop=("</sql>", "</solution>"))


def prompt(engine: Any, number: int) -> list[int]:
    ids: list[int] = engine.chat.prompt_ids([{"role": "user", "content": f"city {number}"}])
    return ids


def generate(engine: Engine, ids: list[int], params: SamplingParams, seed: int = 0) -> Generation:
    """One turn in a session of its own."""

    async def turn() -> Generation:
        async with engine.session(0) as session:
            return await session.generate(ids, params, seed)

    return asyncio.run(turn())


def stops_at_the_token_that_completes_a_stop_string(
    engine: Any, free: Generation, again: Callable[..., Generation]
) -> None:
    """`free` has at least 12 tokens without stop strings; again(stop) generates the same with them."""
    ids = free.output_ids
    assert len(ids) == len(free.logprobs) >= 12
    for start, length in ((1, 2), (3, 2), (6, 4), (9, 1)):
        text = engine.chat.decode(ids[start : start + length])
        stopped = again(("never", text))
        end = next(n for n in range(1, len(ids) + 1) if text in engine.chat.decode(ids[:n]))
        assert stopped.finish_reason == "stop"
        assert stopped.output_ids == ids[:end]
        np.testing.assert_allclose(stopped.logprobs, free.logprobs[:end], atol=1e-4)
        assert stopped.spans == [(engine.version, 0, end)]


def scores_given_tokens_as_it_sampled_them(engine: Any) -> None:
    greedy = SamplingParams(temperature=0.0, max_tokens=18, stop=())
    free = generate(engine, prompt(engine, 3), greedy)
    ids = prompt(engine, 3) + free.output_ids
    first, second = engine.score([ids, ids[:5]])
    assert (len(first), len(second)) == (len(ids) - 1, 4)
    np.testing.assert_allclose(first[-len(free.output_ids) :], free.logprobs, atol=1e-4)
    np.testing.assert_allclose(second, first[:4], atol=1e-4)
    assert generate(engine, prompt(engine, 3), greedy).output_ids == free.output_ids
    with pytest.raises(EngineError, match="vocabulary"):
        engine.score([[1, 10**6]])


def refuses_what_it_cannot_serve(engine: Any) -> None:
    for ids, message in (([], "0 input tokens"), ([1] * engine.max_context, "input tokens"), ([10**6], "vocabulary")):
        with pytest.raises(EngineError, match=message):
            generate(engine, ids, PARAMS)
    with pytest.raises(EngineError, match="max_tokens"):
        generate(engine, [1], SamplingParams(max_tokens=0))


def bounds_a_turn_by_the_context(engine: Any) -> None:
    generation = generate(engine, [7] * (engine.max_context - 5), SamplingParams(max_tokens=64, stop=()))
    assert len(generation.output_ids) == 5
    assert generation.finish_reason == "length"
    last = generate(engine, [7] * (engine.max_context - 1), SamplingParams(max_tokens=64, stop=()))
    assert len(last.output_ids) == 1


def frees_the_places_of_cancelled_and_aborted_turns(engine: Any) -> None:
    long = SamplingParams(temperature=1.0, max_tokens=60, stop=())

    async def main() -> tuple[int, list[str]]:
        async def turn(order: int) -> Generation:
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
    assert engine.stats()["sessions"] == engine.stats()["active"] == 0
    assert generate(engine, prompt(engine, 0), PARAMS).output_ids


def goes_on_with_new_weights(
    engine: Any, new: Mapping[str, np.ndarray], version: int, ids: list[int], params: SamplingParams, seed: int = 0
) -> None:
    """A turn long enough is under way when the weights change: its rest is what the new weights alone would say."""
    before = engine.version
    started, swapped = engine.stats()["generated_tokens"], threading.Event()
    fault: list[BaseException] = []

    def swap() -> None:
        while engine.stats()["generated_tokens"] < started + 8 and not swapped.wait(0.001):
            continue
        engine.pause()
        try:
            engine.apply_weights(new, version)
            for array in new.values():
                array[...] = 0  # the caller's memory is reused; the engine must have copied
        except BaseException as error:
            fault.append(error)
        engine.resume()

    async def main() -> Generation:
        thread = threading.Thread(target=swap)
        thread.start()
        try:
            async with engine.session(0) as session:
                return await session.generate(ids, params, seed)
        finally:
            swapped.set()
            await asyncio.to_thread(thread.join, 60)

    generation = asyncio.run(main())
    assert not fault, fault
    assert engine.version == version
    assert [span[0] for span in generation.spans] == [before, version]
    start, total = generation.spans[1][1], len(generation.output_ids)
    assert generation.spans == [(before, 0, start), (version, start, total)]
    left = SamplingParams(params.temperature, params.top_p, total - start, params.stop)
    rest = generate(engine, ids + generation.output_ids[:start], left, seed)
    assert rest.output_ids == generation.output_ids[start:]
    np.testing.assert_allclose(rest.logprobs, generation.logprobs[start:], atol=1e-4)


def keeps_its_weights_when_others_do_not_fit(
    engine: Any, new: Mapping[str, np.ndarray], ending: str = "0.mlp.up_proj.weight"
) -> None:
    """`new` fits; what is made of it and its tensor of that ending here does not."""
    greedy = SamplingParams(temperature=0.0, max_tokens=12, stop=())
    before, version = generate(engine, prompt(engine, 1), greedy), engine.version
    name = next(n for n in new if n.endswith(ending))
    for wrong in (
        {k: v for k, v in new.items() if k != name},
        {**new, "model.layers.0.mlp.side_proj.weight": new[name]},
        {**new, name: new[name][:-1]},
    ):
        with pytest.raises(EngineError, match="mlp"):
            engine.apply_weights(wrong, version + 1)
    assert engine.version == version
    assert generate(engine, prompt(engine, 1), greedy) == before
    assert {spec.name for spec in engine.manifest()} == set(new)
