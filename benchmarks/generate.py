"""How fast the embedded engine generates, as a markdown table.

    python benchmarks/generate.py [--runs 3]

A random 0.92M Qwen2-type model (hidden 128, 4 layers, 4 heads, 2 key/value heads, vocabulary 1024, float32). Two kinds
of work: 64 prompts x 60 tokens, and 256 multi-turn episodes (prompts of 100 tokens shared by 8, four turns of 24 tokens,
observations of 32 tokens in between). "first" includes compiling. The same prompts run through transformers' `generate`
if torch is installed. Only sampled tokens count; the best of the runs is shown, with CPU time beside it, because machines
are seldom quiet.
"""

from __future__ import annotations

import argparse
import asyncio
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

from rollout.engine.embedded import EmbeddedEngine
from rollout.types import SamplingParams
from sqlrl_jax.config_file import load
from sqlrl_jax.data.demo.tokenizer import train_tokenizer
from sqlrl_jax.model.config import ModelConfig
from sqlrl_jax.model.decoder import init_params
from sqlrl_jax.model.hf import save_hf

VOCABULARY = 1024


class Timing(NamedTuple):
    """One run: sampled tokens, seconds on the clock and of CPU."""

    tokens: int
    seconds: float
    cpu: float


def write_model(folder: Path) -> Path:
    """The 0.92M model with random weights; generation speed does not depend on their values."""
    train_tokenizer(["SELECT name FROM city"], folder / "tokenizer", 320)
    config = ModelConfig(
        model_type="qwen2",
        vocab_size=VOCABULARY,
        hidden_size=128,
        intermediate_size=384,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=32,
        tie_word_embeddings=True,
        attention_bias=True,
        max_position_embeddings=1024,
    )
    params = jax.jit(init_params, static_argnums=(0, 1))(config, 0)
    save_hf(folder / "model", params, config, tokenizer_source=folder / "tokenizer")
    return folder / "model"


def prompts(count: int, length: int, seed: int) -> list[list[int]]:
    """Random ids that are no control tokens."""
    return np.random.default_rng(seed).integers(300, VOCABULARY, (count, length)).tolist()


async def single_turns(engine: EmbeddedEngine, count: int, tokens: int) -> None:
    sessions = [engine.session(i) for i in range(count)]
    params = SamplingParams(temperature=1.0, max_tokens=tokens, stop=())

    async def one(i: int, ids: list[int]) -> None:
        async with sessions[i] as session:
            await session.generate(ids, params, i)

    await asyncio.gather(*(one(i, ids) for i, ids in enumerate(prompts(count, 32, 0))))


async def episodes(engine: EmbeddedEngine, count: int) -> None:
    sessions = [engine.session(i) for i in range(count)]
    shared, observations = prompts(count // 8, 100, 1), prompts(count, 32, 2)
    params = SamplingParams(temperature=1.0, max_tokens=24, stop=("</sql>", "</solution>"))

    async def one(i: int) -> None:
        ids = shared[i // 8]
        async with sessions[i] as session:
            for _ in range(4):
                turn = await session.generate(ids, params, i)
                ids = ids + turn.output_ids + observations[i]

    await asyncio.gather(*(one(i) for i in range(count)))


def measure(work: Callable[[], int], runs: int) -> tuple[Timing, Timing]:
    """The first run and the best of those after it."""
    out = []
    for _ in range(runs + 1):
        started, cpu = time.monotonic(), time.process_time()
        tokens = work()
        out.append(Timing(tokens, time.monotonic() - started, time.process_time() - cpu))
    return out[0], min(out[1:], key=lambda t: t.seconds / t.tokens)


def transformers_work(model: Path, count: int, tokens: int) -> Callable[[], int] | None:
    """The same 64 prompts through transformers, or None without torch."""
    try:
        import torch
        from transformers import AutoModelForCausalLM
    except ImportError:
        return None
    peer: Any = AutoModelForCausalLM.from_pretrained(str(model), dtype=torch.float32)
    ids = torch.tensor(prompts(count, 32, 0))

    def work() -> int:
        with torch.inference_mode():
            out = peer.generate(
                ids, attention_mask=torch.ones_like(ids), do_sample=True, min_new_tokens=tokens, max_new_tokens=tokens
            )
        return int(out.shape[0] * (out.shape[1] - ids.shape[1]))

    return work


def row(name: str, first: Timing, best: Timing) -> str:
    return (
        f"| {name} | {best.tokens} | {first.seconds:.1f} | {best.seconds:.2f} | {best.cpu:.2f} "
        f"| {best.tokens / best.seconds:,.0f} |"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=3, help="timed runs after the first one")
    runs = parser.parse_args().runs
    with tempfile.TemporaryDirectory() as folder:
        model = write_model(Path(folder))
        settings = ["trainer.compile_cache=", "generator.max_input_length=900"]  # so that "first" compiles
        config = load(None, [f"trainer.policy.model.path={model}", *settings])
        engine = EmbeddedEngine(config)

        def counted(work: Callable[[], object]) -> Callable[[], int]:
            def run() -> int:
                before = engine.stats()["generated_tokens"]
                work()
                return int(engine.stats()["generated_tokens"] - before)

            return run

        print("| work | sampled tokens | first s | warm s | CPU s | warm tok/s |\n|---|---|---|---|---|---|")
        flat = measure(counted(lambda: asyncio.run(single_turns(engine, 64, 60))), runs)
        print(row("embedded engine, 64 prompts x 60 tokens", *flat), flush=True)
        turns = measure(counted(lambda: asyncio.run(episodes(engine, 256))), runs)
        print(row("embedded engine, 256 episodes of 4 turns", *turns), flush=True)
        engine.close()
        peer = transformers_work(model, 64, 60)
        if peer is not None:
            print(row("transformers generate, 64 prompts x 60 tokens", *measure(peer, runs)))


if __name__ == "__main__":
    main()
