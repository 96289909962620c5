"""A made-up run folder, as the trainer writes one, for the tests of the report: accuracy rises over its steps."""

from __future__ import annotations

import json
import math
import random
from pathlib import Path
from typing import Any

from sqlrl_jax import config_file

SOURCES = ("aggregate", "join", "look up a value", "repair", "tie")


def turn(action: str, status: str, sql: str = "", observation: str = "") -> dict[str, Any]:
    return {"action": action, "sql": sql, "status": status, "observation": observation, "tokens": 40, "seconds": 0.2}


def good_turns(city: str) -> list[dict[str, Any]]:
    look = "SELECT DISTINCT city FROM stores LIMIT 10"
    broken = f"SELECT COUNT(*) FROM sales JOIN stores ON sales.store = stores.id WHERE city = '{city.upper()}'"
    fixed = f"SELECT COUNT(*) FROM sales AS s JOIN stores AS t ON s.store_id = t.id WHERE t.city = '{city.upper()}'"
    return [
        turn(f"<think>How is {city} spelled in this database? I look first.</think>\n<sql>{look}</sql>", "ok", look,
             f"\n<observation>\ncity\n{city.upper()}\nLYON\nOSLO\n(3 rows)\n</observation>\n"
             "<reminder>You have 4 turns left.</reminder>\n"),
        turn(f"<think>Upper case. Now count the sales.</think>\n<sql>{broken}</sql>", "error", broken,
             "\n<observation>\nError: no such column: sales.store\n</observation>\n"),
        turn(f"<think>The column is store_id.</think>\n<sql>{fixed}</sql>", "ok", fixed,
             "\n<observation>\nCOUNT(*)\n42\n</observation>\n"),
        turn(f"<think>That answers it.</think>\n<solution>{fixed}</solution>", "solution", fixed),
    ]  # fmt: skip


def guess(city: str) -> list[dict[str, Any]]:
    sql = f"SELECT COUNT(*) FROM sales WHERE city = '{city}'"
    return [turn(f"<think>Count them.</think>\n<solution>{sql}</solution>", "solution", sql)]


def episode(
    kind: str, step: int, number: int, outcome: str, turns: list[dict[str, Any]] | None = None
) -> dict[str, Any]:
    city = ("Bergen", "Gdansk", "Porto", "Turku")[number % 4]
    reason = {"malformed": "length", "overflow": "overflow"}.get(outcome, "solution")
    if turns is None:
        turns = good_turns(city) if outcome == "correct" else guess(city)
    return {
        "kind": kind, "step": step, "db_id": f"shops_{number % 7}",
        "question": f"How many sales were made in {city}? ({number})",
        "gold_sql": "SELECT COUNT(*) FROM sales AS s JOIN stores AS t ON s.store_id = t.id WHERE t.city = 'X'",
        "evidence": "", "task_id": f"q{number:03d}", "source": SOURCES[number % 5], "sample": 0, "prompt_ids": [1] * 50,
        "response_ids": [2] * 50, "loss_mask": [1] * 50, "logprobs": [-0.5] * 50, "spans": [[step, 0, 50]],
        "reward": float(outcome == "correct"), "outcome": outcome, "stop_reason": reason, "turns": turns,
        "metrics": {}, "error": "", "prompt": "<|im_start|>user\nCREATE TABLE stores (id, city)\n<|im_end|>",
    }  # fmt: skip


def train_entry(step: int, steps: int, rng: random.Random) -> dict[str, Any]:
    done = step / steps
    right = min(0.97, max(0.0, 0.12 + 0.75 / (1 + math.exp(-9 * (done - 0.4))) + rng.gauss(0, 0.025)))
    left = 1 - right
    shares = {"wrong": 0.55, "malformed": 0.2 * (1 - done), "sql_error": 0.2, "timeout": 0.02, "overflow": 0.03}
    norm = sum(shares.values())
    rollout, update, push = 3.1 + rng.random(), 2.2 + rng.random() / 3, 0.15
    return {
        "kind": "train", "step": step, "time": 1_760_000_000 + 30 + 7.5 * step, "reward/avg_raw_reward": right,
        "generate/episodes": 160.0, "generate/tokens": 31000.0, "generate/tokens_per_second": 7600 + rng.gauss(0, 300),
        "generate/turns": 1.3 + 1.6 * right, "generate/looked_first": min(1.0, 0.25 + 0.7 * right),
        "sql/error_rate": 0.28 - 0.2 * right, "sql/queries": 300.0, "policy/loss": rng.gauss(0, 0.02),
        "policy/grad_norm": 0.3 + 0.2 * rng.random(), "policy/clip_frac": 0.01 + 0.02 * rng.random(),
        "policy/entropy": 0.9 - 0.6 * done, "policy/logprob_diff": 1e-6 * (1 + done),
        "timing/rollout": rollout, "timing/update": update, "timing/push": push,
        "timing/step": rollout + update + push + 0.3 + (4 if step % 10 == 0 else 0),
        "outcome/correct": right, **{f"outcome/{k}": left * v / norm for k, v in shares.items()},
    }  # fmt: skip


def eval_entry(step: int, steps: int, turns: int) -> dict[str, Any]:
    score = 0.11 + (0.78 if turns > 1 else 0.16) / (1 + math.exp(-9 * (step / steps - 0.38)))
    by_source = {f"eval/{s}/avg_score": min(1.0, max(0.0, score + 0.06 * (i - 2))) for i, s in enumerate(SOURCES)}
    return {
        "kind": "eval", "step": step, "time": 1_760_000_029 + 7.5 * step, "max_turns": turns, "eval/questions": 200.0,
        "eval/samples": 1.0, "eval/all/avg_score": score, "eval/all/pass_at_n": score, "eval/turns": 1 + 2 * score,
        "eval/looked_first": min(1.0, 0.2 + 0.8 * score), **by_source, "eval/outcome/correct": score,
        "eval/outcome/wrong": (1 - score) * 0.7, "eval/outcome/sql_error": (1 - score) * 0.3,
    }  # fmt: skip


def make_run(folder: Path, steps: int = 60, questions: int = 40) -> Path:
    """A run whose accuracy rises; the first held-out episodes guess, the last ones look and repair."""
    (folder / "trajectories").mkdir(parents=True)
    settings = ["trainer.train_batch_size=32", "trainer.policy_mini_batch_size=32"]
    config_file.save(config_file.load(None, settings), folder / "config.yaml")
    rng = random.Random(0)
    entries = [eval_entry(0, steps, 5), eval_entry(0, steps, 1)]
    for step in range(1, steps + 1):
        entries.append(train_entry(step, steps, rng))
        if step % 5 == 0:
            entries += [eval_entry(step, steps, 5), eval_entry(step, steps, 1)]
    write_lines(folder / "metrics.jsonl", entries)
    wrong = ("wrong", "sql_error", "malformed")
    before = [episode("eval", 0, n, "correct" if n % 9 == 0 else wrong[n % 3]) for n in range(questions)]
    after = [episode("eval", steps, n, "wrong" if n % 8 == 0 else "correct") for n in range(questions)]
    write_lines(folder / "trajectories" / "eval_000000.jsonl", before)
    write_lines(folder / f"trajectories/eval_{steps:06d}.jsonl", after)
    for step in range(1, steps + 1, 6):
        outcomes = [("correct", *wrong, "overflow")[(n + step) % 5] for n in range(20)]
        lines = [episode("train", step, n, outcome) for n, outcome in enumerate(outcomes)]
        write_lines(folder / f"trajectories/train_{step:06d}.jsonl", lines)
    return folder


def write_lines(path: Path, records: list[dict[str, Any]], tail: str = "") -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(record) + "\n" for record in records) + tail)
