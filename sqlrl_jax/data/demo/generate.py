"""The demo task: generated databases, questions about them, and demonstrations for a supervised cold start.

    python -m sqlrl_jax.data.demo.generate --out data/demo

writes train.jsonl, heldout.jsonl, demonstrations.jsonl and databases/<db_id>/<db_id>.sqlite, and prints how far guessing
and looking get. The three sets of databases are disjoint. Everything follows from the parameters: the same ones give
the same lines. What is asked and hidden is in demo_schema.py and demo_questions.py; who plays, in demo_script.py.
"""

from __future__ import annotations

import argparse
import json
import random
import shutil
import sqlite3
import sys
import tempfile
from collections import Counter
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from rollout.types import Task
from sqlrl_jax.config import DemoConfig
from sqlrl_jax.data.demo.questions import KINDS, Question, draw_kind, draw_question
from sqlrl_jax.data.demo.schema import Database, build, make_database
from sqlrl_jax.data.demo.script import Episode, Player, Rows, play, run_query
from sqlrl_jax.data.tasks import DataError, read_tasks, write_tasks

FORMAT = 6  # raise it when the same parameters give other data
MARKER = "complete.json"
MAX_TURNS = 5
DRAWS = 20
MAX_CELL = 10
SETS = ("train", "heldout", "demonstrations")


@dataclass(frozen=True)
class Parameters:
    """All that decides what is generated. `look` is the share of careful decisions in demonstrations."""

    seed: int
    train_databases: int
    heldout_databases: int
    questions_per_database: int
    demonstration_databases: int = 0
    look: float = 0.4
    spelled: float = 0.6
    renamed: float = 0.5
    demonstrations_hide: float = 0.8  # in place of both: what is found by looking must be seen often to be learned
    format: int = FORMAT


@dataclass
class Item:
    """A question with its database and the connection that answers it."""

    task: Task
    database: Database
    question: Question
    connection: sqlite3.Connection
    gold: Rows


def items(parameters: Parameters, split: str) -> Iterator[Item]:
    """All questions of one set, in order. The connection lives until the next database."""
    counts = {
        "train": parameters.train_databases,
        "heldout": parameters.heldout_databases,
        "demonstrations": parameters.demonstration_databases,
    }
    for index in range(counts[split]):
        db_id = f"{split}_{index:05d}"
        rng = random.Random(f"{parameters.seed}/{split}/{index}")
        spelled, renamed = parameters.spelled, parameters.renamed
        if split == "demonstrations":
            spelled = renamed = parameters.demonstrations_hide
        database = make_database(db_id, rng, spelled=spelled, renamed=renamed)
        connection = build(database)
        seen: set[str] = set()
        while len(seen) < parameters.questions_per_database:
            kind = draw_kind(rng)
            for _ in range(DRAWS):  # a kind that a database has no more questions of gives way to another
                question = draw_question(database, kind, rng)
                gold = _answer(database, question, connection)
                if gold is not None and question.text() not in seen:
                    seen.add(question.text())
                    yield Item(_task(database, question, f"{db_id}-{len(seen)}"), database, question, connection, gold)
                    break
        connection.close()


def _answer(database: Database, question: Question, connection: sqlite3.Connection) -> Rows | None:
    """The gold rows, or None for a question to be left out.

    Left out are nothing, NULL and 0, which a query that misses gives too, and averages of many digits, which cost tokens.
    """
    gold, _ = run_query(connection, question.gold(database.parent))
    return None if not gold or gold[0][0] in (None, 0) or len(str(gold[0][0])) > MAX_CELL else gold


def same(rows: Rows, gold: Rows) -> bool:
    """Equal as multisets: what the environment's grader says of the few forms of answers that scripts give."""
    return Counter(rows) == Counter(gold)


def _task(database: Database, question: Question, task_id: str) -> Task:
    fields: dict[str, Any] = {
        "db_id": database.db_id,
        "question": question.text(),
        "gold_sql": question.gold(database.parent),
        "evidence": "",
        "schema": database.prompt_schema,
        "hidden": question.hidden(),
    }
    return Task(task_id, question.kind, fields)


def generate(
    out_dir: str | Path,
    *,
    seed: int,
    train_databases: int,
    heldout_databases: int,
    questions_per_database: int,
    demonstrations: bool = True,
    demonstration_databases: int = 4000,
    look: float = 0.4,
) -> Path:
    """Writes the task into `out_dir` unless a complete one with the same parameters is there; returns `out_dir`.

    A folder with other parameters is replaced only if it holds nothing but a generated task. The new folder is built
    beside it and renamed, so a reader never sees half of it. Raises DataError.
    """
    parameters = Parameters(
        seed=seed,
        train_databases=train_databases,
        heldout_databases=heldout_databases,
        questions_per_database=questions_per_database,
        demonstration_databases=demonstration_databases if demonstrations else 0,
        look=look,
    )
    out = Path(out_dir)
    if out.exists() and any(out.iterdir()):
        if _holds(out, parameters):
            return out
        _refuse_foreign(out)
    out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{out.name}.", dir=out.parent) as beside:
        part = Path(beside, "part")
        part.mkdir()
        for split in SETS:
            write_tasks(part / f"{split}.jsonl", _write_set(parameters, split, part / "databases"))
        (part / MARKER).write_text(json.dumps(asdict(parameters), indent=1) + "\n", encoding="utf-8")
        if out.exists():
            shutil.rmtree(out)
        part.rename(out)
    return out


def ensure(demo: DemoConfig) -> Path:
    """The task that a run's configuration asks for, generated if it is not there; demonstrations are left out."""
    return generate(
        demo.directory,
        seed=demo.seed,
        train_databases=demo.train_databases,
        heldout_databases=demo.heldout_databases,
        questions_per_database=demo.questions_per_database,
        demonstrations=False,
    )


def _write_set(parameters: Parameters, split: str, root: Path) -> Iterator[Task]:
    """Yields the tasks of one set, writing each database when its first question comes."""
    player = Player.mixed(parameters.look)
    for item in items(parameters, split):
        path = root / item.database.db_id / f"{item.database.db_id}.sqlite"
        if not path.exists():
            path.parent.mkdir(parents=True)
            path.write_bytes(item.connection.serialize())
        if split != "demonstrations":
            yield item.task
            continue
        rng = random.Random(f"{parameters.seed}/play/{item.task.id}")
        episode = play(item.database, item.question, item.connection, player, rng)
        yield Task(item.task.id, item.task.source, {**item.task.fields, "actions": episode.actions})


def _marker(out: Path) -> dict[str, Any] | None:
    try:
        value = json.loads((out / MARKER).read_text(encoding="utf-8"))
    except (OSError, json.JSONDecodeError):
        return None
    return value if isinstance(value, dict) else None


def _holds(out: Path, parameters: Parameters) -> bool:
    """Whether the folder has what is asked for. Demonstrations that nobody asked for do no harm."""
    there, wanted = _marker(out), asdict(parameters)
    if there is not None and not parameters.demonstration_databases:
        for key in ("demonstration_databases", "look"):
            there[key] = wanted[key]
    return there == wanted


def _refuse_foreign(out: Path) -> None:
    known = {MARKER, "databases", *(f"{split}.jsonl" for split in SETS)}
    foreign = sorted(p.name for p in out.iterdir() if p.name not in known)
    if foreign or _marker(out) is None:
        what = f"{foreign[0]}, which is not part of it" if foreign else f"no readable {MARKER}"
        raise DataError(f"{out}: cannot replace this folder by a generated demo task: it holds {what}; choose another")


def prompt_text(task: Task) -> str:
    """What the environment's `short` style asks."""
    return f"{task.fields['schema']}\n{task.fields['question']}"


def observation_text(text: str, turns_left: int) -> str:
    """An observation as it stands in the episode."""
    reminder = f"<reminder>You have {turns_left} turns left to complete the task.</reminder>"
    return f"\n\n<observation>{text}\n{reminder}</observation>\n\n"


def response_text(episode: Episode) -> str:
    """A scripted episode as one text, observations included."""
    text = ""
    for turn, action in enumerate(episode.actions):
        text += action
        if turn < len(episode.observations):
            text += observation_text(episode.observations[turn], MAX_TURNS - turn - 1)
    return text


def corpus(parameters: Parameters) -> Iterator[str]:
    """Prompts and responses of the demonstrations: what the tokenizer is trained on."""
    player = Player.mixed(parameters.look)
    for item in items(parameters, "demonstrations"):
        yield prompt_text(item.task)
        rng = random.Random(f"{parameters.seed}/play/{item.task.id}")
        yield response_text(play(item.database, item.question, item.connection, player, rng))


def accuracy(parameters: Parameters, split: str, player: Player) -> dict[str, float]:
    """Share of right answers of a scripted player, by kind and over `all`."""
    right: Counter[str] = Counter()
    count: Counter[str] = Counter()
    for item in items(parameters, split):
        rng = random.Random(f"{parameters.seed}/accuracy/{item.task.id}")
        episode = play(item.database, item.question, item.connection, player, rng)
        rows, _ = run_query(item.connection, episode.solution)
        for kind in (item.question.kind, "all"):
            count[kind] += 1
            right[kind] += same(rows, item.gold)
    return {kind: right[kind] / count[kind] for kind in (*KINDS, "all") if count[kind]}


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m sqlrl_jax.data.demo.generate", description="Generate the demo task."
    )
    parser.add_argument("--out", required=True, help="folder to write; replaced if it holds an older demo task")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--train-databases", type=int, default=400)
    parser.add_argument("--heldout-databases", type=int, default=40)
    parser.add_argument("--demonstration-databases", type=int, default=4000)
    parser.add_argument("--questions-per-database", type=int, default=8)
    parser.add_argument("--look", type=float, default=0.4, help="share of careful decisions in demonstrations")
    parser.add_argument("--tokenizer", default="", help="also train the demo tokenizer and write it to this folder")
    args = vars(parser.parse_args(arguments))
    out, tokenizer_dir = Path(args.pop("out")), args.pop("tokenizer")
    try:
        generate(out, **args)
    except DataError as error:
        sys.exit(str(error))
    parameters = Parameters(**args)
    tokenizer = None
    if tokenizer_dir:
        from sqlrl_jax.data.demo.tokenizer import train_tokenizer

        tokenizer = train_tokenizer(corpus(parameters), tokenizer_dir)
    print(f"{out}: " + ", ".join(f"{len(read_tasks(out / f'{s}.jsonl'))} {s}" for s in SETS))
    _print_table(parameters, tokenizer)


def _print_table(parameters: Parameters, tokenizer: Any) -> None:
    """By kind on held-out questions: scripted players' accuracy, and lengths in tokens of prompts and expert episodes."""
    players = {"guess": Player.guesser(), "mixed": Player.mixed(parameters.look), "expert": Player.expert()}
    table = {name: accuracy(parameters, "heldout", player) for name, player in players.items()}
    counts: Counter[str] = Counter()
    lengths: Counter[tuple[str, str]] = Counter()
    for item in items(parameters, "heldout"):
        for kind in (item.question.kind, "all"):
            counts[kind] += 1
            for name in ("mixed", "expert"):
                rng = random.Random(f"{parameters.seed}/length/{item.task.id}")
                episode = play(item.database, item.question, item.connection, players[name], rng)
                lengths[kind, name] += len(tokenizer.encode(response_text(episode))) if tokenizer else 0
            lengths[kind, "prompt"] += len(tokenizer.encode(prompt_text(item.task))) if tokenizer else 0
    print("kind    questions  guess  mixed  expert | tokens: prompt, mixed episode, expert episode (without prompt)")
    for kind, count in counts.most_common():
        right = "  ".join(f"{table[name].get(kind, 0):5.1%}" for name in players)
        tokens = "  ".join(f"{lengths[kind, name] / count:6.1f}" for name in ("prompt", "mixed", "expert"))
        print(f"{kind:7} {count:9}  {right} | {tokens if tokenizer else 'give --tokenizer to count'}")


if __name__ == "__main__":
    main()
