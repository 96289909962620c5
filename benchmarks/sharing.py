"""How many tokens a step computes where what episodes begin with is stored once, on real prompts, as a markdown table.

    python benchmarks/sharing.py --devset DIR --tokenizer DIR [--questions 256] [--rows 32768]

DIR holds questions.jsonl and databases/, a tokenizer is a Hugging Face folder. Prompts are those of a run (instructions,
schema with sampled values, question), for questions drawn at random; the responses are random tokens of lengths around a
mean, so that nothing of them is alike. No model runs. "Blocks met" are the pairs of 512 queries and 512 keys that the
TPU's kernel for shared beginnings visits, of those that a causal mask alone leaves in the rows where nothing is shared.
"""

from __future__ import annotations

import argparse
import math
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import jax.numpy as jnp
import numpy as np

from rollout.chat import Chat, load_tokenizer
from rollout.text2sql import Text2SQL
from rollout.types import Trajectory
from sqlrl_jax.config_file import load
from sqlrl_jax.data.packing import PackedBatch, pack, samples_of
from sqlrl_jax.data.tasks import read_tasks
from sqlrl_jax.model.reach_attention import BLOCK, meeting_blocks

SAMPLES, RESPONSES = (5, 8, 16), (300, 1000)


def prompts(devset: Path, tokenizer: Path, count: int) -> list[list[int]]:
    """Prompt ids of `count` questions."""
    overrides = [f"environment.text2sql.database_root={devset / 'databases'}", f"trainer.policy.model.path={tokenizer}"]
    config = load(None, overrides)
    shared, chat = Text2SQL.open_shared(config), Chat(load_tokenizer(tokenizer))
    tasks = read_tasks(devset / "questions.jsonl")
    chosen = np.random.default_rng(0).permutation(len(tasks))[:count]
    return [chat.prompt_ids(Text2SQL(config, shared).reset(tasks[i])) for i in chosen]


def packed(asked: list[list[int]], samples: int, mean: int, row_tokens: int, share: bool) -> PackedBatch:
    """A step's episodes in rows."""
    rng = np.random.default_rng(1)
    episodes = []
    for question, prompt in enumerate(asked):
        for sample in range(samples):
            length = int(np.clip(rng.lognormal(np.log(mean) - 0.125, 0.5), 20, 3000))
            ids = rng.integers(0, 100_000, length).tolist()
            mask, logprobs = [1] * length, [-1.0] * length
            episodes.append(Trajectory(str(question), "", sample, prompt, ids, mask, logprobs, [], 0.0, "", ""))
    return pack(
        samples_of(episodes, [0.0] * len(episodes), "token_mean"),
        row_tokens=row_tokens,
        rows_per_micro_batch=1,
        slot_multiple=1024,
        share=share,
    )


def blocks_met(batch: PackedBatch) -> int:
    """Pairs of blocks of queries and of keys that see anything of each other, in all rows."""
    reach = np.concatenate([arrays["reach"] for arrays in batch.micro_batches])
    return int(meeting_blocks(jnp.asarray(reach), BLOCK)[0].counts.sum())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--devset", type=Path, required=True)
    parser.add_argument("--tokenizer", type=Path, required=True)
    parser.add_argument("--questions", type=int, default=256)
    parser.add_argument("--rows", type=int, default=32768, help="tokens of a row")
    args = parser.parse_args()
    asked = prompts(args.devset, args.tokenizer, args.questions)
    lengths = [len(ids) for ids in asked]
    print(
        f"{len(asked)} questions, prompts of {min(lengths)} to {max(lengths)} tokens, median {np.median(lengths):.0f}\n"
    )
    columns = "episodes a question|mean response|tokens|of them prompt|stored|rows|rows, nothing shared|blocks met"
    print(f"| {columns.replace('|', ' | ')} |\n{'|---' * (columns.count('|') + 1)}|")
    for samples in SAMPLES:
        for mean in RESPONSES:
            shared, apart = (packed(asked, samples, mean, args.rows, share) for share in (True, False))
            prompt = samples * sum(lengths) / shared.tokens
            causal = len(apart.micro_batches) * math.comb(args.rows // BLOCK + 1, 2)
            print(
                f"| {samples} | {mean} | {shared.tokens:,} | {prompt:.0%} | {shared.stored / shared.tokens:.0%} | "
                f"{len(shared.micro_batches)} | {len(apart.micro_batches)} | {blocks_met(shared) / causal:.0%} |"
            )


if __name__ == "__main__":
    main()
